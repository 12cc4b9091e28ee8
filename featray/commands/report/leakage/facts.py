"""Collect the facts of the acquisition from the table `scans`: geometry, scanner, kernel and others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa

from featray.schema import SCAN_COLUMNS

SCANNER_FACTS = {
    "scanner": "scanner",
    "scannermodel": "scanner",
    "manufacturermodelname": "scanner",
    "manufacturer": "manufacturer",
    "vendor": "manufacturer",
    "site": "site",
    "center": "center",
    "centre": "center",
    "hospital": "hospital",
    "institution": "institution",
    "institutionname": "institution",
    "station": "station",
    "stationname": "station",
    "device": "device",
    "deviceserialnumber": "device",
    "kernel": "kernel",
    "convolutionkernel": "kernel",
    "reconstructionkernel": "kernel",
    "filter": "filter",
    "filtertype": "filter",
    "kvp": "kVp",
    "tubevoltage": "kVp",
    "tubecurrent": "tube current",
    "xraytubecurrent": "tube current",
    "exposure": "exposure",
    "exposuretime": "exposure time",
    "slicethickness": "slice thickness",
    "reconstructiondiameter": "reconstruction diameter",
    "gantrydetectortilt": "gantry tilt",
    "spiralpitchfactor": "pitch",
    "patientposition": "patient position",
    "protocol": "protocol",
    "protocolname": "protocol",
    "softwareversions": "software",
}
"""Name of a manifest column or a DICOM keyword, in lower case without separators → name of the fact.

The facts are in the order in which they stand for the scanner among neighbors.
"""

_Values = list[Any]


def collect_geometry(scans: pa.Table) -> dict[str, _Values]:
    """Return the facts in every header: fact → one value per scan, None if it is not known."""
    facts = {}
    for title, column, convert in _GEOMETRY:
        if column in scans.column_names:
            values = scans[column].to_pylist()
            facts[title] = [None if value is None else convert(value) for value in values]
    return facts


def collect_scanner_facts(scans: pa.Table, label_names: Collection[str] = ()) -> dict[str, _Values]:
    """Return the facts about scanner and reconstruction from manifest columns and `privacy.dicom_tags`.

    Args:
        scans: Rows of the table `scans`.
        label_names: Names of the labels; a column of the same name is not a fact.
    """
    labels = {_simplify(name) for name in label_names}
    facts: dict[str, _Values] = {}
    columns = {_simplify(name): name for name in scans.column_names if name not in SCAN_COLUMNS.names}
    for key, title in SCANNER_FACTS.items():
        if key in columns and not labels & {key, _simplify(title)}:
            facts.setdefault(title, scans[columns[key]].to_pylist())
    return facts


def _simplify(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _get_axis(axis: int) -> Callable[[Sequence[float]], float | None]:
    """Return a function that gives the entry of one axis (z, y, x) with four digits."""
    return lambda values: float(f"{values[axis]:.4g}") if len(values) == 3 else None


_GEOMETRY: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("slice spacing", "spacing", _get_axis(0)),
    ("pixel spacing", "spacing", _get_axis(1)),
    ("slice count", "shape", lambda shape: shape[0] if len(shape) == 3 else None),
    ("crop size", "shape", lambda shape: shape[1] * shape[2] if len(shape) == 3 else None),
    ("orientation", "orientation", str),
    ("format", "format", str),
)
"""Fact, column of `scans`, and the function that gives the value."""
