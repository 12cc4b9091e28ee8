"""Sort slices by position and compute the affine of their stack, or say why they do not form a volume.

All positions are in LPS mm. Irregular steps are never averaged, and a shear is never hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.header import SliceHeader
from featray.ct.regrid import make_upright_grid
from featray.errors import Reason, ScanError, WarningCode

SAME_POSITION_MM = 0.01
"""Slices closer than this along the normal are at the same position."""

STEP_TOLERANCE_MM, STEP_TOLERANCE_FRACTION = 0.01, 0.01
"""A step is regular within the larger of 0.01 mm and 1 % of the median step, because headers are rounded."""

MAX_DRIFT_MM = 0.1
"""Sideways shift from one slice to the next above which the gantry counts as tilted."""

MAX_GAP_SHARE = 0.25
"""Largest share of irregular steps at which whole multiples of the median step count as missing slices."""

GAP_FACTOR = 1.5
"""A step this many times larger than both its neighbors is a gap, even among irregular steps."""

MAX_TILT_SLOPE = 1.0
"""Sideways shift per mm along the normal from which a tilt is refused.

1 corresponds to 45 degrees; gantries tilt by up to 30 degrees.
"""


@dataclass(frozen=True)
class SliceStack:
    """Order and geometry of the slices of one volume.

    Attributes:
        order: Indices into the slices given, first slice first.
        affine_lps: 4x4, maps a voxel index (x, y, z, 1) to LPS mm. z grows along
            cross(row direction, column direction).
        origins_lps: (n, 3) LPS mm of the first voxel of each slice in `order`, if the slices must be
            resampled onto the grid of the affine; None if they lie on it.
        warnings: `gantry_tilt` and `resampled_steps`, each if it was accepted and is present.
    """

    order: list[int]
    affine_lps: geometry.Affine
    origins_lps: NDArray[np.float64] | None = None
    warnings: tuple[str, ...] = ()


def build_stack(
    slices: Sequence[SliceHeader], *, resample_tilt: bool = False, resample_steps: bool = False
) -> SliceStack:
    """Return order and affine of slices that have passed `check_same_grid`.

    Args:
        slices: Headers with one orientation, pixel spacing and matrix size, in any order.
        resample_tilt: Accept slices that shift sideways (tilted gantry).
        resample_steps: Accept slices at irregular steps. Missing slices are never accepted.

    Raises:
        ScanError: `not_a_volume` (fewer than two positions), `duplicate_slices`, `gantry_tilt`,
            `missing_slices`, `irregular_spacing`, or `unreadable` for impossible geometry.
    """
    order, distances = _sort_along_normal(slices)
    if len(order) < 2 or distances[-1] - distances[0] < SAME_POSITION_MM:
        raise ScanError(Reason.NOT_A_VOLUME, f"{len(order)} image(s) at one position make no volume")
    positions = _get_positions([slices[i] for i in order])
    steps = np.diff(distances)
    _check_duplicates(steps)
    is_tilted = _check_tilt(positions, steps, slices[0], accept=resample_tilt)
    is_uneven = _check_steps(steps, [slices[i].instance_number for i in order], accept=resample_steps)
    affine = _compute_affine(slices[0], positions)
    if not is_tilted and not is_uneven:
        return SliceStack(order, affine)
    accepted = {Reason.GANTRY_TILT.value: is_tilted, WarningCode.RESAMPLED_STEPS.value: is_uneven}
    warnings = tuple(code for code, is_present in accepted.items() if is_present)
    return SliceStack(order, make_upright_grid(affine, positions), positions, warnings)


def find_same_positions(slices: Sequence[SliceHeader]) -> list[list[int]]:
    """Return groups of two or more slices at the same position, as indices into `slices`."""
    order, distances = _sort_along_normal(slices)
    edges = np.flatnonzero(np.diff(distances) >= SAME_POSITION_MM) + 1
    return [group.tolist() for group in np.split(np.array(order), edges) if len(group) > 1]


def project_on_normal(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the position of each slice along the normal of the first slice, in mm."""
    return np.asarray(_get_positions(slices) @ _compute_normal(slices[0]))


def check_same_grid(slices: Sequence[SliceHeader]) -> None:
    """Raise ScanError unless all slices have the same orientation, pixel spacing and matrix size.

    Position, orientation and pixel spacing are required. If no slice has them the reason is `not_a_volume`,
    if only some slices have them it is `unreadable`. Slices of several time points or stacks are refused as
    `duplicate_slices`, unless no two slices have the same one.
    """
    placed = [s for s in slices if s.position and s.orientation and s.spacing_yx]
    if not placed:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            "no slice has ImagePositionPatient, ImageOrientationPatient and PixelSpacing",
        )
    if len(placed) < len(slices):
        incomplete = next(s for s in slices if s not in placed)
        raise ScanError(
            Reason.UNREADABLE,
            f"{incomplete.file_name}: ImagePositionPatient, ImageOrientationPatient or PixelSpacing missing",
        )
    _check_direction_cosines(placed[0])
    if len({(s.rows, s.columns) for s in placed}) > 1:
        raise ScanError(Reason.NOT_A_VOLUME, "slices with different Rows x Columns in one series")
    for field, keyword in (("orientation", "ImageOrientationPatient"), ("spacing_yx", "PixelSpacing")):
        values = np.array([getattr(s, field) for s in placed])
        if np.abs(values - values[0]).max() > 1e-3:
            raise ScanError(Reason.NOT_A_VOLUME, f"slices with different {keyword} in one series")
    for field, noun in (("temporal_position", "time points"), ("stack_id", "stacks")):
        distinct = {getattr(s, field) for s in placed}
        if 1 < len(distinct) < len(placed):
            raise ScanError(
                Reason.DUPLICATE_SLICES, f"{len(distinct)} {noun} in one image; split them into series"
            )


def _sort_along_normal(slices: Sequence[SliceHeader]) -> tuple[list[int], NDArray[np.float64]]:
    """Return the order of slices along their normal and their sorted distances along it in mm.

    Only ImagePositionPatient decides: file names, InstanceNumber and SliceLocation are often wrong.
    """
    distances = project_on_normal(slices)
    order = np.argsort(distances, kind="stable")
    return order.tolist(), distances[order]


def _check_direction_cosines(header: SliceHeader) -> None:
    row, column = _get_directions(header)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: ImageOrientationPatient is not a pair of perpendicular unit vectors",
        )


def _get_positions(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the positions of the first voxels, (n, 3) LPS mm."""
    return np.array([header.position for header in slices], dtype=np.float64)


def _get_directions(header: SliceHeader) -> NDArray[np.float64]:
    """Return the directions of growing column and of growing row index, (2, 3), not normalized."""
    return np.reshape(header.orientation or (), (2, 3))


def _compute_normal(header: SliceHeader) -> NDArray[np.float64]:
    """Return the unit vector cross(row direction, column direction) in LPS."""
    row, column = _get_directions(header)
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal))


def _check_duplicates(steps: NDArray[np.float64]) -> None:
    duplicates = int(np.count_nonzero(steps < SAME_POSITION_MM))
    if duplicates:
        raise ScanError(
            Reason.DUPLICATE_SLICES,
            f"{duplicates} slice(s) have the position of another slice but other pixels (two reconstructions "
            "or time points in one series?); give each its own folder and SeriesInstanceUID",
        )


def _check_tilt(
    positions: NDArray[np.float64], steps: NDArray[np.float64], header: SliceHeader, *, accept: bool
) -> bool:
    """Return whether slices shift sideways, either from one to the next or slowly over the whole scan.

    Raises:
        ScanError: `gantry_tilt` if they do and `accept` is false or the tilt is 45 degrees or more.
    """
    drift = np.diff(positions, axis=0) - steps[:, None] * _compute_normal(header)
    largest = float(np.linalg.norm(drift, axis=1).max())
    total = float(np.linalg.norm(drift.sum(axis=0)) / steps.sum())
    if largest <= MAX_DRIFT_MM and total <= np.sin(np.radians(geometry.SHEAR_DEGREES)):
        return False
    if accept and total < MAX_TILT_SLOPE and (np.linalg.norm(drift, axis=1) < MAX_TILT_SLOPE * steps).all():
        return True
    raise ScanError(
        Reason.GANTRY_TILT,
        f"slices shift sideways by up to {largest:.2f} mm per step (tilted gantry?); "
        "set policy.gantry_tilt: resample to resample tilts below 45 degrees onto an upright grid",
    )


def _check_steps(steps: NDArray[np.float64], numbers: list[int | None], *, accept: bool) -> bool:
    """Return whether the steps between slices are irregular.

    Raises:
        ScanError: `missing_slices`, or `irregular_spacing` if no slices are missing and `accept` is false.
    """
    median = float(np.median(steps))
    is_irregular = np.abs(steps - median) > max(STEP_TOLERANCE_MM, STEP_TOLERANCE_FRACTION * median)
    if median > geometry.MAX_SPACING_MM:
        raise ScanError(Reason.MISSING_SLICES, f"slices are {median:.1f} mm apart")
    if not is_irregular.any():
        return False
    has_gaps = (
        _has_number_jumps(steps, numbers)
        or _has_multiples(steps, median, is_irregular)
        or (accept and _has_gaps(steps))
    )
    if accept and not has_gaps:
        return True
    advice = (
        "copy the series again" if has_gaps else "set policy.irregular_spacing: resample to accept such steps"
    )
    raise ScanError(
        Reason.MISSING_SLICES if has_gaps else Reason.IRREGULAR_SPACING,
        f"{int(is_irregular.sum())} of {len(steps)} steps between slices differ from the median "
        f"{median:.3f} mm ({steps.min():.3f} to {steps.max():.3f} mm); {advice}",
    )


def _has_number_jumps(steps: NDArray[np.float64], numbers: list[int | None]) -> bool:
    """Return whether steps are proportional to jumps of InstanceNumber, so that slices are missing."""
    if None in numbers:
        return False
    jumps = np.diff(np.array(numbers, dtype=np.float64))
    if (jumps == 0).any() or len(set(np.abs(jumps))) == 1:
        return False
    per_number = steps / jumps
    tolerance = STEP_TOLERANCE_MM + STEP_TOLERANCE_FRACTION * abs(np.median(per_number))
    return bool(np.ptp(per_number) <= tolerance)


def _has_multiples(steps: NDArray[np.float64], median: float, is_irregular: NDArray[np.bool_]) -> bool:
    """Return whether few steps are irregular and all of these are whole multiples of the median step."""
    ratios = steps[is_irregular] / median
    is_whole = np.abs(ratios - np.round(ratios)) <= STEP_TOLERANCE_FRACTION * np.round(ratios)
    return bool(is_irregular.mean() <= MAX_GAP_SHARE and is_whole.all() and (ratios > 1.5).all())


def _has_gaps(steps: NDArray[np.float64]) -> bool:
    """Return whether a step is too large to interpolate.

    Such a step is `GAP_FACTOR` times larger than both its neighbors, or above `geometry.MAX_SPACING_MM`.
    """
    if len(steps) < 2:
        return False
    before, after = np.r_[0, steps[:-1]], np.r_[steps[1:], 0]
    is_gap = steps > GAP_FACTOR * np.maximum(before, after)
    return bool(is_gap.any() or steps.max() > geometry.MAX_SPACING_MM)


def _compute_affine(header: SliceHeader, positions: NDArray[np.float64]) -> geometry.Affine:
    """Return the affine of slices at `positions` ((n, 3) LPS mm, sorted).

    Its third column is the vector from the first to the last slice divided by the number of steps, so it
    contains any shear.
    """
    row, column = _get_directions(header)
    between_rows, between_columns = header.spacing_yx or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = row / np.linalg.norm(row) * between_columns
    affine[:3, 1] = column / np.linalg.norm(column) * between_rows
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    problem = geometry.find_affine_problem(affine)
    if problem:
        raise ScanError(Reason.UNREADABLE, problem)
    return affine
