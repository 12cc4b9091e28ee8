"""An enhanced multi-frame file in, one slice header per frame out; decodes no pixels."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pydicom
from pydicom.config import disable_value_validation

from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason, ScanError

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def frame_headers(header: SliceHeader, data: bytes) -> list[SliceHeader]:
    """Return the header of each frame, with geometry and rescale from the functional groups.

    What a frame's own group lacks is taken from the shared group, then from the top level
    (DICOM PS3.3 C.7.6.16).

    Raises:
        ScanError: `unreadable` if the groups do not match the number of frames or do not parse.
    """
    try:
        with disable_value_validation():
            dataset = pydicom.dcmread(
                io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=list(_GROUPS)
            )
            shared = dataset.get(_GROUPS[0]) or [pydicom.Dataset()]
            headers = [_frame(header, frame, shared[0]) for frame in dataset.get(_GROUPS[1]) or ()]
    except Exception as error:  # pydicom raises nearly anything on damaged bytes; texts may quote them
        raise ScanError(
            Reason.UNREADABLE, f"{header.base}: functional groups do not parse ({type(error).__name__})"
        ) from None
    if len(headers) != header.frames:
        raise ScanError(
            Reason.UNREADABLE, f"{header.base}: {header.frames} frames, geometry of {len(headers)}"
        )
    return headers


def _frame(header: SliceHeader, own: Any, shared: Any) -> SliceHeader:
    def floats(sequence: str, keyword: str, count: int) -> tuple[float, ...] | None:
        return _floats(_value(own, shared, sequence, keyword), count)

    slope = floats("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercept = floats("PixelValueTransformationSequence", "RescaleIntercept", 1)
    kind = _value(own, shared, "PixelValueTransformationSequence", "RescaleType")
    temporal = _value(own, shared, "FrameContentSequence", "TemporalPositionIndex")
    stack_id = _value(own, shared, "FrameContentSequence", "StackID")
    return replace(
        header,
        number=None,
        temporal=header.temporal if temporal is None else str(temporal),
        stack_id="" if stack_id is None else str(stack_id),
        position=floats("PlanePositionSequence", "ImagePositionPatient", 3) or header.position,
        orientation=floats("PlaneOrientationSequence", "ImageOrientationPatient", 6) or header.orientation,
        spacing_yx=floats("PixelMeasuresSequence", "PixelSpacing", 2) or header.spacing_yx,
        slope=slope[0] if slope else header.slope,
        intercept=intercept[0] if intercept else header.intercept,
        rescale_type=str(kind).upper() if kind else header.rescale_type,
    )


def _value(own: Any, shared: Any, sequence: str, keyword: str) -> Any:
    for group in (own, shared):
        items = group.get(sequence)
        if items and items[0].get(keyword) is not None:
            return items[0].get(keyword)
    return None


def _floats(value: Any, count: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = tuple(float(part) for part in (value if count > 1 else [value]))
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{len(numbers)} values, expected {count} finite ones")
    return numbers
