"""A manifest, CSV or Parquet, to typed rows: which scans, what is known of them, which part is asked for.

In: the file's bytes and how the config reads it. Out: one `ManifestRow` per row. Opens nothing that the
rows name.
"""

from __future__ import annotations

import csv
import io
import math
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.config import SourceConfig
from featray.errors import ConfigError
from featray.schema import SCAN_COLUMNS

SUFFIXES = (".csv", ".parquet")
CENTER = ("center_x", "center_y", "center_z")


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


def read_manifest(data: bytes, source: SourceConfig) -> list[ManifestRow]:
    """Return the rows of the manifest at `source.uri`.

    Raises:
        ConfigError: It is neither CSV nor Parquet, has no rows, or its columns cannot be used.
    """
    try:
        columns, rows = _parse_csv(data) if _is_csv(source.uri) else _parse_parquet(data)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        kind = type(error).__name__
        raise ConfigError(f"source.uri: the manifest is neither UTF-8 CSV nor Parquet ({kind})") from None
    problems = _problems_of_columns(columns, source)
    if not rows and not problems:
        problems = ["source.uri: the manifest has no rows"]
    if problems:
        raise ConfigError(problems)
    texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    return [_row(row, source) for row in texts]


def _row(row: dict[str, str], source: SourceConfig) -> ManifestRow:
    problem = "" if row["uri"] else "the manifest's row names no uri"
    center: tuple[float, ...] | None = None
    try:
        center = _center_lps(row, source)
    except ValueError:
        problem = problem or f"the manifest's {', '.join(CENTER)} must be three numbers (mm), or all empty"
    return ManifestRow(
        scan_id=row[source.id_column] if source.id_column else row["uri"],
        uri=_resolved(row["uri"], source.uri),
        version=row.get("version", ""),
        mask=_resolved(row.get("mask", ""), source.uri),
        center_lps=center,
        columns={key: value for key, value in row.items() if key not in ("uri", "version", source.id_column)},
        problem=problem,
    )


def _center_lps(row: dict[str, str], source: SourceConfig) -> tuple[float, ...] | None:
    """Return the point in LPS; RAS has x and y the other way round."""
    texts = [row.get(name, "").strip() for name in CENTER]
    if not any(texts):
        return None
    x, y, z = map(float, texts)
    if not all(map(math.isfinite, (x, y, z))):
        raise ValueError
    return (-x, -y, z) if source.center_frame == "RAS" else (x, y, z)


def _is_csv(uri: str) -> bool:
    return uri.lower().endswith(".csv")


def _parse_csv(data: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), restkey="")
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def _parse_parquet(data: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    table = pq.read_table(io.BytesIO(data))
    return table.column_names, table.to_pylist()


def _problems_of_columns(columns: list[str], source: SourceConfig) -> list[str]:
    needed = ["uri", *([source.id_column] if source.id_column else [])]
    problems = [f"source.uri: the manifest has no column {name}" for name in needed if name not in columns]
    centers = [name for name in CENTER if name in columns]
    if centers and len(centers) < len(CENTER):
        problems.append(f"source.uri: the manifest has {', '.join(centers)}, but not all of {CENTER}")
    # Column names of a Delta table differ by more than case.
    carried = Counter(name.lower() for name in columns if name not in ("uri", "version", *needed))
    taken = {*SCAN_COLUMNS.names, "layer", *(name for name, count in carried.items() if count > 1)}
    clashes = sorted(taken & set(carried))
    return problems + [
        f"source.uri: rename the manifest column {name}; scans has one of that name" for name in clashes
    ]


def _resolved(uri: str, manifest: str) -> str:
    """Return a manifest's uri in full: absolute as it is, else relative to the manifest."""
    if not uri or "://" in uri or uri.startswith("/"):
        return uri
    return posixpath.join(posixpath.dirname(manifest), uri)
