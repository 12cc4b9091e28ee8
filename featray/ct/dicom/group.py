"""Group the slice headers of a collection into scans: which files make one volume, and which are left out.

Reads no pixels and opens no files. The rules, in this order:

1. A DICOMDIR is dropped because it is only an index of other files. A file that is not DICOM is dropped too,
   unless it seems to be a damaged DICOM file (rule 6).
2. Files of another modality or SOP class, color images, secondary captures and files without an image are
   `excluded` as `not_ct`, with one entry per SeriesInstanceUID. MR, PET and secondary captures with the
   geometry of slices are accepted on request. Files whose ImageType says localizer are `excluded` as
   `not_a_volume`; in a series that also has slices they are dropped with the warning `localizer_removed`.
   An image that would be left out by this rule, but lies on a free place of the stack that the slices of its
   series form, fails the scan instead: the volume would lack a slice (see `exclude.find_stray_slices`).
3. Slices belong together if they share SeriesInstanceUID, or, without one, folder and SeriesNumber. Slices of
   one folder with a SeriesInstanceUID each are one scan with the warning `duplicate_slices` if they are one
   regular stack, else one failed entry each (see `join.join_single_slices`). If slices of one series
   differ in PatientID or StudyInstanceUID, the positions decide (see `join.split_by_owner`): slices of
   several studies that complete one stack are one scan, slices of several patients that do so fail, and
   other parts are one scan each, all with the warning `duplicate_slices`.
4. Folders with the same SeriesInstanceUID are one scan if they share FrameOfReferenceUID but neither a
   SOPInstanceUID nor a position (an export split over folders), or if they share some images and complete
   one stack. A folder with only a share of the images of another is `excluded` as `duplicate_slices`.
   Other folders are copies or separate volumes, one scan each (see `join.split_copies`).
5. Within these groups, slices with the same orientation, matrix size (Rows x Columns) and kind (single-frame
   or multi-frame) are one scan. If there are several, each has the warning `duplicate_slices`.
   - Up to three images at another angle are localizers and are dropped with `localizer_removed`. Such an
     image that lies in line with the slices of a scan, or images of another matrix size that complete the
     grid of the slices, stay in the scan so that reading refuses the scan.
   - A multi-frame copy of the single-frame slices is `excluded` as `duplicate_slices`.
   - Time points, convolution kernels or slice thicknesses in one series become one scan each, with the
     warning `duplicate_slices`, if their headers separate them cleanly. If their slices lie between each
     other and are not separated cleanly, the scan fails as `duplicate_slices` (see `split`).
   - The files of a concatenation (one multi-frame image split into several files) are one scan. Other
     multi-frame files are one scan, with the warning `duplicate_slices`, if they continue each other, and a
     scan each if they cover the same range (see `join_multiframe`).
6. A damaged file fails the scan that it belongs to, because a volume with a possibly missing slice must not
   be read. It belongs to a scan by its SeriesInstanceUID if that can be read, else by its file name (see
   `_find_adjacent_scans`). A damaged file that belongs to no scan is a failed entry of its own if its content
   or the end of its name shows that it is DICOM; otherwise it is dropped.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featray.ct.dicom.dicom_scan import DicomScan, add_damaged_files
from featray.ct.dicom.exclude import (
    MAX_DISTANCE_IN_LINE_MM,
    Exclusion,
    find_exclusion,
    find_stray_slices,
    get_modality_warnings,
    has_geometry,
    is_in_plane,
)
from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.join import SeriesPart, join_single_slices, split_by_owner, split_copies
from featray.ct.dicom.join_multiframe import (
    are_joined_multiframes,
    find_multiframe_mixture,
    find_places,
    join_multiframes,
)
from featray.ct.dicom.parts import StackRange, is_regular, share_positions, unite
from featray.ct.dicom.split import (
    are_in_alternating_folders,
    find_folder_mixture,
    find_mixture,
    split_volumes,
)
from featray.ct.dicom.stack import project_on_normal
from featray.ct.dicom.unidentified import assign_unidentified_files
from featray.errors import Reason, WarningCode

MAX_LOCALIZER_IMAGES, MIN_LOCALIZER_DEGREES = 3, 10.0
"""Localizers are at most this many images, at an angle of at least this to the other slices."""


def group_into_scans(
    headers: Sequence[SliceHeader], *, accept_other_modalities: bool = False
) -> list[DicomScan]:
    """Return the scans among the files of one folder or one whole collection, sorted by first file name.

    Every header ends up in exactly one entry, except files that are dropped by rules 1, 2, 5 and 6, and
    damaged files that may belong to several scans.

    Args:
        headers: Headers with unique names below one root. The folders of an export that was split over
            several folders must be given together.
        accept_other_modalities: Treat MR and PET images, and secondary captures with the geometry of slices,
            like CT, with the warning `not_ct`.
    """
    grouper = _Grouper(accept_other_modalities)
    groups: dict[tuple[str, ...], list[SliceHeader]] = defaultdict(list)
    unidentified = []
    for header in sorted(headers, key=lambda header: header.name):
        if header.problem and not header.series_uid:
            unidentified.append(header)
        elif not header.is_directory:
            groups[_make_series_key(header)].append(header)
    scans = [scan for group in grouper.join_single_slices(groups) for scan in grouper.make_scans(group)]
    return sorted(assign_unidentified_files(scans, unidentified), key=lambda scan: scan.files)


def _make_series_key(header: SliceHeader) -> tuple[str, ...]:
    return (header.series_uid,) if header.series_uid else ("", header.folder, header.series_number)


@dataclass(frozen=True)
class _Grouper:
    """Makes the entries for the files of one SeriesInstanceUID."""

    accept_other_modalities: bool

    def join_single_slices(self, groups: Mapping[tuple[str, ...], list[SliceHeader]]) -> list[SeriesPart]:
        """Return the files of each series, and slices with a SeriesInstanceUID each that are one stack."""
        single = [
            members[0]
            for members in groups.values()
            if len(members) == 1 and members[0].series_uid and self._is_slice(members[0])
        ]
        parts = join_single_slices(single)
        names = {header.name for part in parts for header in part.headers}
        return parts + [SeriesPart(members) for members in groups.values() if members[0].name not in names]

    def make_scans(self, series: SeriesPart) -> list[DicomScan]:
        """Return the entries for the files of one series."""
        if series.reason:
            return [_make_part_scan(series)]
        return [
            scan
            for part in split_by_owner(series.headers, self._is_slice)
            for scan in self._make_owner_scans(
                replace(part, warnings=_join_codes(series.warnings, part.warnings))
            )
        ]

    def _is_slice(self, header: SliceHeader) -> bool:
        is_placed = bool(header.position and header.orientation) and header.number_of_frames == 1
        return is_placed and not header.problem and self._find_exclusion(header) is None

    def _find_exclusion(self, header: SliceHeader) -> Exclusion | None:
        return find_exclusion(header, accept_other_modalities=self.accept_other_modalities)

    def _make_owner_scans(self, owner: SeriesPart) -> list[DicomScan]:
        """Return the entries for the files of one SeriesInstanceUID and patient."""
        slices, excluded = self._sort_out(owner.headers)
        strays = find_stray_slices(slices, [header for members in excluded.values() for header in members])
        exclusions = {header.name: key for key, members in excluded.items() for header in members}
        excluded = _remove_headers(excluded, strays)
        localizers = [key for key in excluded if slices and key[0] is Reason.NOT_A_VOLUME]
        for key in localizers:
            del excluded[key]
        warnings = (WarningCode.LOCALIZER_REMOVED.value,) if localizers else ()
        if owner.reason:
            scans = [_make_part_scan(replace(owner, headers=slices))] if slices else []
        else:
            scans = _make_copies_scans(slices, _join_codes(owner.warnings, warnings))
        for stray in strays:
            scans = [_add_stray_slice(scan, stray, exclusions[stray.name]) for scan in scans]
        return scans + _make_excluded_scans(excluded)

    def _sort_out(
        self, members: list[SliceHeader]
    ) -> tuple[list[SliceHeader], dict[Exclusion, list[SliceHeader]]]:
        """Return the slices to read, and the files to leave out by the reason."""
        excluded: dict[Exclusion, list[SliceHeader]] = defaultdict(list)
        slices = []
        for header in members:
            exclusion = self._find_exclusion(header)
            if exclusion:
                excluded[exclusion].append(header)
            else:
                slices.append(header)
        return slices, excluded


def _remove_headers(
    excluded: dict[Exclusion, list[SliceHeader]], strays: list[SliceHeader]
) -> dict[Exclusion, list[SliceHeader]]:
    """Return the excluded files without those in `strays`."""
    names = {header.name for header in strays}
    kept = {key: [h for h in members if h.name not in names] for key, members in excluded.items()}
    return {key: members for key, members in kept.items() if members}


def _make_copies_scans(slices: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return the entries for the slices of one SeriesInstanceUID and patient, which may hold copies."""
    scans = []
    for part in split_copies(slices):
        if part.reason:
            scans.append(_make_part_scan(part))
        else:
            codes = _join_codes(warnings, part.warnings, get_modality_warnings(part.headers))
            scans += _make_scans_by_grid(part.headers, codes)
    return scans


def _make_part_scan(part: SeriesPart) -> DicomScan:
    """Return the one entry for a part that must not be read."""
    names, uid = _sort_names(part.headers), part.headers[0].series_uid
    stack = _measure_stack(part.headers)
    return DicomScan(names, uid, part.reason, part.excluded, part.message, part.warnings, stack)


def _join_codes(*codes: Iterable[str]) -> tuple[str, ...]:
    """Return the codes without repetition, in their order."""
    return tuple(dict.fromkeys(code for group in codes for code in group))


def _hash_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _add_stray_slice(scan: DicomScan, header: SliceHeader, exclusion: Exclusion) -> DicomScan:
    """Return the scan as failed, with a file added that is not a slice but lies on a place of its stack."""
    files = tuple(sorted({*scan.files, header.name}))
    if scan.reason:
        return replace(scan, files=files)
    message = (
        f"{header.file_name}: {exclusion[1]}, but it lies on a free place of this stack; "
        "correct its header if it is a slice, or remove the file"
    )
    return replace(scan, files=files, reason=exclusion[0], message=message)


def _make_excluded_scans(excluded: dict[Exclusion, list[SliceHeader]]) -> list[DicomScan]:
    """Return one entry for all excluded files of a SeriesInstanceUID, with the most frequent reason."""
    if not excluded:
        return []
    reason, message = max(excluded, key=lambda exclusion: len(excluded[exclusion]))
    headers = [header for members in excluded.values() for header in members]
    return [DicomScan(_sort_names(headers), headers[0].series_uid, reason, excluded=True, message=message)]


def _make_scans_by_grid(slices: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return the entries for slices without copies: one or more for each orientation, matrix size and kind.

    Damaged files fail all of them. Slices without position or orientation are added to the largest stack,
    so that reading refuses it. If they were an entry of their own, the missing slices of the stack would
    go unnoticed.
    """
    damaged = [header for header in slices if header.problem]
    placed = [header for header in slices if not header.problem and has_geometry(header)]
    unplaced = [header for header in slices if not header.problem and not has_geometry(header)]
    stacks = sorted(join_multiframes(_group_by_grid(placed)), key=len, reverse=True) or [[]]
    main, others = stacks[0] + unplaced, stacks[1:]
    if not main:
        return [add_damaged_files(DicomScan((), damaged[0].series_uid), damaged)]
    in_line = [stack for stack in others if _is_in_line(stack, main) or _fills_gaps(stack, main)]
    main = main + [header for stack in in_line for header in stack]
    others = [stack for stack in others if stack not in in_line]
    localizers = [stack for stack in others if _is_localizer(stack, main)]
    copies = [stack for stack in others if _is_multiframe_copy(stack, main)]
    dropped = {WarningCode.LOCALIZER_REMOVED.value: localizers, Reason.DUPLICATE_SLICES.value: copies}
    new_warnings = (code for code, dropped_stacks in dropped.items() if dropped_stacks)
    warnings = _join_codes(warnings, new_warnings)
    kept = [main] + [stack for stack in others if stack not in localizers and stack not in copies]
    if len(kept) > 1:
        warnings = _join_codes(warnings, [Reason.DUPLICATE_SLICES.value])
    scans = [scan for stack in kept for scan in _make_volume_scans(stack, warnings)]
    scans += [_make_multiframe_copy_scan(stack) for stack in copies]
    return [add_damaged_files(scan, damaged) for scan in scans]


def _make_volume_scans(stack: list[SliceHeader], warnings: tuple[str, ...]) -> list[DicomScan]:
    """Return one entry for each volume of a stack; a stack of mixed volumes is one failed entry."""
    parts = split_volumes(stack)
    if len(parts) > 1 or are_in_alternating_folders(stack) or are_joined_multiframes(stack):
        warnings = _join_codes(warnings, [Reason.DUPLICATE_SLICES.value])
    return [_make_volume_scan(part, warnings) for part in parts]


def _make_volume_scan(slices: list[SliceHeader], warnings: tuple[str, ...]) -> DicomScan:
    mixture = find_mixture(slices) or find_folder_mixture(slices) or find_multiframe_mixture(slices)
    names, uid, stack = _sort_names(slices), slices[0].series_uid, _measure_stack(slices)
    if mixture:
        return DicomScan(names, uid, Reason.DUPLICATE_SLICES, message=mixture, warnings=warnings, stack=stack)
    return DicomScan(names, uid, warnings=warnings, stack=stack)


def _measure_stack(slices: list[SliceHeader]) -> StackRange | None:
    """Return where the slices or the frames of a scan lie, or None if a position is missing."""
    places = find_places(slices)
    if places is None:
        return None
    places, first = unite([places]), slices[0]
    instances = _hash_texts(sorted(header.sop_instance_uid for header in slices))
    owner = _hash_texts([first.series_uid, first.patient_hash, first.study_uid])
    return StackRange(len(places), float(places[0]), float(places[-1]), owner, instances)


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
    return is_in_plane(second, first.rows, first.columns, first.orientation)


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


def _fills_gaps(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Return whether images of another matrix size lie between the main slices and complete one grid."""
    headers = [*main, *stack]
    if not all(header.position and header.orientation for header in headers):
        return False
    if not is_in_plane(replace(stack[0], rows=0, columns=0), 0, 0, main[0].orientation):
        return False
    distances = project_on_normal(headers)
    ours, theirs = distances[: len(main)], distances[len(main) :]
    overlap = theirs.max() > ours.min() and theirs.min() < ours.max()
    is_one_grid = not share_positions([ours, theirs]) and is_regular(unite([ours, theirs]))
    return bool(overlap and is_one_grid)


def _is_multiframe_copy(stack: list[SliceHeader], main: list[SliceHeader]) -> bool:
    """Return whether a multi-frame file agrees with single-frame main slices in count and matrix size."""
    frames, first = stack[0].number_of_frames, main[0]
    has_same_size = (stack[0].rows, stack[0].columns) == (first.rows, first.columns)
    return frames > 1 and frames == len(main) and first.number_of_frames == 1 and has_same_size


def _make_multiframe_copy_scan(stack: list[SliceHeader]) -> DicomScan:
    message = "a multi-frame copy of slices with the same SeriesInstanceUID; the slices are read instead"
    names, uid = _sort_names(stack), stack[0].series_uid
    return DicomScan(names, uid, Reason.DUPLICATE_SLICES, excluded=True, message=message)


def _sort_names(headers: list[SliceHeader]) -> tuple[str, ...]:
    return tuple(sorted(header.name for header in headers))
