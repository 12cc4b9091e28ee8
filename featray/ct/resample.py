"""Resize a CT volume on its voxel grid, without reference to mm.

In: voxels (z, y, x) of any real dtype. Out: float32 (z, y, x). The resampling is separable. Along z, each
output slice is a weighted sum of clipped source slices; the sum is then resized in its plane. Source slices
of weight 0 are not read. Apart from the result, only a few planes are in memory. This module must not know
the configuration or files.

Conventions for output index o of m along an axis of n voxels (half-pixel: `align_corners=False`):

    linear   half-pixel  x = clamp((o + 1/2) n/m - 1/2, 0, n - 1). torch `trilinear`, MONAI Resize, OpenCV
                         INTER_LINEAR. Edge voxels are repeated.
             corners     x = o (n - 1)/(m - 1). scipy.ndimage.zoom(order=1), torch align_corners=True.
    nearest  half-pixel  i = floor((o + 1/2) n/m). torch and MONAI `nearest-exact`, not OpenCV INTER_NEAREST.
             corners     i = floor(o (n - 1)/(m - 1) + 1/2). scipy.ndimage.zoom(order=0). Exactly halfway
                         between two voxels the upper one is used; in scipy the rounding error decides.
    cubic    both        x as for linear, but not clamped. Cubic convolution (Keys 1981) with a = -0.75 over
                         the voxels floor(x) - 1 … floor(x) + 2, with clamped indices. torch `bicubic`, OpenCV
                         INTER_CUBIC; here also along z. It overshoots: values can leave the clip window by a
                         few percent.
    area     -           Mean over [o n/m, (o + 1) n/m), with each voxel weighted by the fraction of it that
                         is covered. OpenCV INTER_AREA if the size shrinks; torch `area` (adaptive average) if
                         m divides n. `align_corners` is ignored, because it has no meaning for this mean.

Only `area` averages over all source voxels when it shrinks. The other kernels do not smooth the volume first,
and neither do the references named above. With corners and m = 1 the position is the first voxel, as in torch
and scipy.

Reference: R. G. Keys, "Cubic convolution interpolation for digital image processing", IEEE Transactions on
Acoustics, Speech, and Signal Processing 29(6), 1981.
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
"""Source indices and weights (m, k): out[o] is the sum over k of weights[o, k] * source[indices[o, k]]."""

_Plane = NDArray[np.float32]
_PlaneResizer = Callable[[_Plane, _Plane], None]

_CUBIC_A = -0.75
"""The parameter a of the cubic kernel (Keys 1981), as in torch and OpenCV. PIL and MATLAB use -0.5."""


def resize(
    voxels_zyx: NDArray[np.generic],
    size_zyx: tuple[int, int, int],
    *,
    kernel: Kernel = LINEAR,
    clip: tuple[float, float] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the volume on a grid of `size_zyx` voxels that covers the same space.

    The result does not depend on the memory layout of the voxels. Two files of one scan that store the axes
    in different orders or directions give bit-identical results after they are reoriented.

    Args:
        voxels_zyx: Integers or real numbers, at least one voxel along each axis. Any strides and byte order
            are accepted, and the array may be read-only.
        size_zyx: Number of voxels of the result along each axis.
        kernel: Interpolation and alignment of the corners.
        clip: Lower and upper bound to which the source voxels are clipped before any interpolation.
        out: C-contiguous float32 array of shape `size_zyx`, into which the result is written and which is
            then returned; None allocates an array.

    Raises:
        ValueError: `voxels_zyx` is not a volume of real numbers, a size is below 1, or the shape, dtype or
            memory order of `out` is wrong.
    """
    _check_input(voxels_zyx, size_zyx)
    if out is not None:
        _check_out(out, size_zyx)
    result = np.empty(size_zyx, np.float32) if out is None else out
    if voxels_zyx.shape == result.shape:
        return copy_clipped(voxels_zyx, clip, result)  # every kernel is the identity at equal size
    indices, weights = _compute_taps(voxels_zyx.shape[0], size_zyx[0], kernel)
    resize_plane = _make_plane_resizer(voxels_zyx.shape[1:], size_zyx[1:], kernel)
    slices = _SliceBlender(voxels_zyx, clip)
    for z, plane in enumerate(result):
        used = np.flatnonzero(weights[z])
        resize_plane(slices.blend(indices[z, used], weights[z, used]), plane)
    return result


def copy_clipped(
    voxels_zyx: NDArray[np.generic], clip: tuple[float, float] | None, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Copy the voxels as float32 into `out` of the same shape, clip them there, and return `out`.

    `clip` holds the lower and the upper bound; None copies without clipping.
    """
    np.copyto(out, voxels_zyx, casting="same_kind")
    if clip is not None:
        np.clip(out, *clip, out=out)
    return out


def _check_input(voxels_zyx: NDArray[np.generic], size_zyx: tuple[int, int, int]) -> None:
    if voxels_zyx.ndim != 3 or 0 in voxels_zyx.shape or voxels_zyx.dtype.kind not in "iufb":
        raise ValueError(
            f"expected a volume (z, y, x) of real numbers, got shape {voxels_zyx.shape}, {voxels_zyx.dtype}"
        )
    if len(size_zyx) != 3 or min(size_zyx) < 1:
        raise ValueError(f"expected a size (z, y, x) of at least 1 each, got {tuple(size_zyx)}")


def _check_out(out: NDArray[np.float32], size_zyx: tuple[int, int, int]) -> None:
    # OpenCV silently writes to a copy if the shape or dtype of the destination is wrong.
    if out.shape != tuple(size_zyx) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected C-contiguous float32 {tuple(size_zyx)}, got {out.dtype} {out.shape}")


class _SliceBlender:
    """Computes weighted sums of the clipped slices of a volume, in buffers that all calls share.

    Slices are read in the order in which memory holds them, which is several times faster than reading them
    mirrored or transposed. The finished sum is then transposed and flipped to (y, x), which changes no value.
    """

    def __init__(self, voxels_zyx: NDArray[np.generic], clip: tuple[float, float] | None) -> None:
        self._clip = clip
        _, step_y, step_x = voxels_zyx.strides
        self._flip_code = _choose_flip_code(rows=step_y < 0, columns=step_x < 0)
        view = voxels_zyx[:, :: -1 if step_y < 0 else 1, :: -1 if step_x < 0 else 1]
        self._transposed = abs(step_y) < abs(step_x)
        self._view = view.transpose(0, 2, 1) if self._transposed else view
        dtype = np.int16 if _can_clip_as_int16(voxels_zyx.dtype, clip) else np.float32
        self._buffers: NDArray[Any] = np.empty((2, *self._view.shape[1:]), dtype)
        self._sum = np.empty(self._view.shape[1:], np.float32)
        self._transposed_sum = np.empty(voxels_zyx.shape[1:], np.float32)
        self._flipped_sum = np.empty(voxels_zyx.shape[1:], np.float32)

    def blend(self, indices: NDArray[np.intp], weights: NDArray[np.float64]) -> _Plane:
        """Return the sum (y, x) of weight times clipped slice; the array is valid until the next call."""
        if len(indices) == 1:
            np.multiply(self._load(indices[0], 0), np.float32(weights[0]), out=self._sum)
        else:
            self._add(self._load(indices[0], 0), weights[0], self._load(indices[1], 1), weights[1])
        for index, weight in zip(indices[2:], weights[2:], strict=True):
            self._add(self._load(index, 0), weight, self._sum, 1.0)
        return self._restore_orientation(self._sum)

    def _load(self, index: np.intp, slot: int) -> NDArray[Any]:
        """Return source slice `index`, clipped, in buffer `slot`: contiguous, native byte order."""
        buffer: NDArray[Any] = self._buffers[slot]
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
        """Write `first_weight * first + second_weight * second` to the sum."""
        cv2.addWeighted(first, first_weight, second, second_weight, 0, dst=self._sum, dtype=cv2.CV_32F)

    def _restore_orientation(self, plane: _Plane) -> _Plane:
        """Return the plane as (y, x), from the order in which memory holds the slices."""
        if self._transposed:
            cv2.transpose(plane, dst=self._transposed_sum)
            plane = self._transposed_sum
        if self._flip_code is not None:
            cv2.flip(plane, self._flip_code, dst=self._flipped_sum)
            plane = self._flipped_sum
        return plane


def _choose_flip_code(*, rows: bool, columns: bool) -> int | None:
    """Return the flip code of OpenCV: 0 reverses the order of the rows, 1 of the columns, -1 of both."""
    if rows and columns:
        return -1
    return 0 if rows else 1 if columns else None


def _can_clip_as_int16(dtype: np.dtype[np.generic], clip: tuple[float, float] | None) -> bool:
    """Return whether slices can be clipped as int16: the dtype is int16 and so are the bounds."""
    if dtype.newbyteorder("=") != np.int16:
        return False
    return clip is None or all(bound == int(bound) and -32768 <= bound <= 32767 for bound in clip)


def _make_plane_resizer(shape_yx: tuple[int, ...], size_yx: tuple[int, ...], kernel: Kernel) -> _PlaneResizer:
    """Return a function that resizes a plane of `shape_yx` into a second plane of `size_yx`."""
    if kernel == LINEAR:
        return _resize_linear
    taps_y = _compute_taps(shape_yx[0], size_yx[0], kernel)
    taps_x = _compute_taps(shape_yx[1], size_yx[1], kernel)

    def gather(plane: _Plane, out: _Plane) -> None:
        columns = cv2.transpose(_gather_rows(plane, taps_y))
        cv2.transpose(_gather_rows(columns, taps_x), dst=out)

    return gather


def _resize_linear(plane: _Plane, out: _Plane) -> None:
    cv2.resize(plane, out.shape[::-1], dst=out, interpolation=cv2.INTER_LINEAR)


def _gather_rows(plane: NDArray[Any], taps: _Taps) -> _Plane:
    """Return rows (m, x) that are weighted sums of the rows (n, x) of the plane."""
    indices, weights = taps[0], taps[1].astype(np.float32)
    result: _Plane = plane[indices[:, 0]] * weights[:, :1]
    for tap in range(1, indices.shape[1]):
        rows = plane[indices[:, tap]]
        rows *= weights[:, tap, None]
        result += rows
    return result


def _compute_taps(n: int, m: int, kernel: Kernel) -> _Taps:
    """Return the source indices and weights for a resize from n to m voxels along one axis."""
    if kernel.interpolation == "nearest":
        return _compute_nearest_taps(n, m, align_corners=kernel.align_corners)
    if kernel.interpolation == "area":
        return _compute_area_taps(n, m)
    positions = _compute_positions(n, m, align_corners=kernel.align_corners)
    if kernel.interpolation == "linear":
        return _compute_linear_taps(n, positions)
    return _compute_cubic_taps(n, positions)


def _compute_positions(n: int, m: int, *, align_corners: bool) -> NDArray[np.float64]:
    """Return the positions (m,) of the centers of the output voxels, as fractional source indices."""
    o = np.arange(m, dtype=np.float64)
    if align_corners:
        return o * ((n - 1) / (m - 1) if m > 1 else 0.0)
    return (o + 0.5) * (n / m) - 0.5


def _compute_linear_taps(n: int, positions: NDArray[np.float64]) -> _Taps:
    inside = np.clip(positions, 0, n - 1)
    lower = np.floor(inside).astype(np.intp)
    fraction = inside - lower
    indices = np.stack([lower, np.minimum(lower + 1, n - 1)], axis=1)
    return indices, np.stack([1 - fraction, fraction], axis=1)


def _compute_cubic_taps(n: int, positions: NDArray[np.float64]) -> _Taps:
    lower = np.floor(positions).astype(np.intp)
    offsets = np.arange(-1, 3)
    distance = np.abs((positions - lower)[:, None] - offsets)
    a = _CUBIC_A
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    indices = np.clip(lower[:, None] + offsets, 0, n - 1)
    return indices, np.where(distance <= 1, near, far)


def _compute_nearest_taps(n: int, m: int, *, align_corners: bool) -> _Taps:
    # Integer arithmetic: a position exactly between two voxels must not depend on rounding.
    o = np.arange(m, dtype=np.intp)
    if not align_corners:
        index = (2 * o + 1) * n // (2 * m)
    else:
        index = (2 * o * (n - 1) + (m - 1)) // (2 * (m - 1)) if m > 1 else np.zeros(1, np.intp)
    return index[:, None], np.ones((m, 1))


def _compute_area_taps(n: int, m: int) -> _Taps:
    # In units of 1/m voxel every edge is an integer, so no voxel gets a weight because of rounding.
    start = np.arange(m, dtype=np.intp)[:, None] * n
    indices = start // m + np.arange(-(-n // m) + 1)
    covered = np.minimum(start + n, (indices + 1) * m) - np.maximum(start, indices * m)
    return np.minimum(indices, n - 1), np.maximum(covered, 0) / n
