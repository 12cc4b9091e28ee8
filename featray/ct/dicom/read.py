"""Read the files of one DICOM scan from memory into a checked Volume.

All checks are made on the bytes given, even if grouping made them before, because the files may have changed
since they were listed. This module must not know paths or storage. Conventions:

- An exact copy of a slice (same position, same values) is dropped with the warning `duplicate_slices`. Two
  different images at one position are refused.
- Slices of several volumes that lie between each other are refused, also if their steps are equal (see
  `split.find_mixture`).
- Every check is made on images, which are slices or the frames of a multi-frame file.
- RescaleSlope and RescaleIntercept apply per image (PS3.3 C.11.1). If no image has them they are 1 and 0; if
  only some images have them the scan is `unreadable`, and also if their RescaleType differs. A RescaleType
  other than HU or US (unspecified) adds the warning `not_hu`.
- Frames of different kinds (original and derived, perfusion, a localizer) are refused.
- Padding pixels keep their value after the rescale (often -3024). Windowing clips them later.
- Gantry tilt and irregular steps are refused unless the caller will resample them. Missing slices are always
  refused. Nothing is resampled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.elements import DEFLATED, Elements
from featray.ct.dicom.exclude import LOCALIZER_IMAGE_TYPES
from featray.ct.dicom.header import SliceHeader, parse_file
from featray.ct.dicom.pixels import PixelSource, check_format, check_size
from featray.ct.dicom.split import find_mixture
from featray.ct.dicom.stack import build_stack, check_same_grid, find_same_positions
from featray.ct.rescale import VOLUME_DTYPES, choose_dtype, find_extremes, rescale
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

_MAX_VALUE = 1e30
"""Larger scaled values are refused because they approach infinity in float32."""

_UNSPECIFIED_RESCALE_TYPES = ("", "US")
"""Values of RescaleType that name no unit."""

_HU_RESCALE_TYPES = (*_UNSPECIFIED_RESCALE_TYPES, "HU")
"""Values of RescaleType that are accepted as Hounsfield units."""

_COMPUTED_IMAGE_TYPES = frozenset(
    {"ADDITION", "DIVISION", "MASKED", "MAXIMUM", "MEAN", "MINIMUM", "MULTIPLICATION", "PERFUSION"}
    | {"QUANTITY", "STD_DEVIATION", "SUBTRACTION"}
)
"""Values of FrameType for frames that are not slices of a plain CT volume (PS3.3 C.8.16.1)."""


def read_series(
    files: Sequence[tuple[str, bytes]],
    *,
    max_voxels: int,
    dicom_tags: Sequence[str] = (),
    resample_tilt: bool = False,
    resample_steps: bool = False,
) -> Volume:
    """Return the volume of one scan from its files.

    Voxels are int16 if all values fit, else int32, or float32 if a value does not fit int32, or a slope or
    intercept is not a whole number. z grows along cross(row direction, column direction). `Volume.slope` and
    `intercept` are those of the first slice.

    With `resample_tilt` or `resample_steps`, slices that shift sideways or lie at irregular steps are
    accepted with the warning `gantry_tilt` or `resampled_steps`. The volume then holds the slices unchanged,
    with their positions in `slice_origins_lps`, and the caller must resample it with
    `regrid.resample_upright`.

    Args:
        files: Pairs of name and content, in any order.
        max_voxels: Largest number of voxels that the headers may claim together.
        dicom_tags: DICOM keywords whose values, from the first slice, are copied into `Volume.tags`.
            Unknown keywords and elements without text are skipped.
        resample_tilt: Accept a tilted gantry.
        resample_steps: Accept irregular steps between slices.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume`,
            `missing_slices`, `duplicate_slices`, `irregular_spacing`, `gantry_tilt`
            or `non_finite`.
    """
    frames = _load_frames(files, max_voxels)
    check_same_grid([frame.header for frame in frames])
    frames, warnings = _drop_copies(frames)
    if mixture := find_mixture([frame.header for frame in frames]):
        raise ScanError(Reason.DUPLICATE_SLICES, mixture)
    stack = build_stack(
        [frame.header for frame in frames],
        resample_tilt=resample_tilt,
        resample_steps=resample_steps,
        max_voxels=max_voxels,
    )
    frames = [frames[index] for index in stack.order]
    if any(frame.header.rescale_type not in _HU_RESCALE_TYPES for frame in frames):
        warnings += (WarningCode.NOT_HU.value,)
    return Volume(
        _rescale_frames(frames),
        stack.affine_lps,
        *_get_rescale(frames[0].header),
        warnings + stack.warnings + geometry.find_geometry_warnings(stack.affine_lps),
        _read_tags(frames[0].data, dicom_tags),
        stack.origins_lps,
    )


@dataclass(frozen=True)
class _Frame:
    """One slice.

    Attributes:
        header: Header of the frame.
        pixels: The pixel data of the file.
        data: Content of the whole file.
        index: Number of the frame in the file, from 0.
    """

    header: SliceHeader
    pixels: PixelSource
    data: bytes
    index: int = 0

    def read_stored_values(self) -> NDArray[Any]:
        return self.pixels.read_stored_values(self.index)


def _load_frames(files: Sequence[tuple[str, bytes]], max_voxels: int) -> list[_Frame]:
    """Return all frames of all files, after checking the sizes that the headers claim against the limit."""
    parsed = [(*parse_file(data, name), data) for name, data in files]
    claimed = sum(header.rows * header.columns * header.number_of_frames for header, _, _ in parsed)
    if claimed > max_voxels:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the headers claim {claimed} voxels, more than limits.max_voxels ({max_voxels})",
        )
    for header, elements, data in parsed:
        check_format(header)
        check_size(header, elements, len(data))
    _check_concatenation([header for header, _, _ in parsed])
    parsed = [_inflate_pixels(header, elements, data) for header, elements, data in parsed]
    frames = []
    for header, elements, data in parsed:
        pixels = PixelSource(header, elements)
        headers = _make_frame_headers(header, elements, data)
        frames += [_Frame(frame_header, pixels, data, index) for index, frame_header in enumerate(headers)]
    _check_values([frame.header for frame in frames])
    _check_frame_types([frame.header for frame in frames])
    return frames


def _check_values(images: list[SliceHeader]) -> None:
    """Raise ScanError unless all images (slices or frames) have rescale values, or none, and one unit."""
    if len({(image.slope is None, image.intercept is None) for image in images}) > 1:
        raise ScanError(Reason.UNREADABLE, "RescaleSlope or RescaleIntercept is missing in some slices only")
    if len({image.rescale_type for image in images} - set(_UNSPECIFIED_RESCALE_TYPES)) > 1:
        raise ScanError(Reason.UNREADABLE, "slices with different RescaleType (units) in one series")


def _check_frame_types(images: list[SliceHeader]) -> None:
    """Raise ScanError unless the frames of multi-frame files are images of one kind and no localizers."""
    types = [image.image_type for image in images if image.has_functional_groups]
    if any(LOCALIZER_IMAGE_TYPES & set(values) for values in types):
        raise ScanError(Reason.NOT_A_VOLUME, "a frame is a localizer; give it a series of its own")
    if len({(values[:1], _COMPUTED_IMAGE_TYPES & set(values[2:])) for values in types}) > 1:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            "frames with different FrameType (original, derived, perfusion, projection) in one image; give "
            "each kind a series of its own",
        )


def _check_concatenation(headers: list[SliceHeader]) -> None:
    """Raise ScanError if files of a concatenation (a multi-frame image in several files) are missing."""
    expected = max((header.concatenation_total for header in headers if header.concatenation_uid), default=0)
    if expected > len(headers):
        raise ScanError(
            Reason.MISSING_SLICES,
            f"{len(headers)} of the {expected} files of a split multi-frame image; copy the series again",
        )


def _inflate_pixels(
    header: SliceHeader, elements: Elements, data: bytes
) -> tuple[SliceHeader, Elements, bytes]:
    """Return header, elements and content of a file; inflate the pixel data of a large deflated file.

    `parse_file` inflates only a limited number of bytes. The size in the header must have been checked.
    """
    claimed = header.rows * header.columns * header.number_of_frames * header.bits_allocated // 8
    end = elements.pixel_start + claimed
    if elements.transfer_syntax != DEFLATED or end <= len(elements.data):
        return header, elements, data
    return (*parse_file(data, header.name, end), data)


def _make_frame_headers(header: SliceHeader, elements: Elements, data: bytes) -> list[SliceHeader]:
    """Return one header per frame of a file."""
    if not header.has_functional_groups:
        return [header]
    from featray.ct.dicom.multiframe import make_frame_headers  # imports pydicom, which is slow

    return make_frame_headers(header, elements, data)


def _drop_copies(frames: list[_Frame]) -> tuple[list[_Frame], tuple[str, ...]]:
    """Return the frames without exact copies, and the warnings.

    Different images at one position are kept, so that `build_stack` refuses them.
    """
    copies: set[int] = set()
    for first, *others in find_same_positions([frame.header for frame in frames]):
        copies.update(other for other in others if _has_same_values(frames[first], frames[other]))
    warnings = (Reason.DUPLICATE_SLICES.value,) if copies else ()
    return [frame for index, frame in enumerate(frames) if index not in copies], warnings


def _has_same_values(first: _Frame, second: _Frame) -> bool:
    has_same_rescale = _get_rescale(first.header) == _get_rescale(second.header)
    return has_same_rescale and np.array_equal(first.read_stored_values(), second.read_stored_values())


def _get_rescale(header: SliceHeader) -> tuple[float, float]:
    """Return slope and intercept, 1 and 0 where they are missing; raise ScanError if the slope is 0."""
    slope = 1.0 if header.slope is None else header.slope
    if slope == 0:
        raise ScanError(Reason.UNREADABLE, f"{header.file_name}: RescaleSlope is 0")
    return slope, header.intercept or 0.0


def _rescale_frames(frames: list[_Frame]) -> NDArray[Any]:
    """Return the rescaled slices as one array (z, y, x), in the narrowest dtype that fits all of them."""
    first = frames[0].header
    voxels: NDArray[Any] = np.empty((len(frames), first.rows, first.columns), VOLUME_DTYPES[0])
    limits = []
    for z, frame in enumerate(frames):
        stored = frame.read_stored_values()
        slope, intercept = _get_rescale(frame.header)
        low, high = find_extremes(stored)
        if max(abs(slope), abs(intercept), abs(low * slope), abs(high * slope)) > _MAX_VALUE:
            raise ScanError(
                Reason.NON_FINITE, f"{frame.header.file_name}: rescaled values beyond {_MAX_VALUE:g}"
            )
        needed = choose_dtype(stored.dtype, low, high, slope, intercept)
        if VOLUME_DTYPES.index(needed) > VOLUME_DTYPES.index(voxels.dtype):
            voxels = voxels.astype(needed)
        rescale(stored, slope, intercept, voxels.dtype, out=voxels[z])
        limits += [low * slope + intercept, high * slope + intercept]
    if min(limits) == max(limits):
        raise ScanError(Reason.NOT_A_VOLUME, f"every voxel is {limits[0]:g}")
    return voxels


def _read_tags(data: bytes, keywords: Sequence[str]) -> dict[str, str]:
    if not keywords:
        return {}
    from featray.ct.dicom.tags import read_tags  # imports pydicom, which is slow

    return read_tags(data, keywords)
