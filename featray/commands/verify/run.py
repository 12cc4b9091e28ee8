"""The way of a verification: the ledger is read back, then layer by layer all features, then the folders."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featray.commands.verify.data_file import in_threads, schema_problems
from featray.commands.verify.findings import Fault, Finding, Findings, Kind
from featray.commands.verify.orphans import look_for_strays
from featray.commands.verify.read_features import read_rows
from featray.commands.verify.read_scans import Ledger, join, read_part
from featray.commands.verify.reconcile import Books, LayerBooks
from featray.commands.verify.run_files import RecipeFacts, recipe_facts
from featray.errors import ExitCode, FeatrayError, OutputBusyError, StorageError, UsageError
from featray.job import lock_output
from featray.output.dataset import FEATURES, SCANS, Dataset, Snapshot
from featray.output.query import Output, open_output
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, DataFile
from featray.stages.commit import Committer
from featray.terminal.progress import Progress

LOOKS = 5
"""Times to begin again when a run has deleted superseded files before they were read."""
_OWED = (
    "the last commit was cut between the two tables; nothing is lost, and the next run (or --repair) writes "
    "down its second half"
)

_Broken = list[tuple[DataFile, Fault]]


@dataclass(frozen=True)
class Verification:
    """What was read back and what is wrong with it.

    Attributes:
        version: Of `features`, as it was read.
        findings: What is wrong; empty when nothing is.
        notes: What is worth knowing but no fault.
        mended: What `--repair` or `--forget-damaged` did, before the output was read (again).
        scans: Rows of the ledger by status.
        rows: Rows of `features` that could be read, by layer.
        files: Files read, of both tables.
        size_bytes: Of those files.
        seconds: Wall time.
        exit_code: 0, or 3 when something is wrong.
    """

    version: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    mended: tuple[str, ...]
    scans: dict[str, int]
    rows: dict[str, int]
    files: int
    size_bytes: int
    seconds: float
    exit_code: int

    def text(self) -> str:
        """Return the verdict for a person."""
        scans = ", ".join(f"{count} {status}" for status, count in self.scans.items())
        lines = [
            *self.mended,
            *(finding.text() for finding in self.findings),
            *(f"note: {note}" for note in self.notes),
            f"version {self.version}: {scans}; {sum(self.rows.values())} rows of {len(self.rows)} layers",
            f"read back {self.files} files, {self.size_bytes / 1e6:.2f} MB in {self.seconds:.1f} s",
            f"findings: {len(self.findings)}" if self.findings else "everything is in order",
        ]
        return "\n".join(lines)


def verify(
    output: Output,
    *,
    repair: bool = False,
    forget_damaged: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    show: bool = False,
) -> Verification:
    """Read an output back and say what is wrong with it. Changes nothing unless asked to mend.

    Args:
        output: Its folder or URL, or the config (.yaml) that names it.
        repair: First finish a commit that a kill cut, and delete orphans.
        forget_damaged: Also take the scans that anything is wrong with out of both tables, so that the next
            run makes them again; then read everything a second time.
        storage_options: For fsspec; those of the config by default.
        show: Whether to show progress on stderr.

    Raises:
        ConfigError: There is no featray output here.
        OutputBusyError: Asked to mend while a run holds the output; or the output changes faster than it
            can be read.
        StorageError: The store does not answer.
    """
    start = time.monotonic()
    dataset = open_output(output, storage_options)
    if _is_apart(dataset):
        found, mended = _nothing_but(Kind.TABLES_APART), []
    else:
        mended = _mend(dataset, forget_damaged, show) if repair or forget_damaged else []
        found = _read_back(dataset, show)[0]
    return replace(found, mended=tuple(mended), seconds=time.monotonic() - start)


def _mend(dataset: Dataset, forget_damaged: bool, show: bool) -> list[str]:
    """Mend what can be; return in words what was done."""
    mended = []
    with lock_output(dataset) as committer:
        if committer.recovered:
            mended.append("finished a commit that a run was killed in")
        if forget_damaged:
            mended += _forget(committer, _read_back(dataset, show)[1])
        orphans = committer.delete_orphans()
    if orphans:
        more = ", …" if len(orphans) > 1 else ""
        mended.append(f"deleted orphans: {len(orphans)} ({orphans[0]}{more})")
    return mended


def _forget(committer: Committer, findings: Findings) -> list[str]:
    """Take what is damaged out of both tables; return in words what was done."""
    damage = findings.damage()
    if not damage.scan_ids and not damage.broken:
        return []
    if any(finding.kind is Kind.NO_ACCESS for finding in findings.listed()):
        return ["nothing was taken out: the store refuses files, and what they hold must be known first"]
    committer.delete_scans(damage.scan_ids, damage.broken)
    scans, files = len(damage.scan_ids), sum(map(len, damage.broken.values()))
    return [
        f"took what is damaged out of both tables (scans: {scans}, files: {files}); the next "
        "`featray extract CONFIG` makes it again"
    ]


def _read_back(dataset: Dataset, show: bool) -> tuple[Verification, Findings]:
    """Read one commit back; begin again when a run deletes it meanwhile."""
    for _ in range(LOOKS):
        snapshot = dataset.open_snapshot()
        reading = _Reading(dataset, snapshot, show)
        try:
            return reading.run(), reading.findings
        except _SupersededError:
            continue
    raise OutputBusyError(
        "a run changes this output faster than it can be read back; verify it when the run has ended, or set "
        "output.keep_versions_days so that superseded files stay for a while"
    )


class _SupersededError(Exception):
    """A file is gone because a newer commit does without it."""


class _Reading:
    """One reading of one commit."""

    def __init__(self, dataset: Dataset, snapshot: Snapshot, show: bool) -> None:
        self.dataset, self.snapshot, self.findings = dataset, snapshot, Findings()
        self.files = {table: snapshot.files(table) for table in (SCANS, FEATURES)}
        size = sum(file.size for files in self.files.values() for file in files)
        self.progress = Progress(size, show=show, unit="B")

    def run(self) -> Verification:
        """Read everything; return the verdict."""
        for table, fixed in ((FEATURES, FEATURE_COLUMNS), (SCANS, SCAN_COLUMNS)):
            problems = schema_problems(self.snapshot.schema(table), fixed)
            if problems:
                self.findings.add(Fault(Kind.WRONG_SCHEMA, detail="; ".join(problems)), table)
        with self.progress:
            ledger, broken_scans = self._ledger()
            facts = recipe_facts(self.dataset.store, ledger)
            books, rows = Books(ledger), {}
            for layer, files in self._layers(facts).items():
                rows[layer] = self._layer(layer, files, books, facts)
        books.settle(broken_scans, self.findings)
        notes = look_for_strays(self.dataset, self.snapshot, self.findings)
        return self._verdict(ledger, rows, ([_OWED] if self.snapshot.pending else []) + notes)

    def _ledger(self) -> tuple[Ledger, _Broken]:
        further = self.snapshot.partition_by[1:]
        schema = self.snapshot.schema(SCANS)
        work = functools.partial(read_part, self.dataset.store, schema, further)
        parts, broken = [], []
        for file, part in in_threads(work, self.files[SCANS]):
            self.progress.add_bytes(file.size)
            self._note(part.faults, SCANS, None, file)
            if part.rows is None:
                broken += [(file, fault) for fault in part.faults]
            else:
                parts.append(part.rows)
        self._stop_if_superseded(SCANS, broken)
        ledger, faults = join(parts, further)
        for fault in faults:
            self.findings.add(fault, SCANS)
        return ledger, broken

    def _layers(self, facts: dict[int, RecipeFacts]) -> dict[str, list[DataFile]]:
        """Return the files of each layer, also of those that a run promised and that have none."""
        files: dict[str, list[DataFile]] = defaultdict(list)
        for file in self.files[FEATURES]:
            files[file.partition_values.get("layer") or ""].append(file)
        promised = {layer for told in facts.values() for layer in told.layers}
        return {layer: files.get(layer, []) for layer in sorted({*files, *promised})}

    def _layer(
        self, layer: str, files: list[DataFile], all_books: Books, facts: dict[int, RecipeFacts]
    ) -> int:
        """Read one layer and enter it; return its rows."""
        ledger = all_books.ledger
        books = LayerBooks(layer, ledger, sum(file.rows or 0 for file in files))
        shapes = any(told.is_fixed_size for told in facts.values())
        schema = self.snapshot.schema(FEATURES)
        work = functools.partial(read_rows, self.dataset.store, schema, ledger, shapes=shapes)
        unknown, broken, rows = [], [], 0
        for file, found in in_threads(work, files):
            self.progress.add_bytes(file.size)
            self._note(found.faults, FEATURES, layer, file)
            if found.is_broken:
                broken += [(file, fault) for fault in found.faults]
                continue
            self._note(books.add(found), FEATURES, layer, file)
            unknown.append(found.unknown)
            rows += len(found.scan)
        self._stop_if_superseded(FEATURES, broken)
        all_books.unknown[layer] = pc.unique(pa.chunked_array(unknown, pa.string()))
        all_books.close(books, broken, facts, self.findings)
        return rows

    def _note(self, faults: list[Fault], table: str, layer: str | None, file: DataFile) -> None:
        for fault in faults:
            self.findings.add(fault, table, layer, file.path)

    def _stop_if_superseded(self, table: str, broken: _Broken) -> None:
        """Begin again when a file is missing because a newer commit does without it."""
        gone = {file.path for file, fault in broken if fault.kind is Kind.MISSING_FILE}
        if gone and not gone <= {file.path for file in self.dataset.open_snapshot().files(table)}:
            raise _SupersededError

    def _verdict(self, ledger: Ledger, rows: dict[str, int], notes: list[str]) -> Verification:
        findings = self.findings.listed()
        files = [file for files in self.files.values() for file in files]
        return Verification(
            version=self.snapshot.version,
            findings=findings,
            notes=tuple(notes),
            mended=(),
            scans=ledger.counts,
            rows=rows,
            files=len(files),
            size_bytes=sum(file.size for file in files),
            seconds=0.0,
            exit_code=int(ExitCode.TOO_MANY_FAILED if findings else ExitCode.OK),
        )


def _is_apart(dataset: Dataset) -> bool:
    """Whether the two tables do not belong together; raises what else `Dataset.open_snapshot` does."""
    try:
        dataset.open_snapshot()
    except (UsageError, StorageError):
        raise
    except FeatrayError:
        return True
    return False


def _nothing_but(kind: Kind) -> Verification:
    findings = Findings()
    findings.add(Fault(kind), "features and scans")
    return Verification(-1, findings.listed(), (), (), {}, {}, 0, 0, 0.0, int(ExitCode.TOO_MANY_FAILED))
