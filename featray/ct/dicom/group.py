"""Slice headers in, scans out: which files make one volume, and what is left out by which rule.

Sees no pixels and opens nothing. Rules, in this order:

1. A DICOMDIR is an index, and a file that is no DICOM is none of ours; both are dropped, except
   that a damaged file counts: see 6.
2. Files of another modality or class (unless they are accepted), colour pages, secondary captures and
   files without an image are `excluded` as `not_ct` (one entry per SeriesInstanceUID); localizers as
   `not_a_volume`.
3. Slices belong together by SeriesInstanceUID, patient and study. Where the UID is empty: by folder,
   SeriesNumber, patient and study.
4. A UID in several folders is one scan if the folders share the frame of reference but neither
   SOP Instance UID nor position (a split export); other folders are copies, one scan each.
5. Within that, slices of one orientation, rows x columns and kind (single or multi-frame) are one
   scan. Up to three images at another angle are localizers, dropped with `localizer_removed`; but what
   lies in line with a scan's slices is a damaged one of them, and stays for reading to refuse. A
   multi-frame copy of the single frames is `excluded` as `duplicate_slices`. Time points, kernels or
   thicknesses in one series are one scan each, with the warning `duplicate_slices`, where headers tell
   them apart cleanly (`dicom_apart`). The files of a divided multi-frame image are one scan.
6. A damaged file fails the scan it belongs to, since a volume that may miss a slice is never made:
   by its SeriesInstanceUID if that can be read, else by its name (see `_neighbours`). One that
   belongs to nothing is a failed entry of its own if its name ends like a DICOM file's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.split import apart, volumes
from featray.errors import Reason, WarningCode

SAME_DIRECTION = 1e-3
"""Direction cosines closer than this are one orientation; writers round to 4 to 6 digits."""

LOCALIZER_IMAGES, LOCALIZER_DEGREES = 3, 10.0
"""At most this many images, at least this far off the main orientation."""

IN_LINE_MM = 5.0
"""A scout's corner lies a field of view away from the line of the slices' corners."""

_CT_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "2.1", "2.2")
)  # CT, Enhanced CT, Legacy Converted Enhanced CT Image Storage
_OTHER_MODALITIES = frozenset({"MR", "PT"})
_OTHER_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("4", "4.1", "4.4", "128", "128.1", "130")
)  # MR, Enhanced MR, Legacy Converted Enhanced MR, PET, Legacy Converted Enhanced PET, Enhanced PET
_NAMED = frozenset(
    {"CR", "DX", "ES", "IO", "KO", "MG", "MR", "NM", "OT", "PR", "PT", "PX", "REG", "RF", "RTDOSE"}
    | {"RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SR", "US", "XA", "XC"}
)
_CAPTURES = "1.2.840.10008.5.1.4.1.1.7."  # Secondary Capture; multi-frame ones add 1 to 4
_LOCALIZER_WORDS = frozenset({"LOCALIZER", "SCOUT", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"})
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_UNFINISHED = re.compile(r"\.(part|partial|tmp|filepart|crdownload|download)$")


@dataclass(frozen=True)
class DicomScan:
    """One scan as found: its files and, if it is not to be read, why.

    Attributes:
        files: Names of the headers given, sorted; what `read_series` needs if `reason` is None.
        series_uid: SeriesInstanceUID, empty if the files have none.
        reason: None for a scan to read.
        excluded: True if left out by rule, false if failed; only with a reason.
        message: The reason in words, for people.
        warnings: Codes of what was odd but accepted.
    """

    files: tuple[str, ...]
    series_uid: str
    reason: Reason | None = None
    excluded: bool = False
    message: str = ""
    warnings: tuple[str, ...] = ()


def group_into_scans(
    headers: Sequence[SliceHeader], *, accept_other_modalities: bool = False
) -> list[DicomScan]:
    """Return the scans among the files of one folder or one whole collection, by first file name.

    Every header ends in exactly one entry, except what rules 1 and 5 drop, and damaged files that may
    belong to several. Names must be unique and share one root; a split export is only seen if its
    folders are given together. With `accept_other_modalities` MR and PET images are scans like CT,
    with the warning `not_ct`.
    """
    others = _OTHER_MODALITIES if accept_other_modalities else frozenset()
    groups: dict[tuple[str, ...], list[SliceHeader]] = defaultdict(list)
    strays = []
    for header in sorted(headers, key=lambda header: header.name):
        if header.problem and not header.series_uid:
            strays.append(header)
        elif not header.is_directory:
            groups[_key(header)].append(header)
    series = [
        found for members in groups.values() for part in _owners(members) for found in _scans(part, others)
    ]
    return sorted(_with_strays(series, strays), key=lambda found: found.files)


def _owners(members: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return files of one UID by patient and study; damaged ones that name neither go with each."""
    lost: list[SliceHeader] = []
    known: list[SliceHeader] = []
    for header in members:
        nameless = header.problem and not (header.patient or header.study_uid)
        (lost if nameless else known).append(header)
    return [part + lost for part in apart(known, "patient", "study_uid")] if known else [lost]


def _exclusion(header: SliceHeader, others: frozenset[str]) -> tuple[Reason, str] | None:
    """Return why a file is left out by rule, or None for a CT slice (or what must be one)."""
    # A damaged modality or class does not make a CT slice vanish from among its neighbours.
    by_class = header.sop_class in _CT_CLASSES and header.modality not in _NAMED
    if header.modality not in {"", "CT", *others} and not by_class:
        return Reason.NOT_CT, f"modality is {_code(header.modality)}"
    capture = (header.sop_class + ".").startswith(_CAPTURES)
    foreign = header.sop_class in _OTHER_CLASSES and not others
    if foreign or not (header.sop_class in _CT_CLASSES or capture or _is_plain_slice(header)):
        return Reason.NOT_CT, "an object of another class than CT images"
    if header.problem:
        return None
    if not header.has_pixels and not header.sop_class and not header.rows:
        return Reason.NOT_CT, "no image in it"
    if header.samples != 1 or (capture and not header.functional_groups) or _is_page(header):
        return Reason.NOT_CT, "a secondary capture (report, screenshot or copy of a localizer)"
    if _LOCALIZER_WORDS & set(header.image_type):
        return Reason.NOT_A_VOLUME, "a localizer, no volume"
    return None


def _is_plain_slice(header: SliceHeader) -> bool:
    """Tell a single image with a place, or a file that does not say what it is."""
    return not header.sop_class or (header.has_pixels and header.frames == 1 and bool(header.position))


def _is_page(header: SliceHeader) -> bool:
    """Tell a screenshot or report that calls itself a CT image: made from others, and lying nowhere."""
    return not _has_place(header) and not header.position and "SECONDARY" in header.image_type


def _key(header: SliceHeader) -> tuple[str, ...]:
    return (header.series_uid,) if header.series_uid else ("", header.folder, header.series_number)


def _code(text: str) -> str:
    """Return a known modality for a message; anything else might say who the patient is."""
    return text if text in _NAMED else "not CT"


def _scans(members: list[SliceHeader], others: frozenset[str]) -> list[DicomScan]:
    """Return the entries of one SeriesInstanceUID."""
    excluded: dict[tuple[Reason, str], list[SliceHeader]] = defaultdict(list)
    slices = []
    for header in members:
        why = _exclusion(header, others)
        if why:
            excluded[why].append(header)
        else:
            slices.append(header)
    localizers = [why for why in excluded if slices and why[0] is Reason.NOT_A_VOLUME]
    for why in localizers:
        del excluded[why]
    warnings = (WarningCode.LOCALIZER_REMOVED.value,) if localizers else ()
    kinds = apart(slices, "modality") if others else [slices]
    stacks = [
        found for kind in kinds for copy in _copies(kind) for found in _stacks(copy, warnings + _other(copy))
    ]
    return stacks + _left_out(excluded)


def _other(slices: list[SliceHeader]) -> tuple[str, ...]:
    return (Reason.NOT_CT.value,) if any(s.modality in _OTHER_MODALITIES for s in slices) else ()


def _left_out(excluded: dict[tuple[Reason, str], list[SliceHeader]]) -> list[DicomScan]:
    """Return one entry for all that a UID holds beside slices; the commonest reason speaks."""
    if not excluded:
        return []
    reason, message = max(excluded, key=lambda why: len(excluded[why]))
    headers = [header for found in excluded.values() for header in found]
    return [DicomScan(_names(headers), headers[0].series_uid, reason, True, message)]


def _copies(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return slices of one UID, apart where folders overlap; each folder joins the first it fits."""
    folders: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        folders[header.folder].append(header)
    copies: list[list[SliceHeader]] = []
    taken: list[set[object]] = []
    for members in folders.values():
        marks, frame = _marks(members), members[0].frame_uid
        fits = (i for i, others in enumerate(taken) if not others & marks and copies[i][0].frame_uid == frame)
        fit = next(fits, None)
        if fit is None:
            copies.append(members)
            taken.append(marks)
        else:
            copies[fit] += members
            taken[fit] |= marks
    return copies


def _marks(slices: list[SliceHeader]) -> set[object]:
    """Return what two different slices cannot share: their SOP Instance UID and their place."""
    uids = {header.sop_uid for header in slices if header.sop_uid}
    places = {tuple(round(mm, 1) for mm in header.position) for header in slices if header.position}
    return uids | places


def _stacks(slices: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return one entry per orientation, matrix and kind.

    Damaged files fail them all. Slices without a place go with the largest stack, where reading
    refuses them: on their own they would leave it one slice short.
    """
    broken = [header for header in slices if header.problem]
    placed = [header for header in slices if not header.problem and _has_place(header)]
    unplaced = [header for header in slices if not header.problem and not _has_place(header)]
    stacks = sorted(_alike(placed), key=len, reverse=True) or [[]]
    main, others = stacks[0] + unplaced, stacks[1:]
    if not main:
        return [_with_broken(DicomScan((), broken[0].series_uid), broken)]
    damaged = [stack for stack in others if _is_in_line(stack, main)]
    main = main + [header for stack in damaged for header in stack]
    others = [stack for stack in others if stack not in damaged]
    localizers = [stack for stack in others if _is_localizer(stack, main)]
    copies = [stack for stack in others if _is_copy(stack, main)]
    dropped = {WarningCode.LOCALIZER_REMOVED.value: localizers, Reason.DUPLICATE_SLICES.value: copies}
    warnings = tuple(dict.fromkeys([*warnings, *(code for code, found in dropped.items() if found)]))
    kept = [main] + [stack for stack in others if stack not in localizers and stack not in copies]
    found = [entry for stack in kept for entry in _entries(stack, warnings)]
    return [_with_broken(entry, broken) for entry in found + [_multiframe_copy(stack) for stack in copies]]


def _entries(stack: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return one entry for each volume of a stack."""
    parts = volumes(stack)
    if len(parts) > 1:
        warnings = tuple(dict.fromkeys([*warnings, Reason.DUPLICATE_SLICES.value]))
    return [DicomScan(_names(part), part[0].series_uid, warnings=warnings) for part in parts]


def _has_place(header: SliceHeader) -> bool:
    return header.functional_groups or bool(header.position and header.orientation)


def _alike(slices: Iterable[SliceHeader]) -> list[list[SliceHeader]]:
    stacks: list[list[SliceHeader]] = []
    for header in slices:
        fit = next((stack for stack in stacks if _same_stack(stack[0], header)), None)
        if fit is None:
            stacks.append([header])
        else:
            fit.append(header)
    return stacks


def _same_stack(first: SliceHeader, second: SliceHeader) -> bool:
    if first.frames > 1 or second.frames > 1:
        return bool(first.concatenation) and first.concatenation == second.concatenation
    if (first.rows, first.columns) != (second.rows, second.columns):
        return False
    if first.orientation is None or second.orientation is None:
        return first.orientation == second.orientation
    pairs = zip(first.orientation, second.orientation, strict=True)
    return all(abs(a - b) <= SAME_DIRECTION for a, b in pairs)


def _is_localizer(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    ours, theirs = stack[0].orientation, main[0].orientation
    if len(stack) > LOCALIZER_IMAGES or len(main) <= LOCALIZER_IMAGES or ours is None or theirs is None:
        return False
    cosine = np.dot(np.cross(ours[:3], ours[3:]), np.cross(theirs[:3], theirs[3:]))
    return bool(abs(cosine) < np.cos(np.radians(LOCALIZER_DEGREES)))


def _is_in_line(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Tell a few images that lie on the line through the places of many others."""
    places = np.array([header.position or (np.nan,) * 3 for header in (*main, *stack)])
    many = len(stack) > LOCALIZER_IMAGES or len(main) <= LOCALIZER_IMAGES
    if many or stack[0].functional_groups or np.isnan(places).any():
        return False
    from_first = places - places[0]
    far = from_first[np.linalg.norm(from_first[: len(main)], axis=1).argmax()]
    length = np.linalg.norm(far)
    if length == 0:
        return False
    off = np.linalg.norm(np.cross(from_first[len(main) :], far), axis=1) / length
    return bool((off < IN_LINE_MM).all())


def _is_copy(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    frames, first = stack[0].frames, main[0]
    same_matrix = (stack[0].rows, stack[0].columns) == (first.rows, first.columns)
    return frames > 1 and frames == len(main) and first.frames == 1 and same_matrix


def _multiframe_copy(stack: list[SliceHeader]) -> DicomScan:
    message = "a multi-frame copy of the single frames with the same SeriesInstanceUID; those are read"
    return DicomScan(_names(stack), stack[0].series_uid, Reason.DUPLICATE_SLICES, True, message)


def _with_broken(series: DicomScan, broken: list[SliceHeader]) -> DicomScan:
    for header in broken:
        series = _failed(series, header)
    return series


def _failed(series: DicomScan, header: SliceHeader) -> DicomScan:
    """Return the series with a damaged file in it; left out by rule it stays left out."""
    files = tuple(sorted({*series.files, header.name}))
    if series.reason:
        return replace(series, files=files)
    message = (
        f"{header.base}: {header.message}; copy the file again, or take it out if it is not of this scan"
    )
    return replace(series, files=files, reason=header.problem, message=message)


def _with_strays(series: list[DicomScan], strays: list[SliceHeader]) -> list[DicomScan]:
    """Return the series with the damaged files whose UID is unknown where they belong."""
    owners: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for index, found in enumerate(series):
        for name in found.files:
            owners[_pattern(name)][name] = index
    series, own = list(series), []
    for header in strays:
        neighbours = _neighbours(header.name, owners.get(_pattern(header.name), {}))
        for index in neighbours:
            series[index] = _failed(series[index], header)
        if not neighbours and _claims_dicom(header):
            own.append(_failed(DicomScan((header.name,), ""), header))
    return series + own


def _pattern(name: str) -> tuple[str, str]:
    """Return folder and file name with each run of digits as `#`: what numbered files share."""
    folder, _, base = name.rpartition("/")
    return folder, re.sub(r"\d+", "#", _UNFINISHED.sub("", base))


def _neighbours(name: str, owners: dict[str, int]) -> set[int]:
    """Return the series a damaged file may belong to, among files named alike in its folder.

    If each series takes up one block of the numbers: those just before and after it. If not
    (hashes, several series interleaved): all, because it may be a slice of any.
    """
    ordered = sorted(owners, key=_natural)
    indices = [owners[other] for other in ordered]
    blocks = sum(a != b for a, b in pairwise(indices)) + bool(indices)
    if blocks > len(set(indices)):
        return set(indices)
    place = sum(_natural(other) < _natural(name) for other in ordered)
    return set(indices[max(0, place - 1) : place + 1])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _claims_dicom(header: SliceHeader) -> bool:
    if header.base.startswith("."):
        return False  # companions that macOS and rsync leave
    return header.is_dicom or header.base.lower().endswith(DICOM_SUFFIXES)


def _names(headers: list[SliceHeader]) -> tuple[str, ...]:
    return tuple(sorted(header.name for header in headers))
