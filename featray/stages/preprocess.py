"""Preprocess: a CT `Volume` in, the model's input as float32 patches and their origins out.

The steps, in order: reorient to `orientation`, clip to `window`, resample to `spacing`, bring to `size` by
`fit`, and map the window onto `scale`. Knows no files, no model and no engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.config import PreprocessConfig
from featray.ct import geometry
from featray.ct.reorient import reorient
from featray.ct.resample import Kernel, copy_clipped, resize
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

ShapeZYX = tuple[int, int, int]
Window = tuple[float, float] | None


@dataclass(frozen=True)
class ModelInput:
    """The model input of one scan.

    Attributes:
        tensor: float32 (n, z, y, x), C-contiguous; n patches, 1 for a whole-volume input.
        origins: int32 (n, 3), voxel index (z, y, x) of the first voxel of each patch in the preprocessed
            volume; (0, 0, 0) for a whole-volume input, also if it is cropped or padded.
    """

    tensor: NDArray[np.float32]
    origins: NDArray[np.int32]


def preprocess(
    volume: Volume,
    config: PreprocessConfig,
    out: NDArray[np.float32] | None = None,
    center_lps: tuple[float, ...] | None = None,
) -> ModelInput:
    """Return the model input of one scan.

    - spacing: the volume is resized to m = round(n * spacing / target) voxels, at least 1, between its outer
      edges. The extent is kept exactly. The resulting spacing n * spacing / m differs from the target only by
      the rounding of m, as in nnU-Net. With align_corners the volume is resized between its corner voxels, as
      `scipy.ndimage.zoom(voxels, spacing / target)` does, and the resulting spacing is
      (n - 1) * spacing / (m - 1).
    - stretch: the volume is resized to `size`; if `spacing` is set too, this is a second interpolation.
    - crop_pad: the piece is centered as in MONAI ResizeWithPadOrCrop: n // 2 - size // 2 voxels are cut off
      in front (n > size), or (size - n) // 2 voxels are added in front (n < size).
    - patches: patches start at 0, stride, 2 stride, … in C order over (z, y, x). If voxels remain at the end,
      a last patch is shifted inwards so that it ends at the volume's end. An axis shorter than the patch is
      padded at its end, so that origins are voxel indices of the volume.
    - padding has the value of the window's lower bound; with window null, the smallest value of the volume
      after the spacing step.
    - window null: values are neither clipped nor scaled.

    Args:
        volume: The volume as it was read; its voxels are not changed.
        config: The preprocessing.
        out: C-contiguous float32 array with the shape that `input_shape` returns; it becomes the tensor. It
            may be shared memory.
        center_lps: Point (x, y, z) in mm, frame LPS. The nearest voxel becomes the middle of a crop_pad
            piece; None means the middle of the volume.

    Raises:
        ScanError: `Reason.PREPROCESS`; the volume cannot be preprocessed, or the point lies outside of it.
        ValueError: `out` has another shape, type or layout.
    """
    oriented = reorient(volume, config.orientation)
    voxels = oriented.voxels_zyx
    if voxels.dtype.kind not in "iufb":
        raise _make_error(f"expected voxels that are real numbers, got {voxels.dtype}")
    shape = input_shape(config, voxels.shape, oriented.spacing_zyx)
    tensor = np.empty(shape, np.float32) if out is None else _check_out(out, shape)
    resampled = resampled_shape(config, voxels.shape, oriented.spacing_zyx)
    if config.size is None or config.fit == "stretch":
        _stretch(voxels, resampled, config, tensor[0])
        starts = [(0, 0, 0)]
    else:
        middle = None if center_lps is None else _resampled_index(oriented, resampled, center_lps, config)
        starts = _cut_pieces(voxels, resampled, config, tensor, middle)
    _map_onto_scale(tensor, config)
    origins = starts if config.fit == "patches" else [(0, 0, 0)]
    return ModelInput(tensor, np.array(origins, np.int32))


def input_shape(
    config: PreprocessConfig, shape_zyx: tuple[int, ...], spacing_zyx: tuple[float, float, float]
) -> tuple[int, int, int, int]:
    """Return the shape (n, z, y, x) of the model input that `preprocess` makes, from facts of the header.

    Args:
        config: The preprocessing.
        shape_zyx: Number of voxels of the volume along the axes of `config.orientation`.
        spacing_zyx: Voxel spacing in mm along the same axes; only used with `config.spacing`.

    Raises:
        ScanError: `Reason.PREPROCESS`; for the same volumes as `preprocess`.
    """
    shape = resampled_shape(config, shape_zyx, spacing_zyx)
    if config.size is None:
        return (1, *shape)
    if config.fit != "patches":
        return (1, *config.size)
    return (math.prod(map(len, _patch_starts(config, shape))), *config.size)


def input_spacing(
    config: PreprocessConfig, shape_zyx: ShapeZYX, spacing_zyx: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the voxel spacing (z, y, x) of the model input in mm.

    If n voxels of s mm become m voxels and the extent is kept, their spacing is n s / m. With align_corners
    (which has no effect on `area`) the centers of the corner voxels are kept, and the spacing is
    (n - 1) s / (m - 1). Arguments and errors are those of `input_shape`.
    """
    shape = resampled_shape(config, shape_zyx, spacing_zyx)
    if config.size is not None and config.fit == "stretch":
        shape = config.size
    corners = config.align_corners and config.interpolation != "area"
    z, y, x = (
        step * (n - 1) / (m - 1) if corners and n > 1 and m > 1 else step * n / m
        for n, m, step in zip(shape_zyx, shape, spacing_zyx, strict=True)
    )
    return (z, y, x)


def resampled_shape(
    config: PreprocessConfig, shape_zyx: tuple[int, ...], spacing_zyx: tuple[float, float, float]
) -> ShapeZYX:
    """Return the shape (z, y, x) after the spacing step.

    With `spacing` set, `preprocess` allocates a float32 array of this shape. Check it against the limits
    before decoding, because a header may claim any spacing. Arguments and errors are those of `input_shape`.
    """
    if len(shape_zyx) != 3 or min(shape_zyx) < 1:
        raise _make_error(f"expected a volume (z, y, x) of at least one voxel, got shape {tuple(shape_zyx)}")
    if config.spacing is None:
        return (shape_zyx[0], shape_zyx[1], shape_zyx[2])
    if not all(math.isfinite(step) and step > 0 for step in spacing_zyx):
        raise _make_error(
            f"expected a known voxel spacing to resample to {list(config.spacing)} mm, got "
            f"{[float(step) for step in spacing_zyx]}; set "
            "preprocess.spacing to null to keep the native spacing"
        )
    z, y, x = (
        max(1, round(count * step / target))
        for count, step, target in zip(shape_zyx, spacing_zyx, config.spacing, strict=True)
    )
    return (z, y, x)


def _make_error(message: str) -> ScanError:
    return ScanError(Reason.PREPROCESS, message)


def _check_out(out: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected C-contiguous float32 {shape}, got {out.dtype} {out.shape}")
    return out


def _stretch(
    voxels: NDArray[np.generic], resampled: ShapeZYX, config: PreprocessConfig, out: NDArray[np.float32]
) -> None:
    clip = config.window
    if out.shape != resampled:
        voxels, clip = _resample_to_spacing(voxels, resampled, config)
    _resize(voxels, config, clip, out)


def _resampled_index(
    oriented: Volume, resampled: ShapeZYX, point_lps: tuple[float, ...], config: PreprocessConfig
) -> list[float]:
    """Return the fractional index (z, y, x) of a point in the volume after the spacing step."""
    shape = oriented.voxels_zyx.shape
    index = geometry.compute_indices_xyz(oriented.affine_lps, np.array([point_lps]))[0, ::-1].tolist()
    if any(not -0.5 <= at <= count - 0.5 for at, count in zip(index, shape, strict=True)):
        raise _make_error(
            "the center point of the manifest lies outside of the scan; check source.center_frame"
        )
    keeps_corners = config.align_corners and config.interpolation != "area"  # a mean has no corners
    return [
        at * (m - 1) / max(n - 1, 1) if keeps_corners else (at + 0.5) * m / n - 0.5
        for at, n, m in zip(index, shape, resampled, strict=True)
    ]


def _cut_pieces(
    voxels: NDArray[np.generic],
    resampled: ShapeZYX,
    config: PreprocessConfig,
    tensor: NDArray[np.float32],
    middle: list[float] | None,
) -> list[ShapeZYX]:
    """Fill the tensor with pieces of the volume and return the start (z, y, x) of each."""
    voxels, clip = _resample_to_spacing(voxels, resampled, config)
    if config.fit == "patches":
        starts = list(itertools.product(*_patch_starts(config, resampled)))
    else:
        size = _size_zyx(tensor)
        starts = [_centered_start(resampled, size) if middle is None else _start_around(middle, size)]
    padding = float(voxels.min()) if config.window is None else config.window[0]
    for patch, start in zip(tensor, starts, strict=True):
        _cut(voxels, start, clip, padding, patch)
    return starts


def _resample_to_spacing(
    voxels: NDArray[np.generic], resampled: ShapeZYX, config: PreprocessConfig
) -> tuple[NDArray[np.generic], Window]:
    """Return the volume at the target spacing, and the window that has yet to be applied."""
    if voxels.shape == resampled:
        return voxels, config.window
    out = np.empty(resampled, np.float32)
    _resize(voxels, config, config.window, out)
    return out, None


def _resize(
    voxels: NDArray[np.generic], config: PreprocessConfig, clip: Window, out: NDArray[np.float32]
) -> None:
    resize(
        voxels,
        _size_zyx(out),
        kernel=Kernel(config.interpolation, align_corners=config.align_corners),
        clip=clip,
        out=out,
    )


def _size_zyx(array: NDArray[np.float32]) -> ShapeZYX:
    z, y, x = array.shape[-3:]
    return (z, y, x)


def _patch_starts(config: PreprocessConfig, shape_zyx: ShapeZYX) -> tuple[list[int], list[int], list[int]]:
    """Return the starts along z, y and x; every voxel is in a patch unless the stride exceeds the size."""
    assert config.size is not None, "the config requires a size for patches"
    z, y, x = zip(shape_zyx, config.size, config.stride or config.size, strict=True)
    return _axis_starts(*z), _axis_starts(*y), _axis_starts(*x)


def _axis_starts(count: int, size: int, stride: int) -> list[int]:
    last = max(count - size, 0)
    starts = list(range(0, last + 1, stride))
    return starts if starts[-1] == last else [*starts, last]


def _centered_start(shape_zyx: ShapeZYX, size_zyx: ShapeZYX) -> ShapeZYX:
    """Return the start of a centered piece; negative along axes where it is larger than the volume."""
    z, y, x = (
        count // 2 - size // 2 if count > size else -((size - count) // 2)
        for count, size in zip(shape_zyx, size_zyx, strict=True)
    )
    return (z, y, x)


def _start_around(middle: list[float], size_zyx: ShapeZYX) -> ShapeZYX:
    """Return the start of the piece whose middle voxel is nearest to the index `middle`."""
    z, y, x = (math.floor(at + 0.5) - size // 2 for at, size in zip(middle, size_zyx, strict=True))
    return (z, y, x)


def _cut(
    voxels: NDArray[np.generic], start: Sequence[int], clip: Window, padding: float, out: NDArray[np.float32]
) -> None:
    """Copy the piece that starts at voxel `start` into `out`; pad it outside of the volume."""
    begins = [max(at, 0) for at in start]
    ends = [min(at + size, count) for at, size, count in zip(start, out.shape, voxels.shape, strict=True)]
    source = tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))
    target = tuple(slice(begin - at, end - at) for begin, end, at in zip(begins, ends, start, strict=True))
    piece = voxels[source]
    if piece.shape != out.shape:
        out.fill(padding)
    copy_clipped(piece, clip, out[target])


def _map_onto_scale(tensor: NDArray[np.float32], config: PreprocessConfig) -> None:
    """Map the window linearly onto the scale, in place; the lower bound is mapped exactly."""
    if config.window is None:
        return
    (low, high), (first, last) = config.window, config.scale
    for plane in tensor.reshape(-1, *tensor.shape[2:]):  # one plane stays in the CPU's cache
        plane -= low
        plane *= (last - first) / (high - low)
        if first:
            plane += first
