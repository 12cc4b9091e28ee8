"""What listing remembers from run to run, so that headers of unchanged DICOM files are not read again.

Series are remembered in groups of folders that share one: a group is as it was when the same candidate
files, of the same size and version, lie in its folders, and no folder that had to be read holds one of its
series. That is all grouping depends on, so a listing with memory is the listing without. Only hashes of
folders and UIDs are in it, no file's name but those that messages of damaged files give, as `scans` does.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.errors import Reason

log = logging.getLogger(__name__)

_STAMP = b"featray.listing"  # a key in stored files, which must not follow the name of this package
_SERIES = pa.struct(
    [
        ("files", pa.list_(pa.int32())),
        ("uid", pa.string()),
        ("own", pa.string()),
        ("reason", pa.string()),
        ("excluded", pa.bool_()),
        ("message", pa.string()),
        ("warnings", pa.list_(pa.string())),
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
class KnownSeries:
    """One series as grouping found it.

    Attributes:
        files: Its files, as numbers into the sorted names of all candidates of its group; None for all.
        uid: Hash of the SeriesInstanceUID; empty where there is none.
        own: Hash that tells it from others of the same UID.
        reason: Why it is not to be read; None when it is.
        excluded: With a reason: left out by rule.
        message: With a reason: what to do.
        warnings: Codes of what was odd.
    """

    files: tuple[int, ...] | None
    uid: str
    own: str
    reason: Reason | None = None
    excluded: bool = False
    message: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownGroup:
    """Folders that share series, and what was found in them.

    Attributes:
        folders: Hashes of the folders, sorted.
        fingerprint: Of the names, sizes and versions of all candidate files in them.
        uids: Hashes of every SeriesInstanceUID there, also of what is no scan.
        series: In the order of their first files.
    """

    folders: tuple[str, ...]
    fingerprint: str
    uids: frozenset[str]
    series: tuple[KnownSeries, ...]


class HeaderCache:
    """Remembered groups, by place. Give it to `list_scans`; afterwards it holds what that listing found.

    Places may be listed in several threads, each place in one.
    """

    def __init__(self) -> None:
        self._stamp = ""
        self._known: dict[str, tuple[KnownGroup, ...]] = {}
        self._found: dict[str, tuple[KnownGroup, ...]] = {}

    @classmethod
    def from_bytes(cls, data: bytes) -> HeaderCache:
        """Return the memory that `to_bytes` wrote; an empty one, with a warning, if it cannot be read."""
        memory = cls()
        try:
            table = pq.read_table(io.BytesIO(data))
            memory._stamp = (table.schema.metadata or {})[_STAMP].decode()
            for row in table.cast(_COLUMNS).to_pylist():
                memory._known.setdefault(row["place"], ())
                memory._known[row["place"]] += (_group(row),)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            log.warning(
                "the listing memory is damaged (%s); every header is read again", type(error).__name__
            )
            return cls()
        memory._found = dict(memory._known)
        return memory

    def to_bytes(self) -> bytes:
        """Return it as one small Parquet file."""
        rows = [
            {"place": place, **asdict(group), "uids": sorted(group.uids)}
            for place, groups in sorted(self._found.items())
            for group in groups
        ]
        schema = _COLUMNS.with_metadata({_STAMP: self._stamp.encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @property
    def is_changed(self) -> bool:
        """Whether the last listing found other than what was remembered, so that it is worth storing."""
        return self._found != self._known

    def begin(self, stamp: str) -> None:
        """Start a listing; what was remembered under another stamp is forgotten.

        Args:
            stamp: Changes with everything but the files that a listing follows from.
        """
        if stamp != self._stamp:
            self._known = {}
        self._stamp, self._found = stamp, {}

    def recall(self, place: str) -> tuple[KnownGroup, ...]:
        """Return what was remembered of a place."""
        return self._known.get(place, ())

    def keep(self, place: str, groups: Iterable[KnownGroup]) -> None:
        """Remember what this listing found in a place."""
        kept = tuple(sorted(groups, key=lambda group: group.folders))
        if kept:
            self._found[place] = kept


def _group(row: dict[str, Any]) -> KnownGroup:
    return KnownGroup(
        tuple(row["folders"]),
        row["fingerprint"],
        frozenset(row["uids"]),
        tuple(_series(found) for found in row["series"]),
    )


def _series(found: dict[str, Any]) -> KnownSeries:
    return KnownSeries(
        files=None if found["files"] is None else tuple(found["files"]),
        uid=found["uid"],
        own=found["own"],
        reason=None if found["reason"] is None else Reason(found["reason"]),
        excluded=found["excluded"],
        message=found["message"],
        warnings=tuple(found["warnings"]),
    )
