"""Verify an output: read the scans table, then the features layer by layer, then the listing of its files."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from featray.commands.verify.data_file import find_schema_problems, map_files
from featray.commands.verify.expected_cells import ExpectedCells, make_expected_cells
from featray.commands.verify.findings import Fault, Finding, FindingKind, Findings
from featray.commands.verify.orphans import report_unreferenced_files
from featray.commands.verify.read_features import read_features_file
from featray.commands.verify.read_scans import ScansTable, join_files, read_scans_file
from featray.commands.verify.reconcile import BrokenFiles, LayerReconciliation, Reconciliation
from featray.commands.verify.run_files import read_recipe_facts
from featray.errors import ExitCode, FeatrayError, OutputBusyError, StorageError, UsageError
from featray.job import lock_output
from featray.output.carry_over import find_earlier_scans
from featray.output.dataset import FEATURES, SCANS, Dataset, Snapshot
from featray.output.ledger import list_layers
from featray.output.query import Output, open_output
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, DataFile
from featray.stages.commit import Committer
from featray.terminal.progress import Progress

MAX_ATTEMPTS = 5
"""Number of snapshots to try if runs delete superseded files before they are read."""
_PENDING_COMMIT_NOTE = (
    "the last commit was interrupted between the two tables; nothing is lost, and the next run (or --repair) "
    "finishes it"
)


@dataclass(frozen=True)
class Verification:
    """The result of reading an output completely.

    Attributes:
        version: Version of `features` that was read; -1 if the tables are out of sync and nothing was read.
        findings: The problems; empty if none were found.
        notes: Facts that are worth knowing but are not problems.
        mended: Changes that `--repair` or `--forget-damaged` made before the output was read (again).
        scans: Number of rows of the scans table by status.
        rows: Number of readable rows of `features` by layer.
        files: Number of files read, of both tables.
        size_bytes: Total size of these files.
        seconds: Wall time.
        exit_code: 0, or 3 if there are findings.
    """

    version: int = -1
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    scans: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    files: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    exit_code: int = 0

    def text(self) -> str:
        """Return the result as text."""
        scans = ", ".join(f"{count} {status}" for status, count in self.scans.items())
        lines = [
            *self.mended,
            *(finding.text() for finding in self.findings),
            *(f"note: {note}" for note in self.notes),
            f"version {self.version}: {scans}; {sum(self.rows.values())} rows of {len(self.rows)} layers",
            f"read {self.files} files, {self.size_bytes / 1e6:.2f} MB in {self.seconds:.1f} s",
            f"findings: {len(self.findings)}" if self.findings else "everything is in order",
        ]
        return "\n".join(lines)


def verify(  # noqa: PLR0913  # public as featray.verify
    output: Output,
    *,
    repair: bool = False,
    forget_damaged: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    show: bool = False,
    wait: float = 0,
) -> Verification:
    """Read an output completely and return its problems.

    Nothing is changed without `repair` or `forget_damaged`.

    Args:
        output: Folder or URL of the output, or the config file (.yaml) that names it.
        repair: First finish an interrupted commit, and delete orphan files.
        forget_damaged: Like `repair`; also remove all scans that have a problem from both tables, or only
            those of their cells that have one, so that the next run extracts them again. Then read everything
            a second time.
        storage_options: fsspec options; those of the config by default.
        show: Whether to show progress on stderr.
        wait: Seconds to wait for an output that a run holds, before a change.

    Raises:
        ConfigError: The location holds no featray output.
        OutputBusyError: A change was requested while a run holds the output, or a run changes the output
            faster than it can be read.
        StorageError: The store does not answer.
    """
    start = time.monotonic()
    dataset = open_output(output, storage_options)
    verification, findings, repairs = Verification(), Findings(), []
    if _are_tables_out_of_sync(dataset):
        findings.add(Fault(FindingKind.TABLES_OUT_OF_SYNC), "features and scans")
    else:
        if repair or forget_damaged:
            repairs = _repair(dataset, forget_damaged=forget_damaged, show=show, wait_s=wait)
        verification, findings = _read_output(dataset, show=show)
    return replace(
        verification,
        findings=findings.list_findings(),
        mended=tuple(repairs),
        seconds=time.monotonic() - start,
        exit_code=int(ExitCode.TOO_MANY_FAILED if findings else ExitCode.OK),
    )


def _are_tables_out_of_sync(dataset: Dataset) -> bool:
    """Return whether the tables do not belong together; raise all other errors of `Dataset.open_snapshot`."""
    try:
        dataset.open_snapshot()
    except (UsageError, StorageError):
        raise
    except FeatrayError:
        return True
    return False


def _repair(dataset: Dataset, *, forget_damaged: bool, show: bool, wait_s: float) -> list[str]:
    """Repair an output; return one sentence per change."""
    repairs = []
    with lock_output(dataset, wait_s) as committer:
        if committer.recovered:
            repairs.append("finished an interrupted commit")
        if forget_damaged:
            repairs += _delete_damage(committer, _read_output(dataset, show=show)[1])
        orphans = committer.delete_orphans()
    if orphans:
        more = ", …" if len(orphans) > 1 else ""
        repairs.append(f"deleted orphan files: {len(orphans)} ({orphans[0]}{more})")
    return repairs


def _delete_damage(committer: Committer, findings: Findings) -> list[str]:
    """Remove damaged scans, cells and files from both tables; return one sentence per change."""
    damage = findings.collect_damage()
    if not damage:
        return []
    if any(finding.kind is FindingKind.NO_ACCESS for finding in findings.list_findings()):
        return [
            "nothing was removed, because the store refuses to return some files and their contents must be "
            "known first"
        ]
    # Broken files go first, because the other changes would have to read them.
    committer.delete_scans(damage.scan_ids, damage.broken)
    # Rows of featray 0.1.0 do not list their layers, so such a scan is removed as a whole.
    earlier = set(find_earlier_scans(committer.snapshot()).to_pylist())
    earlier &= {scan_id for ids in damage.cells.values() for scan_id in ids}
    committer.delete_scans(earlier)
    for layer, ids in damage.cells.items():
        committer.delete_cells(layer, set(ids) - earlier)
    scans, files = {*damage.scan_ids, *earlier}, sum(map(len, damage.broken.values()))
    cells = sum(len(set(ids) - scans) for ids in damage.cells.values())
    return [
        f"removed damaged data from both tables (scans: {len(scans)}, cells of other scans: {cells}, "
        f"files: {files}); the next `featray extract CONFIG` extracts them again"
    ]


def _read_output(dataset: Dataset, *, show: bool) -> tuple[Verification, Findings]:
    """Read one snapshot completely; start again with a newer one if a run deletes files of the first.

    Returns:
        A verification without findings, repairs, time and exit code; and the findings.
    """
    for _ in range(MAX_ATTEMPTS):
        reader = _SnapshotReader(dataset, dataset.open_snapshot(), show=show)
        try:
            return reader.read(), reader.findings
        except _SupersededError:
            continue
    raise OutputBusyError(
        "a run changes this output faster than it can be read; verify it after the run has ended, or set "
        "output.keep_versions_days, which keeps superseded files for a while"
    )


class _SupersededError(Exception):
    """A file is missing because a newer commit has replaced it."""


class _CheckedFile(Protocol):
    """The result of reading one file of a table."""

    @property
    def faults(self) -> list[Fault]: ...

    @property
    def is_broken(self) -> bool: ...


_File = TypeVar("_File", bound=_CheckedFile)


class _SnapshotReader:
    """Reads one snapshot of an output, and collects its problems in `findings`."""

    def __init__(self, dataset: Dataset, snapshot: Snapshot, *, show: bool) -> None:
        self.dataset, self.snapshot, self.findings = dataset, snapshot, Findings()
        self.files = {table: snapshot.files(table) for table in (SCANS, FEATURES)}
        self.size_bytes = sum(file.size for files in self.files.values() for file in files)
        self.progress = Progress(self.size_bytes, show=show, unit="B")

    def read(self) -> Verification:
        """Read all files; return which version and how many scans, rows, files and bytes were read."""
        self._check_table_schemas()
        with self.progress:
            scans, broken_scans = self._read_scans()
            cells = self._make_expected_cells(scans)
            reconciliation, rows = Reconciliation(scans), {}
            for layer, files in self._group_by_layer(cells).items():
                rows[layer] = self._read_layer(layer, files, reconciliation, cells)
        reconciliation.report(broken_scans, self.findings)
        notes = report_unreferenced_files(self.dataset, self.snapshot, self.findings)
        return Verification(
            version=self.snapshot.version,
            notes=(*((_PENDING_COMMIT_NOTE,) if self.snapshot.pending else ()), *notes),
            scans=scans.counts,
            rows=rows,
            files=sum(map(len, self.files.values())),
            size_bytes=self.size_bytes,
        )

    def _check_table_schemas(self) -> None:
        for table, required in ((FEATURES, FEATURE_COLUMNS), (SCANS, SCAN_COLUMNS)):
            problems = find_schema_problems(self.snapshot.schema(table), required)
            if problems:
                self.findings.add(Fault(FindingKind.WRONG_SCHEMA, detail="; ".join(problems)), table)

    def _read_scans(self) -> tuple[ScansTable, BrokenFiles]:
        partition_columns = self.snapshot.partition_by[1:]
        schema = self.snapshot.schema(SCANS)
        read = functools.partial(read_scans_file, self.dataset.store, schema, partition_columns)
        broken: list[tuple[DataFile, Fault]] = []
        parts = [checked for _, checked in self._read_files(SCANS, self.files[SCANS], read, broken)]
        self._raise_if_superseded(SCANS, broken)
        scans, faults = join_files(parts, partition_columns)
        for fault in faults:
            self.findings.add(fault, SCANS)
        return scans, broken

    def _make_expected_cells(self, scans: ScansTable) -> ExpectedCells:
        facts = read_recipe_facts(self.dataset.store, scans)
        cells, faults = make_expected_cells(scans, facts, list_layers(self.snapshot))
        for fault in faults:
            self.findings.add(fault, SCANS)
        return cells

    def _group_by_layer(self, cells: ExpectedCells) -> dict[str, list[DataFile]]:
        """Return the files of each layer, including layers that scans must have and that have no file."""
        files: dict[str, list[DataFile]] = defaultdict(list)
        for file in self.files[FEATURES]:
            files[file.partition_values.get("layer") or ""].append(file)
        return {layer: files.get(layer, []) for layer in sorted({*files, *cells.layers})}

    def _read_layer(
        self,
        name: str,
        files: Sequence[DataFile],
        reconciliation: Reconciliation,
        cells: ExpectedCells,
    ) -> int:
        """Read one layer, add it to the reconciliation, and return its number of readable rows."""
        layer = LayerReconciliation(name, cells, sum(file.rows or 0 for file in files))
        read = functools.partial(
            read_features_file,
            self.dataset.store,
            self.snapshot.schema(FEATURES),
            cells,
            with_shapes=bool(cells.has_fixed_size.any()),
        )
        broken: list[tuple[DataFile, Fault]] = []
        unknown_ids, rows = [], 0
        for file, checked in self._read_files(FEATURES, files, read, broken):
            self._add_faults(layer.add_file(checked), FEATURES, file)
            unknown_ids.append(checked.unknown_ids)
            rows += len(checked.scan)
        self._raise_if_superseded(FEATURES, broken)
        reconciliation.unknown_ids[name] = pc.unique(pa.chunked_array(unknown_ids, pa.string()))
        reconciliation.add_layer(layer, broken, self.findings)
        return rows

    def _read_files(
        self,
        table: str,
        files: Sequence[DataFile],
        read: Callable[[DataFile], _File],
        broken: list[tuple[DataFile, Fault]],
    ) -> Iterator[tuple[DataFile, _File]]:
        """Yield the readable files of a table in order, and add the other files to `broken`."""
        for file, checked in map_files(read, files):
            self.progress.add_bytes(file.size)
            self._add_faults(checked.faults, table, file)
            if checked.is_broken:
                broken += [(file, fault) for fault in checked.faults]
            else:
                yield file, checked

    def _add_faults(self, faults: Sequence[Fault], table: str, file: DataFile) -> None:
        layer = (file.partition_values.get("layer") or "") if table == FEATURES else None
        for fault in faults:
            self.findings.add(fault, table, layer, file.path)

    def _raise_if_superseded(self, table: str, broken: BrokenFiles) -> None:
        missing = {file.path for file, fault in broken if fault.kind is FindingKind.MISSING_FILE}
        if missing and not missing <= {file.path for file in self.dataset.open_snapshot().files(table)}:
            raise _SupersededError
