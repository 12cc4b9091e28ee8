"""Decide how the parts of one series are related: shares of one stack, copies, or separate scans.

Parts are the slices with one PatientID and StudyInstanceUID, or the slices in one folder. Faulty software
writes other ids into some slices, and exports split a series over folders, so the label alone does not show
whether a part is a scan. The positions decide (see `parts`): shares are joined, or fail if they cannot be
joined; parts that cover the same range, or are far from each other, are separate scans.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from featray.ct.dicom.exclude import are_in_line, is_in_plane
from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.parts import (
    Distances,
    are_complete_volumes,
    belong_together,
    complete_one_stack,
    is_regular,
    is_share_of,
)
from featray.ct.dicom.split import find_mixture, split_by_fields
from featray.ct.dicom.stack import project_on_normal
from featray.errors import Reason

MAX_OWNERS = 20
"""Up to this number of patients and studies in one series, each pair of them is compared."""


MIN_SINGLE_SLICES = 4
"""Fewer slices with a SeriesInstanceUID each may have equal steps by chance."""

_MIN_ADVISED_SLICES = 3


@dataclass
class SeriesPart:
    """Files of one series that are grouped further together.

    Attributes:
        headers: Headers of the files.
        warnings: Codes for every scan made from these files.
        reason: Why no scan must be made from these files, or None.
        message: The reason in words, for users.
        excluded: With a reason: true if the files are copies, false if they are a failed scan.
    """

    headers: list[SliceHeader]
    warnings: tuple[str, ...] = ()
    reason: Reason | None = None
    message: str = ""
    excluded: bool = False


def join_single_slices(slices: Sequence[SliceHeader]) -> list[SeriesPart]:
    """Return the parts for slices of which each has a SeriesInstanceUID of its own.

    Some software writes a new SeriesInstanceUID into each file. Slices of one folder and SeriesNumber are
    joined, with the warning `duplicate_slices`, if there are at least `MIN_SINGLE_SLICES` of them and they
    have one plane and regular positions in line. Otherwise three or more of them in one folder fail with
    advice. The other slices are in no part.
    """
    folders: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        folders[header.folder].append(header)
    parts: list[SeriesPart] = []
    for members in folders.values():
        if len(members) < _MIN_ADVISED_SLICES:
            continue
        for group in split_by_fields(members, "series_number"):
            parts += [_make_joined_part(group)] if _are_one_stack(group) else map(_make_single_part, group)
    return parts


def split_by_owner(headers: list[SliceHeader], is_slice: Callable[[SliceHeader], bool]) -> list[SeriesPart]:
    """Return the files of one SeriesInstanceUID grouped by patient and study.

    - Slices of several studies that complete one stack are joined with the warning `duplicate_slices`.
    - Slices of several patients that complete one stack fail, unless most slices have their own PatientID.
    - A part that repeats some of the images of another part is excluded as `duplicate_slices`.
    - Other parts are separate, with the warning `duplicate_slices`.

    Damaged files without PatientID and StudyInstanceUID are added to every part.

    Args:
        headers: Headers of all files with one SeriesInstanceUID.
        is_slice: Returns whether a file is a slice with a position that is not excluded.
    """
    anonymous = [header for header in headers if header.problem and not _has_owner(header)]
    known = [header for header in headers if not (header.problem and not _has_owner(header))]
    groups = split_by_fields(known, "patient_hash", "study_uid") if known else []
    if len(groups) < 2:
        return [SeriesPart(headers)]
    parts = [
        _make_owner_part([header for group in joined for header in group])
        for joined in _join_groups(groups, is_slice)
    ]
    _exclude_repeated_images(parts)
    for part in parts:
        part.headers = part.headers + anonymous
    return parts


def split_copies(slices: list[SliceHeader]) -> list[SeriesPart]:
    """Return the slices of one series grouped so that each group is one copy of the series.

    The slices of a folder stay together. Each folder joins the first group with which it shares neither a
    SOPInstanceUID nor a position, if the FrameOfReferenceUID is the same (an export split over folders).
    Of the groups that remain, one that holds only a share of the images of another is excluded, and groups
    that share some images and complete one stack are joined. Other groups are copies or separate volumes.
    """
    copies = _join_disjoint_folders(slices)
    if len(copies) < 2:
        return [SeriesPart(copy) for copy in copies]
    parts: list[SeriesPart] = []
    excluded = []
    for copy in sorted(copies, key=len, reverse=True):
        part = SeriesPart(copy)
        larger = next((other for other in parts if _is_share(part, other)), None)
        overlapping = next((other for other in parts if _overlaps(part, other)), None)
        if larger is not None:
            _add_warning(larger)
            part.reason, part.excluded = Reason.DUPLICATE_SLICES, True
            part.message = (
                f"{len(copy)} of the {len(larger.headers)} slices of this series, which another folder holds "
                "too; the other folder is read instead"
            )
            excluded.append(part)
        elif overlapping is not None:
            overlapping.headers = overlapping.headers + copy
            _add_warning(overlapping)
        else:
            parts.append(part)
    _warn_of_separate_copies(parts)
    return parts + excluded


def _are_one_stack(slices: list[SliceHeader]) -> bool:
    """Return whether slices are in line at equal steps, have one plane, and no telling field alternates."""
    first = slices[0]
    plane = first.rows, first.columns, first.orientation
    if len(slices) < MIN_SINGLE_SLICES or not all(is_in_plane(header, *plane) for header in slices):
        return False
    is_in_line = bool(are_in_line([first], slices).all())
    return is_in_line and is_regular(project_on_normal(slices)) and not find_mixture(slices)


def _make_joined_part(slices: list[SliceHeader]) -> SeriesPart:
    part = SeriesPart(slices)
    _add_warning(part)
    return part


def _make_single_part(header: SliceHeader) -> SeriesPart:
    message = (
        "one image is no volume; other files of this folder have a SeriesInstanceUID each, too: "
        "if they are one scan, give all of them the same SeriesInstanceUID"
    )
    return SeriesPart([header], reason=Reason.NOT_A_VOLUME, message=message)


def _has_owner(header: SliceHeader) -> bool:
    return bool(header.patient_hash or header.study_uid)


def _add_warning(part: SeriesPart) -> None:
    part.warnings = tuple(dict.fromkeys([*part.warnings, Reason.DUPLICATE_SLICES.value]))


def _join_groups(
    groups: list[list[SliceHeader]], is_slice: Callable[[SliceHeader], bool]
) -> list[list[list[SliceHeader]]]:
    """Return the groups in lists: groups in one list are likely shares of one stack."""
    slices = [[header for header in group if is_slice(header)] for group in groups]
    placed = [header for group in slices for header in group]
    if not placed:
        return [[group] for group in groups]
    plane = Counter((s.rows, s.columns, s.orientation) for s in placed).most_common(1)[0][0]
    in_plane = [[header for header in group if is_in_plane(header, *plane)] for group in slices]
    numbers = [number for number, group in enumerate(in_plane) if group]
    links = _link_shares([in_plane[number] for number in numbers])
    linked = [(numbers[first], numbers[second]) for first, second in links]
    return [[groups[number] for number in component] for component in connect(len(groups), linked)]


def _link_shares(groups: list[list[SliceHeader]]) -> list[tuple[int, int]]:
    """Return the pairs of groups (as indices) that are likely shares of one stack."""
    distances = _measure(groups)
    if _is_label_per_slice(len(groups), sum(map(len, groups))) or complete_one_stack(distances):
        return [(0, number) for number in range(1, len(groups))]
    pairs = combinations(range(len(groups)), 2) if len(groups) <= MAX_OWNERS else ()
    return [(i, j) for i, j in pairs if _are_shares(groups[i], groups[j], (distances[i], distances[j]))]


def _is_label_per_slice(labels: int, slices: int) -> bool:
    """Return whether slices have so many labels that these cannot stand for patients or studies."""
    return labels > max(2, slices / 2)


def _measure(groups: Sequence[Sequence[SliceHeader]]) -> list[Distances]:
    """Return the distances along one normal of the slices of each group."""
    distances = project_on_normal([header for group in groups for header in group])
    ends = [sum(map(len, groups[: number + 1])) for number in range(len(groups))]
    return [distances[end - len(group) : end] for end, group in zip(ends, groups, strict=True)]


def _are_shares(
    first: list[SliceHeader], second: list[SliceHeader], distances: tuple[Distances, Distances]
) -> bool:
    """Return whether slices of two owners are likely shares of one stack."""
    uids, other_uids = _get_uids(first), _get_uids(second)
    if uids & other_uids:
        return not (uids <= other_uids or other_uids <= uids)
    return belong_together(*distances) and bool(are_in_line(first, second).all())


def connect(count: int, linked: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the numbers from 0 to `count` - 1 in sets that are connected by links."""
    sets = [[number] for number in range(count)]
    for first, second in linked:
        if sets[first] is not sets[second]:
            merged = sets[first] + sets[second]
            for number in merged:
                sets[number] = merged
    return [list(numbers) for numbers in {tuple(sorted(numbers)): None for numbers in sets}]


def _make_owner_part(headers: list[SliceHeader]) -> SeriesPart:
    """Return the part for slices of one or more owners that are likely shares of one stack."""
    part = SeriesPart(headers)
    _add_warning(part)
    patients = {header.patient_hash for header in headers if header.patient_hash}
    if len(patients) > 1 and not _is_label_per_slice(len(patients), len(headers)):
        part.reason = Reason.NOT_A_VOLUME
        part.message = (
            f"slices with {len(patients)} PatientIDs complete one stack; if this is one patient, give all "
            "slices the same PatientID; if not, give each patient another SeriesInstanceUID"
        )
    return part


def _exclude_repeated_images(parts: list[SeriesPart]) -> None:
    """Exclude each part whose images are all among those of a larger part."""
    uids = [_get_uids(part.headers) for part in parts]
    for part, own in zip(parts, uids, strict=True):
        if own and any(own < other for other in uids):
            part.reason, part.excluded, part.message = Reason.DUPLICATE_SLICES, True, _REPEATED


_REPEATED = "these images are among those of another patient or study with the same SeriesInstanceUID"


def _get_uids(headers: Sequence[SliceHeader]) -> set[str]:
    return {header.sop_instance_uid for header in headers if header.sop_instance_uid}


def _join_disjoint_folders(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the slices by folder; each folder joins the first group with which it shares no slice."""
    folders: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        folders[header.folder].append(header)
    if len(folders) == 1:
        return list(folders.values())
    copies: list[list[SliceHeader]] = []
    keys_of_copies: list[set[object]] = []
    for members in folders.values():
        keys, frame_uid = _collect_unique_keys(members), members[0].frame_of_reference_uid
        fitting = (
            i
            for i, other_keys in enumerate(keys_of_copies)
            if not other_keys & keys and copies[i][0].frame_of_reference_uid == frame_uid
        )
        first = next(fitting, None)
        if first is None:
            copies.append(members)
            keys_of_copies.append(keys)
        else:
            copies[first] += members
            keys_of_copies[first] |= keys
    return copies


def _collect_unique_keys(slices: list[SliceHeader]) -> set[object]:
    """Return the values that two slices of one scan cannot share: SOPInstanceUID, and position to 0.1 mm."""
    return _get_uids(slices) | _get_positions(slices)


def _get_positions(slices: Sequence[SliceHeader]) -> set[object]:
    return {tuple(round(mm, 1) for mm in header.position) for header in slices if header.position}


def _is_share(part: SeriesPart, larger: SeriesPart) -> bool:
    """Return whether a part holds only some of the images of a larger part, and no damaged file."""
    if any(header.problem for header in part.headers):
        return False
    uids, larger_uids = _get_uids(part.headers), _get_uids(larger.headers)
    if uids and uids < larger_uids:
        return True
    distances = _measure_part(part, larger)
    return distances is not None and not uids & larger_uids and is_share_of(*distances)


def _overlaps(part: SeriesPart, larger: SeriesPart) -> bool:
    """Return whether two parts share some images and are neither copies nor complete volumes on their own."""
    distances = _measure_part(part, larger)
    if distances is None or not _collect_unique_keys(part.headers) & _collect_unique_keys(larger.headers):
        return False
    uids, larger_uids = _get_uids(part.headers), _get_uids(larger.headers)
    if uids & larger_uids:
        return uids != larger_uids
    is_copy = _get_positions(part.headers) == _get_positions(larger.headers)
    return not is_copy and not are_complete_volumes(distances)


def _measure_part(part: SeriesPart, larger: SeriesPart) -> tuple[Distances, Distances] | None:
    """Return the distances of the slices of two parts, or None if they are not comparable."""
    placed = [header for header in larger.headers if header.position and not header.problem]
    if not placed:
        return None
    plane = placed[0].rows, placed[0].columns, placed[0].orientation
    groups = [
        [header for header in headers if header.position and is_in_plane(header, *plane)]
        for headers in (part.headers, larger.headers)
    ]
    if not all(groups) or plane[2] is None:
        return None
    first, second = _measure(groups)
    return first, second


def _warn_of_separate_copies(parts: list[SeriesPart]) -> None:
    """Add a warning to parts that are not exact copies of each other, because the series was split."""
    uids = [_get_uids(part.headers) for part in parts]
    for part, own in zip(parts, uids, strict=True):
        if any(own != other for other in uids):
            _add_warning(part)
