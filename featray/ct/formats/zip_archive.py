"""Read the members of a zip archive that contains a DICOM series or a volume file.

In: a seekable stream. Out: the names and the bytes of the members; nothing is written to disk. The directory
of the archive is checked before a byte is inflated, and a member is never inflated beyond the size that the
directory claims. An archive is rejected as a whole if it contains an encrypted member, a link, an absolute
path or one that leads out of the archive, members that overlap or have the same name, another archive, a
compression other than deflate, or more bytes than the caller allows. This module must not know DICOM or
NIfTI.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
from itertools import pairwise
from typing import BinaryIO

from featray.ct.formats.inflate import MAX_RATIO
from featray.errors import Reason, ScanError

ZIP_SUFFIX = ".zip"
ZIP_MAGIC = b"PK\x03\x04"

MAX_ARCHIVE_BYTES = 2**40
"""Value of `max_bytes` for callers of `open_archive` that limit the size of each member when they read it."""

MAX_DIRECTORY_BYTES = 2**25
"""Largest accepted directory, enough for about 300,000 members.

In Python's memory a member needs some 20 times the size of its entry.
"""

_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_LONGEST_COMMENT = 2**16
_LOCAL_HEADER = 30
_ENCRYPTED = 0x1 | 0x20 | 0x40 | 0x2000  # flag bits: encryption, patch, strong encryption, hidden directory
_UTF_8 = 0x800  # flag bit: the name is in UTF-8, otherwise zipfile takes it for code page 437
_ARCHIVE_SUFFIXES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz")
_NESTED = "an archive inside the archive; unpack the outer archive"


class Archive:
    """The members of a zip archive; use it in one thread only and while the stream is open.

    Attributes:
        names: Sorted paths of the members, without folders and without the files that macOS adds.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._members = {info.filename: info for info in file.infolist() if _is_scan_file(info)}
        self.names = tuple(sorted(self._members))
        self._local_names: dict[str, str] = {}

    def check_names(self) -> None:
        """Check that all members, also those that are not scan files, have the names of the directory.

        A slice whose entry in the directory is damaged would otherwise seem to lie in another folder, or to
        be hidden, and its series would lack it in silence. Call this after the heads of the members are read,
        because it reads nothing again of those members.

        Raises:
            ScanError: `unreadable`, if a name differs.
            OSError: The stream cannot be read.
        """
        for info in self._file.infolist():
            if self._read_local_name(info) != info.orig_filename:
                raise ScanError(
                    Reason.UNREADABLE,
                    "the directory of the zip archive is damaged: a member has another name; copy it again",
                )

    def _read_local_name(self, info: zipfile.ZipInfo) -> str:
        """Return the name in the header before the data of a member; empty without a header."""
        if info.filename not in self._local_names:
            self._local_names[info.filename] = self._find_local_name(info)
        return self._local_names[info.filename]

    def _find_local_name(self, info: zipfile.ZipInfo) -> str:
        stream = self._file.fp
        assert stream is not None
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(ZIP_MAGIC):
            return ""
        name = stream.read(int.from_bytes(header[26:28], "little"))
        return name.decode("utf-8" if info.flag_bits & _UTF_8 else "cp437", "replace")

    def get_size(self, name: str) -> int:
        """Return the size in bytes of a member: `read` returns exactly this number of bytes, or raises."""
        return self._members[name].file_size

    def get_version(self, name: str) -> str:
        """Return a string that changes if the content of a member changes: its checksum and size."""
        info = self._members[name]
        return f"{info.CRC:08x}-{info.file_size}"

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a member, verified with its checksum.

        Raises:
            ScanError: `too_large`, if the member has more than `limit` bytes; `truncated` or `unreadable`, if
                it is cut, damaged, or differs from its entry in the directory; `unsupported`, if it is itself
                a zip archive.
        """
        claimed = self._members[name].file_size
        if claimed > limit:
            raise ScanError(
                Reason.TOO_LARGE, f"{_get_base_name(name)}: {claimed} bytes in the archive, limit {limit}"
            )
        data = self._inflate(name, claimed + 1)
        if len(data) != claimed:
            raise ScanError(
                Reason.TRUNCATED,
                f"{_get_base_name(name)}: {len(data)} bytes in the archive, its directory claims {claimed}",
            )
        return data

    def read_head(self, name: str, count: int) -> bytes:
        """Return the first `count` bytes of a member, or fewer if it is shorter; ignore the checksum.

        Raises:
            ScanError: `truncated` or `unreadable`, if the member is cut or damaged; `unsupported`, if it is
                itself a zip archive.
        """
        self._read_local_name(self._members[name])
        return self._inflate(name, min(count, self._members[name].file_size))

    def _inflate(self, name: str, most: int) -> bytes:
        """Return at most `most` bytes of a member."""
        try:
            with self._file.open(self._members[name]) as member:
                data = member.read(most)
                while len(data) < most and (more := member.read(most - len(data))):
                    data += more
        except EOFError:
            raise ScanError(Reason.TRUNCATED, f"{_get_base_name(name)}: cut off inside the archive") from None
        except OSError:  # of the stream
            raise
        except Exception as error:  # zipfile raises many kinds, UnicodeDecodeError among them
            raise ScanError(
                Reason.UNREADABLE,
                f"{_get_base_name(name)}: damaged inside the archive ({type(error).__name__})",
            ) from None
        if data.startswith(ZIP_MAGIC):
            raise ScanError(Reason.UNSUPPORTED, f"{_get_base_name(name)}: {_NESTED}")
        return data


def open_archive(stream: BinaryIO, *, max_bytes: int) -> Archive:
    """Check the whole directory of a zip archive and return the archive.

    Args:
        stream: The zip file, as a seekable stream that stays open while the archive is used. Its errors
            (OSError) are not caught.
        max_bytes: Largest accepted size of all members together, after inflation, as the directory claims it.

    Raises:
        ScanError: `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    size = stream.seek(0, 2)
    if not size:
        raise ScanError(Reason.EMPTY, "the archive has no bytes")
    count = _check_directory(stream, size)
    try:
        file = zipfile.ZipFile(stream)
    except OSError:  # of the stream
        raise
    except UnicodeDecodeError:
        raise ScanError(
            Reason.UNREADABLE,
            "the archive has a file name that claims to be UTF-8 but is not; unpack the archive",
        ) from None
    except Exception as error:  # zipfile raises many kinds
        raise ScanError(
            Reason.UNREADABLE, f"the directory of the zip archive is damaged ({type(error).__name__})"
        ) from None
    infos = file.infolist()
    if count not in (len(infos), len(infos) % 2**16):  # some programs count without zip64 beyond 65,535
        raise ScanError(
            Reason.UNREADABLE,
            f"the directory of the zip archive is damaged: it says {count} members and lists {len(infos)}",
        )
    for info in infos:
        _check_member(info, size)
    _check_all_members(infos, max_bytes)
    return Archive(file)


def _check_directory(stream: BinaryIO, size: int) -> int:
    """Check that the archive has a directory that is small enough for zipfile, which loads it as a whole.

    Return the number of members that the end of the archive states. zipfile ignores this number, so a member
    would be lost in silence if the length of another entry is damaged.
    """
    start = max(0, size - 22 - _LONGEST_COMMENT - 20)
    stream.seek(start)
    tail = stream.read(size - start)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):
        stream.seek(0)
        if stream.read(4) == ZIP_MAGIC:
            raise ScanError(Reason.TRUNCATED, "the zip archive lacks its end; copy it again")
        raise ScanError(Reason.UNREADABLE, "the file is not a zip archive")
    count, length = struct.unpack_from("<HI", tail, end + 10)
    if end >= 20 and tail.startswith(_LOCATOR_64, end - 20):
        count, length = _read_end_64(stream, *struct.unpack_from("<Q", tail, end - 12))
    if length > MAX_DIRECTORY_BYTES:
        raise ScanError(
            Reason.TOO_LARGE, f"the directory of the archive has {length} bytes; unpack the archive"
        )
    return int(count)


def _read_end_64(stream: BinaryIO, position: int) -> tuple[int, int]:
    """Return the number of members and the length of the directory, from the zip64 end record at `position`.

    The record is described in APPNOTE 4.3.14.
    """
    stream.seek(min(position, 2**62))
    record = stream.read(56)
    if len(record) < 56 or not record.startswith(_END_64):
        raise ScanError(Reason.UNREADABLE, "the directory of the zip archive is damaged")
    return int.from_bytes(record[32:40], "little"), int.from_bytes(record[40:48], "little")


def _check_member(info: zipfile.ZipInfo, size: int) -> None:
    """Check one entry of the directory; `size` is the size of the archive in bytes."""
    name, base = info.filename, _get_base_name(info.filename)
    parts = re.split(r"[/\\]", info.orig_filename)
    if (
        not name
        or ".." in parts
        or parts[0] == ""
        or re.match(r"[A-Za-z]:", name)
        or "\0" in info.orig_filename
    ):
        raise ScanError(Reason.UNREADABLE, "the archive has a path that leads out of it; do not trust it")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ScanError(Reason.UNSUPPORTED, f"{base}: a link in the archive; pack the files themselves")
    if info.flag_bits & _ENCRYPTED:
        raise ScanError(Reason.UNSUPPORTED, f"{base}: encrypted; unpack the archive")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ScanError(
            Reason.UNSUPPORTED, f"{base}: compressed with another method than deflate; unpack the archive"
        )
    if name.lower().endswith(_ARCHIVE_SUFFIXES):
        raise ScanError(Reason.UNSUPPORTED, f"{base}: {_NESTED}")
    if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER + info.compress_size > size:
        raise ScanError(
            Reason.TRUNCATED, f"{base}: extends beyond the end of the archive; copy the archive again"
        )
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else MAX_RATIO
    if info.file_size > ratio * info.compress_size:
        raise ScanError(
            Reason.UNREADABLE,
            f"{base}: {info.compress_size} compressed bytes cannot hold the claimed {info.file_size} bytes",
        )


def _check_all_members(infos: list[zipfile.ZipInfo], max_bytes: int) -> None:
    """Check the total size of the members, that their names differ, and that their data do not overlap."""
    claimed = sum(info.file_size for info in infos)
    if claimed > max_bytes:
        raise ScanError(Reason.TOO_LARGE, f"the archive claims {claimed} bytes, the limit is {max_bytes}")
    if len({info.filename for info in infos}) < len(infos):
        raise ScanError(Reason.UNREADABLE, "two members of the archive have the same name")
    spans = sorted((i.header_offset, i.header_offset + _LOCAL_HEADER + i.compress_size) for i in infos)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ScanError(Reason.UNREADABLE, "members of the archive overlap (a zip bomb?)")


def _is_scan_file(info: zipfile.ZipInfo) -> bool:
    """Return whether an entry is neither a folder nor a file that macOS adds to archives."""
    return not info.is_dir() and not info.filename.startswith("__MACOSX/")


def _get_base_name(name: str) -> str:
    """Return the name of a member without its folders, which may identify a patient."""
    return name.rpartition("/")[2]
