"""The scans inside a zip archive, found without unpacking it."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace

import fsspec

from featray.collection.files import File, Found, How, Place, is_visible, scan_of
from featray.ct.dicom.elements import MAX_HEADER_BYTES
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.ct.formats.zip_archive import MAX_ARCHIVE_BYTES, Archive, open_archive
from featray.errors import Reason, ScanError
from featray.storage import retry

_HEADER_BYTES = 2**18


def found_in_archive(
    fs: fsspec.AbstractFileSystem, file: File, how: How, found_in: Callable[[Place, How], list[Found]]
) -> list[Found]:
    """Return the scans inside an archive; one that cannot be looked into is a failed scan itself.

    Args:
        fs: Where the archive lies.
        file: The archive.
        how: What to look for.
        found_in: Finds the scans of a place, whatever it is.
    """

    def look() -> list[Found]:
        with fs.open(file.path, "rb") as stream:
            archive = open_archive(stream, max_bytes=MAX_ARCHIVE_BYTES)
            members = [
                File(name, name, archive.get_size(name), archive.get_version(name), archive.get_version(name))
                for name in archive.names
                if is_visible(name)
            ]
            header = functools.partial(_archived_header, archive)
            return found_in(Place(members, "", header, threads=1, archive=file.path), how)

    try:
        found = retry.run_with_retries(look, retry.SOURCE_DEADLINE_S)
    except ScanError as error:
        return [_failed(file, error, how)]
    except OSError as error:
        problem = f"the archive could not be opened ({retry.describe_error(error)})"
        return [_failed(file, ScanError(Reason.STORAGE, problem), how)]
    inside = [f"{file.name}/{one.scan.scan_id}" if len(found) > 1 else file.name for one in found]
    return [
        replace(one, scan=replace(one.scan, scan_id=scan_id), members=(file,))
        for one, scan_id in zip(found, inside, strict=True)
    ]


def _failed(file: File, error: ScanError, how: How) -> Found:
    place = Place([], "", lambda _: NotImplemented)
    scan = scan_of((file,), file.name, "zip", place, how)
    return Found(replace(scan, reason=error.reason, message=str(error)), (file,))


def _archived_header(archive: Archive, file: File) -> SliceHeader:
    """Return a member's DICOM header; more of it is only inflated where its head does not do."""
    try:
        header = read_header(io.BytesIO(archive.read_head(file.path, _HEADER_BYTES)), file.name)
        if header.problem is not Reason.TRUNCATED or file.size <= _HEADER_BYTES:
            return header
        return read_header(io.BytesIO(archive.read_head(file.path, MAX_HEADER_BYTES)), file.name)
    except ScanError as error:
        return make_unreadable_header(file.name, error)
