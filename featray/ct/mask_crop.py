"""Crop a volume to the bounding box of a mask; no files, no voxel value changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

_ROUNDING = 1e-3
"""Fraction of a voxel by which the headers of two files with the same grid may differ."""


def crop_to_mask(volume: Volume, mask: Volume, margin_mm: float) -> Volume:
    """Return the box of the volume that holds every mask voxel above 0, with `margin_mm` on each side.

    The mask may have another grid than the volume: the bounding box of the mask, between the outer edges of
    its voxels, is converted to voxels of the volume by way of both affines. The box is limited to the volume.
    The voxels of the result are a view, and its affine places them where they were.

    Raises:
        ScanError: `preprocess`, if the mask is empty or lies outside of the volume.
    """
    corners = _find_corners_lps(mask)
    indices = geometry.compute_indices_xyz(volume.affine_lps, corners)
    margin = margin_mm / np.array(volume.spacing_zyx[::-1])
    shape = np.array(volume.voxels_zyx.shape[::-1])
    # The edges of the box lie half a voxel outside of the centers of its first and last voxel.
    first = np.floor(indices.min(axis=0) + 0.5 - margin + _ROUNDING).astype(int).clip(0, shape)
    last = np.ceil(indices.max(axis=0) + 0.5 + margin - _ROUNDING).astype(int).clip(0, shape)
    if (first >= last).any():
        raise ScanError(Reason.PREPROCESS, "the mask lies outside of the scan; is it of the same patient?")
    x, y, z = (slice(start, end) for start, end in zip(first, last, strict=True))
    affine = volume.affine_lps.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return replace(volume, voxels_zyx=volume.voxels_zyx[z, y, x], affine_lps=affine)


def _find_corners_lps(mask: Volume) -> NDArray[np.float64]:
    """Return the corners (8, 3), LPS mm, of the bounding box of all mask voxels above 0.

    Raises:
        ScanError: `preprocess`, if no voxel is above 0.
    """
    inside = np.asarray(mask.voxels_zyx > np.zeros((), mask.voxels_zyx.dtype))
    ranges_xyz = []
    for axis in (2, 1, 0):
        other_axes = tuple(other for other in range(3) if other != axis)
        indices = np.flatnonzero(inside.any(axis=other_axes))
        if not len(indices):
            raise ScanError(Reason.PREPROCESS, "the mask is empty: no voxel of it is above 0")
        ranges_xyz.append((indices[0] - 0.5, indices[-1] + 0.5))
    corners = np.stack(np.meshgrid(*ranges_xyz, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(corners @ mask.affine_lps[:3, :3].T + mask.affine_lps[:3, 3])
