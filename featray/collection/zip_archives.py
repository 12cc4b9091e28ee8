"""Find the scans inside a zip archive without unpacking it to disk."""

from __future__ import annotations

import functools
import io
import logging
import posixpath
from collections.abc import Callable
from dataclasses import replace

import fsspec

from featray.collection.files import File, FileGroup, FoundScan, ListingOptions, is_visible, make_scan
from featray.ct.dicom.elements import MAX_HEADER_BYTES
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.ct.formats.zip_archive import MAX_ARCHIVE_BYTES, Archive, open_archive
from featray.errors import Reason, ScanError
from featray.storage import retry

log = logging.getLogger(__name__)

_HEADER_BYTES = 2**18


def find_in_archive(
    fs: fsspec.AbstractFileSystem,
    file: File,
    options: ListingOptions,
    find_scans: Callable[[FileGroup, ListingOptions], list[FoundScan]],
) -> list[FoundScan]:
    """Return the scans inside an archive. An archive that cannot be searched is itself one failed scan.

    Args:
        fs: File system that holds the archive.
        file: The archive.
        options: Options of the listing.
        find_scans: Finds the scans in a group of files.
    """

    def search() -> list[FoundScan]:
        with fs.open(file.path, "rb") as stream:
            archive = open_archive(stream, max_bytes=MAX_ARCHIVE_BYTES)
            members = [
                File(name, name, archive.get_size(name), archive.get_version(name), archive.get_version(name))
                for name in archive.names
                if is_visible(name)
            ]
            group = FileGroup(
                files=members,
                name="",
                read_header=functools.partial(_read_archived_header, archive),
                read_start=lambda member, count: archive.read_head(member.path, count),
                threads=1,
                archive=file.path,
            )
            found = find_scans(group, options)
            archive.check_names()
            return found

    if file.problem:
        return [FoundScan(make_scan((file,), file.name, "zip", options), (file,))]
    try:
        found = retry.run_with_retries(search, retry.SOURCE_DEADLINE_S)
    except ScanError as error:
        return [_make_failed_scan(file, error, options)]
    except OSError as error:
        problem = f"the archive could not be opened ({retry.describe_error(error)})"
        return [_make_failed_scan(file, ScanError(Reason.STORAGE, problem), options)]
    except Exception as error:  # an unexpected error costs one archive, not the listing
        if retry.is_store_error(error):
            raise
        log.debug("unexpected error while searching an archive", exc_info=True)
        problem = f"searching the archive raised {type(error).__name__}; unpack it"
        return [_make_failed_scan(file, ScanError(Reason.UNREADABLE, problem), options)]
    if len(found) > 1 and all(map(_is_damaged, found)):
        first = found[0].scan
        problem = f"none of {len(found)} members can be read: {first.message}"
        return [_make_failed_scan(file, ScanError(first.reason or Reason.UNREADABLE, problem), options)]
    return [_set_archive(found_scan, file, is_only_scan=len(found) == 1) for found_scan in found]


def _is_damaged(found_scan: FoundScan) -> bool:
    """Return whether a scan is a damaged DICOM file that is not known to be part of a series."""
    scan = found_scan.scan
    is_failed = scan.reason in (Reason.UNREADABLE, Reason.TRUNCATED) and not scan.excluded
    return is_failed and scan.format == "dicom" and not scan.series


def _set_archive(found_scan: FoundScan, archive: File, *, is_only_scan: bool) -> FoundScan:
    """Return a scan found in an archive with an id that names the archive, and the archive as its file."""
    scan = found_scan.scan
    scan_id = archive.name if is_only_scan else f"{archive.name}/{scan.scan_id}"
    return replace(found_scan, scan=replace(scan, scan_id=scan_id), members=(archive,))


def _make_failed_scan(file: File, error: ScanError, options: ListingOptions) -> FoundScan:
    scan = make_scan((file,), file.name, "zip", options)
    return FoundScan(replace(scan, reason=error.reason, message=str(error)), (file,))


def _read_archived_header(archive: Archive, file: File) -> SliceHeader:
    """Return the DICOM header of an archive member; inflate more than its first bytes only if needed."""
    try:
        header = read_header(io.BytesIO(archive.read_head(file.path, _HEADER_BYTES)), file.name)
        if header.problem is not Reason.TRUNCATED or file.size <= _HEADER_BYTES:
            return header
        return read_header(io.BytesIO(archive.read_head(file.path, MAX_HEADER_BYTES)), file.name)
    except ScanError as error:  # the text of an unreadable header does not begin with the name of the file
        problem = str(error).removeprefix(f"{posixpath.basename(file.name)}: ")
        return make_unreadable_header(file.name, ScanError(error.reason, problem))
