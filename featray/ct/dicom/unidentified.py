"""Assign damaged files without a SeriesInstanceUID to the scans that they may belong to, by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise

from featray.ct.dicom.dicom_scan import DicomScan, add_damaged_file
from featray.ct.dicom.header import SliceHeader

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_UNFINISHED_COPY = re.compile(r"\.(part|partial|tmp|filepart|crdownload|download)$")


def assign_unidentified_files(scans: list[DicomScan], unidentified: list[SliceHeader]) -> list[DicomScan]:
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
            scans[index] = add_damaged_file(scans[index], header)
        if not adjacent and _claims_to_be_dicom(header):
            separate.append(add_damaged_file(DicomScan((header.name,), ""), header))
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
