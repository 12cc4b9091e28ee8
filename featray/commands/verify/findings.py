"""The kinds of problems that an output can have, their descriptions, and their remedies.

`Findings` collects faults while files are read. It returns one `Finding` per kind, table and layer, however
many rows and files have the problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc

from featray.output.dataset import FEATURES, SCANS

MAX_EXAMPLES = 10
"""Number of scans and of files that a finding names. It counts all of them."""
_MAX_PRINTED = 3


class FindingKind(StrEnum):
    """Kinds of problems. The values are stable, because schedulers and users filter by them."""

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
    COUNTS_DIFFER = "books"
    DOUBLED_ROW = "doubled_row"
    MISSING_PATCH = "missing_patch"
    SURPLUS_PATCH = "surplus_patch"
    WRONG_WIDTH = "wrong_width"
    UNEVEN_SHAPE = "uneven_shape"
    NOT_FINITE = "not_finite"
    LEDGER_WITHOUT_FEATURES = "ledger_without_features"
    FEATURES_WITHOUT_LEDGER = "features_without_ledger"
    OTHER_RECIPE = "other_recipe"
    WRONG_PARTITION = "wrong_partition"
    ORPHAN = "orphan"
    FOREIGN_FILE = "foreign_file"
    TABLES_OUT_OF_SYNC = "tables_apart"


DESCRIPTIONS = {
    FindingKind.MISSING_FILE: "the log names a file that the store does not have",
    FindingKind.TRUNCATED_FILE: "the size of a file differs from its size in the log",
    FindingKind.CHANGED_FILE: "the bytes of a file are not the bytes that were written",
    FindingKind.UNREADABLE_FILE: "a file cannot be read as Parquet",
    FindingKind.NO_ACCESS: "the store has a file but refuses to return it",
    FindingKind.WRONG_SCHEMA: "columns are missing, unknown, or of another type than featray writes",
    FindingKind.WRONG_ROW_COUNT: "the number of rows in a file differs from the number in the log",
    FindingKind.WRONG_ID_RANGE: (
        "the first or last scan_id of a file differs from the log, so readers may skip the file"
    ),
    FindingKind.NULL_VALUE: "a value is null in a column that must not contain nulls",
    FindingKind.UNKNOWN_CODE: "a status, reason or warning is not one of the known codes",
    FindingKind.WRONG_STATE: "the reason, layers or number of patches of a scan contradict its status",
    FindingKind.COUNTS_DIFFER: "ok + failed + excluded differs from the number of rows",
    FindingKind.DOUBLED_ROW: "a row occurs more than once",
    FindingKind.MISSING_PATCH: "the features lack patches that the scans table lists",
    FindingKind.SURPLUS_PATCH: "the features contain patches that the scans table does not list",
    FindingKind.WRONG_WIDTH: "the number of values of a feature does not match its shape",
    FindingKind.UNEVEN_SHAPE: "shapes within a layer differ although the input size is fixed",
    FindingKind.NOT_FINITE: "the features contain NaN or infinity",
    FindingKind.LEDGER_WITHOUT_FEATURES: "the scans table lists layers of a scan that has no features",
    FindingKind.FEATURES_WITHOUT_LEDGER: (
        "there are features of a scan or of a layer of a scan that the scans table does not list"
    ),
    FindingKind.OTHER_RECIPE: "the recipe of features differs from the recipe in the scans table",
    FindingKind.WRONG_PARTITION: "a file is in another partition than its scans belong to",
    FindingKind.ORPHAN: (
        "a file of an ended run belongs to no version; programs that read the folder directly see it"
    ),
    FindingKind.FOREIGN_FILE: (
        "a file that no run wrote is among the data; programs that read the folder directly see it"
    ),
    FindingKind.TABLES_OUT_OF_SYNC: "the tables `features` and `scans` are more than one commit apart",
}
"""One sentence per kind."""

_DEFAULT_REMEDY = (
    "`featray verify OUTPUT --forget-damaged` removes these scans, or only their cells of this layer, from "
    "both tables; the next `featray extract CONFIG` extracts them again"
)
_REMEDIES = {
    FindingKind.NO_ACCESS: (
        "check the store (permissions, network, disk) and verify again; if a file is lost for good, delete "
        "it, then use --forget-damaged"
    ),
    FindingKind.ORPHAN: "`featray verify OUTPUT --repair` (or the next run) deletes it",
    FindingKind.FOREIGN_FILE: "move it elsewhere; featray never deletes a file that no run wrote",
    FindingKind.TABLES_OUT_OF_SYNC: (
        "check whether a folder was copied, restored, or changed by another program; restore both tables "
        "from the same moment, or extract into a new output"
    ),
}
"""Remedies of the kinds that `--forget-damaged` does not repair."""
_TABLE_SCHEMA_REMEDY = (
    "another program changed the table; restore the output from a copy, or extract into a new output"
)


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one table and layer.

    Attributes:
        kind: Kind of the problem.
        table: `features`, `scans`, or the folder `runs`.
        layer: Layer of `features` that has the problem; None if it does not concern a single layer.
        scans: Number of affected scans.
        scan_ids: The first of the affected scans, sorted.
        files: Number of affected files.
        paths: Some of the affected files, relative to the output.
        message: Description of the problem, with an example.
        mend: The remedy.
    """

    kind: FindingKind
    table: str
    layer: str | None
    scans: int
    scan_ids: tuple[str, ...]
    files: int
    paths: tuple[str, ...]
    message: str
    mend: str

    def text(self) -> str:
        """Return the finding as text of a few lines."""
        location = f"{self.table}, layer {self.layer}" if self.layer else self.table
        lines = [f"{self.kind} ({location}): {self.message}"]
        for name, count, examples in (
            ("scans", self.scans, self.scan_ids),
            ("files", self.files, self.paths),
        ):
            if count:
                more = ", …" if count > _MAX_PRINTED else ""
                lines.append(f"  {name}: {count} ({', '.join(examples[:_MAX_PRINTED])}{more})")
        return "\n".join([*lines, f"  remedy: {self.mend}"])


@dataclass(frozen=True)
class Fault:
    """A problem in one file, as the functions that read files return it.

    Attributes:
        kind: Kind of the problem.
        ids: Ids of the affected scans; may contain duplicates and nulls.
        detail: An example for the message.
        removes_file: Whether `--forget-damaged` must remove the whole file, because it cannot select the
            affected rows by their scan ids.
    """

    kind: FindingKind
    ids: pa.Array | None = None
    detail: str = ""
    removes_file: bool = False


@dataclass
class _FaultGroup:
    """The collected faults of one kind, table and layer."""

    ids: list[pa.Array] = field(default_factory=list)
    paths: dict[str, None] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True)
class Damage:
    """The scans, cells and files that `--forget-damaged` removes from an output.

    Attributes:
        scan_ids: Scans to remove from both tables; some may be in neither.
        cells: Layer → scans that lose only this layer; some may be in neither table.
        broken: Table → paths of files to remove as a whole.
    """

    scan_ids: list[str]
    cells: dict[str, list[str]]
    broken: dict[str, set[str]]

    def __bool__(self) -> bool:
        """Return whether there is anything to remove."""
        return bool(self.scan_ids or self.cells or self.broken)


class Findings:
    """A collection of faults, added in any order. Not safe for use by several threads at once."""

    def __init__(self) -> None:
        self._groups: dict[tuple[FindingKind, str, str | None], _FaultGroup] = {}
        self._broken: dict[str, set[str]] = {FEATURES: set(), SCANS: set()}

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, fault: Fault, table: str, layer: str | None = None, path: str | None = None) -> None:
        """Add a fault.

        Args:
            fault: The fault.
            table: Table, or the folder `runs`, that has it.
            layer: Layer of `features` that has it, if it concerns a single layer.
            path: Path of the file that has it, relative to the table's folder.
        """
        group = self._groups.setdefault((fault.kind, table, layer), _FaultGroup())
        if fault.ids is not None and len(fault.ids):
            group.ids.append(pc.unique(fault.ids.drop_null()).cast(pa.string()))
        if path is not None:
            group.paths[f"{table}/{path}"] = None
            if fault.removes_file:
                self._broken[table].add(path)
        group.detail = group.detail or fault.detail

    def collect_damage(self) -> Damage:
        """Return what `--forget-damaged` removes: of a scan, only the layers that have a problem."""
        arrays: dict[str | None, list[pa.Array]] = defaultdict(list)
        for (kind, _, layer), group in self._groups.items():
            if kind not in _REMEDIES and group.ids:
                arrays[layer] += group.ids
        ids = {
            layer: pc.unique(pa.chunked_array(parts, pa.string())).to_pylist()
            for layer, parts in arrays.items()
        }
        return Damage(
            scan_ids=ids.get(None, []),
            cells={layer: of_layer for layer, of_layer in ids.items() if layer is not None},
            broken={table: set(paths) for table, paths in self._broken.items() if paths},
        )

    def list_findings(self) -> tuple[Finding, ...]:
        """Return all findings, sorted by kind (in the order of `FindingKind`), table and layer."""
        order = list(FindingKind)
        keys = sorted(self._groups, key=lambda key: (order.index(key[0]), key[1], key[2] or ""))
        return tuple(_make_finding(*key, self._groups[key]) for key in keys)


def _make_finding(kind: FindingKind, table: str, layer: str | None, group: _FaultGroup) -> Finding:
    ids = pc.unique(pa.chunked_array(group.ids, pa.string()))
    lowest = pc.select_k_unstable(ids, MAX_EXAMPLES, sort_keys=[("", "ascending")]) if len(ids) else ()
    is_table_schema = kind is FindingKind.WRONG_SCHEMA and not group.paths
    return Finding(
        kind=kind,
        table=table,
        layer=layer,
        scans=len(ids),
        scan_ids=tuple(ids.take(lowest).to_pylist()) if len(ids) else (),
        files=len(group.paths),
        paths=tuple(_take_examples(group.paths)),
        message=DESCRIPTIONS[kind] + (f" ({group.detail})" if group.detail else ""),
        mend=_TABLE_SCHEMA_REMEDY if is_table_schema else _REMEDIES.get(kind, _DEFAULT_REMEDY),
    )


def _take_examples(paths: Iterable[str]) -> list[str]:
    return [path for path, _ in zip(paths, range(MAX_EXAMPLES), strict=False)]
