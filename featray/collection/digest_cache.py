"""Keep digests of local files from one listing to the next, so that unchanged files are not read again.

A digest is used only if the file has the size, the modification time and the inode that it had when it was
read. A file that was changed within the last seconds before it was read is not kept, because a further change
could leave its modification time as it is. The cache holds hashes of paths, no names.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from featray.storage.store import Store
from featray.storage.urls import hash_texts

log = logging.getLogger(__name__)

TIME_STEP_S = 2.0
"""Longest step of modification times on the file systems in use (FAT)."""
_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("inode", pa.uint64()),
        ("sample", pa.binary()),
        ("whole", pa.binary()),
    ]
)


class FileState(NamedTuple):
    """The properties of a file that differ after a change of its bytes."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def from_status(cls, status: os.stat_result) -> FileState:
        """Return the state of a file from its status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class FileDigests(NamedTuple):
    """Digests of a file in one state; `whole` is empty if only samples of the file were read."""

    state: FileState
    sample: bytes
    whole: bytes = b""


@dataclass(frozen=True)
class CachePlace:
    """A file in which digests are kept."""

    store: Store
    name: str

    @functools.cached_property
    def stored(self) -> dict[str, FileDigests]:
        """Hash of a path → digests that were saved here; empty if none were saved or they cannot be read."""
        try:
            data = self.store.fs.cat_file(self.store.path(self.name))
            # Not `pq.read_table`, which imports pandas.
            file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
            table = file.read().cast(_COLUMNS)
            return {
                path: FileDigests(FileState(*state), sample, whole)
                for path, *state, sample, whole in zip(*table.to_pydict().values(), strict=True)
            }
        except FileNotFoundError:
            return {}
        except Exception as error:  # a damaged file or a store can raise any error
            log.debug("no digests of files (%s)", type(error).__name__)
            return {}


class DigestCache:
    """Digests of local files, by path. Call it from one thread.

    Pass it to `list_scans`. After the listing it holds the digests that this listing has put.

    Args:
        places: Where digests of earlier listings are kept; they are read only if they are needed.
    """

    def __init__(self, *places: CachePlace) -> None:
        self._places = places
        self._current: dict[str, FileDigests] = {}

    def get(self, path: str, state: FileState) -> FileDigests | None:
        """Return the digests of a file in this state; None if they are not known."""
        key = hash_texts([path])
        for place in self._places:
            digests = place.stored.get(key)
            if digests is not None and digests.state == state:
                return digests
        return None

    def put(self, path: str, digests: FileDigests, read_at: float) -> None:
        """Keep the digests of a file, unless it may change without a change of its state.

        Args:
            path: Path of the file.
            digests: Its digests.
            read_at: Time at which reading the file began, in seconds since the epoch.
        """
        if digests.state.mtime_ns / 1e9 + TIME_STEP_S < read_at:
            self._current[hash_texts([path])] = digests

    def save(self, place: CachePlace) -> None:
        """Write the digests of this listing to one of the places, unless they are there already.

        Raises:
            StorageError: As `Store.write`.
        """
        if self._current and self._current != place.stored:
            place.store.write(place.name, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the digests of this listing as one small Parquet file."""
        rows = [
            (path, *digests.state, digests.sample, digests.whole)
            for path, digests in sorted(self._current.items())
        ]
        table = pa.table(list(map(list, zip(*rows, strict=True))), schema=_COLUMNS)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data: bytes = sink.getvalue().to_pybytes()
        return data
