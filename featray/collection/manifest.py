"""Parse the bytes of a manifest (CSV or Parquet) into columns: scans, their versions and their regions.

The columns are Arrow arrays, because there may be millions of rows. The files that the rows name are not
opened.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import posixpath
import re
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

MANIFEST_SUFFIXES = (".csv", ".parquet")
CENTER_COLUMNS = ("center_x", "center_y", "center_z")
_TEXT = pa.large_string()
_BLOCK = 8192
_BLOCK_BYTES = 2**24
_SEPARATORS = ",;\t"
_EXCEL_SEPARATOR = re.compile(rb"sep=[,;\t]")
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_NAMES_SHOWN = 20
_LOOKS_LIKE_VALUE = re.compile(r"[/\\]|^[\d.,;+\s-]+$|\.(nii|gz|dcm|nrrd|mha|mhd|npy|zip)$", re.IGNORECASE)
"""Texts that are values of a row rather than the name of a column."""
_ROW_TOO_LONG = (
    "the manifest's row has more values than the manifest has columns; quote values that contain commas"
)
_BAD_CENTER = f"the manifest's {', '.join(CENTER_COLUMNS)} must be three numbers (mm), or all empty"
_NO_URI = "the manifest's row names no uri"


@dataclass(frozen=True)
class ManifestRow:
    """One row of a manifest.

    Attributes:
        scan_id: Value of the `id_column`, or, without one, the `uri` as written.
        uri: Full URI: absolute, or joined to the manifest's folder. Empty if the row names none.
        version: Text that changes when the scan does. If it is empty, listing asks the store for a version.
        mask: Full URI of a mask; the mask's bounding box is cut out. Empty for the whole volume.
        center_lps: Point (x, y, z) in mm to crop around; None for the center of the volume.
        columns: Values for the scans table: every column except `uri`, `version` and the `id_column`.
        problem: Why the row cannot be used; empty if it can.
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
    """All rows of a manifest as columns; `get_row` returns one of the rows.

    Attributes:
        scan_id: Value of the `id_column`, or, without one, the `uri` as written.
        uri: Full URIs: absolute, or joined to the manifest's folder. Empty if the row names none.
        version: Texts that change when the scan does. For an empty text, listing asks the store.
        mask: Full URIs of masks; empty for the whole volume.
        centers_lps: (rows, 3), mm; NaN for a row without a center. None if the manifest has no centers.
        extra_columns: Values for the scans table: every column except `uri`, `version` and the `id_column`.
        problems: Row number → why the row cannot be used.
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

    def get_row(self, number: int) -> ManifestRow:
        """Return one row; the first has the number 0."""
        return ManifestRow(
            scan_id=self.scan_id[number].as_py(),
            uri=self.uri[number].as_py(),
            version=self.version[number].as_py(),
            mask=self.mask[number].as_py(),
            center_lps=None if self.centers_lps is None else make_point(self.centers_lps[number].tolist()),
            columns={
                name: self.extra_columns[name][number].as_py() for name in self.extra_columns.column_names
            },
            problem=self.problems.get(number, ""),
        )


def read_manifest(data: bytes, source: SourceConfig) -> Manifest:
    """Return the manifest at `source.uri`.

    Args:
        data: The bytes of the file.
        source: Configuration of the collection: the URI, the id column, and the frame of centers.

    Raises:
        ConfigError: The file is neither CSV nor Parquet, has no rows, or has columns that cannot be used. The
            message names the columns that were found.
    """
    row_problems: dict[int, str] = {}
    try:
        names, texts = _parse_csv(data, row_problems) if _is_csv(source.uri) else _parse_parquet(data)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        error_name = type(error).__name__
        advice = "; it is UTF-16: save it as `CSV UTF-8`" if data.startswith(_UTF_16_MARKS) else ""
        raise ConfigError(
            f"source.uri: the manifest is neither UTF-8 CSV nor Parquet ({error_name}){advice}"
        ) from None
    names = _rename_columns(names, source)
    problems = _find_column_problems(names, source)
    if not problems and not len(texts[0]):
        problems = ["source.uri: the manifest has no rows"]
    if problems:
        raise ConfigError(problems)
    columns = {name: column for name, column in zip(names, texts, strict=True) if name}
    return _make_manifest(columns, source, row_problems)


def make_point(coordinates: list[float]) -> tuple[float, ...] | None:
    """Return one row of `centers_lps` (x, y, z in mm) as a point; None if it is NaN."""
    return None if math.isnan(coordinates[0]) else tuple(coordinates)


def _make_manifest(texts: dict[str, pa.Array], source: SourceConfig, problems: dict[int, str]) -> Manifest:
    uri = texts["uri"]
    empty = pa.repeat(pa.scalar("", _TEXT), len(uri))
    centers, rows_with_bad_center = _parse_centers(texts, source)
    rows_without_uri = np.flatnonzero(np.asarray(pc.equal(uri, ""))).tolist()
    extra = [name for name in texts if name not in ("uri", "version", source.id_column)]
    return Manifest(
        scan_id=texts[source.id_column] if source.id_column else uri,
        uri=_resolve_uris(uri, source.uri),
        version=texts.get("version", empty),
        mask=_resolve_uris(texts["mask"], source.uri) if "mask" in texts else empty,
        centers_lps=centers,
        extra_columns=_make_table({name: texts[name] for name in extra}, len(uri)),
        problems=dict.fromkeys(rows_with_bad_center, _BAD_CENTER)
        | problems
        | dict.fromkeys(rows_without_uri, _NO_URI),
    )


def _make_table(columns: dict[str, pa.Array], row_count: int) -> pa.Table:
    """Return a table that has `row_count` rows even without any column."""
    return pa.table(columns) if columns else pa.table({"": pa.nulls(row_count)}).select([])


def _parse_centers(
    texts: dict[str, pa.Array], source: SourceConfig
) -> tuple[NDArray[np.float64] | None, list[int]]:
    """Return the centers, and the numbers of the rows with values that are not a point.

    The centers have the shape (rows, 3), in mm and LPS, with NaN for a row without a center.
    """
    if CENTER_COLUMNS[0] not in texts:
        return None, []
    centers = np.full((len(texts["uri"]), 3), np.nan)
    bad_rows = []
    for row, values in enumerate(zip(*(_read_values(texts[name]) for name in CENTER_COLUMNS), strict=True)):
        try:
            centers[row] = _parse_center(values)
        except ValueError:
            bad_rows.append(row)
    if source.center_frame == "RAS":  # x and y point in the opposite directions
        centers[:, :2] *= -1
    return centers, bad_rows


def _parse_center(texts: Sequence[str]) -> tuple[float, ...]:
    """Return the point that three texts name; NaN if all are blank. Other texts raise a ValueError."""
    if not any(text.strip() for text in texts):
        return (math.nan,) * 3
    point = tuple(map(float, texts))
    if not all(map(math.isfinite, point)):
        raise ValueError
    return point


def _read_values(array: pa.Array) -> Iterator[str]:
    for start in range(0, len(array), _BLOCK):
        yield from array.slice(start, _BLOCK).to_pylist()


def _is_csv(uri: str) -> bool:
    return uri.lower().endswith(".csv")


def _parse_csv(data: bytes, problems: dict[int, str]) -> tuple[list[str], list[pa.Array]]:
    """Return the names and the texts of the columns; add rows with too many values to `problems`.

    The separator is the first of comma, semicolon and tab with which the first line has a column `uri`,
    otherwise a comma. A line `sep=;`, which Excel understands, may come first.
    """
    first = io.BytesIO(data.removeprefix(codecs.BOM_UTF8)).readline()
    if _EXCEL_SEPARATOR.fullmatch(first.strip(b"\r\n")):
        separators, data = first.decode()[4], data[data.index(b"\n") + 1 :]
    else:
        separators = _SEPARATORS
    headers = {mark: next(_read_csv_rows(data, mark), []) for mark in separators}
    has_uri = (mark for mark, names in headers.items() if "uri" in [name.lower() for name in names])
    separator = next(has_uri, separators[0])
    names = headers[separator]
    columns = _parse_plain_csv(data, names, separator)
    return names, columns or _parse_any_csv(data, names, problems, separator)


def _parse_plain_csv(data: bytes, names: list[str], separator: str = ",") -> list[pa.Array] | None:
    """Return the columns of a CSV file that every CSV reader parses in the same way; None for other files.

    About ten times as fast as `_parse_any_csv`.
    """
    if not names or not _is_unambiguous(data, separator) or any("\n" in name for name in names):
        return None
    numbers = [str(number) for number in range(len(names))]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            pacsv.ReadOptions(column_names=numbers, skip_rows=1),
            pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pacsv.ConvertOptions(column_types=dict.fromkeys(numbers, _TEXT)),
            memory_pool=pa.system_memory_pool(),  # which returns the memory as soon as it is free
        )
    except pa.ArrowInvalid:  # rows of different lengths, or not UTF-8: `_parse_any_csv` reports the problem
        return None
    columns = table.columns[::-1]
    del table  # each column is freed when it is combined, because a million rows take 0.1 GB
    return [_combine(columns.pop()) for _ in names]


def _is_unambiguous(data: bytes, separator: str) -> bool:
    """Return whether lines end in LF or CRLF, and quotes only enclose whole values that contain no quotes."""
    if data.count(b"\r") != data.count(b"\r\n"):
        return False
    if b'"' not in data:
        return True
    text = np.frombuffer(data.removeprefix(codecs.BOM_UTF8), np.uint8)
    blocks = range(0, len(text), _BLOCK_BYTES)
    found = [start + np.flatnonzero(text[start : start + _BLOCK_BYTES] == ord('"')) for start in blocks]
    quotes = np.concatenate([np.zeros(0, np.int64), *found])
    before, after = quotes[::2] - 1, quotes[1::2] + 1
    opens = np.isin(text[before[before >= 0]], list(f"{separator}\n".encode())).all()
    closes = np.isin(text[after[after < len(text)]], list(f"{separator}\r\n".encode())).all()
    return bool(len(quotes) % 2 == 0 and opens and closes)


def _parse_any_csv(
    data: bytes, names: list[str], problems: dict[int, str], separator: str = ","
) -> list[pa.Array]:
    """Return the columns of a CSV file; short rows are padded with empty values, long rows are cut.

    The numbers of long rows are added to `problems`.
    """
    rows = _read_csv_rows(data, separator)
    next(rows, None)
    rows_with_values = filter(None, rows)
    blocks: list[list[pa.Array]] = [[] for _ in names]
    count = 0
    while block := list(islice(rows_with_values, _BLOCK)):
        if set(map(len, block)) != {len(names)}:
            long_rows = (number for number, row in enumerate(block, count) if len(row) > len(names))
            problems |= dict.fromkeys(long_rows, _ROW_TOO_LONG)
            block = [(row + [""] * len(names))[: len(names)] for row in block]
        for column, values in zip(blocks, zip(*block, strict=True), strict=True):
            column.append(pa.array(values, _TEXT))
        count += len(block)
    return [_combine(pa.chunked_array(column, _TEXT)) for column in blocks]


def _read_csv_rows(data: bytes, separator: str = ",") -> Iterator[list[str]]:
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    return csv.reader(text, delimiter=separator)


def _combine(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _parse_parquet(data: bytes) -> tuple[list[str], list[pa.Array]]:
    table = pq.read_table(io.BytesIO(data))
    return table.column_names, [_convert_to_text(column) for column in table.columns]


def _convert_to_text(column: pa.ChunkedArray) -> pa.Array:
    """Return values as texts, as Python's `str` spells them; nulls become empty texts.

    Values that Arrow spells differently, such as floats and times, are converted one by one.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_spelled_alike = _is_text(column.type) or pa.types.is_integer(column.type)
    if is_spelled_alike:
        return _combine(pc.fill_null(column.cast(_TEXT), ""))
    return _map_values(column, lambda value: "" if value is None else str(value))


def _is_text(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type))


def _map_values(column: pa.ChunkedArray, convert: Callable[[object], str]) -> pa.Array:
    blocks = [
        pa.array(map(convert, column.slice(start, _BLOCK).to_pylist()), _TEXT)
        for start in range(0, len(column), _BLOCK)
    ]
    return _combine(pa.chunked_array(blocks, _TEXT))


def _rename_columns(names: list[str], source: SourceConfig) -> list[str]:
    """Return the names with `uri` and the id column spelled as the config spells them, such as `URI`.

    A column is renamed only if it is the only one with this name in upper or lower case.
    """
    wanted = {name.lower(): name for name in ("uri", source.id_column) if name}
    counts = Counter(name.lower() for name in names)
    return [
        wanted[name.lower()] if name.lower() in wanted and counts[name.lower()] == 1 else name
        for name in names
    ]


def _find_column_problems(columns: list[str], source: SourceConfig) -> list[str]:
    required = ["uri", *([source.id_column] if source.id_column else [])]
    missing = [name for name in required if name not in columns]
    problems = [
        f"source.uri: the manifest has no column {name}{_describe_columns(columns)}" for name in missing
    ]
    problems += [
        f"source.uri: the manifest has the column {name} twice; rename or remove one of them"
        for name in ("uri", "version", *required[1:])
        if columns.count(name) > 1
    ]
    known = ("mask", *CENTER_COLUMNS)
    problems += [
        f"source.uri: rename the manifest column {name} to {name.lower()}, or to a name that is not similar"
        for name in columns
        if name not in known and name.lower() in known and name != source.id_column
    ]
    return problems + _find_center_problems(columns) + _find_clashes(columns, source)


def _describe_columns(columns: list[str]) -> str:
    """Return the rest of a message about a missing column: which columns there are."""
    if any(_LOOKS_LIKE_VALUE.search(name) for name in columns):  # not quoted: it may identify a patient
        return "; its first line looks like a scan. Put a line with the names of the columns before it"
    if not columns:
        return "; it is empty"
    shown = ", ".join(repr(name[:40]) for name in columns[:_MAX_NAMES_SHOWN])
    hidden = len(columns) - _MAX_NAMES_SHOWN
    return f"; its columns are {shown}{f' and {hidden} more' if hidden > 0 else ''}"


def _find_center_problems(columns: list[str]) -> list[str]:
    centers = [name for name in CENTER_COLUMNS if name in columns]
    if len(centers) in (0, len(CENTER_COLUMNS)):
        return []
    return [f"source.uri: the manifest has {', '.join(centers)}, but not all of {CENTER_COLUMNS}"]


def _find_clashes(columns: list[str], source: SourceConfig) -> list[str]:
    # Column names of a Delta table must differ by more than upper and lower case.
    special = ("", "uri", "version", source.id_column)
    extra = Counter(name.lower() for name in columns if name not in special)
    taken = {*SCAN_COLUMNS.names, "layer", *(name for name, count in extra.items() if count > 1)}
    return [
        f"source.uri: rename the manifest column {name}; the scans table has another column of this name"
        for name in sorted(taken & set(extra))
    ]


def _resolve_uris(uri: pa.Array, manifest_uri: str) -> pa.Array:
    """Return full URIs: absolute URIs and empty texts unchanged, others joined to the manifest's folder.

    In a local manifest, `~/` and `~user/` at the start are expanded. Environment variables are not, because
    file names may contain `$`.
    """
    starts_at_home = np.asarray(pc.match_substring_regex(uri, "^~[^/]*/"))
    if starts_at_home.any() and "://" not in manifest_uri:
        expanded = [os.path.expanduser(text) for text in uri.filter(pa.array(starts_at_home)).to_pylist()]
        uri = pc.replace_with_mask(uri, pa.array(starts_at_home), pa.array(expanded, _TEXT))
    is_full = pc.or_(pc.match_substring(uri, "://"), pc.or_(pc.starts_with(uri, "/"), pc.equal(uri, "")))
    if pc.all(is_full).as_py():
        return uri
    folder = posixpath.join(posixpath.dirname(manifest_uri), "")
    return pc.if_else(
        is_full, uri, pc.binary_join_element_wise(pa.scalar(folder, _TEXT), uri, pa.scalar("", _TEXT))
    )
