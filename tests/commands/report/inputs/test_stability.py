"""Stability of layers whose answer is known, and groups that do not depend on the order of decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from featray.commands.report.inputs.model_features import LayerModel, ScanGroups
from featray.commands.report.inputs.perturb import make_perturbations
from featray.commands.report.inputs.stability import LayerStability, StabilityTest, measure_stability
from featray.commands.report.label_free.stability import measure_reliability
from featray.config import PreprocessConfig
from featray.schema import Decoded, ScanRecord

PERTURBATIONS = make_perturbations(PreprocessConfig())


def make_scan(number: int, tensor: np.ndarray | None) -> Decoded:
    record = ScanRecord(f"scan_{number:02d}", "", "nifti", patches=0 if tensor is None else len(tensor))
    if tensor is None:
        record.status = "failed"
        return Decoded(record, np.zeros((0, 1, 1, 1), np.float32), np.zeros((0, 3), np.int32))
    return Decoded(record, tensor, np.zeros((len(tensor), 3), np.int32))


def make_noise_scans(count: int, patches: int = 1) -> list[Decoded]:
    """Return volumes of white noise around a level that differs between scans."""
    rng = np.random.default_rng(0)
    return [
        make_scan(number, rng.normal(level, 0.1, (patches, 12, 16, 16)).astype(np.float32))
        for number, level in enumerate(rng.uniform(0.4, 0.6, count))
    ]


class StandIn:
    """A model with the layers `mean`, the mean of all voxels, and `voxel`, the voxel in the middle."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def __call__(
        self, batch: np.ndarray, seeds: Sequence[str], layers: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        self.calls.append(batch[:, 0, 0, 0].tolist())
        values = {"mean": batch.mean(axis=(1, 2, 3))[:, None], "voxel": batch[:, 6, 8, 8:9].copy()}
        return {name: values[name] for name in layers}


def run_test(scans: Sequence[Decoded], stand_in: Any, group_size: int = 4) -> tuple[LayerStability, ...]:
    ids = sorted(scan.record.scan_id for scan in scans)
    test = StabilityTest(LayerModel(stand_in, ("mean", "voxel"), "r"), PERTURBATIONS, ids, group_size)
    for scan in scans:
        test.add(scan)
    return test.measure()


def test_a_global_mean_is_stable_and_a_single_voxel_of_noise_is_not() -> None:
    found = {
        (result.layer, result.perturbation.name): result
        for result in run_test(make_noise_scans(40), StandIn())
    }
    assert len(found) == 6
    icc = {key: float(result.reliability.icc_2_1[0]) for key, result in found.items()}
    assert icc["mean", "shift"] > 0.99
    assert icc["mean", "noise"] > 0.99
    assert icc["mean", "resampling"] > 0.99
    assert abs(icc["voxel", "shift"]) < 0.4
    assert icc["voxel", "noise"] > 0.99
    assert icc["voxel", "shift"] < icc["voxel", "resampling"] < 0.98
    assert all(result.cosines.scans == 40 for result in found.values())
    assert found["mean", "shift"].cosines.cosine.min() == pytest.approx(1)


def test_the_features_of_patches_are_averaged_before_they_are_compared() -> None:
    (first, *_) = run_test(make_noise_scans(3, patches=5), StandIn())
    assert first.reliability.scans == 3
    assert first.reliability.icc_2_1.shape == (1,)


def test_the_batches_do_not_depend_on_the_order_in_which_scans_are_decoded() -> None:
    scans = make_noise_scans(7)
    forward, shuffled = StandIn(), StandIn()
    first = run_test(scans, forward, 3)
    again = run_test([scans[number] for number in (5, 1, 6, 0, 2, 4, 3)], shuffled, 3)
    assert sorted(map(tuple, forward.calls)) == sorted(map(tuple, shuffled.calls))
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.reliability.icc_2_1, other.reliability.icc_2_1)


def test_groups_are_complete_without_the_scans_that_failed() -> None:
    groups = ScanGroups(["scan_00", "scan_01", "scan_02"], 2)
    (kept,) = make_noise_scans(1)
    assert groups.add(make_scan(1, None)) == []
    assert [scan.record.scan_id for scan in groups.add(kept)] == ["scan_00"]
    assert groups.add(make_scan(2, None)) == []
    assert groups.add(make_scan(9, kept.tensor)) == []


def test_a_group_keeps_its_tensors_when_the_buffers_are_written_again() -> None:
    scans = make_noise_scans(2)
    groups, before = ScanGroups(["scan_00", "scan_01"], 2), scans[0].tensor.copy()
    groups.add(scans[0])
    scans[0].tensor[:] = 0
    assert np.array_equal(groups.add(scans[1])[0].tensor, before)


def test_scans_on_which_the_model_fails_are_left_out() -> None:
    class Fragile(StandIn):
        def __call__(self, batch: np.ndarray, *args: Any) -> dict[str, np.ndarray]:
            if any(np.array_equal(row, bad) for row, bad in itertools.product(batch, scans[1].tensor)):
                raise RuntimeError
            return super().__call__(batch, *args)

    scans = make_noise_scans(4)
    test = StabilityTest(
        LayerModel(Fragile(), ("mean",), "r"),  # type: ignore[arg-type]
        PERTURBATIONS,
        [scan.record.scan_id for scan in scans],
        4,
    )
    for scan in scans:
        test.add(scan)
    assert test.failed == 1
    assert test.scans == 3
    assert {result.reliability.scans for result in test.measure()} == {3}


def test_the_reliability_of_many_units_is_that_of_all_at_once() -> None:
    features = np.random.default_rng(0).normal(size=(5, 2, 20_000)).astype(np.float32)
    found = measure_stability("layer", PERTURBATIONS[0], features).reliability
    expected = measure_reliability(features)
    assert np.array_equal(found.icc_2_1, expected.icc_2_1)
    assert np.array_equal(found.icc_3_1, expected.icc_3_1)
    assert np.array_equal(found.is_defined, expected.is_defined)


def test_one_scan_has_no_stability() -> None:
    assert run_test(make_noise_scans(1), StandIn()) == ()
