"""Totals of a run: receipts in, sums out, and the part of the run that limited its speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from featray.hardware import Workers
from featray.schema import STAGE_TIMES, Receipt, UnitsSeen

MIN_ROWS_FOR_DEAD_UNITS = 2
"""With fewer rows, a unit that is 0 means nothing."""
MIN_JUDGED_S = 10.0
"""Seconds of work below which start-up decides the speed of a run."""
MIN_READING = 0.5
"""Average number of workers waiting for files from which the text names it."""
BUSY_SHARE = 0.9
"""Share of time above which workers count as always busy."""


@dataclass
class UnitTotals:
    """Which units of one layer have had a value other than 0.

    Attributes:
        width: Number of units.
        rows: Number of values seen per unit.
        active: One bit per unit; 1 if the unit had a value other than 0.
        is_uneven: Whether the number of units differs between rows.
    """

    width: int = 0
    rows: int = 0
    active: int = 0
    is_uneven: bool = False

    def add(self, seen: UnitsSeen) -> None:
        """Count the units of one file."""
        self.is_uneven |= not seen.width or (self.rows > 0 and seen.width != self.width)
        self.width = seen.width
        self.rows += seen.rows
        self.active |= int(seen.active or "0", 16)

    @property
    def dead(self) -> int:
        """Number of units that were 0 in every row; 0 if there are too few rows to tell."""
        can_tell = self.rows >= MIN_ROWS_FOR_DEAD_UNITS and not self.is_uneven
        return self.width - self.active.bit_count() if can_tell else 0


@dataclass
class RunTotals:
    """Sums over the committed receipts of a run. It holds no scans, because a run may have a million.

    Attributes:
        scans: Number of scans.
        removed: Number of scans that were removed from the output.
        dropped_layers: Number of layers that were removed.
        has_changed_tables: Whether layers were renamed or dropped, failures cleared, or rows of an earlier
            version changed.
        is_interrupted: Whether the run was asked to stop.
        bytes_read: Bytes of the scans' files.
        from_cache: Number of scans whose model input came from the input cache.
        seconds: Wall time from the first scan that was given to a worker, which may be before the model was
            loaded, to the last commit.
        workers: Number of workers of each kind.
        units: Active units by layer.
        reduced_batch: Smallest number of inputs in a call of the model if memory was too short for
            `model.batch_size`; None if it was not.
        stage_seconds: Seconds of each stage, summed over scans.
    """

    scans: int = 0
    removed: int = 0
    dropped_layers: int = 0
    has_changed_tables: bool = False
    is_interrupted: bool = False
    bytes_read: int = 0
    from_cache: int = 0
    seconds: float = 0.0
    workers: Workers | None = None
    units: dict[str, UnitTotals] = field(default_factory=dict)
    reduced_batch: int | None = None
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGE_TIMES, 0.0))

    @property
    def has_changes(self) -> bool:
        """Whether the run has committed anything."""
        return bool(self.scans or self.removed or self.dropped_layers or self.has_changed_tables)

    def add(self, receipt: Receipt) -> None:
        """Count a committed receipt."""
        records = receipt.records
        self.scans += len(records)
        self.bytes_read += sum(record.bytes_read for record in records)
        self.from_cache += sum(record.is_from_cache for record in records)
        reduced = [record.reduced_batch for record in records if record.reduced_batch is not None]
        if reduced:
            self.reduced_batch = min([*reduced, *([self.reduced_batch] if self.reduced_batch else [])])
        for name in STAGE_TIMES:
            self.stage_seconds[name] += sum(getattr(record, name) for record in records)
        for seen in receipt.units:
            self.units.setdefault(seen.layer, UnitTotals()).add(seen)


def describe_bottleneck(totals: RunTotals) -> str:
    """Return a sentence about the limit of the run's speed; empty if nothing was decoded.

    It follows from the average number of workers that were busy: their seconds, divided by the wall time in
    which they could work. Start-up, such as loading the model, is part of that time, so a short run says
    nothing about the speed of a long one.
    """
    seconds, workers = totals.stage_seconds, totals.workers
    decode_s = seconds["read_s"] + seconds["decode_s"] + seconds["preprocess_s"]
    if workers is None or not totals.seconds or not decode_s:
        return ""
    if totals.seconds < MIN_JUDGED_S:
        return f"The run was too short ({totals.seconds:.1f} s) to tell what limits its speed."
    average = _BusyWorkers(
        decoding=min(workers.decode, decode_s / totals.seconds),
        reading=min(workers.decode, seconds["read_s"] / totals.seconds),
        calls=min(workers.model, seconds["infer_s"] / totals.seconds),
    )
    waiting = f" ({average.reading:.1f} of them reading)" if average.reading >= MIN_READING else ""
    return (
        f"{_describe_limit(workers, average)}. On average {average.decoding:.1f} of {workers.decode} decode "
        f"workers{waiting} and {average.calls:.1f} of {workers.model} model calls were busy, "
        f"on {workers.cores:g} cores."
    )


class _BusyWorkers(NamedTuple):
    """Average numbers of workers that decoded, of those that were only reading files, and of model calls."""

    decoding: float
    reading: float
    calls: float


def _describe_limit(workers: Workers, average: _BusyWorkers) -> str:
    """Return a text about the limit of a run's speed. Reading is waiting for the store, and uses no core."""
    decoding_cores = average.decoding - average.reading
    used_cores = decoding_cores + (0.0 if workers.has_gpus else average.calls)
    if used_cores >= BUSY_SHARE * workers.cores and workers.decode + workers.model > workers.cores:
        return f"limited by the cores: decoding took {100 * decoding_cores / used_cores:.0f} % of their time"
    if average.calls >= BUSY_SHARE * workers.model:
        return "limited by the model: more actors or faster devices would help"
    if average.decoding >= BUSY_SHARE * workers.decode:
        part = "reading from the store" if average.reading > average.decoding / 2 else "decoding"
        return f"limited by {part}: more decode workers would help"
    return "limited by neither decoding nor the model: start-up and waiting took the other time"
