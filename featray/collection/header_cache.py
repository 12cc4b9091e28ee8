"""Keep the results of reading DICOM headers from one listing to the next, so unchanged files are not read.

One cache entry covers a set of folders that share DICOM series. An entry is valid under two conditions: its
folders hold the same candidate files with the same sizes and versions, and no folder outside the entry that
had to be read holds one of its series. Grouping depends on nothing else, so a listing with the cache equals a
listing without it.

The cache holds only hashes of folder names and UIDs. The only file names in it are those in messages about
damaged files, which the scans table shows too.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.parts import StackRange
from featray.errors import Reason

log = logging.getLogger(__name__)

_STAMP = b"featray.listing"  # a key in stored files, which stays the same if modules are renamed
_SERIES = pa.struct(
    [
        ("files", pa.list_(pa.int32())),
        ("uid", pa.string()),
        ("own", pa.string()),
        ("reason", pa.string()),
        ("excluded", pa.bool_()),
        ("message", pa.string()),
        ("warnings", pa.list_(pa.string())),
        ("range", pa.list_(pa.float64())),
        ("hashes", pa.list_(pa.string())),
    ]
)
_COLUMNS = pa.schema(
    [
        ("place", pa.string()),
        ("folders", pa.list_(pa.string())),
        ("fingerprint", pa.string()),
        ("uids", pa.list_(pa.string())),
        ("series", pa.list_(_SERIES)),
    ]
)


@dataclass(frozen=True)
class HashedSeries:
    """One DICOM series as grouping returned it, with a hash instead of its UID.

    Attributes:
        scan: The grouped files, and the reason if the series is not to be read. `series_uid` is the hash of
            the SeriesInstanceUID, or empty without a UID. `files` is empty in a cache entry.
        series_hash: Hash that differs between series of one UID.
        file_numbers: In a cache entry: positions of the files among the sorted names of all candidate files
            of the entry; None if the series consists of all of them.
    """

    scan: DicomScan
    series_hash: str
    file_numbers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CacheEntry:
    """Folders that share series, and the series in them.

    Attributes:
        folders: Hashes of the folder names, sorted.
        fingerprint: Hash of the names, sizes and versions of all candidate files in the folders.
        uids: Hashes of all SeriesInstanceUIDs in the folders, including UIDs of files that belong to no scan.
        series: The series, sorted by their file names.
    """

    folders: tuple[str, ...]
    fingerprint: str
    uids: frozenset[str]
    series: tuple[HashedSeries, ...]


class HeaderCache:
    """Cache entries by the key of the folder or archive that was searched.

    Pass it to `list_scans`. After the listing it holds the entries of that listing only. Several threads may
    use it at the same time if each key is used by one thread.
    """

    def __init__(self) -> None:
        self._stamp = self._stored_stamp = ""
        self._stored: dict[str, tuple[CacheEntry, ...]] = {}
        self._previous: dict[str, tuple[CacheEntry, ...]] = {}
        self._current: dict[str, tuple[CacheEntry, ...]] = {}

    @classmethod
    def from_bytes(cls, data: bytes) -> HeaderCache:
        """Return the cache that `to_bytes` wrote; if it is damaged, log a warning and return an empty one."""
        cache = cls()
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
            if not _has_stacks(table.schema):
                return cls()
            cache._stamp = cache._stored_stamp = (table.schema.metadata or {})[_STAMP].decode()
            for row in table.cast(_COLUMNS).to_pylist():
                cache._previous.setdefault(row["place"], ())
                cache._previous[row["place"]] += (_parse_entry(row),)
        except Exception as error:  # a damaged file can raise any error
            log.warning(
                "the cache of DICOM headers is damaged (%s); every header is read again", type(error).__name__
            )
            return cls()
        cache._stored, cache._current = cache._previous, dict(cache._previous)
        return cache

    def to_bytes(self) -> bytes:
        """Return the cache as one small Parquet file."""
        rows = [_make_row(key, entry) for key, entries in sorted(self._current.items()) for entry in entries]
        schema = _COLUMNS.with_metadata({_STAMP: self._stamp.encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd", write_page_checksum=True
        )
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @property
    def is_changed(self) -> bool:
        """Whether the last listing put other entries than those that are stored, or with another stamp."""
        is_other_stamp = bool(self._current) and self._stamp != self._stored_stamp
        return is_other_stamp or self._current != self._stored

    def start_listing(self, stamp: str) -> None:
        """Prepare for a listing, and drop entries that were made with another stamp.

        Args:
            stamp: Identifies everything that a listing depends on, except the files.
        """
        if stamp != self._stamp:
            self._previous = {}
        self._stamp, self._current = stamp, {}

    def get(self, key: str) -> tuple[CacheEntry, ...]:
        """Return the entries that an earlier listing put under a key, or an empty tuple."""
        return self._previous.get(key, ())

    def put(self, key: str, entries: Iterable[CacheEntry]) -> None:
        """Set the entries of this listing under a key."""
        ordered = tuple(sorted(entries, key=lambda entry: entry.folders))
        if ordered:
            self._current[key] = ordered


def _has_stacks(schema: pa.Schema) -> bool:
    """Return whether a cache stores where slices lie; caches of earlier versions do not."""
    return "range" in {field.name for field in schema.field("series").type.value_type}


def _parse_stack(numbers: list[float] | None, hashes: list[str] | None) -> StackRange | None:
    if numbers is None or hashes is None:
        return None
    count, low, high = numbers
    owner, instances = hashes
    return StackRange(int(count), low, high, owner, instances)


def _make_row(key: str, entry: CacheEntry) -> dict[str, Any]:
    return {
        "place": key,
        "folders": entry.folders,
        "fingerprint": entry.fingerprint,
        "uids": sorted(entry.uids),
        "series": [_make_series_value(series) for series in entry.series],
    }


def _make_series_value(series: HashedSeries) -> dict[str, Any]:
    scan, stack = series.scan, series.scan.stack
    return {
        "files": series.file_numbers,
        "uid": scan.series_uid,
        "own": series.series_hash,
        "reason": scan.reason,
        "excluded": scan.excluded,
        "message": scan.message,
        "warnings": scan.warnings,
        "range": None if stack is None else [stack.count, stack.low, stack.high],
        "hashes": None if stack is None else [stack.owner, stack.instances],
    }


def _parse_entry(row: dict[str, Any]) -> CacheEntry:
    return CacheEntry(
        tuple(row["folders"]),
        row["fingerprint"],
        frozenset(row["uids"]),
        tuple(_parse_series(value) for value in row["series"]),
    )


def _parse_series(value: dict[str, Any]) -> HashedSeries:
    scan = DicomScan(
        files=(),
        series_uid=value["uid"],
        reason=None if value["reason"] is None else Reason(value["reason"]),
        excluded=value["excluded"],
        message=value["message"],
        warnings=tuple(value["warnings"]),
        stack=_parse_stack(value["range"], value["hashes"]),
    )
    numbers = value["files"]
    return HashedSeries(scan, value["own"], None if numbers is None else tuple(numbers))
