"""Reorient a volume: permute and flip its axes; no voxel value changes."""

from __future__ import annotations

from dataclasses import replace

from featray.ct.geometry import NEGATIVE, POSITIVE, Affine, compute_orientation
from featray.ct.volume import Volume


def reorient(volume: Volume, orientation: str) -> Volume:
    """Return a view of the volume whose x, y and z axes grow along `orientation`, for example `LPS`.

    Each voxel keeps its value and its position in mm, because the affine is changed together with the axes.
    An oblique volume gets the orientation of its nearest axes and stays oblique.
    """
    letters = compute_orientation(volume.affine_lps)
    columns = [_find_column(letters, letter) for letter in orientation]
    flips = [letters[column] != letter for column, letter in zip(columns, orientation, strict=True)]
    voxels = volume.voxels_zyx.transpose([2 - column for column in reversed(columns)])
    voxels = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))]
    return replace(volume, voxels_zyx=voxels, affine_lps=_reorient_affine(volume, columns, flips))


def _reorient_affine(volume: Volume, columns: list[int], flips: list[bool]) -> Affine:
    """Return the affine after its columns are permuted and then flipped where `flips` is true."""
    affine = volume.affine_lps.copy()
    affine[:, :3] = volume.affine_lps[:, columns]
    for axis, (column, flip) in enumerate(zip(columns, flips, strict=True)):
        if flip:
            last = volume.voxels_zyx.shape[2 - column] - 1
            affine[:, 3] += affine[:, axis] * last
            affine[:, axis] *= -1
    return affine


def _find_column(letters: str, letter: str) -> int:
    """Return the index in `letters` of the axis that runs along `letter` or in the opposite direction."""
    directions = next(pair for pair in zip(POSITIVE, NEGATIVE, strict=True) if letter in pair)
    return next(column for column, direction in enumerate(letters) if direction in directions)
