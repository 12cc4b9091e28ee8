"""Metrics of a run on Ray. Serving them needs `ray[default]`, which the tests do not install."""

from __future__ import annotations

from collections import defaultdict

import pytest

from featray.engines.ray import metrics as ray_metrics
from featray.engines.ray.metrics import Metrics
from featray.hardware import Workers
from featray.schema import Receipt, ScanRecord

values: dict[tuple[str, ...], float] = defaultdict(float)
"""(Name of a metric, value of each of its tags) → value."""


class Metric:
    """Replaces a counter or gauge of Ray: stores its values, and refuses the same calls."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        assert description
        self._name, self._keys = name, tag_keys

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        values[self._make_key(tags)] += value

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        values[self._make_key(tags)] = value

    def _make_key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        assert set(self._keys) == set(tags or {})
        return self._name, *(tags or {}).values()


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    monkeypatch.setattr(ray_metrics, "Counter", Metric)
    monkeypatch.setattr(ray_metrics, "Gauge", Metric)
    values.clear()
    return Metrics("r1", 10)


def make_record(name: str, status: str = "ok", reason: str | None = None) -> ScanRecord:
    record = ScanRecord(
        name, f"/{name}", "nifti", content="c", recipe="r", run_id="run", status=status, reason=reason
    )  # type: ignore[arg-type]
    record.read_s, record.infer_s, record.bytes_read = 0.5, 2.0, 100
    return record


def test_scans_failures_seconds_and_bytes_are_counted_with_the_run_as_label(metrics: Metrics) -> None:
    assert values == {("featray_waiting_scans", "r1"): 10}
    metrics.add(Receipt((), (make_record("a"), make_record("b"))), None)
    metrics.add(Receipt((), (make_record("c", "failed", "truncated"),)), Workers(decode=4, model=2, cores=4))
    assert values == {
        ("featray_scans", "r1", "ok"): 2,
        ("featray_scans", "r1", "failed"): 1,
        ("featray_failures", "r1", "truncated"): 1,
        ("featray_stage_seconds", "r1", "read"): 1.5,
        ("featray_stage_seconds", "r1", "infer"): 6.0,
        ("featray_read_bytes", "r1"): 300,
        ("featray_waiting_scans", "r1"): 7,
        ("featray_workers", "r1", "decode"): 4,
        ("featray_workers", "r1", "model"): 2,
    }


def test_metrics_hold_neither_ids_nor_messages_of_scans(metrics: Metrics) -> None:
    record = make_record("patient-name", "failed", "unreadable")
    record.message = "secret words"
    metrics.add(Receipt((), (record,)), None)
    assert "patient" not in str(values)
    assert "secret" not in str(values)
