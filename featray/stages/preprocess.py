"""From a CT volume to the model's input: a `Volume` in, float32 patches and their origins out.

Steps, in the order of the config's fields: turn to `orientation`; clip to `window`; resample to `spacing`;
bring to `size` by `fit`; map the window onto `scale`. Knows no files, no model and no engine.
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

_Shape = tuple[int, int, int]
_Window = tuple[float, float] | None


@dataclass(frozen=True)
class ModelInput:
    """What the network sees of one scan.

    Attributes:
        tensor: (n, z, y, x) float32, C-contiguous; n patches, 1 for a whole-volume input.
        origins: (n, 3) int32; voxel index (z, y, x) of each patch's first voxel in the preprocessed
            volume. A whole-volume input, cropped or padded or not, has 0, 0, 0.
    """

    tensor: NDArray[np.float32]
    origins: NDArray[np.int32]


def preprocess(
    volume: Volume,
    config: PreprocessConfig,
    out: NDArray[np.float32] | None = None,
    center_lps: tuple[float, ...] | None = None,
) -> ModelInput:
    """Return the model's input for one scan.

    - spacing: the volume is resized to m = round(n * spacing / wanted) voxels, at least 1, between its outer
      edges: the extent is kept exactly, and the spacing reached, n * spacing / m, differs from the wanted one
      by that rounding alone, as in nnU-Net. With align_corners it is resized between its corner voxels, as
      `scipy.ndimage.zoom(voxels, spacing / wanted)` does, and reaches (n - 1) * spacing / (m - 1).
    - stretch: resized to `size`; a second interpolation when `spacing` is set too.
    - crop_pad: centred, as in MONAI ResizeWithPadOrCrop: n // 2 - size // 2 voxels are cut off in front
      (n > size), or (size - n) // 2 put in front (n < size).
    - patches: starts at 0, stride, 2 stride … in C order over (z, y, x); what is left at the end gets a last
      patch shifted inwards to end at the volume's end. An axis shorter than the patch is padded behind,
      so that origins count voxels of the volume.
    - padding holds the window's lower bound; with window null, the smallest value of the volume.
    - window null: values are neither clipped nor scaled.

    Args:
        volume: As read; its voxels are not changed.
        config: The preprocessing to do.
        out: C-contiguous float32 of `input_shape` that becomes the tensor, for instance shared memory.

        center_lps: Point (x, y, z) in mm to put in the middle of a crop_pad piece, to the nearest voxel;
            None takes the volume's middle.

    Raises:
        ScanError: `Reason.PREPROCESS`; the volume cannot be brought to this form, or the point lies outside.
        ValueError: `out` has another shape, type or layout.
    """
    turned = reorient(volume, config.orientation)
    voxels = turned.voxels_zyx
    if voxels.dtype.kind not in "iufb":
        raise _refused(f"expected voxels that are real numbers, got {voxels.dtype}")
    shape = input_shape(config, voxels.shape, turned.spacing_zyx)
    tensor = np.empty(shape, np.float32) if out is None else _checked_out(out, shape)
    spaced = resampled_shape(config, voxels.shape, turned.spacing_zyx)
    if config.size is None or config.fit == "stretch":
        _stretch(voxels, spaced, config, tensor[0])
        starts = [(0, 0, 0)]
    else:
        middle = None if center_lps is None else _spaced_index(turned, spaced, center_lps, config)
        starts = _cut_all(voxels, spaced, config, tensor, middle)
    _map_onto_scale(tensor, config)
    origins = starts if config.fit == "patches" else [(0, 0, 0)]
    return ModelInput(tensor, np.array(origins, np.int32))


def input_shape(
    config: PreprocessConfig, shape_zyx: tuple[int, ...], spacing_zyx: tuple[float, float, float]
) -> tuple[int, int, int, int]:
    """Return the (n, z, y, x) that `preprocess` will give, from header facts alone.

    Args:
        config: The preprocessing to do.
        shape_zyx: Voxels of the volume along the axes of `config.orientation`.
        spacing_zyx: Millimetres along the same axes; only used with `config.spacing`.

    Raises:
        ScanError: `Reason.PREPROCESS`; as `preprocess` would.
    """
    shape = resampled_shape(config, shape_zyx, spacing_zyx)
    if config.size is None:
        return (1, *shape)
    if config.fit != "patches":
        return (1, *config.size)
    return (math.prod(map(len, _patch_starts(config, shape))), *config.size)


def input_spacing(
    config: PreprocessConfig, shape_zyx: _Shape, spacing_zyx: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the millimetres (z, y, x) between voxels of the model's input.

    Of n voxels at s mm, m keep the extent: n s / m; with align_corners (which `area` does not know) the end
    voxels' centres keep their places: (n - 1) s / (m - 1). Arguments and errors as for `input_shape`.
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
) -> _Shape:
    """Return the (z, y, x) voxels after the spacing step, which are held as float32 when it is set.

    Check this against the memory there is before decoding: a header may claim any spacing. Arguments
    and errors as for `input_shape`.
    """
    if len(shape_zyx) != 3 or min(shape_zyx) < 1:
        raise _refused(f"expected a volume (z, y, x) of at least one voxel, got shape {tuple(shape_zyx)}")
    if config.spacing is None:
        return (shape_zyx[0], shape_zyx[1], shape_zyx[2])
    if not all(math.isfinite(step) and step > 0 for step in spacing_zyx):
        raise _refused(
            f"expected a known voxel spacing to resample to {list(config.spacing)} mm, "
            f"got {[float(step) for step in spacing_zyx]}; set preprocess.spacing to null to do without"
        )
    z, y, x = (
        max(1, round(count * step / wanted))
        for count, step, wanted in zip(shape_zyx, spacing_zyx, config.spacing, strict=True)
    )
    return (z, y, x)


def _refused(message: str) -> ScanError:
    return ScanError(Reason.PREPROCESS, message)


def _checked_out(out: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected C-contiguous float32 {shape}, got {out.dtype} {out.shape}")
    return out


def _stretch(
    voxels: NDArray[np.generic], spaced: _Shape, config: PreprocessConfig, out: NDArray[np.float32]
) -> None:
    clip = config.window
    if out.shape != spaced:
        voxels, clip = _at_spacing(voxels, spaced, config)
    _resize(voxels, config, clip, out)


def _spaced_index(
    turned: Volume, spaced: _Shape, point_lps: tuple[float, ...], config: PreprocessConfig
) -> list[float]:
    """Return the index (z, y, x), with fractions, of a point in the volume after the spacing step."""
    shape = turned.voxels_zyx.shape
    index = geometry.compute_indices_xyz(turned.affine_lps, np.array([point_lps]))[0, ::-1].tolist()
    if any(not -0.5 <= at <= count - 0.5 for at, count in zip(index, shape, strict=True)):
        raise _refused("the point to centre on lies outside of the scan; is source.center_frame right?")
    return [
        at * (m - 1) / max(n - 1, 1) if config.align_corners else (at + 0.5) * m / n - 0.5
        for at, n, m in zip(index, shape, spaced, strict=True)
    ]


def _cut_all(
    voxels: NDArray[np.generic],
    spaced: _Shape,
    config: PreprocessConfig,
    tensor: NDArray[np.float32],
    middle: list[float] | None,
) -> list[_Shape]:
    """Fill the tensor with pieces of the volume and return the start (z, y, x) of each."""
    voxels, clip = _at_spacing(voxels, spaced, config)
    if config.fit == "patches":
        starts = list(itertools.product(*_patch_starts(config, spaced)))
    else:
        starts = [_centred_start(spaced, _size(tensor)) if middle is None else _start(middle, _size(tensor))]
    padding = float(voxels.min()) if config.window is None else config.window[0]
    for patch, start in zip(tensor, starts, strict=True):
        _cut(voxels, start, clip, padding, patch)
    return starts


def _at_spacing(
    voxels: NDArray[np.generic], spaced: _Shape, config: PreprocessConfig
) -> tuple[NDArray[np.generic], _Window]:
    """Return the volume on the wanted spacing, and the clipping that is still to do."""
    if voxels.shape == spaced:
        return voxels, config.window
    resampled = np.empty(spaced, np.float32)
    _resize(voxels, config, config.window, resampled)
    return resampled, None


def _resize(
    voxels: NDArray[np.generic], config: PreprocessConfig, clip: _Window, out: NDArray[np.float32]
) -> None:
    resize(
        voxels,
        _size(out),
        kernel=Kernel(config.interpolation, align_corners=config.align_corners),
        clip=clip,
        out=out,
    )


def _size(array: NDArray[np.float32]) -> _Shape:
    z, y, x = array.shape[-3:]
    return (z, y, x)


def _patch_starts(config: PreprocessConfig, shape_zyx: _Shape) -> tuple[list[int], list[int], list[int]]:
    """Return the starts along z, y and x; every voxel is covered unless the stride exceeds the size."""
    assert config.size is not None, "the config checks that patches have a size"
    z, y, x = zip(shape_zyx, config.size, config.stride or config.size, strict=True)
    return _axis_starts(*z), _axis_starts(*y), _axis_starts(*x)


def _axis_starts(count: int, size: int, stride: int) -> list[int]:
    last = max(count - size, 0)
    starts = list(range(0, last + 1, stride))
    return starts if starts[-1] == last else [*starts, last]


def _centred_start(shape_zyx: _Shape, size_zyx: _Shape) -> _Shape:
    """Return where a centred piece starts; negative along axes where it is larger than the volume."""
    z, y, x = (
        count // 2 - size // 2 if count > size else -((size - count) // 2)
        for count, size in zip(shape_zyx, size_zyx, strict=True)
    )
    return (z, y, x)


def _start(middle: list[float], size_zyx: _Shape) -> _Shape:
    """Return where a piece starts whose middle voxel is the one at `middle`."""
    z, y, x = (math.floor(at + 0.5) - size // 2 for at, size in zip(middle, size_zyx, strict=True))
    return (z, y, x)


def _cut(
    voxels: NDArray[np.generic], start: Sequence[int], clip: _Window, padding: float, out: NDArray[np.float32]
) -> None:
    """Copy the piece that begins at voxel `start` and has the shape of `out`; pad where nothing is."""
    begins = [max(at, 0) for at in start]
    ends = [min(at + size, count) for at, size, count in zip(start, out.shape, voxels.shape, strict=True)]
    source = tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))
    target = tuple(slice(begin - at, end - at) for begin, end, at in zip(begins, ends, start, strict=True))
    piece = voxels[source]
    if piece.shape != out.shape:
        out.fill(padding)
    copy_clipped(piece, clip, out[target])


def _map_onto_scale(tensor: NDArray[np.float32], config: PreprocessConfig) -> None:
    """Map the window linearly onto the scale, in place; the lower bound lands exactly."""
    if config.window is None:
        return
    (low, high), (first, last) = config.window, config.scale
    for plane in tensor.reshape(-1, *tensor.shape[2:]):  # plane by plane stays in the CPU's cache
        plane -= low
        plane *= (last - first) / (high - low)
        if first:
            plane += first
