"""One scan of a DICOM collection, or files that were left out together; and add damaged files to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.parts import StackRange
from featray.errors import Reason


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
        stack: Where the slices lie, or None if that is not known.
    """

    files: tuple[str, ...]
    series_uid: str
    reason: Reason | None = None
    excluded: bool = False
    message: str = ""
    warnings: tuple[str, ...] = ()
    stack: StackRange | None = field(default=None, compare=False)


def add_damaged_files(scan: DicomScan, damaged: Iterable[SliceHeader]) -> DicomScan:
    """Return the scan with damaged files added; see `add_damaged_file`."""
    for header in damaged:
        scan = add_damaged_file(scan, header)
    return scan


def add_damaged_file(scan: DicomScan, header: SliceHeader) -> DicomScan:
    """Return the scan with a damaged file added; it then fails, unless it already has a reason."""
    files = tuple(sorted({*scan.files, header.name}))
    if scan.reason:
        return replace(scan, files=files)
    advice = "; copy the file again, or"
    if header.has_pixels or header.problem is Reason.UNSUPPORTED:  # the file is complete
        advice = ", or" if header.has_pixels else ";"
    message = (
        f"{header.file_name}: {header.message}{advice} remove the file if it does not belong to this scan"
    )
    return replace(scan, files=files, reason=header.problem, message=message)
