"""Metrics of a run for Prometheus, through Ray's own metrics; the driver counts them from receipts.

Ray prefixes each name with `ray_` and serves them at every node's metrics port, next to its own metrics of
Ray Data and of nodes. Each metric has the label `run` with the run id, because several runs may share a
cluster. The share of time that the model's actors work is
`sum by (run) (rate(ray_featray_stage_seconds_total{stage="infer"}[5m])) /
sum by (run) (ray_featray_workers{kind="model"})`.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from featray.hardware import Workers
from featray.schema import STAGE_TIMES, Receipt


class Metrics:
    """Counters and gauges of one run. Of a scan they contain only its status, reason and times."""

    def __init__(self, run_id: str, scans: int) -> None:
        """Create the metrics of the run `run_id` over `scans` scans."""
        self._run_id, self._unsettled = run_id, scans
        self._scans = Counter("featray_scans", "Scans settled, by status.", ("run", "status"))
        self._failures = Counter("featray_failures", "Scans not ok, by reason.", ("run", "reason"))
        self._seconds = Counter("featray_stage_seconds", "Seconds of work, by stage.", ("run", "stage"))
        self._bytes = Counter("featray_read_bytes", "Bytes of scans read from the store.", ("run",))
        self._waiting = Gauge("featray_waiting_scans", "Scans that have no result yet.", ("run",))
        self._workers = Gauge(
            "featray_workers", "Maximum number of workers, by kind: decode or model.", ("run", "kind")
        )
        self._set(self._waiting, scans)

    def add(self, receipt: Receipt, workers: Workers | None) -> None:
        """Count the scans of one receipt, which these workers processed."""
        for record in receipt.records:
            self._add(self._scans, 1, status=record.status)
            if record.reason is not None:
                self._add(self._failures, 1, reason=record.reason)
        for name in STAGE_TIMES:
            self._add(
                self._seconds, sum(getattr(record, name) for record in receipt.records), stage=name[:-2]
            )
        self._add(self._bytes, sum(record.bytes_read for record in receipt.records))
        self._unsettled -= len(receipt.records)
        self._set(self._waiting, self._unsettled)
        if workers is not None:
            self._set(self._workers, workers.decode, kind="decode")
            self._set(self._workers, workers.model, kind="model")

    def _add(self, counter: Counter, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses other values
            counter.inc(value, {"run": self._run_id, **tags})

    def _set(self, gauge: Gauge, value: float, **tags: str) -> None:
        gauge.set(value, {"run": self._run_id, **tags})
