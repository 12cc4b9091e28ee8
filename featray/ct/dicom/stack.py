"""Sort slices by position and compute the affine of their stack, or say why they do not form a volume.

All positions are in LPS mm. Irregular steps are never averaged, and a shear is never hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.steps import find_last_digit, judge_steps
from featray.ct.regrid import compute_grid_size, make_upright_grid
from featray.errors import Reason, ScanError, WarningCode

SAME_POSITION_MM = 0.01
"""Slices closer than this along the normal are at the same position."""

MAX_DRIFT_MM = 0.1
"""Sideways shift from one slice to the next above which the gantry counts as tilted."""

SEPARATE_VOLUMES = "give each volume a folder and a SeriesInstanceUID of its own"
"""Advice if one series holds several volumes."""

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
    slices: Sequence[SliceHeader],
    *,
    resample_tilt: bool = False,
    resample_steps: bool = False,
    max_voxels: int | None = None,
) -> SliceStack:
    """Return order and affine of slices that have passed `check_same_grid`.

    A message advises a policy only if the slices would pass all checks of this function with it.

    Args:
        slices: Headers with one orientation, pixel spacing and matrix size, in any order.
        resample_tilt: Accept slices that shift sideways (tilted gantry).
        resample_steps: Accept slices at irregular steps. Missing slices and overlapping passes are never
            accepted.
        max_voxels: Limit of the voxels after resampling; above it no policy is advised.

    Raises:
        ScanError: `not_a_volume` (fewer than two positions), `duplicate_slices`, `gantry_tilt`,
            `missing_slices`, `irregular_spacing`, or `unreadable` for impossible geometry.
    """
    order, distances = _sort_along_normal(slices)
    if len(order) < 2 or distances[-1] - distances[0] < SAME_POSITION_MM:
        raise ScanError(Reason.NOT_A_VOLUME, f"{len(order)} image(s) at one position make no volume")
    sorted_slices = [slices[index] for index in order]
    positions = _get_positions(sorted_slices)
    _check_duplicates(np.diff(distances))
    is_uneven = _check_steps(sorted_slices, distances, positions)
    is_tilted = _check_tilt(positions, np.diff(distances), slices[0])
    affine = _compute_affine(slices[0], positions)
    if not is_tilted and not is_uneven:
        return SliceStack(order, affine)
    findings = {Reason.GANTRY_TILT: is_tilted, Reason.IRREGULAR_SPACING: is_uneven}
    policies = {Reason.GANTRY_TILT: resample_tilt, Reason.IRREGULAR_SPACING: resample_steps}
    grid = make_upright_grid(affine, positions)
    refused = [code for code, is_present in findings.items() if is_present and not policies[code]]
    if refused:
        obstacle = _find_grid_obstacle(grid, positions, slices[0], max_voxels)
        raise _make_policy_error(refused, positions, slices[0], obstacle)
    codes = {Reason.GANTRY_TILT.value: is_tilted, WarningCode.RESAMPLED_STEPS.value: is_uneven}
    return SliceStack(order, grid, positions, tuple(code for code, is_present in codes.items() if is_present))


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
    """Return the unit vector cross(row direction, column direction) in LPS; 0 if they are parallel."""
    row, column = _get_directions(header)
    normal = np.cross(row, column)
    return np.asarray(normal / (np.linalg.norm(normal) or 1.0))


def _check_duplicates(steps: NDArray[np.float64]) -> None:
    duplicates = int(np.count_nonzero(steps < SAME_POSITION_MM))
    if duplicates:
        raise ScanError(
            Reason.DUPLICATE_SLICES,
            f"{duplicates} slice(s) have the position of another slice but other pixels (two reconstructions "
            f"or time points in one series?); {SEPARATE_VOLUMES}",
        )


def _check_steps(
    slices: Sequence[SliceHeader], distances: NDArray[np.float64], positions: NDArray[np.float64]
) -> bool:
    """Return whether the steps between sorted slices are irregular, but can be resampled.

    Raises:
        ScanError: `missing_slices`, or `duplicate_slices` if two passes overlap.
    """
    last_digit = find_last_digit(positions, _compute_normal(slices[0]))
    problem = judge_steps(distances, [header.instance_number for header in slices], last_digit)
    if problem is Reason.DUPLICATE_SLICES:
        raise ScanError(
            problem,
            f"two passes or reconstructions overlap ({_describe_steps(distances)}); {SEPARATE_VOLUMES}",
        )
    if problem is Reason.MISSING_SLICES:
        raise ScanError(problem, f"slices are missing ({_describe_steps(distances)}); copy the series again")
    return problem is not None


def _check_tilt(positions: NDArray[np.float64], steps: NDArray[np.float64], header: SliceHeader) -> bool:
    """Return whether slices shift sideways, either from one to the next or slowly over the whole scan.

    Raises:
        ScanError: `gantry_tilt` if they shift by 45 degrees or more; `duplicate_slices` if they shift to and
            fro, because then every other slice has another field of view.
    """
    normal = _compute_normal(header)
    drift = np.diff(positions, axis=0) - steps[:, None] * normal
    shifts, total = np.linalg.norm(drift, axis=1), float(np.linalg.norm(drift.sum(axis=0)))
    allowance = min(find_last_digit(positions, np.sqrt(1 - normal**2)), MAX_DRIFT_MM)
    max_total = np.sin(np.radians(geometry.SHEAR_DEGREES)) * steps.sum()
    if shifts.max() <= MAX_DRIFT_MM + allowance and total <= max_total + allowance:
        return False
    turns = (drift[1:] * drift[:-1]).sum(axis=1) < -(MAX_DRIFT_MM**2)
    if turns.sum() > len(turns) / 2:
        raise ScanError(
            Reason.DUPLICATE_SLICES,
            f"slices shift to and fro by up to {shifts.max():.2f} mm per step (two fields of view in one "
            f"series?); {SEPARATE_VOLUMES}",
        )
    if total >= MAX_TILT_SLOPE * steps.sum() or (shifts >= MAX_TILT_SLOPE * steps).any():
        raise ScanError(
            Reason.GANTRY_TILT,
            f"slices shift sideways by up to {shifts.max():.2f} mm per step, more than any gantry tilts",
        )
    return True


def _find_grid_obstacle(
    grid: geometry.Affine, positions: NDArray[np.float64], header: SliceHeader, max_voxels: int | None
) -> str | None:
    """Return why slices cannot be resampled onto a grid, or None if they can."""
    problem = geometry.find_affine_problem(grid)
    voxels = 0 if problem else math.prod(compute_grid_size(grid, positions, (header.rows, header.columns)))
    if max_voxels is not None and voxels > max_voxels:
        return f"resampled they would have {voxels} voxels, more than limits.max_voxels ({max_voxels})"
    return problem


def _make_policy_error(
    refused: list[Reason], positions: NDArray[np.float64], header: SliceHeader, obstacle: str | None
) -> ScanError:
    """Return the error for slices that the policies in `refused` do not accept, the first one as its reason.

    The keys in the config have the names of the reasons.
    """
    distances = positions @ _compute_normal(header)
    drift = np.diff(positions, axis=0) - np.diff(distances)[:, None] * _compute_normal(header)
    largest = np.linalg.norm(drift, axis=1).max()
    texts = {
        Reason.GANTRY_TILT: f"slices shift sideways by up to {largest:.2f} mm per step (tilted gantry?)",
        Reason.IRREGULAR_SPACING: f"the steps between slices differ ({_describe_steps(distances)})",
    }
    keys = " and ".join(f"policy.{code}: resample" for code in refused)
    advice = obstacle or f"set {keys} to resample them onto an even, upright grid"
    return ScanError(refused[0], f"{' and '.join(texts[code] for code in refused)}; {advice}")


def _describe_steps(distances: NDArray[np.float64]) -> str:
    """Return the range of the steps in words."""
    steps = np.diff(distances)
    return f"steps of {steps.min():.3f} to {steps.max():.3f} mm, median {np.median(steps):.3f} mm"


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
