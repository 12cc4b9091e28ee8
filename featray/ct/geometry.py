"""Affines in, spacing, orientation letters and reordered views out; no files, no resampling.

One frame everywhere: LPS in mm (x grows to Left, y to Posterior, z to Superior, as in DICOM). An
affine is 4x4 and maps a voxel index (x, y, z, 1) to millimetres; arrays have axes (z, y, x), so
affine column i belongs to array axis 2 - i.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from featray.errors import WarningCode

Affine = NDArray[np.float64]

POSITIVE, NEGATIVE = "LPS", "RAI"
"""Letters of growth along +1 and -1 of the LPS frame's x, y and z."""

OBLIQUE_DEGREES = 0.5
"""Tables and gantries are level to about this; below it nothing is worth saying."""

SHEAR_DEGREES = 0.1
"""0.9 mm sideways over a 500 mm volume; rounding in real headers is a thousandth of it."""

ANISOTROPIC_RATIO = 10.0
"""Largest to smallest spacing; 5 mm slices of 0.7 mm pixels are ordinary, 10 mm ones are not."""

MIN_SPACING_MM, MAX_SPACING_MM = 0.001, 100.0
"""Outside of these the header is wrong (metres taken for millimetres?), not the scan fine or coarse."""

MAX_ORIGIN_MM = 1e6
"""A first voxel a kilometre from the scanner is no place in a patient."""


def convert_ras_to_lps(affine_ras: Affine) -> Affine:
    """Return the affine with millimetres in LPS instead of RAS (NIfTI), or the other way round."""
    return affine_ras * [[-1.0], [-1.0], [1.0], [1.0]]


def compute_spacing_zyx(affine_lps: Affine) -> tuple[float, float, float]:
    """Return mm between voxel centres along array axes z, y and x: the lengths of the columns."""
    x, y, z = np.linalg.norm(affine_lps[:3, :3], axis=0)
    return float(z), float(y), float(x)


def compute_indices_xyz(affine_lps: Affine, points_lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return voxel indices (x, y, z), with fractions to a millionth, of points (n, 3) in mm."""
    moved = points_lps - affine_lps[:3, 3]
    return np.asarray(np.round(np.linalg.solve(affine_lps[:3, :3], moved.T).T, 6))


def compute_orientation(affine_lps: Affine) -> str:
    """Return the patient directions in which x, y and z grow, e.g. `LPS`; nearest axes if oblique."""
    directions = _directions(affine_lps)
    return "".join(
        POSITIVE[axis] if directions[axis, column] > 0 else NEGATIVE[axis]
        for column, axis in enumerate(_nearest_axes(directions))
    )


def is_oblique(affine_lps: Affine, degrees: float = OBLIQUE_DEGREES) -> bool:
    """Return whether a voxel axis is more than `degrees` away from its nearest patient axis."""
    directions = _directions(affine_lps)
    cosines = [abs(directions[axis, column]) for column, axis in enumerate(_nearest_axes(directions))]
    return bool(min(cosines) < np.cos(np.radians(degrees)))


def is_sheared(affine_lps: Affine, degrees: float = SHEAR_DEGREES) -> bool:
    """Return whether two voxel axes are more than `degrees` away from a right angle."""
    directions = _directions(affine_lps)
    between = directions.T @ directions - np.eye(3)
    return bool(np.abs(between).max() > np.sin(np.radians(degrees)))


def find_affine_problem(affine_lps: Affine) -> str | None:
    """Return what makes an affine unusable (not finite, flat, absurd spacing or origin), or None."""
    if not np.isfinite(affine_lps).all():
        return "the affine holds values that are not finite"
    with np.errstate(all="ignore"):  # lengths beyond float64 are infinite, which is the answer
        spacing = compute_spacing_zyx(affine_lps)
    if not MIN_SPACING_MM <= min(spacing) <= max(spacing) <= MAX_SPACING_MM:
        text = ", ".join(f"{mm:g}" for mm in spacing)
        return f"spacing (z, y, x) is {text} mm, expected {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}"
    if np.abs(affine_lps[:3, 3]).max() > MAX_ORIGIN_MM:
        return f"the first voxel lies more than {MAX_ORIGIN_MM:g} mm away from the origin"
    if abs(np.linalg.det(_directions(affine_lps))) < 1e-3:
        return "the affine is singular: two voxel axes point the same way"
    return None


def find_geometry_warnings(affine_lps: Affine) -> tuple[str, ...]:
    """Return the warning codes that an accepted geometry earns: `oblique`, `anisotropic`."""
    spacing = compute_spacing_zyx(affine_lps)
    found = {
        WarningCode.OBLIQUE: is_oblique(affine_lps),
        WarningCode.ANISOTROPIC: max(spacing) / min(spacing) > ANISOTROPIC_RATIO,
    }
    return tuple(code.value for code, present in found.items() if present)


def _directions(affine_lps: Affine) -> Affine:
    columns = affine_lps[:3, :3]
    return np.asarray(columns / np.linalg.norm(columns, axis=0), dtype=np.float64)


def _nearest_axes(directions: Affine) -> tuple[int, ...]:
    """Return for each voxel axis its patient axis: the assignment with the largest sum of |cosines|.

    All three are chosen together, so no patient axis is named twice, even at 45 degrees.
    """
    weights = np.abs(directions)
    return max(permutations(range(3)), key=lambda axes: sum(weights[axes[i], i] for i in range(3)))
