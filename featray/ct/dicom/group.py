"""Group the slice headers of a collection into scans: which files make one volume, and which are left out.

Reads no pixels and opens no files. The rules, in this order:

1. A DICOMDIR is dropped because it is only an index of other files. A file that is not DICOM is dropped too,
   unless it seems to be a damaged DICOM file (rule 6).
2. Files of another modality or SOP class, color images, secondary captures and files without an image are
   `excluded` as `not_ct`, with one entry per SeriesInstanceUID. MR and PET are accepted on request. Files
   whose ImageType says localizer are `excluded` as `not_a_volume`; in a series that also has slices they are
   dropped with the warning `localizer_removed`.
3. Slices belong together if they share SeriesInstanceUID, PatientID and StudyInstanceUID. Without a
   SeriesInstanceUID they must share folder, SeriesNumber, PatientID and StudyInstanceUID.
4. Folders with the same SeriesInstanceUID are one scan if they share FrameOfReferenceUID but neither a
   SOPInstanceUID nor a position (an export split over folders). Otherwise they are copies, one scan each.
5. Within these groups, slices with the same orientation, matrix size (Rows x Columns) and kind (single-frame
   or multi-frame) are one scan.
   - Up to three images at another angle are localizers and are dropped with `localizer_removed`. Such an
     image that lies in line with the slices of a scan is a damaged slice instead; it stays in the scan so
     that reading refuses the scan.
   - A multi-frame copy of the single-frame slices is `excluded` as `duplicate_slices`.
   - Time points, convolution kernels or slice thicknesses in one series become one scan each, with the
     warning `duplicate_slices`, if their headers separate them cleanly (see `split`).
   - The files of a concatenation (one multi-frame image split into several files) are one scan.
6. A damaged file fails the scan that it belongs to, because a volume with a possibly missing slice must not
   be read. It belongs to a scan by its SeriesInstanceUID if that can be read, else by its file name (see
   `_find_adjacent_scans`). A damaged file that belongs to no scan is a failed entry of its own if its content
   or the end of its name shows that it is DICOM; otherwise it is dropped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.split import split_by_fields, split_volumes
from featray.errors import Reason, WarningCode

MAX_COSINE_DIFFERENCE = 1e-3
"""Orientations are equal if their cosines differ by at most this; headers are rounded to 4 to 6 digits."""

MAX_LOCALIZER_IMAGES, MIN_LOCALIZER_DEGREES = 3, 10.0
"""Localizers are at most this many images, at an angle of at least this to the other slices."""

MAX_DISTANCE_IN_LINE_MM = 5.0
"""Images at most this far from the line through the slices' first pixels are in line with the slices.

The first pixel of a localizer is about a field of view away from that line.
"""

_CT_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "2.1", "2.2")
)  # CT, Enhanced CT, Legacy Converted Enhanced CT Image Storage
_MR_PET_MODALITIES = frozenset({"MR", "PT"})
_MR_PET_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("4", "4.1", "4.4", "128", "128.1", "130")
)  # MR, Enhanced MR, Legacy Converted Enhanced MR, PET, Legacy Converted Enhanced PET, Enhanced PET
_KNOWN_MODALITIES = frozenset(
    {"CR", "DX", "ES", "IO", "KO", "MG", "MR", "NM", "OT", "PR", "PT", "PX", "REG", "RF", "RTDOSE"}
    | {"RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SR", "US", "XA", "XC"}
)
"""Modalities other than CT that a message may name. Any other text may identify the patient."""

_SECONDARY_CAPTURE_PREFIX = "1.2.840.10008.5.1.4.1.1.7."
"""SOP class of Secondary Capture Image Storage; the multi-frame variants append 1 to 4."""

_LOCALIZER_IMAGE_TYPES = frozenset({"LOCALIZER", "SCOUT", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"})
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_UNFINISHED_COPY = re.compile(r"\.(part|partial|tmp|filepart|crdownload|download)$")

_Exclusion = tuple[Reason, str]
"""Why a file is left out: the reason and a message."""


@dataclass(frozen=True)
class DicomScan:
    """One scan, or the files that were left out of a series together.

    Attributes:
        files: Names of the headers given, sorted. `read_series` needs these files if `reason` is None.
        series_uid: SeriesInstanceUID, empty if the files have none.
        reason: Why the scan must not be read, or None.
        excluded: With a reason: true if the files were left out by a rule, false if the scan failed.
        message: The reason in words, for users.
        warnings: Codes of unusual properties that were accepted.
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
    """Return the scans among the files of one folder or one whole collection, sorted by first file name.

    Every header ends up in exactly one entry, except files that are dropped by rules 1, 2, 5 and 6, and
    damaged files that may belong to several scans.

    Args:
        headers: Headers with unique names below one root. The folders of an export that was split over
            several folders must be given together.
        accept_other_modalities: Treat MR and PET images like CT, with the warning `not_ct`.
    """
    extra_modalities = _MR_PET_MODALITIES if accept_other_modalities else frozenset()
    groups: dict[tuple[str, ...], list[SliceHeader]] = defaultdict(list)
    unidentified = []
    for header in sorted(headers, key=lambda header: header.name):
        if header.problem and not header.series_uid:
            unidentified.append(header)
        elif not header.is_directory:
            groups[_make_series_key(header)].append(header)
    scans = [
        scan
        for group in groups.values()
        for members in _split_patients(group)
        for scan in _make_scans(members, extra_modalities)
    ]
    return sorted(_assign_unidentified_files(scans, unidentified), key=lambda scan: scan.files)


def _make_series_key(header: SliceHeader) -> tuple[str, ...]:
    return (header.series_uid,) if header.series_uid else ("", header.folder, header.series_number)


def _split_patients(headers: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the files of one UID grouped by patient and study.

    Damaged files without PatientID and StudyInstanceUID are added to every group.
    """
    anonymous: list[SliceHeader] = []
    known: list[SliceHeader] = []
    for header in headers:
        is_anonymous = header.problem and not (header.patient_hash or header.study_uid)
        (anonymous if is_anonymous else known).append(header)
    if not known:
        return [anonymous]
    return [group + anonymous for group in split_by_fields(known, "patient_hash", "study_uid")]


def _make_scans(members: list[SliceHeader], extra_modalities: frozenset[str]) -> list[DicomScan]:
    """Return the entries for the files of one SeriesInstanceUID and patient."""
    excluded: dict[_Exclusion, list[SliceHeader]] = defaultdict(list)
    slices = []
    for header in members:
        exclusion = _find_exclusion(header, extra_modalities)
        if exclusion:
            excluded[exclusion].append(header)
        else:
            slices.append(header)
    localizers = [exclusion for exclusion in excluded if slices and exclusion[0] is Reason.NOT_A_VOLUME]
    for exclusion in localizers:
        del excluded[exclusion]
    warnings = (WarningCode.LOCALIZER_REMOVED.value,) if localizers else ()
    groups = split_by_fields(slices, "modality") if extra_modalities else [slices]
    scans = [
        scan
        for group in groups
        for copy in _split_copies(group)
        for scan in _make_scans_by_grid(copy, warnings + _get_modality_warnings(copy))
    ]
    return scans + _make_excluded_scans(excluded)


def _find_exclusion(header: SliceHeader, extra_modalities: frozenset[str]) -> _Exclusion | None:
    """Return why a file is left out by rule 2, or None if it is, or may be, a slice to read."""
    # A CT SOP class outweighs a damaged Modality, so that a CT slice is not lost from among its neighbors.
    is_ct_class = header.sop_class_uid in _CT_CLASSES
    if header.modality not in {"", "CT", *extra_modalities} and not (
        is_ct_class and header.modality not in _KNOWN_MODALITIES
    ):
        return Reason.NOT_CT, f"modality is {_format_modality(header.modality)}"
    is_capture = (header.sop_class_uid + ".").startswith(_SECONDARY_CAPTURE_PREFIX)
    is_mr_pet = header.sop_class_uid in _MR_PET_CLASSES and not extra_modalities
    if is_mr_pet or not (is_ct_class or is_capture or _may_be_slice(header)):
        return Reason.NOT_CT, "the SOP class is not one of CT images"
    if header.problem:
        return None
    if not header.has_pixels and not header.sop_class_uid and not header.rows:
        return Reason.NOT_CT, "the file contains no image"
    is_plain_capture = is_capture and not header.has_functional_groups
    if header.samples_per_pixel != 1 or is_plain_capture or _is_screenshot(header):
        return Reason.NOT_CT, "a secondary capture (report, screenshot or copy of a localizer)"
    if _LOCALIZER_IMAGE_TYPES & set(header.image_type):
        return Reason.NOT_A_VOLUME, "a localizer, not a volume"
    return None


def _may_be_slice(header: SliceHeader) -> bool:
    """Return whether a file is a single-frame image with a position, or has no SOP class."""
    is_single_frame = header.has_pixels and header.number_of_frames == 1
    return not header.sop_class_uid or (is_single_frame and bool(header.position))


def _is_screenshot(header: SliceHeader) -> bool:
    """Return whether a file with CT SOP class is a screenshot or report: ImageType SECONDARY, no position."""
    return not _has_geometry(header) and not header.position and "SECONDARY" in header.image_type


def _format_modality(text: str) -> str:
    """Return a known modality, else `not CT`, because other text may identify the patient."""
    return text if text in _KNOWN_MODALITIES else "not CT"


def _get_modality_warnings(slices: list[SliceHeader]) -> tuple[str, ...]:
    return (Reason.NOT_CT.value,) if any(s.modality in _MR_PET_MODALITIES for s in slices) else ()


def _make_excluded_scans(excluded: dict[_Exclusion, list[SliceHeader]]) -> list[DicomScan]:
    """Return one entry for all excluded files of a SeriesInstanceUID, with the most frequent reason."""
    if not excluded:
        return []
    reason, message = max(excluded, key=lambda exclusion: len(excluded[exclusion]))
    headers = [header for members in excluded.values() for header in members]
    return [DicomScan(_sort_names(headers), headers[0].series_uid, reason, excluded=True, message=message)]


def _split_copies(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the slices of one SeriesInstanceUID, grouped so that no group contains a slice twice.

    The slices of a folder stay together. Each folder joins the first group that it does not overlap with.
    """
    folders: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        folders[header.folder].append(header)
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
    uids = {header.sop_instance_uid for header in slices if header.sop_instance_uid}
    positions = {tuple(round(mm, 1) for mm in header.position) for header in slices if header.position}
    return uids | positions


def _make_scans_by_grid(slices: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return the entries for slices without copies: one or more for each orientation, matrix size and kind.

    Damaged files fail all of them. Slices without position or orientation are added to the largest stack,
    so that reading refuses it. If they were an entry of their own, nobody would notice that the stack lacks
    slices.
    """
    damaged = [header for header in slices if header.problem]
    placed = [header for header in slices if not header.problem and _has_geometry(header)]
    unplaced = [header for header in slices if not header.problem and not _has_geometry(header)]
    stacks = sorted(_group_by_grid(placed), key=len, reverse=True) or [[]]
    main, others = stacks[0] + unplaced, stacks[1:]
    if not main:
        return [_add_damaged_files(DicomScan((), damaged[0].series_uid), damaged)]
    in_line = [stack for stack in others if _is_in_line(stack, main)]
    main = main + [header for stack in in_line for header in stack]
    others = [stack for stack in others if stack not in in_line]
    localizers = [stack for stack in others if _is_localizer(stack, main)]
    copies = [stack for stack in others if _is_multiframe_copy(stack, main)]
    dropped = {WarningCode.LOCALIZER_REMOVED.value: localizers, Reason.DUPLICATE_SLICES.value: copies}
    new_warnings = (code for code, dropped_stacks in dropped.items() if dropped_stacks)
    warnings = tuple(dict.fromkeys([*warnings, *new_warnings]))
    kept = [main] + [stack for stack in others if stack not in localizers and stack not in copies]
    scans = [scan for stack in kept for scan in _make_volume_scans(stack, warnings)]
    scans += [_make_multiframe_copy_scan(stack) for stack in copies]
    return [_add_damaged_files(scan, damaged) for scan in scans]


def _make_volume_scans(stack: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return one entry for each volume of a stack."""
    parts = split_volumes(stack)
    if len(parts) > 1:
        warnings = tuple(dict.fromkeys([*warnings, Reason.DUPLICATE_SLICES.value]))
    return [DicomScan(_sort_names(part), part[0].series_uid, warnings=warnings) for part in parts]


def _has_geometry(header: SliceHeader) -> bool:
    return header.has_functional_groups or bool(header.position and header.orientation)


def _group_by_grid(slices: Iterable[SliceHeader]) -> list[list[SliceHeader]]:
    stacks: list[list[SliceHeader]] = []
    for header in slices:
        fitting = next((stack for stack in stacks if _is_same_grid(stack[0], header)), None)
        if fitting is None:
            stacks.append([header])
        else:
            fitting.append(header)
    return stacks


def _is_same_grid(first: SliceHeader, second: SliceHeader) -> bool:
    """Return whether slices have one orientation and matrix size, or are files of one concatenation."""
    if first.number_of_frames > 1 or second.number_of_frames > 1:
        return bool(first.concatenation_uid) and first.concatenation_uid == second.concatenation_uid
    if (first.rows, first.columns) != (second.rows, second.columns):
        return False
    if first.orientation is None or second.orientation is None:
        return first.orientation == second.orientation
    pairs = zip(first.orientation, second.orientation, strict=True)
    return all(abs(a - b) <= MAX_COSINE_DIFFERENCE for a, b in pairs)


def _is_localizer(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Return whether a few images are at an angle to the many slices of the main stack."""
    ours, theirs = stack[0].orientation, main[0].orientation
    is_few = len(stack) <= MAX_LOCALIZER_IMAGES < len(main)
    if not is_few or ours is None or theirs is None:
        return False
    cosine = np.dot(np.cross(ours[:3], ours[3:]), np.cross(theirs[:3], theirs[3:]))
    return bool(abs(cosine) < np.cos(np.radians(MIN_LOCALIZER_DEGREES)))


def _is_in_line(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Return whether a few images lie on the line through the positions of the many main slices."""
    positions = np.array([header.position or (np.nan,) * 3 for header in (*main, *stack)])
    is_few = len(stack) <= MAX_LOCALIZER_IMAGES < len(main)
    if not is_few or stack[0].has_functional_groups or np.isnan(positions).any():
        return False
    from_first = positions - positions[0]
    farthest = from_first[np.linalg.norm(from_first[: len(main)], axis=1).argmax()]
    length = np.linalg.norm(farthest)
    if length == 0:
        return False
    distances = np.linalg.norm(np.cross(from_first[len(main) :], farthest), axis=1) / length
    return bool((distances < MAX_DISTANCE_IN_LINE_MM).all())


def _is_multiframe_copy(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Return whether a multi-frame file agrees with single-frame main slices in count and matrix size."""
    frames, first = stack[0].number_of_frames, main[0]
    has_same_size = (stack[0].rows, stack[0].columns) == (first.rows, first.columns)
    return frames > 1 and frames == len(main) and first.number_of_frames == 1 and has_same_size


def _make_multiframe_copy_scan(stack: list[SliceHeader]) -> DicomScan:
    message = "a multi-frame copy of slices with the same SeriesInstanceUID; the slices are read instead"
    names, uid = _sort_names(stack), stack[0].series_uid
    return DicomScan(names, uid, Reason.DUPLICATE_SLICES, excluded=True, message=message)


def _add_damaged_files(scan: DicomScan, damaged: list[SliceHeader]) -> DicomScan:
    for header in damaged:
        scan = _add_damaged_file(scan, header)
    return scan


def _add_damaged_file(scan: DicomScan, header: SliceHeader) -> DicomScan:
    """Return the scan with a damaged file added; it then fails, unless it already has a reason."""
    files = tuple(sorted({*scan.files, header.name}))
    if scan.reason:
        return replace(scan, files=files)
    message = (
        f"{header.file_name}: {header.message}; "
        "copy the file again, or remove it if it does not belong to this scan"
    )
    return replace(scan, files=files, reason=header.problem, message=message)


def _assign_unidentified_files(scans: list[DicomScan], unidentified: list[SliceHeader]) -> list[DicomScan]:
    """Return the scans after adding the damaged files without SeriesInstanceUID to the scans that they fit.

    A file that fits no scan becomes a failed entry of its own, or is dropped if it does not look like DICOM.
    """
    scan_of_file: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for index, scan in enumerate(scans):
        for name in scan.files:
            scan_of_file[_make_name_pattern(name)][name] = index
    scans, separate = list(scans), []
    for header in unidentified:
        adjacent = _find_adjacent_scans(header.name, scan_of_file.get(_make_name_pattern(header.name), {}))
        for index in adjacent:
            scans[index] = _add_damaged_file(scans[index], header)
        if not adjacent and _claims_to_be_dicom(header):
            separate.append(_add_damaged_file(DicomScan((header.name,), ""), header))
    return scans + separate


def _make_name_pattern(name: str) -> tuple[str, str]:
    """Return the folder, and the file name with each run of digits replaced by `#`.

    Files that are numbered in the same way have the same pattern.
    """
    folder, _, file_name = name.rpartition("/")
    return folder, re.sub(r"\d+", "#", _UNFINISHED_COPY.sub("", file_name))


def _find_adjacent_scans(name: str, scan_of_file: dict[str, int]) -> set[int]:
    """Return the indices of the scans that a damaged file may belong to.

    If each scan occupies one block of the file numbers, these are the scans just before and after the file.
    If not (hashes as names, or several series interleaved), these are all scans, because the file may be a
    slice of any of them.

    Args:
        name: Name of the damaged file.
        scan_of_file: Index of the scan by file name, for the files that are named in the same way.
    """
    ordered = sorted(scan_of_file, key=_make_natural_key)
    indices = [scan_of_file[other] for other in ordered]
    blocks = sum(a != b for a, b in pairwise(indices)) + bool(indices)
    if blocks > len(set(indices)):
        return set(indices)
    place = sum(_make_natural_key(other) < _make_natural_key(name) for other in ordered)
    return set(indices[max(0, place - 1) : place + 1])


def _make_natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders runs of digits by their numeric value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _claims_to_be_dicom(header: SliceHeader) -> bool:
    if header.file_name.startswith("."):
        return False  # companion files that macOS and rsync create
    return header.is_dicom or header.file_name.lower().endswith(DICOM_SUFFIXES)


def _sort_names(headers: list[SliceHeader]) -> tuple[str, ...]:
    return tuple(sorted(header.name for header in headers))
