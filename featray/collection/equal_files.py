"""Find local files that hold the same bytes, and read as little as possible for it.

Paths that lead to one inode (hard links, symbolic links) are one file. Files of equal size are compared by
samples of their bytes. If these are equal too, the files are read completely, in several threads, because a
damaged copy may differ from its original in one byte. Digests of unchanged files come from the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from featray.collection.digest_cache import DigestCache, FileDigests, FileState
from featray.hardware import count_usable_cores
from featray.schema import Scan
from featray.terminal.progress import Progress

log = logging.getLogger(__name__)

SAMPLE_BYTES = 2**14
"""Bytes read at the start, in the middle and at the end of a file; a gzip file ends with its checksum."""
SILENT_BYTES = 10**8
"""Up to this number of bytes is read without a message."""
MAX_THREADS = 8
_CHUNK_BYTES = 2**22
"""Bytes read at once; large pieces, because a hard disk changes between the files of several threads."""

T = TypeVar("T")


@dataclass(eq=False)
class _LocalFile:
    """One file on this machine, and the scans whose paths lead to it."""

    state: FileState
    scans: list[Scan] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [scan.files[0] for scan in self.scans]


def find_equal_scans(scans: Sequence[Scan], cache: DigestCache, *, show: bool) -> list[list[Scan]]:
    """Return the groups of two or more scans whose files hold the same bytes.

    Args:
        scans: Scans that are one local file each. A file that cannot be read equals no other file.
        cache: Digests of earlier listings; those of this listing are added.
        show: Whether to show progress on stderr while many bytes are read.
    """
    reader = _DigestReader(cache, show=show)
    by_size = _group(scans, lambda scan: scan.size)
    groups = [_find_files(group) for group in by_size if len(group) > 1]
    for get_digests in (reader.get_samples, reader.get_wholes):
        groups = _split(groups, get_digests([file for group in groups if len(group) > 1 for file in group]))
    merged = ([scan for file in group for scan in file.scans] for group in groups)
    return [group for group in merged if len(group) > 1]


def _split(groups: Iterable[list[_LocalFile]], digests: Mapping[_LocalFile, bytes]) -> list[list[_LocalFile]]:
    """Return the groups in parts with equal digests; a file without a digest is a part of its own."""
    return [part for group in groups for part in _group(group, lambda file: digests.get(file, file))]


def _group(items: Iterable[T], get_key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[get_key(item)].append(item)
    return list(groups.values())


def _find_files(scans: Iterable[Scan]) -> list[_LocalFile]:
    """Return the files of some scans; files that have changed since they were listed are left out."""
    files: dict[Hashable, _LocalFile] = {}
    for scan in scans:
        try:
            status = os.stat(scan.files[0])
        except OSError:  # the error is reported when the scan is read
            continue
        state = FileState.from_status(status)
        if state.size == scan.size:
            # Some network file systems report no inodes.
            key = (status.st_dev, state) if state.inode else scan.files[0]
            files.setdefault(key, _LocalFile(state)).scans.append(scan)
    return list(files.values())


class _DigestReader:
    """Returns digests of files from the cache, and reads the others.

    Args:
        cache: As for `find_equal_scans`; the same holds for `show`.
    """

    def __init__(self, cache: DigestCache, *, show: bool) -> None:
        self._cache, self._show, self._started = cache, show, time.time()
        self._known: dict[_LocalFile, FileDigests] = {}

    def get_samples(self, files: Sequence[_LocalFile]) -> dict[_LocalFile, bytes]:
        """Return the digest of samples of each file that can be read."""
        unknown = []
        for file in files:
            found = (self._cache.get(path, file.state) for path in file.paths)
            if digests := next(filter(None, found), None):
                self._keep(file, digests)
            else:
                unknown.append(file)
        for file, sample in self._read(_hash_samples, unknown, 3 * SAMPLE_BYTES):
            self._keep(file, FileDigests(file.state, sample))
        return {file: self._known[file].sample for file in files if file in self._known}

    def get_wholes(self, files: Sequence[_LocalFile]) -> dict[_LocalFile, bytes]:
        """Return the digest of all bytes of each file that can be read; its samples are known."""
        unknown = [file for file in files if not self._known[file].whole]
        for file, whole in self._read(_hash_whole, unknown, sys.maxsize):
            self._keep(file, self._known[file]._replace(whole=whole))
        return {file: whole for file in files if (whole := self._known[file].whole)}

    def _keep(self, file: _LocalFile, digests: FileDigests) -> None:
        self._known[file] = digests
        for path in file.paths:  # each of them, because any link may be deleted
            self._cache.put(path, digests, self._started)

    def _read(
        self, compute: Callable[[BinaryIO, int], bytes], files: Sequence[_LocalFile], limit: int
    ) -> Iterator[tuple[_LocalFile, bytes]]:
        """Yield each file that can be read with its digest.

        Args:
            compute: Computes the digest from an open file and its size.
            files: Files to read.
            limit: Largest number of bytes that are read of one file.
        """
        sizes = [min(limit, file.state.size) for file in files]
        size = sum(sizes)
        is_slow = size > SILENT_BYTES
        if is_slow:
            text = "comparing %d files of equal sizes, to find copies: reading %.0f MB once"
            log.info(text, len(files), size / 1e6)
        threads = max(2, min(MAX_THREADS, count_usable_cores()))
        with (
            Progress(size, show=self._show and is_slow, unit="B") as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            digests = pool.map(lambda file: _try_compute(compute, file), files)
            for file, file_bytes, digest in zip(files, sizes, digests, strict=True):
                progress.add_bytes(file_bytes)
                if digest is not None:
                    yield file, digest


def _try_compute(compute: Callable[[BinaryIO, int], bytes], file: _LocalFile) -> bytes | None:
    """Return the digest of a file; None if it cannot be read, or is changed meanwhile."""
    try:
        with open(file.paths[0], "rb", buffering=0) as stream:
            digest = compute(stream, file.state.size)
            is_same = FileState.from_status(os.fstat(stream.fileno())) == file.state
    except OSError:  # the error is reported when the scan is read
        return None
    return digest if is_same else None


def _hash_samples(stream: BinaryIO, size: int) -> bytes:
    digest = hashlib.sha256()
    for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
        stream.seek(offset)
        digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


def _hash_whole(stream: BinaryIO, size: int) -> bytes:  # noqa: ARG001  # the end of the file says it
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.digest()
