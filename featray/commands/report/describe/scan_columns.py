"""Choose the properties of the scans by which the maps of the page are colored.

Header values of the table `scans` are used as they are. Manifest columns and DICOM tags are used if they hold
classes or numbers by the rules for labels, and if their names do not say that they identify a person or a
study.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featray.commands.report.label_free.health import Positions
from featray.commands.report.labeled.labels import Label, decide_column
from featray.commands.report.page.model import Cell, Column
from featray.schema import SCAN_COLUMNS

MAX_COLUMNS = 24
"""Columns of the page. Each of 5,000 scans needs some 40 kB."""
_PERSON = {"patient", "patients", "subject", "subjects", "participant", "participants", "person", "donor"}
_ABOUT_A_PERSON = {"sex", "gender", "age", "weight", "height", "size", "bmi", "position", "group"}
"""Words that may follow a word for a person, as in PatientSex."""
_NEVER = {"uid", "uids", "mrn", "accession", "physician", "physicians", "operator", "operators"}
_NEVER |= {"birth", "birthday", "dob", "date", "datetime"}
"""Words of names for persons, ids and dates. Dates that are not named so are found by their values."""
_IDENTIFIER = re.compile(
    r"(patient|subject|participant|study|exam|examination|accession|case)s?"
    r"(id|uid|no|nr|number|key|name|hash|code)"
)


@dataclass(frozen=True)
class ScanColumns:
    """Columns of the scans that the page shows.

    Attributes:
        columns: The columns.
        left_out: Number of usable columns above `MAX_COLUMNS`.
    """

    columns: tuple[Column, ...]
    left_out: int


def choose_columns(scans: pa.Table, labels: Sequence[Column], rows: Positions) -> ScanColumns:
    """Return the columns of some scans: labels, then header values, then manifest columns and DICOM tags.

    Args:
        scans: Rows of the table `scans`.
        labels: One value per row of `scans` each.
        rows: Rows of the scans that the page shows.
    """
    usable = {column.name: column for column in labels}
    for column in (*_make_header_columns(scans), *_make_further_columns(scans)):
        usable.setdefault(column.name, column)
    shown = [
        Column(column.name, tuple(column.values[row] for row in rows.tolist()))
        for column in list(usable.values())[:MAX_COLUMNS]
    ]
    return ScanColumns(tuple(shown), max(0, len(usable) - MAX_COLUMNS))


def _make_header_columns(scans: pa.Table) -> list[Column]:
    """Return the header values that differ between scans."""
    columns = [
        Column(title, tuple(None if value is None else convert(value) for value in scans[name].to_pylist()))
        for title, name, convert in _HEADER
        if name in scans.column_names
    ]
    return [column for column in columns if len({value for value in column.values if value is not None}) > 1]


def _get_axis(axis: int) -> Callable[[Sequence[float]], Cell]:
    """Return a function that gives the entry of one axis (z, y, x) with four digits."""
    return lambda values: float(f"{values[axis]:.4g}") if len(values) == 3 else None


def _count_slices(shape: Sequence[int]) -> Cell:
    return int(shape[0]) if len(shape) == 3 else None


def _describe_matrix(shape: Sequence[int]) -> Cell:
    return f"{shape[1]} × {shape[2]}" if len(shape) == 3 else None


def _join_codes(codes: Sequence[str]) -> Cell:
    return ", ".join(sorted(codes)) or "none"


_HEADER: tuple[tuple[str, str, Callable[[Any], Cell]], ...] = (
    ("slice spacing (mm)", "spacing", _get_axis(0)),
    ("pixel spacing (mm)", "spacing", _get_axis(1)),
    ("slice count", "shape", _count_slices),
    ("matrix", "shape", _describe_matrix),
    ("orientation", "orientation", str),
    ("format", "format", str),
    ("median HU", "hu_p50", lambda value: float(f"{value:.5g}")),
    ("warnings", "warnings", _join_codes),
    ("patches", "patches", int),
)
"""Title, column of `scans`, and the function that gives the value to show."""


def _make_further_columns(scans: pa.Table) -> list[Column]:
    """Return the manifest columns and DICOM tags that hold classes or numbers."""
    columns = []
    for name in scans.column_names:
        if name in SCAN_COLUMNS.names or is_identity(name) or not pa.types.is_string(scans[name].type):
            continue
        decided = decide_column(name, ["" if text is None else text for text in scans[name].to_pylist()])
        if isinstance(decided, Label):
            columns.append(make_label_column(decided))
    return columns


def make_label_column(label: Label) -> Column:
    """Return a label as a column: names of classes, or numbers."""
    known = np.where(label.known, label.values, 0.0)
    if label.kind == "classes":
        values: list[Cell] = [label.classes[code] for code in known.astype(np.intp)]
    else:
        values = known.tolist()
    is_known = label.known.tolist()
    return Column(
        label.name, tuple(value if has else None for value, has in zip(values, is_known, strict=True))
    )


def is_identity(name: str) -> bool:
    """Return whether the name of a column says that it identifies a person or a study, or is a date."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    words = re.findall(r"[a-z]+", separated.lower())
    others = set(words) - _PERSON
    if len(others) < len(set(words)):
        return not others or not others <= _ABOUT_A_PERSON
    return words == ["id"] or bool(others & _NEVER) or bool(_IDENTIFIER.search("".join(words)))
