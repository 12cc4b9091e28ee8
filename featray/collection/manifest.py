"""A manifest, CSV or Parquet, to columns: which scans, what is known of them, which part is asked for.

In: the file's bytes and how the config reads it. Out: a `Manifest`, Arrow columns with one entry per row,
for there may be millions. Opens nothing that the rows name.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featray.config import SourceConfig
from featray.errors import ConfigError
from featray.schema import SCAN_COLUMNS

SUFFIXES = (".csv", ".parquet")
CENTER = ("center_x", "center_y", "center_z")
_TEXT = pa.large_string()
_BLOCK = 8192
_BEFORE_VALUE, _AFTER_VALUE = [np.frombuffer(marks, np.uint8) for marks in (b",\n", b",\r\n")]
_TOO_LONG = "the manifest's row has more values than the manifest has columns; quote values that hold commas"
_NO_CENTER = f"the manifest's {', '.join(CENTER)} must be three numbers (mm), or all empty"


@dataclass(frozen=True)
class ManifestRow:
    """One row.

    Attributes:
        scan_id: From the `id_column`, else the `uri` as written.
        uri: In full: absolute, or joined to the manifest's folder; empty where the row names none.
        version: Changes when the scan does; empty where the store is to be asked.
        mask: Uri, in full, of the mask whose bounding box is cut out; empty for none.
        center_lps: Millimetres (x, y, z) of the point to centre on; None for none.
        columns: What `scans` carries: every column but uri, version and id.
        problem: Why the row cannot be used; empty when it can.
    """

    scan_id: str
    uri: str
    version: str = ""
    mask: str = ""
    center_lps: tuple[float, ...] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Manifest:
    """The rows as columns; `row` gives one of them.

    Attributes:
        scan_id: Texts, as all but the centres.
        uri: In full.
        version: Empty where the store is to be asked.
        mask: In full; empty for none.
        centers_lps: (rows, 3), mm, NaN for none; None where the manifest has no centres.
        extra_columns: What `scans` carries: every column but uri, version and id.
        problems: Why rows cannot be used, by row.
    """

    scan_id: pa.LargeStringArray
    uri: pa.LargeStringArray
    version: pa.LargeStringArray
    mask: pa.LargeStringArray
    centers_lps: NDArray[np.float64] | None
    extra_columns: pa.Table
    problems: dict[int, str]

    def __len__(self) -> int:
        return len(self.uri)

    def row(self, at: int) -> ManifestRow:
        """Return one row."""
        center = None if self.centers_lps is None else tuple(self.centers_lps[at].tolist())
        return ManifestRow(
            scan_id=self.scan_id[at].as_py(),
            uri=self.uri[at].as_py(),
            version=self.version[at].as_py(),
            mask=self.mask[at].as_py(),
            center_lps=None if center is None or math.isnan(center[0]) else center,
            columns={name: self.extra_columns[name][at].as_py() for name in self.extra_columns.column_names},
            problem=self.problems.get(at, ""),
        )


def read_manifest(data: bytes, source: SourceConfig) -> Manifest:
    """Return the manifest at `source.uri`.

    Raises:
        ConfigError: It is neither CSV nor Parquet, has no rows, or its columns cannot be used.
    """
    problems_of_rows: dict[int, str] = {}
    try:
        names, texts = _parse_csv(data, problems_of_rows) if _is_csv(source.uri) else _parse_parquet(data)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        kind = type(error).__name__
        raise ConfigError(f"source.uri: the manifest is neither UTF-8 CSV nor Parquet ({kind})") from None
    problems = _problems_of_columns(names, source)
    if not problems and not len(texts[0]):
        problems = ["source.uri: the manifest has no rows"]
    if problems:
        raise ConfigError(problems)
    return _manifest(dict(zip(names, texts, strict=True)), source, problems_of_rows)


def _manifest(texts: dict[str, pa.Array], source: SourceConfig, problems: dict[int, str]) -> Manifest:
    uri = texts["uri"]
    nothing = pa.repeat(pa.scalar("", _TEXT), len(uri))
    centers, wrong = _centers_lps(texts, source)
    nameless = np.flatnonzero(np.asarray(pc.equal(uri, ""))).tolist()
    problems = dict.fromkeys(wrong, _NO_CENTER) | problems
    extra_columns = [name for name in texts if name not in ("uri", "version", source.id_column)]
    return Manifest(
        scan_id=texts[source.id_column] if source.id_column else uri,
        uri=_resolved(uri, source.uri),
        version=texts.get("version", nothing),
        mask=_resolved(texts["mask"], source.uri) if "mask" in texts else nothing,
        centers_lps=centers,
        extra_columns=pa.table({name: texts[name] for name in extra_columns})
        if extra_columns
        else _no_columns(len(uri)),
        problems=problems | dict.fromkeys(nameless, "the manifest's row names no uri"),
    )


def _no_columns(rows: int) -> pa.Table:
    return pa.table({"": pa.nulls(rows)}).select([])


def _centers_lps(
    texts: dict[str, pa.Array], source: SourceConfig
) -> tuple[NDArray[np.float64] | None, list[int]]:
    """Return the points in LPS, (rows, 3) with NaN for none, and the rows whose values are no point."""
    if CENTER[0] not in texts:
        return None, []
    centers = np.full((len(texts["uri"]), 3), np.nan)
    wrong = []
    for at, values in enumerate(zip(*(_values(texts[name]) for name in CENTER), strict=True)):
        try:
            centers[at] = _point(values)
        except ValueError:
            wrong.append(at)
    if source.center_frame == "RAS":  # has x and y the other way round
        centers[:, :2] *= -1
    return centers, wrong


def _point(texts: Sequence[str]) -> tuple[float, ...]:
    if not any(text.strip() for text in texts):
        return (math.nan,) * 3
    point = tuple(map(float, texts))
    if not all(map(math.isfinite, point)):
        raise ValueError
    return point


def _values(array: pa.Array) -> Iterator[str]:
    for start in range(0, len(array), _BLOCK):
        yield from array.slice(start, _BLOCK).to_pylist()


def _is_csv(uri: str) -> bool:
    return uri.lower().endswith(".csv")


def _parse_csv(data: bytes, problems: dict[int, str]) -> tuple[list[str], list[pa.Array]]:
    """Return names and texts of the columns; rows with too many values are added to `problems`."""
    names: list[str] = next(_csv_rows(data), [])
    return names, _parse_plain_csv(data, names) or _parse_any_csv(data, names, problems)


def _parse_plain_csv(data: bytes, names: list[str]) -> list[pa.Array] | None:
    """Return the columns of a CSV file that every reader understands alike, ten times as fast; else None."""
    if not names or not _is_unambiguous(data) or any("\n" in name for name in names):
        return None
    numbers = [str(number) for number in range(len(names))]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            pacsv.ReadOptions(column_names=numbers, skip_rows=1),
            pacsv.ParseOptions(newlines_in_values=True),
            pacsv.ConvertOptions(column_types=dict.fromkeys(numbers, _TEXT)),
        )
    except pa.ArrowInvalid:  # rows of other lengths, or no UTF-8: the other reader sorts it out
        return None
    return [_joined(column) for column in table.columns]


def _is_unambiguous(data: bytes) -> bool:
    """Whether lines end in LF or CRLF, and quotes, if any, enclose whole values and are in none."""
    if data.count(b"\r") != data.count(b"\r\n"):
        return False
    text = np.frombuffer(data.removeprefix(codecs.BOM_UTF8), np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    before, after = quotes[::2] - 1, quotes[1::2] + 1
    opens = np.isin(text[before[before >= 0]], _BEFORE_VALUE).all()
    closes = np.isin(text[after[after < len(text)]], _AFTER_VALUE).all()
    return bool(len(quotes) % 2 == 0 and opens and closes)


def _parse_any_csv(data: bytes, names: list[str], problems: dict[int, str]) -> list[pa.Array]:
    """Return the columns of a CSV file; short rows are filled up, of long ones the rest is cut off."""
    rows = _csv_rows(data)
    next(rows, None)
    filled = filter(None, rows)
    blocks: list[list[pa.Array]] = [[] for _ in names]
    count = 0
    while block := list(islice(filled, _BLOCK)):
        if set(map(len, block)) != {len(names)}:
            long = (at for at, row in enumerate(block, count) if len(row) > len(names))
            problems |= dict.fromkeys(long, _TOO_LONG)
            block = [(row + [""] * len(names))[: len(names)] for row in block]
        for column, values in zip(blocks, zip(*block, strict=True), strict=True):
            column.append(pa.array(values, _TEXT))
        count += len(block)
    return [_joined(pa.chunked_array(column, _TEXT)) for column in blocks]


def _csv_rows(data: bytes) -> Iterator[list[str]]:
    return csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""))


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _parse_parquet(data: bytes) -> tuple[list[str], list[pa.Array]]:
    table = pq.read_table(io.BytesIO(data))
    return table.column_names, [_texts(column) for column in table.columns]


def _texts(column: pa.ChunkedArray) -> pa.Array:
    """Return values as texts, as Python spells them, which for floats and times Arrow does not."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    is_same = _is_text(column.type) or pa.types.is_integer(column.type)
    if is_same:
        return _joined(pc.fill_null(column.cast(_TEXT), ""))
    return _each(column, lambda value: "" if value is None else str(value))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _each(column: pa.ChunkedArray, change: Callable[[object], str]) -> pa.Array:
    blocks = [
        pa.array(map(change, column.slice(start, _BLOCK).to_pylist()), _TEXT)
        for start in range(0, len(column), _BLOCK)
    ]
    return _joined(pa.chunked_array(blocks, _TEXT))


def _problems_of_columns(columns: list[str], source: SourceConfig) -> list[str]:
    needed = ["uri", *([source.id_column] if source.id_column else [])]
    problems = [f"source.uri: the manifest has no column {name}" for name in needed if name not in columns]
    centers = [name for name in CENTER if name in columns]
    if centers and len(centers) < len(CENTER):
        problems.append(f"source.uri: the manifest has {', '.join(centers)}, but not all of {CENTER}")
    # Column names of a Delta table differ by more than case.
    extra_columns = Counter(name.lower() for name in columns if name not in ("uri", "version", *needed))
    taken = {*SCAN_COLUMNS.names, "layer", *(name for name, count in extra_columns.items() if count > 1)}
    clashes = sorted(taken & set(extra_columns))
    return problems + [
        f"source.uri: rename the manifest column {name}; scans has one of that name" for name in clashes
    ]


def _resolved(uri: pa.Array, manifest: str) -> pa.Array:
    """Return a manifest's uris in full: absolute as they are, else relative to the manifest."""
    is_full = pc.or_(pc.match_substring(uri, "://"), pc.or_(pc.starts_with(uri, "/"), pc.equal(uri, "")))
    folder = posixpath.join(posixpath.dirname(manifest), "")
    return pc.if_else(
        is_full, uri, pc.binary_join_element_wise(pa.scalar(folder, _TEXT), uri, pa.scalar("", _TEXT))
    )
