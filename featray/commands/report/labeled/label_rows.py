"""Parse a table of labels to texts: CSV with any usual separator, or Parquet.

The messages name columns and line numbers, and never a value, because a value may identify a patient.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.errors import UsageError

SCAN_ID, PATIENT = "scan_id", "patient"

_PATIENT_NAME = re.compile(r"^(patient|subject)s?[\W_]*(id|no|nr|number|key|name|hash)?$", re.I)
_LOOKS_LIKE_VALUE = re.compile(r"[/\\]|^[\d.,;+\s-]+$|\.(nii|gz|dcm|nrrd|mha|mhd|npy|zip)$", re.IGNORECASE)
"""Texts that are values of a row rather than the name of a column."""
_WHERE = "table of labels"
_MAX_SHOWN = 5
_PARQUET_MAGIC = b"PAR1"
_INDEX_PREFIX = "__index_level_"
"""pandas writes the index of a table as columns with this prefix."""


@dataclass(frozen=True)
class LabelRows:
    """The table of labels as texts.

    Attributes:
        header: Names of the columns.
        rows: Values of each row, as many as there are columns; empty if a value is missing.
        lines: Line of the file on which each row ends.
        comma_decimals: Whether `1,5` is a number.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    comma_decimals: bool = False

    @property
    def label_names(self) -> list[str]:
        """Return the names of the columns that may be labels."""
        return _get_label_names(self.header)

    def get_column(self, name: str) -> list[str]:
        """Return the texts of a column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]


def parse_rows(data: bytes) -> LabelRows:
    """Return the rows of a table of labels.

    Args:
        data: Content of the file: Parquet, or text in UTF-8, or in UTF-16 with a byte order mark. Text has
            commas, semicolons or tabs between the values, and the names of the columns on its first line.

    Raises:
        UsageError: The table is empty, damaged, without `scan_id`, without a label, or lists scans twice.
    """
    table = _parse_parquet(data) if data.startswith(_PARQUET_MAGIC) else _parse_text(_decode(data))
    _check_header(table.header)
    _check_ids(table.get_column(SCAN_ID), table.lines)
    return table


def _parse_parquet(data: bytes) -> LabelRows:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"the {_WHERE} is damaged: it is no complete Parquet file") from error
    kept = [place for place, name in enumerate(table.column_names) if not name.startswith(_INDEX_PREFIX)]
    columns = [[_to_text(value) for value in table.column(place).to_pylist()] for place in kept]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return LabelRows([table.column_names[place] for place in kept], rows, list(range(1, len(rows) + 1)))


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return value.isoformat() if isinstance(value, date) else str(value).strip()


def _decode(data: bytes) -> str:
    if not data.strip():
        raise UsageError(f"the {_WHERE} is empty; its first line must name the columns, such as {SCAN_ID}")
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the {_WHERE} is not text in UTF-8; save it as CSV in UTF-8") from error


def _parse_text(text: str) -> LabelRows:
    """Return the header and the rows; lines without any text are skipped."""
    first = next(line for line in text.splitlines() if line.strip())
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if any(value.strip() for value in row):
                rows.append([value.strip() for value in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UsageError(
            f"line {reader.line_num} of the {_WHERE} cannot be read; check its quotation marks"
        ) from error
    header = rows[0]
    wrong = [line for row, line in zip(rows, lines, strict=True) if len(row) != len(header)]
    if wrong:
        raise UsageError(f"the {_WHERE} has {len(header)} columns, but not on {_format_lines(wrong)}")
    return LabelRows(header, rows[1:], lines[1:], separator != ",")


def _check_header(header: list[str]) -> None:
    """Raise UsageError if the columns cannot be used."""
    if SCAN_ID not in header:
        raise UsageError(f"the {_WHERE} has no column {SCAN_ID}{_describe_columns(header)}")
    twice = [name for name, number in Counter(header).items() if name and number > 1]
    if twice:
        raise UsageError(f"the {_WHERE} has {len(twice)} names that more than one column uses")
    similar = [name for name in header if _PATIENT_NAME.match(name)]
    if PATIENT not in header and similar:
        raise UsageError(
            f"the {_WHERE} has a column {similar[0][:40]!r} and no column {PATIENT!r}. If it says to which "
            f"patient a scan belongs, rename it to {PATIENT!r}; otherwise give it another name"
        )
    if not _get_label_names(header):
        raise UsageError(f"the {_WHERE} has no column besides {SCAN_ID} and {PATIENT}; add one per label")


def _check_ids(ids: list[str], lines: list[int]) -> None:
    """Raise UsageError if rows have no id, or the id of an earlier row."""
    if not ids:
        raise UsageError(f"the {_WHERE} has no rows below the names of the columns")
    empty = [line for scan_id, line in zip(ids, lines, strict=True) if not scan_id]
    first: dict[str, int] = {}
    twice = [
        line for scan_id, line in zip(ids, lines, strict=True) if first.setdefault(scan_id, line) != line
    ]
    problems = []
    if empty:
        problems.append(f"{len(empty)} rows have no {SCAN_ID}: {_format_lines(empty)}")
    if twice and not empty:
        problems.append(f"{len(twice)} rows repeat the {SCAN_ID} of an earlier row: {_format_lines(twice)}")
    if problems:
        raise UsageError(problems, _WHERE)


def _describe_columns(header: list[str]) -> str:
    """Return the rest of a message about a missing column. Names that may be values are not quoted."""
    if any(_LOOKS_LIKE_VALUE.search(name) for name in header):
        return "; its first line looks like a row. Put a line with the names of the columns before it"
    shown = ", ".join(repr(name[:40]) for name in header[:_MAX_SHOWN])
    hidden = len(header) - _MAX_SHOWN
    return f"; its columns are {shown}{f' and {hidden} more' if hidden > 0 else ''}"


def _get_label_names(header: list[str]) -> list[str]:
    return [name for name in header if name not in (SCAN_ID, PATIENT) and name]


def _format_lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:_MAX_SHOWN]))
    hidden = len(lines) - _MAX_SHOWN
    return f"line{'s' if len(lines) > 1 else ''} {shown}{f' and {hidden} more' if hidden > 0 else ''}"
