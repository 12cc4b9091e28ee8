"""Compute spacing, orientation and problems of affines; no files, no voxel values, no resampling.

All positions are LPS in mm (x grows to Left, y to Posterior, z to Superior, as in DICOM). An affine is a 4x4
float64 matrix that maps a voxel index (x, y, z, 1) to a position. Arrays have axes (z, y, x), so column i of
an affine belongs to array axis 2 - i.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from featray.errors import WarningCode

Affine = NDArray[np.float64]

POSITIVE, NEGATIVE = "LPS", "RAI"
"""Letters of the directions +1 and -1 along the x, y and z axes of the LPS frame."""

OBLIQUE_DEGREES = 0.5
"""Angle between a voxel axis and its patient axis above which a volume counts as oblique.

The table and the gantry of a scanner are level to about this angle.
"""

SHEAR_DEGREES = 0.1
"""Deviation of two voxel axes from a right angle above which an affine counts as sheared.

This angle moves the end of a 500 mm volume sideways by 0.9 mm. The rounding in real headers causes about a
thousandth of it.
"""

ANISOTROPIC_RATIO = 10.0
"""Ratio of the largest to the smallest spacing above which a volume counts as anisotropic.

Slices of 5 mm with pixels of 0.7 mm are common; slices of 10 mm are not.
"""

MIN_SPACING_MM, MAX_SPACING_MM = 0.001, 100.0
"""Range of plausible voxel spacing. Outside of it the header is wrong: it may hold meters instead of mm."""

MAX_ORIGIN_MM = 1e6
"""Largest plausible coordinate of the first voxel: one kilometer from the origin."""


def convert_ras_to_lps(affine_ras: Affine) -> Affine:
    """Convert an affine from RAS (the frame of NIfTI) to LPS, or from LPS to RAS."""
    return affine_ras * [[-1.0], [-1.0], [1.0], [1.0]]


def compute_spacing_zyx(affine_lps: Affine) -> tuple[float, float, float]:
    """Return the distance in mm between voxel centers along array axes z, y and x."""
    x, y, z = np.linalg.norm(affine_lps[:3, :3], axis=0)
    return float(z), float(y), float(x)


def compute_indices_xyz(affine_lps: Affine, points_lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the voxel indices (n, 3), ordered (x, y, z), of points (n, 3) in mm.

    Indices are fractional and rounded to 1e-6.
    """
    offsets_mm = points_lps - affine_lps[:3, 3]
    return np.asarray(np.round(np.linalg.solve(affine_lps[:3, :3], offsets_mm.T).T, 6))


def compute_directions(affine: Affine) -> NDArray[np.float64]:
    """Return the directions (3, 3) of the voxel axes x, y and z as unit vectors, one per column."""
    columns = affine[:3, :3]
    return np.asarray(columns / np.linalg.norm(columns, axis=0), dtype=np.float64)


def compute_orientation(affine_lps: Affine) -> str:
    """Return three letters: the patient directions in which x, y and z grow, for example `LPS`.

    An oblique axis gets the letter of its nearest patient axis.
    """
    directions = compute_directions(affine_lps)
    return "".join(
        POSITIVE[axis] if directions[axis, column] > 0 else NEGATIVE[axis]
        for column, axis in enumerate(_find_nearest_axes(directions))
    )


def is_oblique(affine_lps: Affine, degrees: float = OBLIQUE_DEGREES) -> bool:
    """Return whether a voxel axis is more than `degrees` away from its nearest patient axis."""
    directions = compute_directions(affine_lps)
    cosines = [abs(directions[axis, column]) for column, axis in enumerate(_find_nearest_axes(directions))]
    return bool(min(cosines) < np.cos(np.radians(degrees)))


def is_sheared(affine_lps: Affine, degrees: float = SHEAR_DEGREES) -> bool:
    """Return whether the angle between two voxel axes is more than `degrees` away from a right angle."""
    directions = compute_directions(affine_lps)
    cosines = directions.T @ directions - np.eye(3)
    return bool(np.abs(cosines).max() > np.sin(np.radians(degrees)))


def find_affine_problem(affine_lps: Affine) -> str | None:
    """Return a sentence that says why an affine is unusable, or None if it is usable.

    An affine is unusable if it is not finite, is singular, or has an implausible spacing or origin.
    """
    if not np.isfinite(affine_lps).all():
        return "the affine holds values that are not finite"
    with np.errstate(all="ignore"):  # a length beyond float64 becomes infinite and fails the next check
        spacing = compute_spacing_zyx(affine_lps)
    if not MIN_SPACING_MM <= min(spacing) <= max(spacing) <= MAX_SPACING_MM:
        text = ", ".join(f"{mm:g}" for mm in spacing)
        return f"spacing (z, y, x) is {text} mm, expected {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}"
    if np.abs(affine_lps[:3, 3]).max() > MAX_ORIGIN_MM:
        return f"the first voxel lies more than {MAX_ORIGIN_MM:g} mm away from the origin"
    if abs(np.linalg.det(compute_directions(affine_lps))) < 1e-3:
        return "the affine is singular: two voxel axes point the same way"
    return None


def find_geometry_warnings(affine_lps: Affine) -> tuple[str, ...]:
    """Return the warning codes of a usable affine: none, `oblique`, `anisotropic` or both."""
    spacing = compute_spacing_zyx(affine_lps)
    conditions = {
        WarningCode.OBLIQUE: is_oblique(affine_lps),
        WarningCode.ANISOTROPIC: max(spacing) / min(spacing) > ANISOTROPIC_RATIO,
    }
    return tuple(code.value for code, holds in conditions.items() if holds)


def _find_nearest_axes(directions: NDArray[np.float64]) -> tuple[int, ...]:
    """Return the patient axis of each voxel axis: the assignment with the largest sum of |cosines|.

    All three axes are assigned together, so each patient axis is used once, even at 45 degrees.
    """
    weights = np.abs(directions)
    return max(permutations(range(3)), key=lambda axes: sum(weights[axes[i], i] for i in range(3)))
