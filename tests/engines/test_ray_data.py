"""Engine ray: the same numbers as inline, and a scan that kills its worker costs only itself."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featray
from featray.config import LimitsConfig, RunConfig, load
from featray.dataset import FEATURES, Dataset
from featray.engines import Stages
from featray.engines.ray_data import RayEngine
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.write import write
from featray.storage import Store

MINIMAL = {"model": {"uri": "m.keras", "layers": ["sum"]}, "output": {"uri": "out"}}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def features(uri: str) -> dict[tuple[str, str, int], np.ndarray]:
    rows = Dataset(Store(uri)).read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    found = {(row["scan_id"], row["layer"], row["patch"]): np.array(row["feature"]) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


@pytest.mark.parametrize(
    "preprocess", [{}, {"fit": "patches", "stride": [8, 16, 16]}], ids=["whole volumes", "patches"]
)
def test_ray_and_inline_agree(config_of: Any, tmp_path: Path, preprocess: dict[str, Any]) -> None:
    inline = config_of(preprocess=preprocess, run={"decode": {"workers": 2}})
    ray = config_of(preprocess=preprocess, output={"uri": str(tmp_path / "ray")}, model={"batch_size": 3})
    featray.extract(inline)
    summary = featray.extract(ray, ["run.engine=ray"])
    assert (summary.engine, summary.ok, summary.exit_code) == ("ray", 12, 0)
    expected, found = features(inline["output"]["uri"]), features(ray["output"]["uri"])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))


def test_decoding_is_not_fused_into_the_model(tmp_path: Path, by_value: None) -> None:
    engine = RayEngine(RunConfig(), LimitsConfig())
    stages = _stages(tmp_path)
    stats = engine._dataset([_scan("a"), _scan("b")], stages, alone=False).materialize().stats()
    assert "Map(_DecodeRow)" in stats
    assert "MapBatches(_ExtractBatch)" in stats
    assert "->MapBatches(_ExtractBatch)" not in stats


class Poisoned(Decoder):
    """A decoder that dies on every scan named poison and hangs on one named hang."""

    def __call__(self, scan: Scan) -> Decoded:
        if scan.scan_id == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if scan.scan_id == "hang":
            import time

            time.sleep(60)
        record = ScanRecord.of(scan, self.recipe, self.run_id)
        record.patches = 1
        return Decoded(record, np.ones((1, 2, 2, 2), np.float32), np.zeros((1, 3), np.int32))


@pytest.fixture
def by_value() -> None:
    """Let this file's classes travel to workers that cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _scan(name: str) -> Scan:
    return Scan(name, f"/{name}", "nifti", (f"/{name}",), "c")


def _extractor() -> Any:
    return lambda batch, draws: {"sum": batch.reshape(len(batch), -1).sum(axis=1, keepdims=True)}


def _stages(folder: Path) -> Stages:
    decoder = Poisoned.of(load({**MINIMAL, "source": {"uri": "/"}}), "r", "run")
    dataset = Dataset(Store(str(folder)))
    put = functools.partial(write, dataset=dataset, partition_by=("layer",), recipe="r", run_id="run")
    return Stages(decoder, _extractor(), _extractor, put, batch_scans=2, scans_per_file=4)


def test_a_scan_that_kills_its_worker_ends_as_worker_crash_and_costs_no_other(
    tmp_path: Path, by_value: None
) -> None:
    names = [*(f"s{n}" for n in range(7)), "poison", "hang"]
    limits = LimitsConfig(attempts=2, scan_timeout_s=3)
    engine = RayEngine(RunConfig(), limits)
    receipts = list(engine.receipts([_scan(name) for name in names], _stages(tmp_path), threading.Event()))
    records = {record.scan_id: record for receipt in receipts for record in receipt.records}
    assert sorted(records) == sorted(names)
    assert {name: record.reason for name, record in records.items() if record.reason} == {
        "poison": "worker_crash",
        "hang": "timeout",
    }
    assert records["poison"].attempts == 2
