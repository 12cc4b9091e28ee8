"""Test affines (spacing, orientation, obliqueness, shear, problems) and reorienting of volumes."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.reorient import reorient
from featray.ct.volume import Volume

ALL_48 = [
    "".join(letters)
    for pairs in permutations(("LR", "PA", "SI"))
    for letters in product(*pairs)
]  # fmt: skip


def make_affine(
    orientation: str, spacing_xyz: tuple[float, float, float] = (0.5, 1.0, 2.0)
) -> NDArray[np.float64]:
    """Return an affine parallel to the patient axes, built column by column."""
    directions = {
        "L": (1, 0, 0),
        "P": (0, 1, 0),
        "S": (0, 0, 1),
        "R": (-1, 0, 0),
        "A": (0, -1, 0),
        "I": (0, 0, -1),
    }
    affine = np.eye(4)
    for column, letter in enumerate(orientation):
        affine[:3, column] = np.array(directions[letter]) * spacing_xyz[column]
    affine[:3, 3] = (-7.0, 11.0, 13.0)
    return affine


def make_rotated_affine(degrees: float) -> NDArray[np.float64]:
    angle = np.radians(degrees)
    affine = make_affine("LPS", (1.0, 1.0, 1.0))
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


@pytest.mark.parametrize("orientation", ALL_48)
def test_the_orientation_names_the_directions_of_the_affine(orientation: str) -> None:
    assert geometry.compute_orientation(make_affine(orientation)) == orientation


@pytest.mark.parametrize("orientation", ALL_48)
def test_reorienting_keeps_the_position_of_every_voxel(orientation: str) -> None:
    voxels = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(voxels, make_affine("ASR"))

    turned = reorient(volume, orientation)

    assert turned.orientation == orientation
    assert compute_positions(turned) == compute_positions(volume)
    assert np.shares_memory(turned.voxels_zyx, voxels)


def compute_positions(volume: Volume) -> dict[int, tuple[float, ...]]:
    """Return the position in mm of each voxel value, computed one voxel at a time."""
    positions = {}
    for z, y, x in np.ndindex(*volume.voxels_zyx.shape):
        mm = volume.affine_lps @ (x, y, z, 1)
        positions[int(volume.voxels_zyx[z, y, x])] = tuple(np.round(mm[:3], 9))  # type: ignore[call-overload]
    return positions


def test_reorienting_an_oblique_volume_keeps_the_position_of_every_voxel() -> None:
    volume = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), make_rotated_affine(20))

    assert compute_positions(reorient(volume, "RAI")) == compute_positions(volume)


def test_spacing_has_the_order_z_y_x() -> None:
    assert geometry.compute_spacing_zyx(make_affine("ASR", (0.5, 1.0, 2.0))) == (2.0, 1.0, 0.5)


def test_ras_and_lps_differ_in_the_sign_of_x_and_y() -> None:
    assert geometry.compute_orientation(geometry.convert_ras_to_lps(np.eye(4))) == "RAS"
    assert (
        geometry.convert_ras_to_lps(geometry.convert_ras_to_lps(make_affine("SPL"))) == make_affine("SPL")
    ).all()


@pytest.mark.parametrize(("degrees", "oblique"), [(0.0, False), (0.4, False), (0.6, True), (44.0, True)])
def test_a_volume_is_oblique_above_half_a_degree(degrees: float, oblique: bool) -> None:
    assert geometry.is_oblique(make_rotated_affine(degrees)) is oblique
    assert not geometry.is_sheared(make_rotated_affine(degrees))


@pytest.mark.parametrize(("degrees", "sheared"), [(0.05, False), (0.15, True), (18.0, True)])
def test_an_affine_is_sheared_above_a_tenth_of_a_degree(degrees: float, sheared: bool) -> None:
    affine = make_affine("LPS")
    affine[1, 2] = affine[2, 2] * np.tan(np.radians(degrees))

    assert geometry.is_sheared(affine) is sheared


def test_an_orientation_at_45_degrees_has_three_different_letters() -> None:
    assert sorted(geometry.compute_orientation(make_rotated_affine(45.0))) == ["L", "P", "S"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda a: a.__setitem__((0, 3), np.nan), id="not-finite"),
        pytest.param(lambda a: a.__setitem__((slice(3), 1), 0), id="zero-spacing"),
        pytest.param(lambda a: a.__setitem__((2, 2), 101), id="spacing-above-100-mm"),
        pytest.param(lambda a: a.__setitem__((2, 2), 0.0007), id="spacing-in-meters"),
        pytest.param(lambda a: a.__setitem__((1, 3), -2e6), id="origin-two-kilometers-away"),
        pytest.param(lambda a: a.__setitem__((slice(3), 1), a[:3, 0]), id="two-equal-axes"),
    ],
)
def test_an_unusable_affine_has_a_problem(damage) -> None:  # type: ignore[no-untyped-def]
    affine = make_affine("LPS")
    assert geometry.find_affine_problem(affine) is None
    damage(affine)
    assert geometry.find_affine_problem(affine)


def test_a_spacing_ratio_above_ten_is_anisotropic_and_a_ratio_of_seven_is_not() -> None:
    assert geometry.find_geometry_warnings(make_affine("LPS", (0.7, 0.7, 7.1))) == ("anisotropic",)
    assert geometry.find_geometry_warnings(make_affine("LPS", (0.7, 0.7, 5.0))) == ()
