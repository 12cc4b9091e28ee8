"""Expand an enhanced multi-frame file into one slice header per frame; decode no pixels."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pydicom
from pydicom.config import disable_value_validation

from featray.ct.dicom.elements import Elements
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason, ScanError

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


_PIXEL_VALUES = "PixelValueTransformationSequence"

_LUT_TAGS = (b"\x28\x00\x00\x30", b"\x00\x28\x30\x00")
"""Tag of ModalityLUTSequence as its bytes lie in a file, in both byte orders."""


def make_frame_headers(header: SliceHeader, elements: Elements, data: bytes) -> list[SliceHeader]:
    """Return the header of each frame, with geometry and rescale values from the functional groups.

    A value that the functional groups of a frame lack is taken from the shared functional groups, then from
    the top level of the data set (DICOM PS3.3 C.7.6.16). Rescale values come from the top level only if no
    frame has its own; otherwise the frames without them would have other units unnoticed.

    Args:
        header: Header of the file.
        elements: Elements of the file.
        data: Content of the file.

    Raises:
        ScanError: `unreadable` if the groups do not parse or their number is not that of the frames,
            `unsupported` if they hold a modality lookup table.
    """
    try:
        with disable_value_validation():
            dataset = pydicom.dcmread(
                io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=[_SHARED, _PER_FRAME]
            )
            groups = list(dataset.get(_PER_FRAME) or ())
            shared = (dataset.get(_SHARED) or [pydicom.Dataset()])[0]
            _check_lookup_table(header, elements, [shared, *groups])
            if any(_PIXEL_VALUES in own for own in groups):
                header = replace(header, slope=None, intercept=None)
            headers = [
                _make_frame_header(header, own, shared, number) for number, own in enumerate(groups, 1)
            ]
    except ScanError:
        raise
    except Exception as error:  # pydicom raises errors of any type; their texts may quote the file
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: functional groups do not parse ({type(error).__name__})",
        ) from None
    if len(headers) != header.number_of_frames:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: {header.number_of_frames} frames, "
            f"but functional groups for {len(headers)} frames",
        )
    return headers


def _check_lookup_table(header: SliceHeader, elements: Elements, groups: list[Any]) -> None:
    """Raise ScanError (`unsupported`) if functional groups hold a modality lookup table at any depth."""
    # Nearly no file has the tag. Searching the bytes for it is much faster than walking through all groups.
    if not any(elements.data.find(tag, 0, elements.pixel_start) >= 0 for tag in _LUT_TAGS):
        return
    if any(element.keyword == "ModalityLUTSequence" for group in groups for element in group.iterall()):
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{header.file_name}: a modality lookup table instead of rescale slope and intercept",
        )


def _make_frame_header(header: SliceHeader, own: Any, shared: Any, number: int) -> SliceHeader:
    """Return the header of frame `number` from its own and the shared functional groups (data sets)."""

    def get_floats(sequence: str, keyword: str, count: int) -> tuple[float, ...] | None:
        try:
            return _convert_floats(_find_value(own, shared, sequence, keyword), count)
        except (ValueError, TypeError, OverflowError):
            raise ScanError(
                Reason.UNREADABLE,
                f"{header.file_name}: {keyword} of frame {number} is not {count} finite number(s)",
            ) from None

    slope = get_floats(_PIXEL_VALUES, "RescaleSlope", 1)
    intercept = get_floats(_PIXEL_VALUES, "RescaleIntercept", 1)
    rescale_type = _find_value(own, shared, _PIXEL_VALUES, "RescaleType")
    temporal = _find_value(own, shared, "FrameContentSequence", "TemporalPositionIndex")
    stack_id = _find_value(own, shared, "FrameContentSequence", "StackID")
    place = _find_value(own, shared, "FrameContentSequence", "InStackPositionNumber")
    orientation = get_floats("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    return replace(
        _set_labels(header, own, shared),
        instance_number=number if place is None else int(place),
        temporal_position=header.temporal_position if temporal is None else str(temporal),
        stack_id="" if stack_id is None else str(stack_id),
        position=get_floats("PlanePositionSequence", "ImagePositionPatient", 3) or header.position,
        orientation=orientation or header.orientation,
        spacing_yx=get_floats("PixelMeasuresSequence", "PixelSpacing", 2) or header.spacing_yx,
        slope=slope[0] if slope else header.slope,
        intercept=intercept[0] if intercept else header.intercept,
        rescale_type=str(rescale_type).upper() if rescale_type else header.rescale_type,
    )


_LABELS = {
    "acquisition_number": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "convolution_kernel": ("CTReconstructionSequence", "ConvolutionKernel"),
    "kvp": ("CTXRayDetailsSequence", "KVP"),
    "slice_thickness": ("PixelMeasuresSequence", "SliceThickness"),
    "image_type": ("CTImageFrameTypeSequence", "FrameType"),
}
"""Fields of `SliceHeader` that tell volumes apart → sequence and keyword in the functional groups."""


_FURTHER_LABELS = (
    ("CTReconstructionSequence", "ReconstructionAlgorithm"),
    ("CTReconstructionSequence", "ConvolutionKernelGroup"),
    ("CTAcquisitionTypeSequence", "AcquisitionType"),
    ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("RespiratorySynchronizationSequence", "NominalPercentageOfRespiratoryPhase"),
    ("TemporalPositionSequence", "TemporalPositionTimeOffset"),
)
"""Sequence and keyword of the values that `SliceHeader.frame_labels` holds."""

_ENERGY_GROUPS = (
    "MultienergyCTAcquisitionSequence",
    "MultienergyCTProcessingSequence",
    "MultienergyCTCharacteristicsSequence",
)
"""Sequences whose whole content describes the energy of a frame."""


def _set_labels(header: SliceHeader, own: Any, shared: Any) -> SliceHeader:
    """Return the header with the values of a frame that tell several volumes in one file apart."""
    labels: dict[str, Any] = {}
    for field, (sequence, keyword) in _LABELS.items():
        value = _find_value(own, shared, sequence, keyword)
        if value is not None:
            labels[field] = tuple(map(str, value)) if field == "image_type" else str(value)
    further = [_find_value(own, pydicom.Dataset(), *place) for place in _FURTHER_LABELS]
    energies = [str(own[sequence].value) for sequence in _ENERGY_GROUPS if sequence in own]
    labels["frame_labels"] = "\\".join(map(str, further + energies))
    return replace(header, **labels)


def _find_value(own: Any, shared: Any, sequence: str, keyword: str) -> Any:
    """Return a value of the first item of a sequence in the frame's own groups, else in the shared ones."""
    for groups in (own, shared):
        items = groups.get(sequence)
        if items and items[0].get(keyword) is not None:
            return items[0].get(keyword)
    return None


def _convert_floats(value: Any, count: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = tuple(float(part) for part in (value if count > 1 else [value]))
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{len(numbers)} values, expected {count} finite values")
    return numbers
