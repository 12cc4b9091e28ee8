"""What can be wrong with an output, in words, and what mends it.

`Findings` collects while everything is read; it ends as one `Finding` per kind, table and layer, however
many rows and files are concerned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc

from featray.output.dataset import FEATURES, SCANS

EXAMPLES = 10
"""Scans and files that a finding names; it counts them all."""
_SHOWN = 3


class Kind(StrEnum):
    """What is wrong. Stable: schedulers and people filter by these."""

    MISSING_FILE = "missing_file"
    TRUNCATED_FILE = "truncated_file"
    CHANGED_FILE = "changed_file"
    UNREADABLE_FILE = "unreadable_file"
    NO_ACCESS = "no_access"
    WRONG_SCHEMA = "wrong_schema"
    WRONG_ROW_COUNT = "wrong_row_count"
    WRONG_ID_RANGE = "wrong_id_range"
    NULL_VALUE = "null_value"
    UNKNOWN_CODE = "unknown_code"
    WRONG_STATE = "wrong_state"
    BOOKS = "books"
    DOUBLED_ROW = "doubled_row"
    MISSING_PATCH = "missing_patch"
    SURPLUS_PATCH = "surplus_patch"
    WRONG_WIDTH = "wrong_width"
    UNEVEN_SHAPE = "uneven_shape"
    NOT_FINITE = "not_finite"
    LEDGER_WITHOUT_FEATURES = "ledger_without_features"
    FEATURES_WITHOUT_LEDGER = "features_without_ledger"
    OTHER_RECIPE = "other_recipe"
    OTHER_RUN = "other_run"
    WRONG_PARTITION = "wrong_partition"
    ORPHAN = "orphan"
    FOREIGN_FILE = "foreign_file"
    TABLES_APART = "tables_apart"


MEANING = {
    Kind.MISSING_FILE: "the log names a file that the store does not have",
    Kind.TRUNCATED_FILE: "a file has another size than the log says",
    Kind.CHANGED_FILE: "a file's bytes are not those that were written",
    Kind.UNREADABLE_FILE: "a file cannot be read as Parquet",
    Kind.NO_ACCESS: "the store has a file but does not give it",
    Kind.WRONG_SCHEMA: "columns or their types are not the contract's",
    Kind.WRONG_ROW_COUNT: "a file has another number of rows than the log says",
    Kind.WRONG_ID_RANGE: "a file's first or last scan_id is not what the log says, so readers may skip it",
    Kind.NULL_VALUE: "a value is null where none may be",
    Kind.UNKNOWN_CODE: "status, reason or a warning is none of the known codes",
    Kind.WRONG_STATE: "reason and patches of a row do not fit its status",
    Kind.BOOKS: "ok + failed + excluded is not the number of rows",
    Kind.DOUBLED_ROW: "a row is there twice",
    Kind.MISSING_PATCH: "patches that the ledger promises are not there",
    Kind.SURPLUS_PATCH: "there are patches that the ledger does not promise",
    Kind.WRONG_WIDTH: "a feature has not as many values as its shape says",
    Kind.UNEVEN_SHAPE: "shapes differ within a layer although the input size is fixed",
    Kind.NOT_FINITE: "features hold NaN or infinity",
    Kind.LEDGER_WITHOUT_FEATURES: "the ledger says ok, but there are no features",
    Kind.FEATURES_WITHOUT_LEDGER: "there are features of a scan whose ledger row is missing, or not ok",
    Kind.OTHER_RECIPE: "features are of another recipe than the ledger says",
    Kind.OTHER_RUN: "features are of another run than the ledger says",
    Kind.WRONG_PARTITION: "a file lies in another partition than its scans belong to",
    Kind.ORPHAN: "a file of an ended run belongs to no version; plain readers of the folder see it",
    Kind.FOREIGN_FILE: "a file that no run wrote lies among the data; plain readers of the folder see it",
    Kind.TABLES_APART: "`features` and `scans` are more than one commit apart",
}
"""One sentence per kind."""

_FORGET = (
    "`featray verify OUTPUT --forget-damaged` takes these scans out of both tables; the next "
    "`featray extract CONFIG` makes them again"
)
_MEND = {
    Kind.NO_ACCESS: (
        "look at the store (permissions, network, disk) and verify again; if a file is lost for good, delete "
        "it, then use --forget-damaged"
    ),
    Kind.ORPHAN: "`featray verify OUTPUT --repair` (or the next run) deletes it",
    Kind.FOREIGN_FILE: "move it elsewhere yourself; featray never deletes what no run wrote",
    Kind.TABLES_APART: (
        "was one of the folders copied, restored or changed by another program? Bring back both from one "
        "moment, or extract into a new output"
    ),
}
_MEND_TABLE = "another program changed the table; bring the output back from a copy, or make a new one"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in one table and layer.

    Attributes:
        kind: What.
        table: `features`, `scans`, or the folder `runs`.
        layer: Of `features`, where it is one layer's; else None.
        scans: Number of scans concerned.
        scan_ids: Some of them, sorted.
        files: Number of files concerned.
        paths: Some of them, below the output.
        message: What is wrong, with an example.
        mend: What to do.
    """

    kind: Kind
    table: str
    layer: str | None
    scans: int
    scan_ids: tuple[str, ...]
    files: int
    paths: tuple[str, ...]
    message: str
    mend: str

    def text(self) -> str:
        """Return the finding for a person, over a few lines."""
        where = f"{self.table}, layer {self.layer}" if self.layer else self.table
        lines = [f"{self.kind} ({where}): {self.message}"]
        for name, count, examples in (
            ("scans", self.scans, self.scan_ids),
            ("files", self.files, self.paths),
        ):
            if count:
                more = ", …" if count > _SHOWN else ""
                lines.append(f"  {name}: {count} ({', '.join(examples[:_SHOWN])}{more})")
        return "\n".join([*lines, f"  mend: {self.mend}"])


@dataclass(frozen=True)
class Fault:
    """Something wrong in one file, as a worker hands it on to `Findings`.

    Attributes:
        kind: What.
        ids: The scans concerned; may repeat and hold nulls.
        detail: An example in words.
        broken: Whether the file must leave the table whole.
    """

    kind: Kind
    ids: pa.Array | None = None
    detail: str = ""
    broken: bool = False


@dataclass
class _Found:
    """What is collected of one finding."""

    ids: list[pa.Array] = field(default_factory=list)
    paths: dict[str, None] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True)
class Damage:
    """What `--forget-damaged` takes out.

    Attributes:
        scan_ids: Scans, known to the ledger or not.
        broken: By table, files that leave it whole.
    """

    scan_ids: list[str]
    broken: dict[str, set[str]]


class Findings:
    """Collects what is found, in any order; not for several threads at once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, str, str | None], _Found] = {}
        self._broken: dict[str, set[str]] = {FEATURES: set(), SCANS: set()}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, fault: Fault, table: str, layer: str | None = None, path: str | None = None) -> None:
        """Note something wrong in a table, a layer of `features`, a file below the table's folder."""
        found = self._found.setdefault((fault.kind, table, layer), _Found())
        if fault.ids is not None and len(fault.ids):
            found.ids.append(pc.unique(fault.ids.drop_null()).cast(pa.string()))
        if path is not None:
            found.paths[f"{table}/{path}"] = None
            if fault.broken:
                self._broken[table].add(path)
        found.detail = found.detail or fault.detail

    def damage(self) -> Damage:
        """Return what `--forget-damaged` takes out."""
        arrays = [
            ids for (kind, _, _), found in self._found.items() if kind not in _MEND for ids in found.ids
        ]
        scan_ids = pc.unique(pa.chunked_array(arrays, pa.string())).to_pylist()
        return Damage(scan_ids, {table: set(paths) for table, paths in self._broken.items() if paths})

    def listed(self) -> tuple[Finding, ...]:
        """Return the findings, in the order of `Kind`, by table and layer."""
        order = list(Kind)
        keys = sorted(self._found, key=lambda key: (order.index(key[0]), key[1], key[2] or ""))
        return tuple(_finding(*key, self._found[key]) for key in keys)


def _finding(kind: Kind, table: str, layer: str | None, found: _Found) -> Finding:
    ids = pc.unique(pa.chunked_array(found.ids, pa.string()))
    lowest = pc.select_k_unstable(ids, EXAMPLES, sort_keys=[("", "ascending")]) if len(ids) else ()
    is_table = kind is Kind.WRONG_SCHEMA and not found.paths
    return Finding(
        kind=kind,
        table=table,
        layer=layer,
        scans=len(ids),
        scan_ids=tuple(ids.take(lowest).to_pylist()) if len(ids) else (),
        files=len(found.paths),
        paths=tuple(_first(found.paths)),
        message=MEANING[kind] + (f" ({found.detail})" if found.detail else ""),
        mend=_MEND_TABLE if is_table else _MEND.get(kind, _FORGET),
    )


def _first(paths: Iterable[str]) -> list[str]:
    return [path for path, _ in zip(paths, range(EXAMPLES), strict=False)]
