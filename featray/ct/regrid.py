"""Volumes off the patient's axes or with shifted, uneven slices in; upright float32 volumes out.

Two steps that a policy may ask for, before anything else looks at the geometry:

    upright     slices that shift sideways (tilted gantry) or lie unevenly, onto an even, rectangular grid
    resample_to_axes   an oblique volume onto the axes of the patient

Both are linear between true positions. Values are clipped to the window first: interpolating across
metal or padding and clipping afterwards gives other numbers. Outside of the source lies the fill value,
the window's lower bound or else the smallest voxel; the outermost voxel fades into it. Nothing is cut off:
grids grow to hold every source voxel. Ask for the size first, and compare it with the limit.
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

_NEGLIGIBLE = 1e-3
"""Part of a voxel that a source may stick out of its grid: rounding in headers."""


def make_upright_grid(sheared_lps: Affine, origins_lps: NDArray[np.float64]) -> Affine:
    """Return the affine of the even grid for slices at `origins_lps`, (n, 3) in order along the normal.

    x and y grow as in `sheared_lps`, the third axis along their normal. The first and the last slice lie
    on the grid exactly; its step is the one nearest to the median step that allows it. In plane the grid
    begins where the outermost slices do, so that none is cut.
    """
    affine = sheared_lps.copy()
    x, y = affine[:3, 0], affine[:3, 1]
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    along = origins_lps @ normal
    way = along[-1] - along[0]
    affine[:3, 2] = normal * way / max(1, round(way / np.median(np.diff(along))))
    affine[:3, 3] = origins_lps[0]
    sideways = geometry.compute_indices_xyz(affine, origins_lps)[:, :2].min(axis=0)
    affine[:3, 3] += affine[:3, :2] @ sideways
    return affine


def compute_upright_size(volume: Volume) -> tuple[int, int, int]:
    """Return the voxels (z, y, x) of `resample_upright`; the volume's own if it needs none."""
    slices, rows, columns = volume.voxels_zyx.shape
    if volume.slice_origins_lps is None:
        return slices, rows, columns
    x, y, z = geometry.compute_indices_xyz(volume.affine_lps, volume.slice_origins_lps).max(axis=0)
    return round(z) + 1, rows + math.ceil(y - _NEGLIGIBLE), columns + math.ceil(x - _NEGLIGIBLE)


def resample_upright(volume: Volume, window: Window) -> Volume:
    """Return the volume with its slices moved to where `slice_origins_lps` say, on its `affine_lps`.

    Each slice is shifted in plane by its distance to the grid, then slices are blended along the normal.
    Voxels are float32, clipped to the window if there is one. A volume without `slice_origins_lps` is
    returned as it is.
    """
    if volume.slice_origins_lps is None:
        return volume
    places = geometry.compute_indices_xyz(volume.affine_lps, volume.slice_origins_lps)
    out = np.empty(compute_upright_size(volume), np.float32)
    slices = _Slices(volume.voxels_zyx, places, window, out.shape[1:])
    for z, plane in enumerate(out):
        _blend(slices, places[:, 2], z, plane)
    return replace(volume, voxels_zyx=out, slice_origins_lps=None)


def compute_axes_size(volume: Volume) -> tuple[int, int, int]:
    """Return the voxels (z, y, x) of `resample_to_axes`; the volume's own if it needs none."""
    if not geometry.is_oblique(volume.affine_lps):
        z, y, x = volume.voxels_zyx.shape
        return z, y, x
    return _axes_grid(volume)[1]


def resample_to_axes(volume: Volume, window: Window) -> Volume:
    """Return an oblique volume on the axes of the patient: same orientation letters, same spacing.

    The grid holds the box around all voxel centres, in its middle. Trilinear; float32, clipped to the
    window if there is one. A volume that is not oblique is returned as it is.
    """
    if not geometry.is_oblique(volume.affine_lps):
        return volume
    from scipy.ndimage import affine_transform  # 0.2 s to import; most scans are not oblique

    affine, shape = _axes_grid(volume)
    between = np.linalg.solve(volume.affine_lps, affine)  # index on the new grid to index in the source
    out = np.empty(shape, np.float32)
    affine_transform(
        _clipped(volume.voxels_zyx, window),
        between[2::-1, 2::-1],
        between[2::-1, 3],
        output=out,
        order=1,
        mode="grid-constant",
        cval=_fill(volume.voxels_zyx, window),
    )
    return replace(volume, voxels_zyx=out, affine_lps=affine)


def _axes_grid(volume: Volume) -> tuple[Affine, tuple[int, int, int]]:
    """Return affine and (z, y, x) of the grid along the nearest axes that holds every voxel centre."""
    last_xyz = np.array(volume.voxels_zyx.shape[::-1]) - 1
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * last_xyz
    turned = np.eye(4)
    spacing_xyz = geometry.compute_spacing_zyx(volume.affine_lps)[::-1]
    for column, letter in enumerate(geometry.compute_orientation(volume.affine_lps)):
        axis, sign = _axis(letter)
        turned[:, column] = 0
        turned[axis, column] = sign * spacing_xyz[column]
    corners_mm = corners @ volume.affine_lps[:3, :3].T + volume.affine_lps[:3, 3]
    places = geometry.compute_indices_xyz(turned, corners_mm)
    extent = np.ptp(places, axis=0)
    count = np.ceil(extent - _NEGLIGIBLE).astype(int) + 1
    turned[:3, 3] = turned[:3, :3] @ (places.min(axis=0) - (count - 1 - extent) / 2)
    x, y, z = count.tolist()
    return turned, (z, y, x)


def _axis(letter: str) -> tuple[int, float]:
    if letter in geometry.POSITIVE:
        return geometry.POSITIVE.index(letter), 1.0
    return geometry.NEGATIVE.index(letter), -1.0


def _fill(voxels: NDArray[Any], window: Window) -> float:
    return float(voxels.min()) if window is None else window[0]


def _clipped(voxels: NDArray[Any], window: Window) -> NDArray[Any]:
    """Return the voxels clipped, integer where bounds and voxels are, which halves the memory."""
    if window is None:
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind == "i" and all(float(bound).is_integer() for bound in window):
        limits = np.iinfo(voxels.dtype)
        low, high = (int(min(max(bound, limits.min), limits.max)) for bound in window)
        clipped: NDArray[Any] = np.clip(voxels, low, high)
        return clipped
    return copy_clipped(voxels, window, np.empty(voxels.shape, np.float32))


class _Slices:
    """The source slices at their place in the plane of the grid; each is made once while it is needed."""

    def __init__(
        self,
        voxels: NDArray[Any],
        places_xyz: NDArray[np.float64],
        window: Window,
        shape_yx: tuple[int, ...],
    ) -> None:
        self._voxels, self._places, self._window, self._shape = voxels, places_xyz, window, shape_yx
        self._fill = _fill(voxels, window)
        self._made: dict[int, NDArray[np.float32]] = {}

    def __getitem__(self, k: int) -> NDArray[np.float32]:
        if k not in self._made:
            self._made = {other: plane for other, plane in self._made.items() if other == k - 1}
            self._made[k] = self._make(k)
        return self._made[k]

    def _make(self, k: int) -> NDArray[np.float32]:
        plane = copy_clipped(self._voxels[k], self._window, np.empty(self._voxels.shape[1:], np.float32))
        x, y, _ = self._places[k]
        wide = _shifted(plane.T, x, self._shape[1], self._fill).T
        return _shifted(wide, y, self._shape[0], self._fill)


def _shifted(rows: NDArray[np.float32], by: float, count: int, fill: float) -> NDArray[np.float32]:
    """Return `count` rows with row i of the given ones at i + by, linear in between."""
    whole = math.floor(by)
    part = np.float32(by - whole)
    padded = np.pad(rows, ((1, 1), (0, 0)), constant_values=fill)
    moved = padded[1:] * (1 - part) + padded[:-1] * part if part else padded[1:]
    out = np.full((count, rows.shape[1]), fill, np.float32)
    end = min(whole + len(moved), count)
    out[whole:end] = moved[: end - whole]
    return out


def _blend(slices: _Slices, along: NDArray[np.float64], z: int, out: NDArray[np.float32]) -> None:
    """Write the plane at grid index z, between the two slices around it."""
    below = int(np.clip(np.searchsorted(along, z, side="right") - 1, 0, len(along) - 2))
    part = np.float32(np.clip((z - along[below]) / (along[below + 1] - along[below]), 0, 1))
    np.multiply(slices[below], 1 - part, out=out)
    if part:
        out += slices[below + 1] * part
