"""Hold the result of a listing, with the scans of a manifest as Arrow columns.

A manifest may have millions of rows, of which a refresh processes only a few. Ids and contents are therefore
Arrow columns, which planning compares as a whole. A `Scan` object is built only when it is accessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.collection.digest_cache import DigestCache
from featray.collection.header_cache import HeaderCache
from featray.collection.manifest import make_point
from featray.errors import find_similar_names
from featray.schema import Scan
from featray.storage.urls import make_absolute

TEXT = pa.large_string()
"""Type of columns that may hold more than 2 GB in total."""

LISTING_COLUMNS = pa.schema(
    [
        ("scan_id", TEXT),
        ("content", TEXT),
        ("reason", pa.string()),
        ("excluded", pa.bool_()),
        ("has_files", pa.bool_()),
    ]
)
"""Columns that planning compares; `has_files` is false for scans that listing left open."""

_BLOCK = 4096


@dataclass(frozen=True)
class ScanColumns:
    """Scans of manifest rows as columns, for rows that describe their scan without a request to the store.

    Attributes:
        main: Columns scan_id, uri (without credentials), format, content, mask; no nulls.
        extra: Further columns of the manifest, which are copied to the scans table.
        centers_lps: (rows, 3), mm; NaN for a row without a center. None if no row has a center.
    """

    main: pa.Table
    extra: pa.Table
    centers_lps: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.main)

    def take(self, rows: NDArray[np.int64]) -> ScanColumns:
        """Return chosen rows, in this order."""
        centers_lps = None if self.centers_lps is None else self.centers_lps[rows]
        return ScanColumns(self.main.take(pa.array(rows)), self.extra.take(pa.array(rows)), centers_lps)

    def get_rows(self) -> Iterator[_Row]:
        """Yield the values of every row."""
        count, extra_texts = len(self), [column.to_pylist() for column in self.extra.columns]
        return map(
            _Row,
            *(self.main[name].to_pylist() for name in ("scan_id", "uri", "format", "content", "mask")),
            repeat(None, count) if self.centers_lps is None else map(make_point, self.centers_lps.tolist()),
            zip(*extra_texts, strict=True) if extra_texts else repeat((), count),
        )


class _Row(NamedTuple):
    scan_id: str
    uri: str
    format: str
    content: str
    mask: str
    center_lps: tuple[float, ...] | None
    extra: tuple[str, ...]


class LazyScans(Sequence[Scan]):
    """Scans of a manifest, each of which is built when it is accessed.

    Args:
        columns: Scans as columns.
        get_path: Returns the path of a URI in its file system.
        built: Further scans, which are built already.
        order: Order of all scans. Numbers below `len(columns)` are rows of `columns`; higher numbers
            continue through `built`.
        due_layers: Due layers of each scan, in this order; None if no scan has any.
    """

    def __init__(
        self,
        columns: ScanColumns,
        get_path: Callable[[str], str],
        built: Sequence[Scan],
        order: NDArray[np.int64],
        due_layers: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        self._columns, self._get_path, self._built, self._order = columns, get_path, built, order
        self._due_layers = due_layers

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Scan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scan]: ...
    def __getitem__(self, index: int | slice) -> Scan | Sequence[Scan]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        position = range(len(self))[index]
        return next(self._build_scans(position, position + 1))

    def __iter__(self) -> Iterator[Scan]:
        for start in range(0, len(self), _BLOCK):
            yield from self._build_scans(start, start + _BLOCK)

    def take(
        self, positions: NDArray[np.int64], due_layers: Sequence[tuple[str, ...]] | None = None
    ) -> LazyScans:
        """Return the scans at some positions, in this order.

        Args:
            positions: Positions among all scans.
            due_layers: Due layers of each returned scan; None for those that the scans have.
        """
        if due_layers is None and self._due_layers is not None:
            due_layers = [self._due_layers[position] for position in positions.tolist()]
        return LazyScans(self._columns, self._get_path, self._built, self._order[positions], due_layers)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Names of the manifest's further columns."""
        return tuple(self._columns.extra.column_names)

    @property
    def has_centers(self) -> bool:
        """Whether any scan has a center to crop around."""
        centers_lps = self._columns.centers_lps
        in_columns = centers_lps is not None and not bool(np.isnan(centers_lps).all())
        return in_columns or any(scan.center_lps for scan in self._built)

    def to_table(self) -> pa.Table:
        """Return the scans as a table with the columns `LISTING_COLUMNS`."""
        main, count = self._columns.main, len(self._columns)
        from_columns = pa.table(
            [
                main["scan_id"],
                main["content"],
                pa.nulls(count, pa.string()),
                pa.repeat(pa.scalar(value=False), count),
                pc.not_equal(main["format"], "auto"),
            ],
            schema=LISTING_COLUMNS,
        )
        return pa.concat_tables([from_columns, make_listing_table(self._built)]).take(pa.array(self._order))

    def _build_scans(self, start: int, stop: int) -> Iterator[Scan]:
        """Yield the scans at the positions from `start` to before `stop`."""
        count, order = len(self._columns), self._order[start:stop]
        rows = self._columns.take(order[order < count]).get_rows()
        due_layers = repeat(()) if self._due_layers is None else self._due_layers[start:stop]
        for number, due in zip(order.tolist(), due_layers, strict=False):
            if number < count:
                yield self._build_scan(next(rows), due)
            else:
                built = self._built[number - count]
                yield replace(built, due_layers=due) if due else built

    def _build_scan(self, row: _Row, due_layers: tuple[str, ...]) -> Scan:
        is_open = row.format == "auto"
        path = self._get_path(row.uri)
        return Scan(
            scan_id=row.scan_id,
            uri=row.uri,
            format=row.format,
            files=() if is_open else (path,),
            content=row.content,
            open_path=path if is_open else "",
            mask=make_absolute(row.mask),
            center_lps=row.center_lps,
            columns=dict(zip(self._columns.extra.column_names, row.extra, strict=True)),
            due_layers=due_layers,
        )


@dataclass(frozen=True)
class Listing:
    """The scans of a collection.

    Attributes:
        scans: Every scan, sorted by id; ids are unique. Scans of a manifest are built when they are
            accessed, so use `table` to look at all of them.
        ignored: File name suffix → number of files that belong to no scan.
        header_cache: Cache for the next listing of the same collection; None for a listing without a cache.
        digest_cache: Digests of local files for the next listing.
    """

    scans: Sequence[Scan]
    ignored: dict[str, int] = field(default_factory=dict)
    header_cache: HeaderCache | None = field(default=None, compare=False, repr=False)
    digest_cache: DigestCache = field(default_factory=DigestCache, compare=False, repr=False)

    @functools.cached_property
    def table(self) -> pa.Table:
        """The scans as a table with the columns `LISTING_COLUMNS`, in the order of `scans`."""
        return self.scans.to_table() if isinstance(self.scans, LazyScans) else make_listing_table(self.scans)

    @property
    def scan_ids(self) -> pa.ChunkedArray:
        """Ids of all scans (large_string), sorted."""
        return self.table["scan_id"]

    @functools.cached_property
    def extra_columns(self) -> tuple[str, ...]:
        """Names of the manifest columns that are copied to the scans table."""
        if isinstance(self.scans, LazyScans):
            return self.scans.extra_columns
        return tuple(dict.fromkeys(name for scan in self.scans for name in scan.columns))

    @functools.cached_property
    def has_centers(self) -> bool:
        """Whether any scan has a center to crop around."""
        if isinstance(self.scans, LazyScans):
            return self.scans.has_centers
        return any(scan.center_lps for scan in self.scans)

    def take(
        self, positions: NDArray[np.int64], due_layers: Sequence[tuple[str, ...]] | None = None
    ) -> Sequence[Scan]:
        """Return the scans at some positions, in this order, each with its due layers if these are given."""
        if isinstance(self.scans, LazyScans):
            return self.scans.take(positions, due_layers)
        scans = tuple(self.scans[position] for position in positions.tolist())
        if due_layers is None:
            return scans
        return tuple(replace(scan, due_layers=due) for scan, due in zip(scans, due_layers, strict=True))

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


def make_listing_table(scans: Sequence[Scan]) -> pa.Table:
    """Return scans as a table with the columns `LISTING_COLUMNS`."""
    return pa.table(
        [
            pa.array([scan.scan_id for scan in scans], TEXT),
            pa.array([scan.content for scan in scans], TEXT),
            pa.array([None if scan.reason is None else str(scan.reason) for scan in scans], pa.string()),
            pa.array([scan.excluded for scan in scans], pa.bool_()),
            pa.array([bool(scan.files) for scan in scans], pa.bool_()),
        ],
        schema=LISTING_COLUMNS,
    )


def sample_by_size(scans: Sequence[Scan], count: int) -> list[Scan]:
    """Return up to `count` of the scans, spread evenly over their sizes, from small to large."""
    by_size = sorted(scans, key=lambda scan: scan.size)
    step = max(1, len(by_size) / count)
    return [by_size[int((index + 0.5) * step)] for index in range(min(count, len(by_size)))]
