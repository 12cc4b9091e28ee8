"""A zip file in, its members' names and bytes out; nothing touches the disk, nothing is trusted.

For a series, or a volume file, that was archived. Every claim of the directory is checked before a byte
is inflated, and inflation stops at the claim. Refused as a whole: archives with encrypted members, links,
paths that are absolute or climb out, members that overlap or appear twice, archives inside, any
compression but deflate, and more bytes than the caller allows. Knows neither DICOM nor NIfTI.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from itertools import pairwise
from typing import BinaryIO

from featray.ct.formats.inflate import MAX_RATIO
from featray.errors import Reason, ScanError

ZIP_SUFFIX = ".zip"
ZIP_MAGIC = b"PK\x03\x04"

MAX_ARCHIVE_BYTES = 2**40
"""A sound limit on what all members may claim together: each is inflated only when it is read."""

MAX_DIRECTORY_BYTES = 2**25
"""About 300,000 members; each costs Python some 20 times its entry."""

_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_LONGEST_COMMENT = 2**16
_LOCAL_HEADER = 30
_ENCRYPTED = 0x1 | 0x20 | 0x40 | 0x2000  # flag bits: encryption, patch, strong encryption, hidden directory
_INSIDE = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz")


class Archive:
    """The files of an open zip archive; use in one thread, while the stream is open.

    Attributes:
        names: Paths of the files in it, sorted; folders and what macOS adds are left out.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._members = {info.filename: info for info in file.infolist() if _is_file(info)}
        self.names = tuple(sorted(self._members))

    def get_size(self, name: str) -> int:
        """Return the inflated bytes a member claims; `read` gives exactly these, or raises."""
        return self._members[name].file_size

    def get_version(self, name: str) -> str:
        """Return what changes with a member's content: its checksum and size."""
        info = self._members[name]
        return f"{info.CRC:08x}-{info.file_size}"

    def read(self, name: str, limit: int) -> bytes:
        """Return a member's bytes, verified against its checksum.

        Raises:
            ScanError: `too_large` if it claims more than `limit`; `truncated` or `unreadable` if it is
                cut, damaged or not what the directory claims.
        """
        claimed = self._members[name].file_size
        if claimed > limit:
            raise ScanError(Reason.TOO_LARGE, f"{_base(name)}: {claimed} bytes in the archive, limit {limit}")
        data = self._inflate(name, claimed + 1)
        if len(data) != claimed:
            raise ScanError(
                Reason.TRUNCATED, f"{_base(name)}: {len(data)} bytes in the archive, it claims {claimed}"
            )
        return data

    def read_head(self, name: str, count: int) -> bytes:
        """Return the first `count` bytes of a member, or fewer if it is shorter; no checksum protects them.

        Raises:
            ScanError: As `read`.
        """
        return self._inflate(name, min(count, self._members[name].file_size))

    def _inflate(self, name: str, most: int) -> bytes:
        try:
            with self._file.open(self._members[name]) as member:
                data = member.read(most)
                while len(data) < most and (more := member.read(most - len(data))):
                    data += more
        except EOFError:
            raise ScanError(Reason.TRUNCATED, f"{_base(name)}: cut inside the archive") from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, struct.error, RuntimeError):
            raise ScanError(Reason.UNREADABLE, f"{_base(name)}: damaged inside the archive") from None
        if data.startswith(ZIP_MAGIC):
            raise ScanError(Reason.UNSUPPORTED, f"{_base(name)}: an archive inside the archive; unpack it")
        return data


def open_archive(stream: BinaryIO, *, max_bytes: int) -> Archive:
    """Return the archive in a seekable stream, after its whole directory passed the checks.

    Args:
        stream: The zip file; must stay open. Its errors (OSError) pass through.
        max_bytes: Inflated bytes that all members together may claim.

    Raises:
        ScanError: `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    size = stream.seek(0, 2)
    if not size:
        raise ScanError(Reason.EMPTY, "the archive has no bytes")
    _check_directory(stream, size)
    try:
        file = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError):
        raise ScanError(Reason.UNREADABLE, "the directory of the zip archive is damaged") from None
    infos = file.infolist()
    for info in infos:
        _check_member(info, size)
    _check_together(infos, max_bytes)
    return Archive(file)


def _check_directory(stream: BinaryIO, size: int) -> None:
    """Check that there is a directory, and that it is small enough for zipfile to load it whole."""
    start = max(0, size - 22 - _LONGEST_COMMENT - 20)
    stream.seek(start)
    tail = stream.read(size - start)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):
        stream.seek(0)
        cut = stream.read(4) == ZIP_MAGIC
        reason = Reason.TRUNCATED if cut else Reason.UNREADABLE
        raise ScanError(reason, "the zip archive lacks its end; copy it again" if cut else "no zip archive")
    (length,) = struct.unpack_from("<I", tail, end + 12)
    if end >= 20 and tail.startswith(_LOCATOR_64, end - 20):
        length = _length_64(stream, *struct.unpack_from("<Q", tail, end - 12))
    if length > MAX_DIRECTORY_BYTES:
        raise ScanError(Reason.TOO_LARGE, f"the archive's directory has {length} bytes; unpack it")


def _length_64(stream: BinaryIO, place: int) -> int:
    """Return the length of the directory from the zip64 end record (APPNOTE 4.3.14)."""
    stream.seek(min(place, 2**62))
    record = stream.read(56)
    if len(record) < 56 or not record.startswith(_END_64):
        raise ScanError(Reason.UNREADABLE, "the directory of the zip archive is damaged")
    return int.from_bytes(record[40:48], "little")


def _check_member(info: zipfile.ZipInfo, size: int) -> None:
    name, base = info.filename, _base(info.filename)
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
        raise ScanError(Reason.UNSUPPORTED, f"{base}: packed other than by deflate; unpack the archive")
    if name.lower().endswith(_INSIDE):
        raise ScanError(Reason.UNSUPPORTED, f"{base}: an archive inside the archive; unpack it")
    if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER + info.compress_size > size:
        raise ScanError(Reason.TRUNCATED, f"{base}: reaches beyond the archive; copy it again")
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else MAX_RATIO
    if info.file_size > ratio * info.compress_size:
        raise ScanError(
            Reason.UNREADABLE,
            f"{base}: {info.compress_size} packed bytes cannot hold the {info.file_size} claimed",
        )


def _check_together(infos: list[zipfile.ZipInfo], max_bytes: int) -> None:
    claimed = sum(info.file_size for info in infos)
    if claimed > max_bytes:
        raise ScanError(Reason.TOO_LARGE, f"the archive claims {claimed} bytes, the limit is {max_bytes}")
    if len({info.filename for info in infos}) < len(infos):
        raise ScanError(Reason.UNREADABLE, "the archive has two members of one name")
    spans = sorted((i.header_offset, i.header_offset + _LOCAL_HEADER + i.compress_size) for i in infos)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ScanError(Reason.UNREADABLE, "members of the archive overlap (a zip bomb?)")


def _is_file(info: zipfile.ZipInfo) -> bool:
    return not info.is_dir() and not info.filename.startswith("__MACOSX/")


def _base(name: str) -> str:
    return name.rpartition("/")[2]
