"""A listing, and its scans as columns: objects are only made of those that somebody asks for.

A manifest may have millions of rows of which a refresh takes up a few. Their ids and contents are Arrow
columns that are compared as a whole; a `Scan` is built when it is looked at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.collection.header_cache import HeaderCache
from featray.errors import find_similar_names
from featray.schema import Scan

TEXT = pa.large_string()
"""Of columns that may hold more than 2 GB together."""

LISTED = pa.schema(
    [
        ("scan_id", TEXT),
        ("content", TEXT),
        ("reason", pa.string()),
        ("excluded", pa.bool_()),
        ("is_located", pa.bool_()),
    ]
)
"""What planning compares; `is_located` is false where only the worker will find the files."""

_BLOCK = 4096


class RowScans(Sequence[Scan]):
    """Scans of a manifest, in some order; each is built when it is asked for.

    Args:
        rows: One row per scan whose row says all there is to know: scan_id, uri (shown), format, content,
            mask, without nulls.
        extra_columns: Further columns of the same rows, to carry along.
        centers_lps: (rows, 3), mm; NaN for none; None where no row has one.
        path: Makes of a uri its path in its file system.
        made: Further scans, ready.
        order: Of the scans; numbers below len(rows) are rows, those above count through `made`.
    """

    def __init__(
        self,
        rows: pa.Table,
        extra_columns: pa.Table,
        centers_lps: NDArray[np.float64] | None,
        path: Callable[[str], str],
        made: Sequence[Scan],
        order: NDArray[np.int64],
    ) -> None:
        self._rows, self._extra_columns, self._centers_lps = rows, extra_columns, centers_lps
        self._path, self._made, self._order = path, made, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Scan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scan]: ...
    def __getitem__(self, index: int | slice) -> Scan | Sequence[Scan]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return next(self._built(self._order[[index]]))

    def __iter__(self) -> Iterator[Scan]:
        for start in range(0, len(self), _BLOCK):
            yield from self._built(self._order[start : start + _BLOCK])

    def take(self, places: NDArray[np.int64]) -> RowScans:
        """Return the scans at those places, in their order."""
        order = self._order[places]
        return RowScans(self._rows, self._extra_columns, self._centers_lps, self._path, self._made, order)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Names of the columns that scans carry along."""
        return tuple(self._extra_columns.column_names)

    @property
    def has_centers(self) -> bool:
        """Whether any scan asks for a centre."""
        in_rows = self._centers_lps is not None and not bool(np.isnan(self._centers_lps).all())
        return in_rows or any(scan.center_lps for scan in self._made)

    def listed(self) -> pa.Table:
        """Return the scans as columns, see `LISTED`."""
        count = len(self._rows)
        plain = pa.table(
            [
                self._rows["scan_id"],
                self._rows["content"],
                pa.nulls(count, pa.string()),
                pa.repeat(False, count),
                pc.not_equal(self._rows["format"], "auto"),
            ],
            schema=LISTED,
        )
        return pa.concat_tables([plain, listed(self._made)]).take(pa.array(self._order))

    def _built(self, order: NDArray[np.int64]) -> Iterator[Scan]:
        at = order[order < len(self._rows)]
        rows = zip(*self._values(at), strict=True)
        for number in order:
            yield (
                self._scan(*next(rows)) if number < len(self._rows) else self._made[number - len(self._rows)]
            )

    def _values(self, at: NDArray[np.int64]) -> list[Sequence[Any]]:
        """Return the values of some rows: what a `Scan` is made of, column by column."""
        rows = self._rows.take(pa.array(at))
        extra_columns = self._extra_columns.take(pa.array(at))
        texts = [extra_columns[name].to_pylist() for name in extra_columns.column_names]
        centers: Sequence[Any] = [None] * len(at)
        if self._centers_lps is not None:
            centers = list(map(point, self._centers_lps[at].tolist()))
        columns = [rows[name].to_pylist() for name in ("scan_id", "uri", "format", "content", "mask")]
        return [*columns, centers, list(zip(*texts, strict=True)) if texts else [()] * len(at)]

    def _scan(
        self, scan_id: str, uri: str, kind: str, content: str, mask: str, center: Any, texts: Sequence[str]
    ) -> Scan:
        is_open = kind == "auto"
        return Scan(
            scan_id=scan_id,
            uri=uri,
            format=kind,
            files=() if is_open else (self._path(uri),),
            content=content,
            place=self._path(uri) if is_open else "",
            mask=mask,
            center_lps=center,
            columns=dict(zip(self._extra_columns.column_names, texts, strict=True)),
        )


@dataclass(frozen=True)
class Listing:
    """What a collection holds.

    Attributes:
        scans: Every scan, sorted by id; ids are unique. Those of a manifest are built when they are asked
            for: to look at all of them, prefer the columns below.
        ignored: Number of files by suffix that are no scans.
        header_cache: DICOM headers that the next listing of the same collection need not read again.
    """

    scans: Sequence[Scan]
    ignored: dict[str, int] = field(default_factory=dict)
    header_cache: HeaderCache | None = field(default=None, compare=False, repr=False)

    @functools.cached_property
    def table(self) -> pa.Table:
        """The scans as columns, in the same order, see `LISTED`."""
        return self.scans.listed() if isinstance(self.scans, RowScans) else listed(self.scans)

    @property
    def scan_ids(self) -> pa.ChunkedArray:
        """Ids of all scans (large_string), sorted."""
        return self.table["scan_id"]

    @functools.cached_property
    def extra_columns(self) -> tuple[str, ...]:
        """Names of the manifest's columns that scans carry along."""
        if isinstance(self.scans, RowScans):
            return self.scans.extra_columns
        return tuple(dict.fromkeys(name for scan in self.scans for name in scan.columns))

    @functools.cached_property
    def has_centers(self) -> bool:
        """Whether any scan asks for a centre."""
        if isinstance(self.scans, RowScans):
            return self.scans.has_centers
        return any(scan.center_lps for scan in self.scans)

    def find_similar_ids(self, scan_id: str) -> list[str]:
        """Return up to five ids of the collection that an error message can suggest for an unknown id.

        Ids that contain the unknown id are preferred to ids that are spelled like it. Without either, the
        first three ids are examples.
        """
        ids = self.scan_ids
        if containing := ids.filter(pc.match_substring(ids, scan_id)).slice(0, 5).to_pylist():
            return list(containing)
        # Only 10,000 ids around the unknown one in sort order: comparing a million would take minutes.
        position = int(pc.sum(pc.less(ids, pa.scalar(scan_id, TEXT))).as_py() or 0)
        neighbors = ids.slice(max(0, position - 5000), 10_000).to_pylist()
        return find_similar_names(scan_id, neighbors, limit=5) or ids.slice(0, 3).to_pylist()

    def take(self, places: NDArray[np.int64]) -> Sequence[Scan]:
        """Return the scans at those places."""
        if isinstance(self.scans, RowScans):
            return self.scans.take(places)
        return tuple(self.scans[place] for place in places.tolist())


def listed(scans: Sequence[Scan]) -> pa.Table:
    """Return scans as columns, see `LISTED`."""
    return pa.table(
        [
            pa.array([scan.scan_id for scan in scans], TEXT),
            pa.array([scan.content for scan in scans], TEXT),
            pa.array([None if scan.reason is None else str(scan.reason) for scan in scans], pa.string()),
            pa.array([scan.excluded for scan in scans], pa.bool_()),
            pa.array([bool(scan.files) for scan in scans], pa.bool_()),
        ],
        schema=LISTED,
    )


def point(millimetres: list[float]) -> tuple[float, ...] | None:
    """Return one row of `centers_lps` as a point; None for NaN."""
    return None if math.isnan(millimetres[0]) else tuple(millimetres)


def sample_by_size(scans: Sequence[Scan], count: int) -> list[Scan]:
    """Return up to `count` of the scans, spread evenly over their sizes, from small to large."""
    by_size = sorted(scans, key=lambda scan: scan.size)
    step = max(1, len(by_size) / count)
    return [by_size[int((index + 0.5) * step)] for index in range(min(count, len(by_size)))]
