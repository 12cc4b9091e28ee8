"""Reorient a volume: permute and flip its axes, so that they grow along the letters asked for."""

from __future__ import annotations

from dataclasses import replace

from featray.ct.geometry import NEGATIVE, POSITIVE, Affine, compute_orientation
from featray.ct.volume import Volume


def reorient(volume: Volume, orientation: str) -> Volume:
    """Return the volume as a view whose x, y and z grow along `orientation`, e.g. `LPS`.

    Only permutes and flips: no voxel value changes, and each voxel keeps its place in mm (the
    affine follows). An oblique volume goes to the nearest axes and stays oblique.
    """
    have = compute_orientation(volume.affine_lps)
    columns = [_column_of(have, letter) for letter in orientation]
    flips = [have[column] != letter for column, letter in zip(columns, orientation, strict=True)]
    voxels = volume.voxels_zyx.transpose([2 - column for column in reversed(columns)])
    voxels = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))]
    return replace(volume, voxels_zyx=voxels, affine_lps=_moved(volume, columns, flips))


def _moved(volume: Volume, columns: list[int], flips: list[bool]) -> Affine:
    affine = volume.affine_lps.copy()
    affine[:, :3] = volume.affine_lps[:, columns]
    for axis, (column, flip) in enumerate(zip(columns, flips, strict=True)):
        if flip:
            last = volume.voxels_zyx.shape[2 - column] - 1
            affine[:, 3] += affine[:, axis] * last
            affine[:, axis] *= -1
    return affine


def _column_of(letters: str, wanted: str) -> int:
    pair = next(pair for pair in zip(POSITIVE, NEGATIVE, strict=True) if wanted in pair)
    return next(column for column, letter in enumerate(letters) if letter in pair)
