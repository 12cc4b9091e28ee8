"""What a run on Ray shows to Prometheus, through Ray's own metrics: counted in the driver as receipts come.

Ray puts `ray_` before each name and answers at every node's metrics port; its own metrics of Ray Data and of
nodes are there as well. How busy the model's actors are is
`rate(ray_featray_stage_seconds_total{stage="infer"}[5m]) / ray_featray_workers{kind="model"}`.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from featray.hardware import Workers
from featray.schema import STAGE_TIMES, Receipt


class Metrics:
    """Counters and gauges of one run; nothing of a scan but its status, reason and times gets into them."""

    def __init__(self, scans: int) -> None:
        """Begin with so many scans to do."""
        self._left = scans
        self._scans = Counter("featray_scans", "Scans settled, by status.", ("status",))
        self._failures = Counter("featray_failures", "Scans not ok, by reason.", ("reason",))
        self._seconds = Counter("featray_stage_seconds", "Seconds of work, by stage.", ("stage",))
        self._bytes = Counter("featray_read_bytes", "Bytes of scans read from the store.")
        self._waiting = Gauge("featray_waiting_scans", "Scans that are still to be settled.")
        self._workers = Gauge("featray_workers", "Workers at most, decode or model.", ("kind",))
        self._waiting.set(scans)

    def add(self, receipt: Receipt, workers: Workers | None) -> None:
        """Count the scans of one receipt; `workers` is what they were done with."""
        for record in receipt.records:
            self._scans.inc(1, {"status": record.status})
            if record.reason is not None:
                self._failures.inc(1, {"reason": record.reason})
        for name in STAGE_TIMES:
            _add(self._seconds, sum(getattr(record, name) for record in receipt.records), stage=name[:-2])
        _add(self._bytes, sum(record.bytes_read for record in receipt.records))
        self._left -= len(receipt.records)
        self._waiting.set(self._left)
        if workers is not None:
            self._workers.set(workers.decode, {"kind": "decode"})
            self._workers.set(workers.model, {"kind": "model"})


def _add(counter: Counter, value: float, **tags: str) -> None:
    if value > 0:  # Ray refuses others
        counter.inc(value, tags)
