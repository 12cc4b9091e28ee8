"""Test that resampling of tilted, unevenly spaced and oblique volumes keeps positions in the patient."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.ct.formats.voxel_data import convert_to_shifted_slices
from featray.ct.regrid import (
    compute_axes_size,
    compute_upright_size,
    make_upright_grid,
    resample_to_axes,
    resample_upright,
)
from featray.ct.reorient import reorient
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

WINDOW = (-1000.0, 1000.0)
LESION = np.array([6.0, -4.0, 9.0])
"""Center of the lesion in LPS mm."""

EVEN = list(range(-30, 34, 3))
UNEVEN = [*range(-30, 0, 3), *np.arange(0, 33, 4.4)]


def make_patient() -> sitk.Image:
    """Return a smooth sphere of 900 HU, 12 mm wide, in air, on a fine upright grid."""
    z, y, x = np.meshgrid(*(np.arange(-50, 50.5, 1.0) for _ in range(3)), indexing="ij")
    squared = (x - LESION[0]) ** 2 + (y - LESION[1]) ** 2 + (z - LESION[2]) ** 2
    image = sitk.GetImageFromArray((-1000 + 1900 * np.exp(-squared / (2 * 6**2))).astype(np.float32))
    image.SetOrigin((-50.0, -50.0, -50.0))
    return image


def resample_with_simpleitk(affine: NDArray[np.float64], shape_zyx: Sequence[int]) -> NDArray[np.float32]:
    """Return the patient on another grid, resampled by SimpleITK."""
    grid = sitk.Image([int(n) for n in shape_zyx[::-1]], sitk.sitkFloat32)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    grid.SetOrigin(affine[:3, 3].tolist())
    grid.SetSpacing(spacing.tolist())
    grid.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return sitk.GetArrayFromImage(
        sitk.Resample(make_patient(), grid, sitk.Transform(), sitk.sitkLinear, -1000.0)
    )


def make_rotation(degrees: float, axis: int = 0) -> NDArray[np.float64]:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[[first, second], [first, second]] = cosine
    matrix[second, first], matrix[first, second] = sine, -sine
    return matrix


def make_tilted_scan(degrees: float, table_mm: Sequence[float]) -> Volume:
    """Return slices of a gantry tilted about x, at table positions along z; pixels of 0.8 x 0.9 mm."""
    axes = make_rotation(degrees) @ np.diag([0.9, 0.8, 1.0])
    origins = np.array([[-27.0, -24.0 * np.cos(np.radians(degrees)), z] for z in table_mm])
    slices = []
    for origin in origins:
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = axes, origin
        slices.append(resample_with_simpleitk(affine, (1, 60, 60))[0])
    sheared = np.eye(4)
    sheared[:3, :2] = axes[:, :2]
    sheared[:3, 2] = (origins[-1] - origins[0]) / (len(origins) - 1)
    grid = make_upright_grid(sheared, origins)
    return Volume(np.stack(slices), grid, slice_origins_lps=origins)


def find_lesion_lps(volume: Volume) -> NDArray[np.float64]:
    """Return the position of the lesion in LPS mm: the center of mass of the bright voxels."""
    weights = np.clip(volume.voxels_zyx.astype(np.float64) + 500, 0, None)
    z, y, x = (np.average(np.indices(weights.shape)[axis], weights=weights) for axis in range(3))
    return np.asarray((volume.affine_lps @ (x, y, z, 1))[:3])


def find_covered_voxels(volume: Volume) -> NDArray[np.bool_]:
    """Return a mask of the resampled voxels that depend on source voxels only and not on the fill value."""
    ones = np.ones(volume.voxels_zyx.shape, np.float32)
    marked = replace(volume, voxels_zyx=ones)
    resampled = (
        resample_upright(marked, (0, 1))
        if volume.slice_origins_lps is not None
        else resample_to_axes(marked, (0, 1))
    )
    return np.asarray(resampled.voxels_zyx > 0.9999)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [20, -20, 0])
@pytest.mark.parametrize("table", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_resampling_keeps_the_position_of_a_lesion_in_mm(degrees: float, table: list[float]) -> None:
    scan = make_tilted_scan(degrees, table)
    result = resample_upright(scan, WINDOW)

    assert np.abs(find_lesion_lps(result) - LESION).max() < 0.5 * min(result.spacing_zyx)
    assert not geometry.is_sheared(result.affine_lps)
    assert result.slice_origins_lps is None


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [20, -20])
def test_an_upright_volume_agrees_with_simpleitk_on_its_grid(degrees: float) -> None:
    scan = make_tilted_scan(degrees, UNEVEN)
    result = resample_upright(scan, WINDOW)
    difference = np.abs(
        result.voxels_zyx - resample_with_simpleitk(result.affine_lps, result.voxels_zyx.shape)
    )

    assert find_covered_voxels(scan).mean() > 0.5
    assert (
        difference[find_covered_voxels(scan)].max() < 120
    )  # of 1900 HU, linear over 4.4 mm in a ball 12 mm wide
    assert difference[find_covered_voxels(scan)].mean() < 4


def test_the_first_and_the_last_slice_lie_on_the_grid_and_are_not_cropped() -> None:
    scan = make_tilted_scan(20, UNEVEN)
    scan = replace(scan, voxels_zyx=np.random.default_rng(0).integers(0, 100, scan.voxels_zyx.shape))
    result = resample_upright(scan, (0, 100))  # a fill value of 0 keeps the sum of a shifted slice

    for index in (0, -1):
        sums = [volume.voxels_zyx[index].sum() for volume in (scan, result)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_tilted_scan_with_a_sheared_affine_gives_the_same_volume(is_reversed: bool) -> None:
    slices = make_tilted_scan(15, EVEN)
    assert slices.slice_origins_lps is not None
    sheared = slices.affine_lps.copy()
    sheared[:3, 2] = slices.slice_origins_lps[1] - slices.slice_origins_lps[0]
    sheared[:3, 3] = slices.slice_origins_lps[0]
    converted = Volume(slices.voxels_zyx, sheared)
    if is_reversed:
        sheared[:3, 3] += (len(slices.voxels_zyx) - 1) * sheared[:3, 2]
        sheared[:3, 2] *= -1
        converted = Volume(slices.voxels_zyx[::-1], sheared)
    volumes = resample_upright(convert_to_shifted_slices(converted), WINDOW), resample_upright(slices, WINDOW)
    actual, expected = (reorient(volume, "LPS") for volume in volumes)
    np.testing.assert_allclose(actual.affine_lps, expected.affine_lps, atol=1e-9)
    np.testing.assert_allclose(actual.voxels_zyx, expected.voxels_zyx, atol=1e-2)


def test_unevenly_spaced_slices_of_a_linear_ramp_give_the_ramp() -> None:
    heights = np.array([0, 1, 2.5, 4, 6, 8.0])
    voxels = np.broadcast_to((10 * heights)[:, None, None], (6, 3, 4)).astype(np.int16)
    sheared = np.diag([1.0, 1, heights[-1] / 5, 1])
    origins = np.array([[0, 0, height] for height in heights])
    scan = Volume(voxels, make_upright_grid(sheared, origins), slice_origins_lps=origins)

    result = resample_upright(scan, None)

    assert result.spacing_zyx == pytest.approx((1.6, 1, 1))
    assert result.voxels_zyx[:, 1, 2] == pytest.approx([0, 16, 32, 48, 64, 80])
    assert result.voxels_zyx.dtype == np.float32


def test_values_are_clipped_before_the_interpolation() -> None:
    voxels = np.stack([np.full((2, 2), value, np.int16) for value in (0, 3000, 0)])
    origins = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 3.0]])
    scan = Volume(voxels, make_upright_grid(np.diag([1, 1, 1.5, 1]), origins), slice_origins_lps=origins)

    assert resample_upright(scan, WINDOW).voxels_zyx[:, 0, 0] == pytest.approx([0, 750, 0])


@pytest.mark.parametrize(("window", "fill"), [(WINDOW, -1000), (None, 7)])
def test_voxels_that_no_slice_covers_have_the_lower_bound_or_the_minimum(window: Any, fill: float) -> None:
    origins = np.array([[0, 0, 0], [4, 0, 2], [8, 0, 4.0]])
    voxels = np.full((3, 2, 5), 7, np.int16)
    voxels[1, 1, 1] = 9
    scan = Volume(voxels, make_upright_grid(np.diag([1.0, 1, 1, 1]), origins), slice_origins_lps=origins)

    result = resample_upright(scan, window).voxels_zyx

    assert result.shape == (3, 2, 13)
    assert result[0].tolist() == [[7] * 5 + [fill] * 8] * 2
    assert result[2].tolist() == [[fill] * 8 + [7] * 5] * 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resampling_to_the_axes_keeps_the_position_of_a_lesion(axis: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = make_rotation(20, axis) @ np.diag([-0.9, 0.8, 1.5])
    affine[:3, 3] = LESION - affine[:3, :3] @ [35, 30, 20]
    scan = Volume(resample_with_simpleitk(affine, (42, 62, 72)), affine)

    result = resample_to_axes(scan, WINDOW)

    assert result.orientation == scan.orientation
    assert result.spacing_zyx == pytest.approx(scan.spacing_zyx)
    assert not geometry.is_oblique(result.affine_lps, degrees=0.01)
    assert np.abs(find_lesion_lps(result) - LESION).max() < 0.4
    difference = np.abs(
        result.voxels_zyx - resample_with_simpleitk(result.affine_lps, result.voxels_zyx.shape)
    )
    assert difference[find_covered_voxels(scan)].max() < 40


def test_the_grid_on_the_patient_axes_contains_every_corner() -> None:
    affine = np.eye(4)
    affine[:3, :3] = make_rotation(20) @ make_rotation(-12, 2)
    scan = Volume(np.zeros((8, 9, 10), np.int16), affine)
    size, result = compute_axes_size(scan), resample_to_axes(scan, None)

    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (9, 8, 7)
    indices_xyz = np.c_[corners, np.ones(8)] @ affine.T @ np.linalg.inv(result.affine_lps).T
    assert result.voxels_zyx.shape == size
    assert indices_xyz[:, :3].min() > -0.01
    assert (indices_xyz[:, :3] < np.array(size[::-1]) - 1 + 0.01).all()


def test_an_upright_volume_is_returned_unchanged() -> None:
    scan = Volume(np.zeros((2, 3, 4), np.int16), np.eye(4))

    assert resample_upright(scan, WINDOW) is scan
    assert resample_to_axes(scan, WINDOW) is scan
    assert compute_upright_size(scan) == compute_axes_size(scan) == (2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [">i2", "u1", "i4", "f4"])
def test_every_dtype_is_accepted(dtype: str) -> None:
    scan = make_tilted_scan(10, EVEN)
    values = np.clip(scan.voxels_zyx, 0, 200).astype(dtype)

    result = resample_upright(replace(scan, voxels_zyx=values), (0, 200)).voxels_zyx

    assert result.max() <= 200
    assert np.abs(result - resample_upright(scan, (0, 200)).voxels_zyx).max() <= 1
    oblique = replace(scan, voxels_zyx=values, slice_origins_lps=None)
    assert 190 < resample_to_axes(oblique, (0.0, 200.5)).voxels_zyx.max() <= 200


def test_a_tilted_uneven_head_is_read_completely_if_both_may_be_resampled(shared_ct: Path) -> None:
    folder = shared_ct / "odd" / "gantry-tilt-variable-step"
    files = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    (series,) = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])
    files = [file for file in files if file[0] in series.files]

    for only in ({"resample_tilt": True}, {"resample_steps": True}):
        with pytest.raises(ScanError) as caught:
            read_series(files, max_voxels=10**9, **only)
        assert caught.value.reason in (Reason.GANTRY_TILT, Reason.IRREGULAR_SPACING)
    scan = read_series(files, max_voxels=10**9, resample_tilt=True, resample_steps=True)
    result = resample_upright(scan, WINDOW)

    assert {"gantry_tilt", "resampled_steps"} <= set(scan.warnings)
    assert scan.voxels_zyx.shape == (28, 512, 512)
    assert result.voxels_zyx.shape == compute_upright_size(scan)
    slices, step = len(result.voxels_zyx), result.spacing_zyx[0]
    assert (slices - 1) * step == pytest.approx(144.1, abs=0.1)
    assert step == pytest.approx(4.0, abs=0.02)
    assert not geometry.is_sheared(result.affine_lps)
