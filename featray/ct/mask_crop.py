"""A volume and a mask in, the part of the volume that the mask marks out; no files, no voxel changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

_ROUNDING = 1e-3
"""Part of a voxel by which two headers of one grid may differ."""


def crop_to_mask(volume: Volume, mask: Volume, margin_mm: float) -> Volume:
    """Return the box of voxels that holds every voxel of the mask above 0, and `margin_mm` on each side.

    The mask may lie on another grid: its box, from outer edge to outer edge, is carried over by both
    affines. The box ends where the volume does. Voxels are a view; the affine follows.

    Raises:
        ScanError: `preprocess`; the mask is empty, or lies outside of the volume.
    """
    corners = _corners_lps(mask)
    indices = geometry.compute_indices_xyz(volume.affine_lps, corners)
    margin = margin_mm / np.array(volume.spacing_zyx[::-1])
    shape = np.array(volume.voxels_zyx.shape[::-1])
    # Edges lie half a voxel outside of the centres of the first and the last voxel.
    first = np.floor(indices.min(axis=0) + 0.5 - margin + _ROUNDING).astype(int).clip(0, shape)
    last = np.ceil(indices.max(axis=0) + 0.5 + margin - _ROUNDING).astype(int).clip(0, shape)
    if (first >= last).any():
        raise ScanError(Reason.PREPROCESS, "the mask lies outside of the scan; is it of the same patient?")
    x, y, z = (slice(begin, end) for begin, end in zip(first, last, strict=True))
    affine = volume.affine_lps.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return replace(volume, voxels_zyx=volume.voxels_zyx[z, y, x], affine_lps=affine)


def _corners_lps(mask: Volume) -> NDArray[np.float64]:
    """Return the eight corners, (8, 3) in LPS mm, of the box of all voxels above 0."""
    inside = np.asarray(mask.voxels_zyx > np.zeros((), mask.voxels_zyx.dtype))
    spans = []
    for axis in (2, 1, 0):
        others = tuple(other for other in range(3) if other != axis)
        found = np.flatnonzero(inside.any(axis=others))
        if not len(found):
            raise ScanError(Reason.PREPROCESS, "the mask is empty: no voxel of it is above 0")
        spans.append((found[0] - 0.5, found[-1] + 0.5))
    corners = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(corners @ mask.affine_lps[:3, :3].T + mask.affine_lps[:3, 3])
