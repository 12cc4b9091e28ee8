"""Slice positions in, their order and the volume's affine out, or why they make no volume.

All positions are LPS mm. Never averages over an irregular step, never hides a shear.
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

SAME_PLACE_MM = 0.01
"""Slices closer than this lie at one position."""

STEP_TOLERANCE_MM, STEP_TOLERANCE = 0.01, 0.01
"""A step is regular within the larger of 0.01 mm and 1 % of the median: writers round."""

DRIFT_MM = 0.1
"""Sideways movement from slice to slice above which a gantry was tilted."""

FEW_GAPS = 0.25
"""Share of odd steps up to which whole multiples of the median speak for missing slices."""


GAP = 1.5
"""A step this many times both its neighbours is a hole, however irregular the rest."""

STEEPEST_TILT = 1.0
"""Sideways per forward mm, 45 degrees; gantries tilt up to 30."""


@dataclass(frozen=True)
class Stack:
    """Slices in order along their normal.

    Attributes:
        order: Index into the slices given, first slice first.
        affine_lps: 4x4, voxel index (x, y, z, 1) to mm; z grows along cross(row, column direction).
        origins_lps: (n, 3) places of the first voxels, in this order, where slices must be moved onto
            the affine's grid first; None if they lie on it.
        warnings: `gantry_tilt` and `resampled_steps` where they were allowed and found.
    """

    order: list[int]
    affine_lps: geometry.Affine
    origins_lps: NDArray[np.float64] | None = None
    warnings: tuple[str, ...] = ()


def stack(
    slices: Sequence[SliceHeader], *, resample_tilt: bool = False, resample_steps: bool = False
) -> Stack:
    """Return order and affine of slices with equal orientation, spacing and matrix.

    Tilted or unevenly spaced slices are refused unless they may be resampled; missing ones always are.

    Raises:
        ScanError: `not_a_volume` (fewer than two places), `duplicate_slices`, `gantry_tilt`,
            `missing_slices`, `irregular_spacing`, or `unreadable` for impossible geometry.
    """
    order, along = _sorted(slices)
    if len(order) < 2 or along[-1] - along[0] < SAME_PLACE_MM:
        raise ScanError(Reason.NOT_A_VOLUME, f"{len(order)} image(s) at one position make no volume")
    positions = _positions([slices[i] for i in order])
    steps = np.diff(along)
    _check_duplicates(steps)
    tilted = _is_tilted(positions, steps, slices[0], resample_tilt)
    uneven = _is_uneven(steps, [slices[i].number for i in order], resample_steps)
    affine = _affine(slices[0], positions)
    if not tilted and not uneven:
        return Stack(order, affine)
    found = {Reason.GANTRY_TILT.value: tilted, WarningCode.RESAMPLED_STEPS.value: uneven}
    warnings = tuple(code for code, present in found.items() if present)
    return Stack(order, make_upright_grid(affine, positions), positions, warnings)


def same_places(slices: Sequence[SliceHeader]) -> list[list[int]]:
    """Return the groups of two and more slices that lie at one place, as indices into `slices`."""
    order, along = _sorted(slices)
    edges = np.flatnonzero(np.diff(along) >= SAME_PLACE_MM) + 1
    return [group.tolist() for group in np.split(np.array(order), edges) if len(group) > 1]


def places_along_normal(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return where each slice lies along the normal of the first, in mm."""
    return np.asarray(_positions(slices) @ _normal(slices[0]))


def check_alike(slices: Sequence[SliceHeader]) -> None:
    """Raise ScanError unless all slices have one orientation, pixel spacing and matrix.

    A slice without position, orientation or spacing cannot be placed: `not_a_volume` if none
    has them, `unreadable` if some do.
    """
    placed = [s for s in slices if s.position and s.orientation and s.spacing_yx]
    if not placed:
        raise ScanError(Reason.NOT_A_VOLUME, "no position, orientation or pixel spacing in the headers")
    if len(placed) < len(slices):
        lost = next(s for s in slices if s not in placed)
        raise ScanError(Reason.UNREADABLE, f"{lost.base}: position, orientation or pixel spacing is missing")
    _check_axes(placed[0])
    if len({(s.rows, s.columns) for s in placed}) > 1:
        raise ScanError(Reason.NOT_A_VOLUME, "slices of different rows x columns in one series")
    for name, tolerance in (("orientation", 1e-3), ("spacing_yx", 1e-3)):
        values = np.array([getattr(s, name) for s in placed])
        if np.abs(values - values[0]).max() > tolerance:
            raise ScanError(Reason.NOT_A_VOLUME, f"slices of different {name} in one series")
    for name, what in (("temporal", "time points"), ("stack_id", "stacks")):
        found = {getattr(s, name) for s in placed}
        if 1 < len(found) < len(placed):
            raise ScanError(Reason.DUPLICATE_SLICES, f"{len(found)} {what} in one; split them into series")


def _sorted(slices: Sequence[SliceHeader]) -> tuple[list[int], NDArray[np.float64]]:
    """Return the order of slices along their normal and their sorted distances along it in mm.

    Positions decide; file names, InstanceNumber and SliceLocation lie.
    """
    along = places_along_normal(slices)
    order = np.argsort(along, kind="stable")
    return order.tolist(), along[order]


def _check_axes(header: SliceHeader) -> None:
    row, column = np.reshape(header.orientation or (), (2, 3))
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ScanError(
            Reason.UNREADABLE, f"{header.base}: image orientation is no pair of perpendicular unit vectors"
        )


def _positions(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    return np.array([header.position for header in slices], dtype=np.float64)


def _normal(header: SliceHeader) -> NDArray[np.float64]:
    row, column = np.reshape(header.orientation or (), (2, 3))
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal))


def _check_duplicates(steps: NDArray[np.float64]) -> None:
    same = int(np.count_nonzero(steps < SAME_PLACE_MM))
    if same:
        raise ScanError(
            Reason.DUPLICATE_SLICES,
            f"{same} slice(s) lie where another one lies, with other pixels (two reconstructions or "
            "time points in one series?); give each its own folder and SeriesInstanceUID",
        )


def _is_tilted(
    positions: NDArray[np.float64], steps: NDArray[np.float64], header: SliceHeader, accepted: bool
) -> bool:
    """Tell whether slices shift sideways, from one to the next or slowly along the whole scan."""
    drift = np.diff(positions, axis=0) - steps[:, None] * _normal(header)
    most = float(np.linalg.norm(drift, axis=1).max())
    whole = float(np.linalg.norm(drift.sum(axis=0)) / steps.sum())
    if most <= DRIFT_MM and whole <= np.sin(np.radians(geometry.SHEAR_DEGREES)):
        return False
    if accepted and whole < STEEPEST_TILT and (np.linalg.norm(drift, axis=1) < STEEPEST_TILT * steps).all():
        return True
    raise ScanError(
        Reason.GANTRY_TILT,
        f"slices shift sideways by up to {most:.2f} mm per step (tilted gantry?); "
        "policy.gantry_tilt: resample brings tilts below 45 degrees onto an upright grid",
    )


def _is_uneven(steps: NDArray[np.float64], numbers: list[int | None], accepted: bool) -> bool:
    median = float(np.median(steps))
    odd = np.abs(steps - median) > max(STEP_TOLERANCE_MM, STEP_TOLERANCE * median)
    if median > geometry.MAX_SPACING_MM:
        raise ScanError(Reason.MISSING_SLICES, f"slices are {median:.1f} mm apart")
    if not odd.any():
        return False
    gaps = _follow_numbers(steps, numbers) or _multiples(steps, median, odd) or (accepted and _holes(steps))
    if accepted and not gaps:
        return True
    advice = "copy the series again" if gaps else "policy.irregular_spacing: resample accepts such steps"
    raise ScanError(
        Reason.MISSING_SLICES if gaps else Reason.IRREGULAR_SPACING,
        f"{int(odd.sum())} of {len(steps)} steps differ from the median {median:.3f} mm "
        f"({steps.min():.3f} to {steps.max():.3f} mm); {advice}",
    )


def _follow_numbers(steps: NDArray[np.float64], numbers: list[int | None]) -> bool:
    """Tell whether steps grow with jumps of InstanceNumber: then slices of the series are missing."""
    if None in numbers:
        return False
    jumps = np.diff(np.array(numbers, dtype=np.float64))
    if (jumps == 0).any() or len(set(np.abs(jumps))) == 1:
        return False
    per_number = steps / jumps
    return bool(np.ptp(per_number) <= STEP_TOLERANCE_MM + STEP_TOLERANCE * abs(np.median(per_number)))


def _multiples(steps: NDArray[np.float64], median: float, odd: NDArray[np.bool_]) -> bool:
    """Tell whether a few steps are whole multiples of an otherwise regular one."""
    ratios = steps[odd] / median
    whole = np.abs(ratios - np.round(ratios)) <= STEP_TOLERANCE * np.round(ratios)
    return bool(odd.mean() <= FEW_GAPS and whole.all() and (ratios > 1.5).all())


def _holes(steps: NDArray[np.float64]) -> bool:
    """Tell whether a step is much larger than both its neighbours: there is nothing to interpolate."""
    if len(steps) < 2:
        return False
    before, after = np.r_[0, steps[:-1]], np.r_[steps[1:], 0]
    return bool((steps > GAP * np.maximum(before, after)).any() or steps.max() > geometry.MAX_SPACING_MM)


def _affine(header: SliceHeader, positions: NDArray[np.float64]) -> geometry.Affine:
    """Return the affine; its third column is the whole way divided by the steps, shear included."""
    row, column = np.reshape(header.orientation or (), (2, 3))
    between_rows, between_columns = header.spacing_yx or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = row / np.linalg.norm(row) * between_columns
    affine[:3, 1] = column / np.linalg.norm(column) * between_rows
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    wrong = geometry.find_affine_problem(affine)
    if wrong:
        raise ScanError(Reason.UNREADABLE, wrong)
    return affine
