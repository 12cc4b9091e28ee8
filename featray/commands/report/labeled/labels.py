"""Read a table of labels, and decide for each column whether it holds classes or numbers.

The table is text with separators (comma, semicolon or tab) and a first line with the names of the columns:
`scan_id`, optionally `patient`, and one column per label. Rules for a column, in this order:

1. An empty text, NA, N/A, NaN, null, <NA> and a single period are missing values; `none` is a class.
2. A column without values, or with one value for all scans, is left out.
3. A column in which at least 90 % of the values are dates is left out.
4. If all values are numbers: whole numbers that differ between nearly all scans, and that count through the
   scans or belong to a column named like an id, are left out. Two different values, or at most five different
   whole numbers, are classes. All others are numbers.
5. If not all values are numbers: texts that differ between nearly all scans are ids and are left out, and so
   is a column with more than 20 different texts. All others are classes. Case does not matter.

The messages name columns and line numbers, and never a value, because a value may identify a patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.labeled.label_rows import PATIENT, SCAN_ID, LabelRows, parse_rows
from featray.errors import UsageError

MAX_CLASSES = 20
"""Largest number of different texts that are classes."""
MAX_WHOLE_CLASSES = 5
"""Largest number of different whole numbers that are classes, such as grades."""
MISSING = frozenset({"", "na", "n/a", "nan", "null", "<na>", "."})
"""Texts of a missing value, in lower case."""

_DATE_SHARE = 0.9
_DIFFERENT_SHARE = 0.9
"""Share of different values from which a column counts as an id."""
_MIN_RUNNING_NUMBERS = 20
_ID_NAME = re.compile(r"(^|[\W_])(id|uid|mrn|accession|key)s?$|^(id|uid|mrn|accession)([\W_]|$)", re.I)
_DATE = re.compile(r"^(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))([T ].*)?$")
_COMPACT_DATE = re.compile(r"^(19|20)\d{6}$")
_DECIMAL_COMMA = re.compile(r"^[+-]?\d*,\d+$")


@dataclass(frozen=True)
class Label:
    """One label of the scans.

    Attributes:
        name: Name of the column.
        kind: `classes` or `number`.
        values: float64, one per scan: the number, or the position of the class in `classes`. NaN if the
            value is missing.
        classes: Names of the classes in a fixed order; empty for numbers.
    """

    name: str
    kind: Literal["classes", "number"]
    values: NDArray[np.float64]
    classes: tuple[str, ...] = ()

    @property
    def known(self) -> NDArray[np.bool_]:
        """Return which scans have a value."""
        return ~np.isnan(self.values)


@dataclass(frozen=True)
class LeftOut:
    """A column that is not used as a label, and the reason in words."""

    name: str
    reason: str


@dataclass(frozen=True)
class LabelTable:
    """The labels of the scans of an output.

    Attributes:
        labels: Usable labels, in the order of the columns.
        left_out: Columns that are not used.
        patients: Number of the patient of each scan. Scans without a patient have a number of their own.
        has_patients: Whether the table has a column `patient`. Otherwise each scan counts as one patient.
        rows: Number of rows in the table.
        unknown_rows: Number of rows whose scan_id is not in the output.
        scans_without_row: Number of scans of the output without a row.
        rows_without_patient: Number of rows of known scans without a patient in a table that has the
            column. Their labels are not used, because these scans cannot be kept together with others
            of the patient.
    """

    labels: tuple[Label, ...]
    left_out: tuple[LeftOut, ...]
    patients: NDArray[np.intp]
    has_patients: bool
    rows: int
    unknown_rows: int
    scans_without_row: int
    rows_without_patient: int


def parse_labels(data: bytes, scan_ids: Sequence[str]) -> LabelTable:
    """Return the labels of scans from the bytes of a table.

    Args:
        data: Content of the file; see `parse_rows`.
        scan_ids: Ids of the scans of the output. All arrays of the result have this order.

    Raises:
        UsageError: The table is empty, damaged, without `scan_id`, without known scans, or lists scans twice.
    """
    table = parse_rows(data)
    ids = table.get_column(SCAN_ID)
    row_of = {scan_id: number for number, scan_id in enumerate(ids)}
    places = [row_of.get(scan_id, -1) for scan_id in scan_ids]
    found = sum(place >= 0 for place in places)
    if not found:
        raise UsageError(
            f"none of the {len(ids)} scan_id values of the table of labels is in the output; "
            "the output's ids are in the column scan_id of its scans table"
        )
    patient_texts = _get_patients(table, places)
    usable = [text is not None for text in patient_texts]
    columns = [_decide_aligned(table, name, places, usable) for name in table.label_names]
    return LabelTable(
        labels=tuple(column for column in columns if isinstance(column, Label)),
        left_out=tuple(column for column in columns if isinstance(column, LeftOut)),
        patients=_number_patients(patient_texts),
        has_patients=PATIENT in table.header,
        rows=len(ids),
        unknown_rows=len(ids) - found,
        scans_without_row=len(scan_ids) - found,
        rows_without_patient=found - sum(usable[i] for i, place in enumerate(places) if place >= 0),
    )


def decide_column(name: str, texts: Sequence[str], *, comma_decimals: bool = False) -> Label | LeftOut:
    """Return the label that a column of texts holds, or the reason why the column is not a label.

    Args:
        name: Name of the column.
        texts: One text per scan; missing values as in `MISSING`.
        comma_decimals: Whether `1,5` is a number.
    """
    clean = [text.strip() for text in texts]
    present = [text for text in clean if not _is_missing(text)]
    different = {text.casefold() for text in present}
    if not present:
        return LeftOut(name, "it has no value for any scan of the output")
    if len(different) == 1:
        return LeftOut(name, f"it has the same value for all {len(present)} scans that have one")
    if sum(map(_is_date, present)) >= _DATE_SHARE * len(present):
        return LeftOut(name, "it holds dates")
    numbers = [parse_number(text, comma_decimals=comma_decimals) for text in clean]
    if all(number is not None for number, text in zip(numbers, clean, strict=True) if not _is_missing(text)):
        values = np.array([math.nan if number is None else number for number in numbers], np.float64)
        return _decide_numbers(name, values)
    return _decide_texts(name, clean, sum(number is not None for number in numbers))


def count_patients(patients: NDArray[np.intp], known: NDArray[np.bool_]) -> int:
    """Return the number of patients of which at least one scan is known."""
    return len(np.unique(patients[known]))


def count_class_patients(label: Label, patients: NDArray[np.intp]) -> tuple[int, ...]:
    """Return for each class the number of patients with at least one scan of the class."""
    return tuple(count_patients(patients, label.values == code) for code in range(len(label.classes)))


def parse_number(text: str, *, comma_decimals: bool = False) -> float | None:
    """Return a finite number, or None; `comma_decimals` says whether `1,5` is a number."""
    if comma_decimals and _DECIMAL_COMMA.match(text):
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _get_patients(table: LabelRows, places: list[int]) -> list[str | None]:
    """Return the patient of each scan, or the scan's number without a patient column; None if not known."""
    if PATIENT not in table.header:
        return [str(number) for number in range(len(places))]
    texts = table.get_column(PATIENT)
    return [None if place < 0 or _is_missing(texts[place]) else texts[place] for place in places]


def _number_patients(texts: list[str | None]) -> NDArray[np.intp]:
    """Return numbers from 0; scans without a patient get a number of their own."""
    numbers: dict[tuple[str, int], int] = {}
    keys = [("", place) if text is None else (text, -1) for place, text in enumerate(texts)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.intp)


def _decide_aligned(table: LabelRows, name: str, places: list[int], usable: list[bool]) -> Label | LeftOut:
    """Return the decision on a column, with one value per scan of the output."""
    texts = table.get_column(name)
    aligned = [texts[place] if place >= 0 and use else "" for place, use in zip(places, usable, strict=True)]
    return decide_column(name, aligned, comma_decimals=table.comma_decimals)


def _decide_numbers(name: str, values: NDArray[np.float64]) -> Label | LeftOut:
    """Return the decision on a column in which all values are numbers."""
    present = values[~np.isnan(values)]
    different = np.unique(present)
    whole = bool(np.all(present == np.round(present)))
    if whole and _is_running_number(name, present, different):
        return LeftOut(name, "it holds a different whole number for nearly every scan, like an id")
    if len(different) == 2 or (whole and len(different) <= MAX_WHOLE_CLASSES):
        codes = np.where(np.isnan(values), math.nan, np.searchsorted(different, values))
        return Label(name, "classes", codes, tuple(f"{value:g}" for value in different))
    return Label(name, "number", values)


def _is_running_number(name: str, present: NDArray[np.float64], different: NDArray[np.float64]) -> bool:
    if len(present) < _MIN_RUNNING_NUMBERS or len(different) < _DIFFERENT_SHARE * len(present):
        return False
    span = different[-1] - different[0]
    return bool(_ID_NAME.search(name)) or bool(span < 1.2 * len(present))


def _decide_texts(name: str, texts: list[str], numbers: int) -> Label | LeftOut:
    """Return the decision on a column in which `numbers` of the texts, but not all, are numbers."""
    present = [text for text in texts if not _is_missing(text)]
    names: dict[str, str] = {}
    for text in present:
        names.setdefault(text.casefold(), text)
    if numbers > len(present) / 2 and len(names) > MAX_CLASSES:
        others = len(present) - numbers
        return LeftOut(name, f"it holds {numbers} numbers and {others} values that are not numbers")
    if len(names) > max(2, _DIFFERENT_SHARE * len(present)):
        return LeftOut(name, "it holds a different text for nearly every scan, like an id")
    if len(names) > MAX_CLASSES:
        return LeftOut(name, f"it holds {len(names)} different texts; at most {MAX_CLASSES} are classes")
    codes = {key: code for code, key in enumerate(sorted(names))}
    values = [math.nan if _is_missing(text) else codes[text.casefold()] for text in texts]
    return Label(name, "classes", np.array(values, np.float64), tuple(names[key] for key in codes))


def _is_missing(text: str) -> bool:
    return text.casefold() in MISSING


def _is_date(text: str) -> bool:
    if not _COMPACT_DATE.match(text):
        return bool(_DATE.match(text))
    try:
        datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    return True
