"""Resample volumes with shifted, unevenly spaced or oblique slices to a regular, upright grid.

The axes of an upright grid are at right angles and its slices are evenly spaced. The configuration can
request two steps, which take place before any other code uses the geometry:

    resample_upright   slices that are shifted sideways (gantry tilt) or unevenly spaced
    resample_to_axes   an oblique volume, to the axes of the patient

Both interpolate linearly between the true positions of the voxels and return float32. Values are clipped to
the window before the interpolation; clipping them afterwards would give other values next to metal and
padding. Outside of the source volume the result has the fill value: the lower bound of the window or, without
a window, the smallest voxel. Up to one voxel outside of the outermost source voxels, the result is
interpolated between them and the fill value. The grid is large enough for every source voxel. It can
therefore be much larger than the source: compute its size first and compare it with the limit on voxels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.geometry import Affine
from featray.ct.resample import copy_clipped
from featray.ct.volume import Volume

Window = tuple[float, float] | None
"""Lower and upper bound in HU, or None to leave the values as they are."""

_NEGLIGIBLE = 1e-3
"""Fraction of a voxel by which the source may extend beyond the grid, because of rounding in headers."""


def make_upright_grid(sheared_lps: Affine, origins_lps: NDArray[np.float64]) -> Affine:
    """Return the affine of the upright grid for slices whose first voxels lie at `origins_lps`.

    x and y of the grid grow as in `sheared_lps`; the third axis is normal to both. The first and the last
    slice lie exactly on the grid: the step along the normal is the distance between them, divided by the
    whole number of steps whose length is nearest to the median step. Along x and y the grid starts at the
    smallest position of any slice, so no slice is cut off.

    Args:
        sheared_lps: Affine (LPS mm) whose first two columns are the in-plane axes of all slices.
        origins_lps: Positions (n, 3) in LPS mm, sorted along the normal.
    """
    affine = sheared_lps.copy()
    x, y = affine[:3, 0], affine[:3, 1]
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    heights = origins_lps @ normal
    extent = heights[-1] - heights[0]
    affine[:3, 2] = normal * extent / max(1, round(extent / np.median(np.diff(heights))))
    affine[:3, 3] = origins_lps[0]
    start_xy = geometry.compute_indices_xyz(affine, origins_lps)[:, :2].min(axis=0)
    affine[:3, 3] += affine[:3, :2] @ start_xy
    return affine


def compute_upright_size(volume: Volume) -> tuple[int, int, int]:
    """Return the number of voxels (z, y, x) of the volume that `resample_upright` would return."""
    slices, rows, columns = volume.voxels_zyx.shape
    if volume.slice_origins_lps is None:
        return slices, rows, columns
    return compute_grid_size(volume.affine_lps, volume.slice_origins_lps, (rows, columns))


def compute_grid_size(
    affine_lps: Affine, origins_lps: NDArray[np.float64], shape_yx: tuple[int, int]
) -> tuple[int, int, int]:
    """Return the number of voxels (z, y, x) of an upright grid that encloses slices of `shape_yx`.

    Args:
        affine_lps: Affine of the grid, from `make_upright_grid`.
        origins_lps: Positions (n, 3) in LPS mm of the first voxel of each slice.
        shape_yx: Rows and columns of a slice.
    """
    x, y, z = geometry.compute_indices_xyz(affine_lps, origins_lps).max(axis=0)
    rows, columns = shape_yx
    return round(z) + 1, rows + math.ceil(y - _NEGLIGIBLE), columns + math.ceil(x - _NEGLIGIBLE)


def resample_upright(volume: Volume, window: Window) -> Volume:
    """Return the volume resampled from its `slice_origins_lps` to the grid of its `affine_lps`.

    Each slice is first shifted within its plane to the voxels of the grid. Then neighboring slices are
    interpolated along the normal. The voxels are float32, clipped to the window. A volume without
    `slice_origins_lps` is returned unchanged.
    """
    if volume.slice_origins_lps is None:
        return volume
    indices_xyz = geometry.compute_indices_xyz(volume.affine_lps, volume.slice_origins_lps)
    out = np.empty(compute_upright_size(volume), np.float32)
    slices = _ShiftedSlices(volume.voxels_zyx, indices_xyz, window, out.shape[1:])
    for z, plane in enumerate(out):
        _interpolate_slices(slices, indices_xyz[:, 2], z, plane)
    return replace(volume, voxels_zyx=out, slice_origins_lps=None)


def compute_axes_size(volume: Volume) -> tuple[int, int, int]:
    """Return the number of voxels (z, y, x) of the volume that `resample_to_axes` would return."""
    if not geometry.is_oblique(volume.affine_lps):
        z, y, x = volume.voxels_zyx.shape
        return z, y, x
    return _make_axes_grid(volume)[1]


def resample_to_axes(volume: Volume, window: Window) -> Volume:
    """Return an oblique volume on the axes of the patient, with the same orientation letters and spacing.

    The grid encloses all voxel centers of the source and has the same center. The interpolation is trilinear.
    The voxels are float32, clipped to the window. A volume that is not oblique is returned unchanged.
    """
    if not geometry.is_oblique(volume.affine_lps):
        return volume
    from scipy.ndimage import affine_transform  # takes 0.2 s to import; most scans are not oblique

    affine, shape = _make_axes_grid(volume)
    grid_to_source = np.linalg.solve(volume.affine_lps, affine)  # voxel indices (x, y, z, 1)
    out = np.empty(shape, np.float32)
    affine_transform(
        _clip(volume.voxels_zyx, window),
        grid_to_source[2::-1, 2::-1],  # in array order: z, y, x
        grid_to_source[2::-1, 3],
        output=out,
        order=1,
        mode="grid-constant",
        cval=_choose_fill(volume.voxels_zyx, window),
    )
    return replace(volume, voxels_zyx=out, affine_lps=affine)


def _make_axes_grid(volume: Volume) -> tuple[Affine, tuple[int, int, int]]:
    """Return the affine and the size (z, y, x) of the grid along the patient axes that holds every voxel."""
    last_xyz = np.array(volume.voxels_zyx.shape[::-1]) - 1
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * last_xyz
    affine = np.eye(4)
    spacing_xyz = geometry.compute_spacing_zyx(volume.affine_lps)[::-1]
    for column, letter in enumerate(geometry.compute_orientation(volume.affine_lps)):
        axis, sign = _get_axis(letter)
        affine[:, column] = 0
        affine[axis, column] = sign * spacing_xyz[column]
    corners_mm = corners @ volume.affine_lps[:3, :3].T + volume.affine_lps[:3, 3]
    indices_xyz = geometry.compute_indices_xyz(affine, corners_mm)
    extent = np.ptp(indices_xyz, axis=0)
    count = np.ceil(extent - _NEGLIGIBLE).astype(int) + 1
    affine[:3, 3] = affine[:3, :3] @ (indices_xyz.min(axis=0) - (count - 1 - extent) / 2)
    x, y, z = count.tolist()
    return affine, (z, y, x)


def _get_axis(letter: str) -> tuple[int, float]:
    """Return the LPS axis (0, 1 or 2) along which an orientation letter points, and its sign on that axis."""
    if letter in geometry.POSITIVE:
        return geometry.POSITIVE.index(letter), 1.0
    return geometry.NEGATIVE.index(letter), -1.0


def _choose_fill(voxels: NDArray[Any], window: Window) -> float:
    return float(voxels.min()) if window is None else window[0]


def _clip(voxels: NDArray[Any], window: Window) -> NDArray[Any]:
    """Return the voxels clipped to the window.

    The result keeps the integer dtype of the voxels if the bounds are whole numbers: int16 needs half of the
    memory of float32.
    """
    if window is None:
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind == "i" and all(float(bound).is_integer() for bound in window):
        limits = np.iinfo(voxels.dtype)
        low, high = (int(min(max(bound, limits.min), limits.max)) for bound in window)
        clipped: NDArray[Any] = np.clip(voxels, low, high)
        return clipped
    return copy_clipped(voxels, window, np.empty(voxels.shape, np.float32))


class _ShiftedSlices:
    """Source slices, clipped and shifted within their plane to the voxels of the grid.

    Each slice is computed when it is first used. Only the last two are kept, because the grid is filled in
    slice order.
    """

    def __init__(
        self,
        voxels_zyx: NDArray[Any],
        indices_xyz: NDArray[np.float64],
        window: Window,
        shape_yx: tuple[int, ...],
    ) -> None:
        self._voxels, self._indices, self._window, self._shape = voxels_zyx, indices_xyz, window, shape_yx
        self._fill = _choose_fill(voxels_zyx, window)
        self._planes: dict[int, NDArray[np.float32]] = {}

    def __getitem__(self, k: int) -> NDArray[np.float32]:
        """Return source slice `k` as float32 of the grid's shape (y, x)."""
        if k not in self._planes:
            self._planes = {index: plane for index, plane in self._planes.items() if index == k - 1}
            self._planes[k] = self._compute(k)
        return self._planes[k]

    def _compute(self, k: int) -> NDArray[np.float32]:
        plane = copy_clipped(self._voxels[k], self._window, np.empty(self._voxels.shape[1:], np.float32))
        x, y, _ = self._indices[k]
        wide = _shift_rows(plane.T, x, self._shape[1], self._fill).T
        return _shift_rows(wide, y, self._shape[0], self._fill)


def _shift_rows(rows: NDArray[np.float32], by: float, count: int, fill: float) -> NDArray[np.float32]:
    """Return `count` rows, in which input row i lies at position i + `by`; interpolate linearly."""
    whole = math.floor(by)
    fraction = np.float32(by - whole)
    padded = np.pad(rows, ((1, 1), (0, 0)), constant_values=fill)
    shifted = padded[1:] * (1 - fraction) + padded[:-1] * fraction if fraction else padded[1:]
    out = np.full((count, rows.shape[1]), fill, np.float32)
    end = min(whole + len(shifted), count)
    out[whole:end] = shifted[: end - whole]
    return out


def _interpolate_slices(
    slices: _ShiftedSlices, heights: NDArray[np.float64], z: int, out: NDArray[np.float32]
) -> None:
    """Write the plane (y, x) at grid index `z` to `out`, interpolated between its two neighboring slices.

    `heights` holds the grid index along z of each source slice, in ascending order.
    """
    below = int(np.clip(np.searchsorted(heights, z, side="right") - 1, 0, len(heights) - 2))
    fraction = np.float32(np.clip((z - heights[below]) / (heights[below + 1] - heights[below]), 0, 1))
    np.multiply(slices[below], 1 - fraction, out=out)
    if fraction:
        out += slices[below + 1] * fraction
