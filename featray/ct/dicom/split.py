"""Split the slices of one stack into volumes, if their headers separate the volumes cleanly.

Examples are time points, convolution kernels or slice thicknesses stored as one series. Reads no pixels.

Fields that have one value in a volume, or one value for each range of table positions, say whether slices
belong together. If the values of such a field alternate along the normal, there are two volumes, also if
their positions never coincide: together they would look like one volume with a finer step. Slices that
alternate and cannot be separated cleanly are refused, because nothing shows which of them are a volume.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.parts import (
    Distances,
    are_complete_volumes,
    has_crossing_labels,
    has_returning_label,
    has_short_run,
    have_squeezed_slices,
    is_regular,
    share_positions,
)
from featray.ct.dicom.stack import project_on_normal

_TELLING_FIELDS = {
    "temporal_position": "TemporalPositionIdentifier",
    "acquisition_number": "AcquisitionNumber",
    "convolution_kernel": "ConvolutionKernel",
    "kvp": "KVP",
    "echo_number": "EchoNumbers",
    "slice_thickness": "SliceThickness",
    "frame_of_reference_uid": "FrameOfReferenceUID",
    "series_number": "SeriesNumber",
    "image_type": "ImageType",
    "frame_labels": "the functional groups (energy, phase, reconstruction)",
    "sop_class_uid": "SOPClassUID",
    "modality": "Modality",
}
"""Fields of `SliceHeader` that do not alternate in one volume → their name in messages.

The most explicit field is first.
"""

_FURTHER_FIELDS = ("trigger_time",)
"""Fields that separate volumes like `_TELLING_FIELDS`, but that may differ in each slice of a volume."""

_NUMBER_TOLERANCE = 0.01
"""Numbers closer than this have one label, because some scanners write 3.26999999999998 for 3.27."""

_NUMERIC_FIELDS = frozenset({"kvp", "slice_thickness"})
_OTHER_MODALITIES = frozenset({"MR", "PT"})

_ADVICE = "if these are several scans, give each its own SeriesInstanceUID"
_ADVICE_FOR_ONE_GRID = f"{_ADVICE}; if they are one scan, give all slices the same value"


def split_by_fields(slices: Sequence[SliceHeader], *fields: str) -> list[list[SliceHeader]]:
    """Return the slices grouped by their values of `fields`.

    Slices with an empty value join the largest group.
    """
    groups = [list(slices)]
    for field in fields:
        groups = [part for group in groups for part in _split_by_field(group, field)]
    return groups


def split_volumes(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the volumes among slices of one orientation and matrix size, or all slices as one group.

    Slices are only split if positions repeat or a field alternates along the normal, and only if the split is
    clean (see `are_complete_volumes`). This keeps volumes that lack a slice, and successive ranges of slices
    from a table movement, from being split off.
    """
    if not all(header.position and header.orientation for header in slices) or len(slices) < 4:
        return [slices]
    labels_of_fields = _find_varying_labels(slices, (*_TELLING_FIELDS, *_FURTHER_FIELDS))
    if not labels_of_fields:
        return [slices]
    distances = project_on_normal(slices)
    order = np.argsort(distances, kind="stable").tolist()
    if not share_positions([distances]):
        labels_of_fields = {
            field: labels
            for field, labels in labels_of_fields.items()
            if has_crossing_labels([labels[i] for i in order])
        }
    fields = sorted(labels_of_fields, key=_rank_field)
    for combination in [*((field,) for field in fields), tuple(fields)]:
        parts = _group_indices([labels_of_fields[field] for field in combination])
        if len(parts) > 1 and are_complete_volumes([distances[part] for part in parts]):
            return [[slices[i] for i in part] for part in parts]
    return [slices]


def find_mixture(slices: Sequence[SliceHeader]) -> str:
    """Return why slices at different positions are not one volume, in words; empty if nothing shows that.

    A mixture of volumes is recognized by a field whose values alternate along the normal, by a value that
    returns at positions between those of a regular stack, and by images of several modalities.

    Args:
        slices: Headers with one orientation. If positions repeat, the result is empty, because the caller has
            to deal with duplicates first.
    """
    if len(slices) < 2 or not all(header.position and header.orientation for header in slices):
        return ""
    labels_of_fields = _find_varying_labels(slices, tuple(_TELLING_FIELDS))
    if not labels_of_fields and len({header.trigger_time for header in slices}) < 2:
        return ""
    distances = project_on_normal(slices)
    if share_positions([distances]):
        return ""
    is_squeezed = have_squeezed_slices(distances)
    order = np.argsort(distances, kind="stable").tolist()
    for field, labels in labels_of_fields.items():
        ordered = [labels[i] for i in order]
        is_alternating = has_crossing_labels(ordered) and has_short_run(ordered)
        is_between = is_squeezed and has_returning_label(ordered)
        if is_alternating or is_between:
            keyword, count = _TELLING_FIELDS[field], len(set(labels))
            advice = _ADVICE_FOR_ONE_GRID if is_regular(distances) else _ADVICE
            return f"slices with {count} values of {keyword} lie between each other; {advice}"
        if field == "modality":
            return f"slices of {len(set(labels))} modalities in one stack; {_ADVICE}"
    return _find_further_mixture(slices, distances, order)


def _find_further_mixture(slices: Sequence[SliceHeader], distances: Distances, order: list[int]) -> str:
    """Return why slices are a mixture if each value of a further field has a regular stack; else empty."""
    for labels in _find_varying_labels(slices, _FURTHER_FIELDS).values():
        parts = [distances[part] for part in _group_indices([labels])]
        if has_crossing_labels([labels[i] for i in order]) and all(map(is_regular, parts)):
            return f"slices with {len(parts)} values of TriggerTime lie between each other; {_ADVICE}"
    return ""


def find_folder_mixture(slices: Sequence[SliceHeader]) -> str:
    """Return why slices of several folders are not one volume, in words; empty if nothing shows that.

    Slices that are distributed over folders at random are one volume. If the slices of each folder are a
    regular stack and lie between those of the others, they may also be several volumes.
    """
    folders = [header.folder for header in slices]
    if len(set(folders)) < 2 or not all(header.position and header.orientation for header in slices):
        return ""
    distances = project_on_normal(slices)
    order = np.argsort(distances, kind="stable").tolist()
    if share_positions([distances]) or not has_crossing_labels([folders[i] for i in order]):
        return ""
    parts = [distances[part] for part in _group_indices([folders])]
    if not have_squeezed_slices(distances) and not all(map(is_regular, parts)):
        return ""
    return (
        f"the slices of {len(parts)} folders lie between each other; if the folders are several scans, "
        "give each its own SeriesInstanceUID; if they are one scan, copy its slices into one folder"
    )


def are_in_alternating_folders(slices: Sequence[SliceHeader]) -> bool:
    """Return whether slices of several folders lie between each other."""
    folders = [header.folder for header in slices]
    if len(set(folders)) < 2 or not all(header.position and header.orientation for header in slices):
        return False
    order = np.argsort(project_on_normal(slices), kind="stable").tolist()
    return has_returning_label([folders[i] for i in order])


def _rank_field(field: str) -> int:
    """Return the place of a field among all fields, the most explicit field first."""
    return [*_TELLING_FIELDS, *_FURTHER_FIELDS].index(field)


def _find_varying_labels(
    slices: Sequence[SliceHeader], fields: Sequence[str]
) -> Mapping[str, list[Hashable]]:
    """Return the labels of all slices by field, for fields that do not have the same label in all slices."""
    labels_of_fields = {}
    for field in fields:
        values: list[Hashable] = [getattr(header, field) for header in slices]
        if len(set(values)) > 1:
            labels = _make_labels(field, values)
            if len(set(labels)) > 1:
                labels_of_fields[field] = labels
    return labels_of_fields


def _make_labels(field: str, values: list[Hashable]) -> list[Hashable]:
    """Return the labels for the values of a field: values with the same meaning have the same label."""
    if field == "modality":
        return [value if value in _OTHER_MODALITIES else "CT" for value in values]
    if field not in _NUMERIC_FIELDS:
        return values
    label_of_value: dict[Hashable, Hashable] = {}
    previous, label = -np.inf, -np.inf
    for number, value in sorted((_parse_number(value), str(value)) for value in set(values)):
        label = label if number - previous <= _NUMBER_TOLERANCE else number
        label_of_value[value], previous = label, number
    return [label_of_value[value] for value in values]


def _parse_number(value: Hashable) -> float:
    """Return the number in a text, or -1 if it holds no finite number."""
    try:
        number = float(str(value))
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def _split_by_field(slices: list[SliceHeader], field: str) -> list[list[SliceHeader]]:
    groups: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        groups[getattr(header, field)].append(header)
    without_value = groups.pop("", [])
    if not groups:
        return [slices]
    max(groups.values(), key=len).extend(without_value)
    return list(groups.values())


def _group_indices(labels_of_fields: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Return the indices of the slices with the same labels, as one list for each combination of labels."""
    groups: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index, labels in enumerate(zip(*labels_of_fields, strict=True)):
        groups[labels].append(index)
    return list(groups.values())
