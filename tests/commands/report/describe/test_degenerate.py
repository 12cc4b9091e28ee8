"""Every set of features gives a page: few scans, equal scans, broken values, one layer, many layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from featray.commands.report.describe import maps as map_module
from featray.commands.report.describe import scope
from featray.commands.report.describe.describe_features import LabelFreeParts

Describe = Callable[..., LabelFreeParts]


@pytest.fixture(autouse=True)
def _quick_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_module, "_run_tsne", lambda projection, seed: projection.coordinates[:, :2])


def make_noise(scans: int, units: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(scans, units))


@pytest.mark.parametrize("scans", [1, 2, 3, 4, 5, 9, 10, 11, 20, 21, 30])
@pytest.mark.parametrize("layers", [1, 3])
def test_few_scans_give_a_page(
    scans: int, layers: int, make_set: Any, describe: Describe, render: Any
) -> None:
    names = ["conv", "encoder/z_mean", "encoder/z_log_var"][-layers:]
    features = make_set({name: make_noise(scans, 1 + 4 * (name == "conv"), len(name)) for name in names})
    parts = describe(features)
    assert b"report" in render(features, parts)["report.html"]
    assert len(parts.scans.ids) == scans
    assert sum(scan_map.method == "PCA" for scan_map in parts.maps) == (layers if scans > 1 else 0)
    assert any("can show little" in caution for caution in parts.cautions) == (scans < 20)
    assert not [finding for finding in parts.findings if "same values" in finding.reason]


@pytest.mark.parametrize("scans", [1, 2, 3, 25])
@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_equal_scans_give_a_page(
    scans: int, value: float, make_set: Any, describe: Describe, render: Any
) -> None:
    features = make_set({"conv": np.full((scans, 7), value), "z_mean": np.full((scans, 2), value)})
    parts = describe(features)
    assert b"report" in render(features, parts)["report.html"]
    assert (parts.maps, parts.neighbors, parts.outliers) == ((), (), ())
    assert [finding.reason for finding in parts.findings if "same values" in finding.reason] == (
        [f"All {scans} scans have the same values."] * 2 if scans > 1 else []
    )


@pytest.mark.parametrize("scans", [2, 3, 25])
def test_one_constant_layer_gives_a_page(scans: int, make_set: Any, describe: Describe, render: Any) -> None:
    features = make_set({"conv": np.ones((scans, 3)), "dense": make_noise(scans, 4)})
    parts = describe(features)
    assert b"report" in render(features, parts)["report.html"]
    assert {scan_map.candidate for scan_map in parts.maps} == {"dense (vector)"}
    for matrix in parts.agreement:
        assert np.isnan(matrix.values[0]).all()


@pytest.mark.parametrize("scans", [1, 2, 3, 40])
@pytest.mark.parametrize("broken", ["first", "half", "all"])
@pytest.mark.parametrize("layers", [1, 2])
def test_broken_values_give_a_page(
    scans: int, broken: str, layers: int, make_set: Any, describe: Describe, render: Any
) -> None:
    values = make_noise(scans, 6)
    values[: {"first": 1, "half": (scans + 1) // 2, "all": scans}[broken], 0] = np.nan
    features = make_set({"conv": values} if layers == 1 else {"conv": values, "dense": make_noise(scans, 4)})
    parts = describe(features)
    assert b"report" in render(features, parts)["report.html"]
    assert any("NaN" in finding.reason for finding in parts.findings)
    assert bool(parts.measures.candidates) == (layers == 2 or np.isfinite(values).all(axis=1).any())


def test_the_same_broken_scan_in_all_layers_is_left_out(make_set: Any, describe: Describe) -> None:
    layers = {"conv": make_noise(3, 5), "dense": make_noise(3, 2)}
    for values in layers.values():
        values[1] = np.inf
    parts = describe(make_set(layers))
    assert len(parts.measures.candidates) == 2
    assert parts.measures.scope.used.tolist() == [0, 2]


def test_all_variation_in_one_outlier_outside_of_the_sample_gives_a_page(
    make_set: Any, describe: Describe, render: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "MAX_SCANS", 12)
    values = np.zeros((60, 3))
    for row in range(60):
        values[row] = 1
        features = make_set({"conv": values, "dense": make_noise(60, 3)})
        parts = describe(features)
        if row not in parts.measures.sample:
            break
        values[row] = 0
    assert row in parts.measures.compared
    assert b"report" in render(features, parts)["report.html"]


@pytest.mark.slow
def test_thirty_layers_give_a_page_with_all_of_them(make_set: Any, describe: Describe, render: Any) -> None:
    features = make_set({f"conv_{number}": make_noise(60, 20, number) for number in range(30)})
    parts = describe(features)
    page = render(features, parts)["report.html"]
    assert len(page) < 5_000_000
    assert all(matrix.values.shape == (30, 30) for matrix in parts.agreement)
    assert len({scan_map.candidate for scan_map in parts.maps}) == 30
    assert sum(scan_map.method == "t-SNE" for scan_map in parts.maps) == map_module.MAX_TSNE_MAPS
