"""The files of one DICOM series in memory in, a checked Volume out; knows no paths and no storage.

Header, grouping and reading: `read_header` for each file found, `group_into_scans` for all of them,
`read_series` for the bytes of one entry's files. Every check is made here again from the bytes
read, because the files may have changed since they were listed. Decisions:

- An exact copy of a slice (same position, same values) is dropped with the warning
  `duplicate_slices`; two different images at one position are refused.
- Slope and intercept count per slice. Missing ones are 1 and 0; missing in some slices only is
  `unreadable`. A RescaleType other than HU (or unspecified) earns `not_hu`.
- Pixel padding keeps its value after the rescale (often -3024): clipping is the window's work.
- Tilt and unequal steps are refused unless the caller will resample; gaps are always refused.
  Nothing is resampled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.elements import DEFLATED, Elements
from featray.ct.dicom.header import SliceHeader, parse_slice
from featray.ct.dicom.pixels import check_format, check_size, stored_values
from featray.ct.dicom.stack import check_alike, same_places, stack
from featray.ct.rescale import VOLUME_DTYPES, choose_dtype, find_extremes, rescale
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

_FAR = 1e30
"""Scaled values beyond it would come near infinity in float32."""

_HU_TYPES = ("", "HU", "US")  # US: unspecified


def read_series(
    files: Sequence[tuple[str, bytes]],
    *,
    max_voxels: int,
    dicom_tags: Sequence[str] = (),
    resample_tilt: bool = False,
    resample_steps: bool = False,
) -> Volume:
    """Return the volume whose slices are `files`, pairs of name and content in any order.

    Voxels are int16 if all values fit, else int32; float32 if a slope or intercept is no whole
    number. z grows along cross(row direction, column direction). `Volume.slope` and `intercept`
    are those of the first slice. `dicom_tags` are keywords whose values, from the first slice,
    are copied into `Volume.tags`; unknown and non-text ones are skipped.

    With `resample_tilt` or `resample_steps` slices that shift sideways or lie unevenly are accepted with
    the warning `gantry_tilt` or `resampled_steps`. The volume then holds them as they are, with their
    places in `slice_origins_lps`, and `regrid.resample_upright` must follow.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume`,
            `missing_slices`, `duplicate_slices`, `irregular_spacing`, `gantry_tilt`
            or `non_finite`.
    """
    images = _images(files, max_voxels)
    check_alike([image.header for image in images])
    images, warnings = _without_copies(images)
    stacked = stack(
        [image.header for image in images], resample_tilt=resample_tilt, resample_steps=resample_steps
    )
    images = [images[place] for place in stacked.order]
    if any(image.header.rescale_type not in _HU_TYPES for image in images):
        warnings += (WarningCode.NOT_HU.value,)
    return Volume(
        _voxels(images),
        stacked.affine_lps,
        *_scaling(images[0].header),
        warnings + stacked.warnings + geometry.find_geometry_warnings(stacked.affine_lps),
        _tags(images[0].data, dicom_tags),
        stacked.origins_lps,
    )


@dataclass(frozen=True)
class _Image:
    """One slice: its header, where its pixels are, and the whole file's bytes."""

    header: SliceHeader
    elements: Elements
    data: bytes
    frame: int = 0

    def values(self) -> NDArray[Any]:
        return stored_values(self.header, self.elements, self.frame)


def _images(files: Sequence[tuple[str, bytes]], max_voxels: int) -> list[_Image]:
    """Return every frame of every file, after all claimed sizes together passed the limit."""
    parsed = [(*parse_slice(data, name), data) for name, data in files]
    claimed = sum(header.rows * header.columns * header.frames for header, _, _ in parsed)
    if claimed > max_voxels:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the headers claim {claimed} voxels, more than limits.max_voxels ({max_voxels})",
        )
    for header, elements, data in parsed:
        check_format(header)
        check_size(header, elements, len(data))
    _check_parts([header for header, _, _ in parsed])
    parsed = [_whole(*found) for found in parsed]
    scaled = {(header.slope is None, header.intercept is None) for header, _, _ in parsed}
    if len(scaled) > 1:
        raise ScanError(Reason.UNREADABLE, "slope or intercept is missing in some slices only")
    return [
        _Image(frame_header, elements, data, frame)
        for header, elements, data in parsed
        for frame, frame_header in enumerate(_frame_headers(header, data))
    ]


def _check_parts(headers: list[SliceHeader]) -> None:
    """Raise ScanError if files of a divided multi-frame image are missing."""
    wanted = max((header.parts for header in headers if header.concatenation), default=0)
    if wanted > len(headers):
        raise ScanError(
            Reason.MISSING_SLICES,
            f"{len(headers)} of the {wanted} files of a divided multi-frame image; copy the series again",
        )


def _whole(header: SliceHeader, elements: Elements, data: bytes) -> tuple[SliceHeader, Elements, bytes]:
    """Return a large deflated file with all its pixels inflated, now that its claims are checked."""
    claimed = header.rows * header.columns * header.frames * header.bits_allocated // 8
    end = elements.pixel_start + claimed
    if elements.transfer_syntax != DEFLATED or end <= len(elements.data):
        return header, elements, data
    return (*parse_slice(data, header.name, end), data)


def _frame_headers(header: SliceHeader, data: bytes) -> list[SliceHeader]:
    if not header.functional_groups:
        return [header]
    from featray.ct.dicom.multiframe import frame_headers  # imports pydicom

    return frame_headers(header, data)


def _without_copies(images: list[_Image]) -> tuple[list[_Image], tuple[str, ...]]:
    """Return the images without exact copies of one another; different ones at one place stay."""
    copies: set[int] = set()
    for place in same_places([image.header for image in images]):
        kept, *others = place
        copies.update(other for other in others if _same_values(images[kept], images[other]))
    warnings = (Reason.DUPLICATE_SLICES.value,) if copies else ()
    return [image for i, image in enumerate(images) if i not in copies], warnings


def _same_values(first: _Image, second: _Image) -> bool:
    same_scaling = _scaling(first.header) == _scaling(second.header)
    return same_scaling and np.array_equal(first.values(), second.values())


def _scaling(header: SliceHeader) -> tuple[float, float]:
    """Return slope and intercept; missing ones are 1 and 0."""
    slope = 1.0 if header.slope is None else header.slope
    if slope == 0:
        raise ScanError(Reason.UNREADABLE, f"{header.base}: RescaleSlope is 0")
    return slope, header.intercept or 0.0


def _voxels(images: list[_Image]) -> NDArray[Any]:
    """Return the scaled slices as one array (z, y, x), widened when a slice does not fit it."""
    first = images[0].header
    voxels: NDArray[Any] = np.empty((len(images), first.rows, first.columns), VOLUME_DTYPES[0])
    ends = []
    for place, image in enumerate(images):
        stored = image.values()
        slope, intercept = _scaling(image.header)
        low, high = find_extremes(stored)
        if max(abs(slope), abs(intercept), abs(low * slope), abs(high * slope)) > _FAR:
            raise ScanError(Reason.NON_FINITE, f"{image.header.base}: scaled values beyond {_FAR:g}")
        needed = choose_dtype(stored.dtype, low, high, slope, intercept)
        if VOLUME_DTYPES.index(needed) > VOLUME_DTYPES.index(voxels.dtype):
            voxels = voxels.astype(needed)
        rescale(stored, slope, intercept, voxels.dtype, out=voxels[place])
        ends += [low * slope + intercept, high * slope + intercept]
    if min(ends) == max(ends):
        raise ScanError(Reason.NOT_A_VOLUME, f"every voxel is {ends[0]:g}")
    return voxels


def _tags(data: bytes, keywords: Sequence[str]) -> dict[str, str]:
    if not keywords:
        return {}
    from featray.ct.dicom.tags import named_values  # imports pydicom

    return named_values(data, keywords)
