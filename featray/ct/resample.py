"""Resize a CT volume on its voxel grid: voxels (z, y, x) of any real type in, float32 (z, y, x) out.

Separable, z first: an output slice is a weighted sum of clipped source slices, which is then resized in
plane. Only the slices that carry weight are touched, and memory beside the result is a few planes. Knows
no millimetres, no config and no files.

Conventions, for output index o of m along an axis of n voxels (half-pixel: `align_corners=False`):

    linear   half-pixel  x = clamp((o + 1/2) n/m - 1/2, 0, n - 1). torch `trilinear`, MONAI Resize, OpenCV
                         INTER_LINEAR. Edge voxels are repeated.
             corners     x = o (n - 1)/(m - 1). scipy.ndimage.zoom(order=1), torch align_corners=True.
    nearest  half-pixel  i = floor((o + 1/2) n/m). torch and MONAI `nearest-exact`, not OpenCV INTER_NEAREST.
             corners     i = floor(o (n - 1)/(m - 1) + 1/2). scipy.ndimage.zoom(order=0).
                         Exactly halfway between two voxels the upper one; in the references rounding decides.
    cubic    both        x as for linear but not clamped; Keys' kernel with a = -0.75 on floor(x) - 1 … + 2,
                         indices clamped. torch `bicubic`, OpenCV INTER_CUBIC, here along z as well.
                         It overshoots: values may leave the clip window by up to a few per cent.
    area     -           mean over [o n/m, (o + 1) n/m), voxels counted by the fraction covered. OpenCV
                         INTER_AREA when shrinking; torch `area` (adaptive average) when m divides n.
                         Corner alignment means nothing for a mean over a box: `align_corners` is ignored.

Of these only `area` smooths before it shrinks; none of the named references does either. With corners and
m = 1 the one position is the first voxel, as in torch and scipy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["linear", "area", "nearest", "cubic"]


@dataclass(frozen=True)
class Kernel:
    """How the value of an output voxel follows from the source voxels around it.

    The module docstring gives the formula and the reference of each combination.

    Attributes:
        interpolation: Name of the kernel.
        align_corners: True maps the centers of the corner voxels onto each other. False maps the outer edges
            of the two grids onto each other (half-pixel centers).
    """

    interpolation: Interpolation = "linear"
    align_corners: bool = field(default=False, kw_only=True)


LINEAR = Kernel()


_Taps = tuple[NDArray[np.intp], NDArray[np.float64]]
"""Source indices and weights, both (m, k): out[o] is the sum of weights[o, k] * source[indices[o, k]]."""

_Plane = NDArray[np.float32]
_PlaneResizer = Callable[[_Plane, _Plane], None]

_CUBIC_A = -0.75
"""Keys' parameter as torch and OpenCV have it; -0.5 is another kernel (PIL, MATLAB)."""


def resize(
    voxels_zyx: NDArray[np.generic],
    size_zyx: tuple[int, int, int],
    *,
    kernel: Kernel = LINEAR,
    clip: tuple[float, float] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the volume on a grid of `size_zyx` voxels that covers the same space.

    Args:
        voxels_zyx: Integer or real values, at least one voxel along each axis; any strides, either byte
            order, may be read-only.
        size_zyx: Voxels of the result.
        kernel: Interpolation and alignment of the corners.
        clip: Lower and upper bound applied to the source voxels, before any interpolation.
        out: C-contiguous float32 of `size_zyx` that receives the result (and is returned).

    The result depends on the values alone: two files of one scan stored in different axis orders or
    directions give bit-identical results once they are turned the same way.

    Raises:
        ValueError: `voxels_zyx` is no volume of real numbers, a size is below 1, or `out` does not fit.
    """
    _check(voxels_zyx, size_zyx)
    result = np.empty(size_zyx, np.float32) if out is None else _checked_out(out, size_zyx)
    if voxels_zyx.shape == result.shape:
        return copy_clipped(voxels_zyx, clip, result)  # every kernel is the identity at equal size
    indices, weights = _taps(voxels_zyx.shape[0], size_zyx[0], kernel)
    resize_plane = _plane_resizer(voxels_zyx.shape[1:], size_zyx[1:], kernel)
    slices = _Slices(voxels_zyx, clip)
    for z, plane in enumerate(result):
        used = np.flatnonzero(weights[z])
        resize_plane(slices.weighted_sum(indices[z, used], weights[z, used]), plane)
    return result


def copy_clipped(
    voxels_zyx: NDArray[np.generic], clip: tuple[float, float] | None, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Copy voxels into `out` of the same shape as float32, clipped to the bounds if there are any."""
    np.copyto(out, voxels_zyx, casting="same_kind")
    if clip is not None:
        np.clip(out, *clip, out=out)
    return out


def _check(voxels_zyx: NDArray[np.generic], size_zyx: tuple[int, int, int]) -> None:
    if voxels_zyx.ndim != 3 or 0 in voxels_zyx.shape or voxels_zyx.dtype.kind not in "iufb":
        raise ValueError(
            f"expected a volume (z, y, x) of real numbers, got shape {voxels_zyx.shape}, {voxels_zyx.dtype}"
        )
    if len(size_zyx) != 3 or min(size_zyx) < 1:
        raise ValueError(f"expected a size (z, y, x) of at least 1 each, got {tuple(size_zyx)}")


def _checked_out(out: NDArray[np.float32], size_zyx: tuple[int, int, int]) -> NDArray[np.float32]:
    # OpenCV silently writes to a copy when a destination does not fit.
    if out.shape != tuple(size_zyx) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected C-contiguous float32 {tuple(size_zyx)}, got {out.dtype} {out.shape}")
    return out


class _Slices:
    """Weighted sums of a volume's clipped slices, through reused buffers.

    Slices are read in the order in which memory holds them, which is several times faster than reading
    mirrored or transposed; the finished sum is turned upright afterwards, which changes no value.
    """

    def __init__(self, voxels_zyx: NDArray[np.generic], clip: tuple[float, float] | None) -> None:
        self._clip = clip
        _, step_y, step_x = voxels_zyx.strides
        self._flip_code = _flip_code(step_y < 0, step_x < 0)
        view = voxels_zyx[:, :: -1 if step_y < 0 else 1, :: -1 if step_x < 0 else 1]
        self._transposed = abs(step_y) < abs(step_x)
        self._view = view.transpose(0, 2, 1) if self._transposed else view
        work = np.int16 if _stays_int16(voxels_zyx.dtype, clip) else np.float32
        self._loaded: NDArray[Any] = np.empty((2, *self._view.shape[1:]), work)
        self._sum = np.empty(self._view.shape[1:], np.float32)
        self._turned = np.empty(voxels_zyx.shape[1:], np.float32)
        self._mirrored = np.empty(voxels_zyx.shape[1:], np.float32)

    def weighted_sum(self, indices: NDArray[np.intp], weights: NDArray[np.float64]) -> _Plane:
        """Return the sum of weight times clipped slice, (y, x); valid until the next call."""
        if len(indices) == 1:
            np.multiply(self._load(indices[0], 0), np.float32(weights[0]), out=self._sum)
        else:
            self._add(self._load(indices[0], 0), weights[0], self._load(indices[1], 1), weights[1])
        for index, weight in zip(indices[2:], weights[2:], strict=True):
            self._add(self._load(index, 0), weight, self._sum, 1.0)
        return self._upright(self._sum)

    def _load(self, index: np.intp, slot: int) -> NDArray[Any]:
        """Return source slice `index`, clipped, as contiguous native numbers in buffer `slot`."""
        buffer: NDArray[Any] = self._loaded[slot]
        if self._clip is None:
            np.copyto(buffer, self._view[index], casting="same_kind")
        elif buffer.dtype == np.int16:
            np.clip(self._view[index], int(self._clip[0]), int(self._clip[1]), out=buffer)
        else:
            copy_clipped(self._view[index], self._clip, buffer)
        return buffer

    def _add(
        self, first: NDArray[Any], first_weight: float, second: NDArray[Any], second_weight: float
    ) -> None:
        cv2.addWeighted(first, first_weight, second, second_weight, 0, dst=self._sum, dtype=cv2.CV_32F)

    def _upright(self, plane: _Plane) -> _Plane:
        if self._transposed:
            cv2.transpose(plane, dst=self._turned)
            plane = self._turned
        if self._flip_code is not None:
            cv2.flip(plane, self._flip_code, dst=self._mirrored)
            plane = self._mirrored
        return plane


def _flip_code(rows: bool, columns: bool) -> int | None:
    """Return OpenCV's code: 0 mirrors the rows' order, 1 the columns', -1 both."""
    if rows and columns:
        return -1
    return 0 if rows else 1 if columns else None


def _stays_int16(dtype: np.dtype[np.generic], clip: tuple[float, float] | None) -> bool:
    """Return whether slices can be clipped as int16 without changing what the bounds mean."""
    if dtype.newbyteorder("=") != np.int16:
        return False
    return clip is None or all(bound == int(bound) and -32768 <= bound <= 32767 for bound in clip)


def _plane_resizer(shape_yx: tuple[int, ...], size_yx: tuple[int, ...], kernel: Kernel) -> _PlaneResizer:
    """Return what resizes one plane (y, x) into another."""
    if kernel == LINEAR:
        return _linear_half_pixel
    taps_y = _taps(shape_yx[0], size_yx[0], kernel)
    taps_x = _taps(shape_yx[1], size_yx[1], kernel)

    def gather(plane: _Plane, out: _Plane) -> None:
        columns = cv2.transpose(_gather_rows(plane, taps_y))
        cv2.transpose(_gather_rows(columns, taps_x), dst=out)

    return gather


def _linear_half_pixel(plane: _Plane, out: _Plane) -> None:
    cv2.resize(plane, out.shape[::-1], dst=out, interpolation=cv2.INTER_LINEAR)


def _gather_rows(plane: NDArray[Any], taps: _Taps) -> _Plane:
    """Return rows that are weighted sums of the plane's rows."""
    indices, weights = taps[0], taps[1].astype(np.float32)
    result: _Plane = plane[indices[:, 0]] * weights[:, :1]
    for tap in range(1, indices.shape[1]):
        rows = plane[indices[:, tap]]
        rows *= weights[:, tap, None]
        result += rows
    return result


def _taps(n: int, m: int, kernel: Kernel) -> _Taps:
    """Return indices and weights from n voxels to m along one axis."""
    if kernel.interpolation == "nearest":
        return _nearest_taps(n, m, align_corners=kernel.align_corners)
    if kernel.interpolation == "area":
        return _area_taps(n, m)
    positions = _positions(n, m, align_corners=kernel.align_corners)
    return _linear_taps(n, positions) if kernel.interpolation == "linear" else _cubic_taps(n, positions)


def _positions(n: int, m: int, *, align_corners: bool) -> NDArray[np.float64]:
    """Return where the m output voxels lie, in source voxels."""
    o = np.arange(m, dtype=np.float64)
    if align_corners:
        return o * ((n - 1) / (m - 1) if m > 1 else 0.0)
    return (o + 0.5) * (n / m) - 0.5


def _linear_taps(n: int, positions: NDArray[np.float64]) -> _Taps:
    inside = np.clip(positions, 0, n - 1)
    lower = np.floor(inside).astype(np.intp)
    fraction = inside - lower
    indices = np.stack([lower, np.minimum(lower + 1, n - 1)], axis=1)
    return indices, np.stack([1 - fraction, fraction], axis=1)


def _cubic_taps(n: int, positions: NDArray[np.float64]) -> _Taps:
    lower = np.floor(positions).astype(np.intp)
    offsets = np.arange(-1, 3)
    distance = np.abs((positions - lower)[:, None] - offsets)
    a = _CUBIC_A
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    indices = np.clip(lower[:, None] + offsets, 0, n - 1)
    return indices, np.where(distance <= 1, near, far)


def _nearest_taps(n: int, m: int, *, align_corners: bool) -> _Taps:
    # Whole-number arithmetic, so that a position exactly between two voxels never depends on rounding.
    o = np.arange(m, dtype=np.intp)
    if not align_corners:
        index = (2 * o + 1) * n // (2 * m)
    else:
        index = (2 * o * (n - 1) + (m - 1)) // (2 * (m - 1)) if m > 1 else np.zeros(1, np.intp)
    return index[:, None], np.ones((m, 1))


def _area_taps(n: int, m: int) -> _Taps:
    # In units of 1/m voxel every edge is a whole number, so no voxel gets a weight by rounding.
    start = np.arange(m, dtype=np.intp)[:, None] * n
    indices = start // m + np.arange(-(-n // m) + 1)
    covered = np.minimum(start + n, (indices + 1) * m) - np.maximum(start, indices * m)
    return np.minimum(indices, n - 1), np.maximum(covered, 0) / n
