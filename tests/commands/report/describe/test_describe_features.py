"""Features with known properties give the tables, heat maps, maps and sentences that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.describe import describe_features as whole
from featray.commands.report.describe import maps as map_module
from featray.commands.report.describe import measure, scope
from featray.commands.report.describe.describe_features import LabelFreeParts
from featray.commands.report.describe.findings import Kind
from featray.commands.report.label_free.rank import measure_rank
from featray.commands.report.label_free.similarity import compare_features
from featray.commands.report.page.model import Column

Features = NDArray[np.float64]
Describe = Callable[..., LabelFreeParts]
SCANS = 120


@pytest.fixture
def quick_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace t-SNE, which takes most of the time."""
    monkeypatch.setattr(map_module, "_run_tsne", lambda projection, seed: projection.coordinates[:, :2])


pytestmark = pytest.mark.usefixtures("quick_maps")


def make_layers(scans: int = SCANS, seed: int = 0) -> dict[str, Features]:
    """Return layers that share six directions: a wide one with a copy, and the means of latents."""
    rng = np.random.default_rng(seed)
    content = rng.normal(size=(scans, 6))
    conv = content @ rng.normal(size=(6, 40)) + 0.3 * rng.normal(size=(scans, 40))
    return {"conv": conv, "copy": 3 * conv[:, ::-1] + 1, "encoder/z_mean": content}


def get_cells(parts: LabelFreeParts, candidate: str) -> dict[str, Any]:
    (row,) = [row for row in parts.health.rows if row[0] == candidate]
    return dict(zip(parts.health.columns, row, strict=True))


def list_kinds(parts: LabelFreeParts) -> list[tuple[str, Kind]]:
    return [(finding.candidate, finding.kind) for finding in parts.findings]


def test_dead_constant_and_duplicate_units_and_zeros_are_counted(make_set: Any, describe: Describe) -> None:
    conv = make_layers()["conv"].astype(np.float32)
    conv[:, 20:35] = 0
    conv[:, 19] = conv[:, 3]
    conv[:, 18] *= 1e-7
    cells = get_cells(parts := describe(make_set({"conv": conv})), "conv (vector)")
    expected = {"Values": 40, "Alive": 24, "Constant": 15, "Dead": 1, "Duplicate units": 1}
    assert {name: cells[name] for name in expected} == expected
    assert cells["Exact zeros"] == "38 %"
    assert parts.findings == ()
    conv[:, :15] = 7
    (finding,) = describe(make_set({"conv": conv})).findings
    assert finding.kind is Kind.FEW_UNITS
    assert finding.reason == ("31 of 40 values (78 %) are the same, or nearly the same, for all 120 scans.")


def test_two_equal_layers_agree_and_one_is_redundant(make_set: Any, describe: Describe) -> None:
    parts = describe(make_set(make_layers()))
    cka, common = parts.agreement
    assert cka.rows == cka.columns == ("conv (vector)", "copy (vector)", "z_mean (vector)")
    assert cka.values[0, 1] == pytest.approx(1)
    assert 0.5 < cka.values[0, 2] < 0.95
    assert common.values[0, 1] == 1
    assert 0.1 < common.values[0, 2] < 1
    assert "from 120 scans" in cka.reading
    assert "0.084 by chance" in common.reading
    assert list_kinds(parts) == [("copy (vector)", Kind.REDUNDANT)]
    assert parts.findings[0].other == "conv (vector)"
    assert parts.vetoes[0].reason.startswith(
        "Nearly the same as conv (vector), which has as many values: debiased CKA 1.00."
    )


def test_the_smaller_of_two_equal_layers_is_named(make_set: Any, describe: Describe) -> None:
    conv = make_layers()["conv"]
    (finding,) = describe(make_set({"big": np.repeat(conv, 2, axis=1), "conv": conv})).findings
    assert (finding.candidate, finding.other) == ("big (vector)", "conv (vector)")
    assert "which has 40 values instead of 80" in finding.reason


def test_a_layer_that_is_ruled_out_replaces_no_other(make_set: Any, describe: Describe) -> None:
    conv = make_layers()["conv"]
    kinds = list_kinds(describe(make_set({"big": np.repeat(conv, 2, axis=1), "sampling": conv})))
    assert kinds == [("sampling (vector)", Kind.SAMPLING)]


def make_latents(in_use: int, scans: int = SCANS) -> dict[str, Features]:
    """Return means and log-variances of 16 latents, the others of which equal the prior."""
    rng = np.random.default_rng(3)
    mean, log_variance = np.zeros((scans, 16)), np.zeros((scans, 16))
    mean[:, in_use:] = 1e-3 * rng.normal(size=(scans, 16 - in_use))
    mean[:, :in_use] = rng.normal(size=(scans, in_use))
    log_variance[:, :in_use] = np.log(0.1) + 0.1 * rng.normal(size=(scans, in_use))
    return {"encoder/z_mean": mean, "encoder/z_log_var": log_variance}


@pytest.mark.parametrize(
    ("in_use", "sentence", "kinds"),
    [
        (0, "The posterior has collapsed: none of 16 latents is in use", [Kind.COLLAPSE]),
        (1, "Most of the posterior has collapsed: only 1 of 16 latents is in use", [Kind.COLLAPSE]),
        (5, "The posterior has collapsed in part: 5 of 16 latents are in use", []),
        (16, "The posterior has not collapsed: all 16 latents are in use", []),
    ],
)
def test_the_verdict_on_posterior_collapse_is_a_sentence(
    in_use: int, sentence: str, kinds: list[Kind], make_set: Any, describe: Describe
) -> None:
    layers = make_latents(in_use)
    parts = describe(make_set(layers))
    assert f"z_mean (vector): {sentence}" in parts.health.reading
    of_means = [finding for finding in parts.findings if finding.candidate == "z_mean (vector)"]
    assert [finding.kind for finding in of_means] == kinds
    cells = get_cells(parts, "z_mean (vector)")
    assert (cells["Active latents"], cells["Latents in use"]) == (in_use, in_use)
    mean, log_variance = (values.astype(np.float32).astype(np.float64) for values in layers.values())
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=1).mean()
    assert cells["KL (nats)"] == pytest.approx(kl)
    assert get_cells(parts, "z_log_var (vector)")["KL (nats)"] is None
    assert ("z_log_var (vector)", Kind.UNCERTAINTY) in list_kinds(parts)


def test_standard_deviations_give_no_divergence(make_set: Any, describe: Describe) -> None:
    layers = make_latents(4)
    parts = describe(
        make_set({"z_mean": layers["encoder/z_mean"], "z_log_sigma": layers["encoder/z_log_var"]})
    )
    cells = get_cells(parts, "z_mean (vector)")
    assert (cells["Active latents"], cells["Latents in use"], cells["KL (nats)"]) == (4, None, None)
    text = next(method.text for method in parts.methods if "collapse" in method.title)
    assert "z_log_sigma (vector) is not read as log-variances" in text


def test_latents_that_are_not_in_use_do_not_decide_the_neighbors(make_set: Any, describe: Describe) -> None:
    layers = make_latents(4)
    only_used = {"z_mean": layers["encoder/z_mean"][:, :4]}
    first = describe(make_set(layers)).neighbors[0]
    second = describe(make_set(only_used)).neighbors[0]
    np.testing.assert_array_equal(first.neighbors, second.neighbors)


def test_a_mean_after_a_relu_and_a_random_layer_are_named(make_set: Any, describe: Describe) -> None:
    content = make_layers()["encoder/z_mean"]
    kinds = list_kinds(describe(make_set({"z_mean": np.maximum(content, 0), "sampling": content})))
    assert ("z_mean (vector)", Kind.RELU) in kinds
    assert ("sampling (vector)", Kind.SAMPLING) in kinds


def test_one_outlier_is_found_in_the_layers_in_which_it_is_one(make_set: Any, describe: Describe) -> None:
    layers = make_layers()
    layers["conv"][17] *= 20
    layers["copy"][17] *= 3
    parts = describe(make_set(layers))
    outlier = parts.outliers[0]
    assert parts.scans.ids[outlier.scan] == "scan-00017"
    assert outlier.candidate == "conv (vector)"
    assert outlier.score > 5
    assert outlier.reason.endswith("It is an outlier in 2 of 3 layers.")


def test_all_layers_are_measured_without_a_scan_that_is_broken_in_one(
    make_set: Any, describe: Describe
) -> None:
    layers = make_layers()
    layers["copy"][5, 2] = np.nan
    parts = describe(make_set(layers))
    assert [row[2] for row in parts.health.rows] == [0, 1, 0]
    assert parts.findings[0].reason == "1 of 120 scans has NaN or infinite values."
    assert parts.measures.scope.used.tolist() == [row for row in range(SCANS) if row != 5]
    assert "1 of 120 scans is left out" in parts.cautions[0]
    assert np.isnan(parts.maps[0].x).sum() == 1
    assert (parts.neighbors[0].neighbors[5] == -1).all()
    assert not (parts.neighbors[0].neighbors == 5).any()


def test_a_layer_with_many_broken_scans_is_not_measured(make_set: Any, describe: Describe) -> None:
    layers = make_layers()
    layers["conv"][::2] = np.inf
    layers["encoder/z_mean"][7] = np.nan
    parts = describe(make_set(layers))
    assert [candidate.view.layer for candidate in parts.measures.candidates] == ["copy", "z_mean"]
    assert parts.measures.scope.lost == 1
    cells = get_cells(parts, "conv (vector)")
    assert (cells["Broken scans"], cells["Alive"], cells["Effective rank"]) == (60, None, None)
    assert parts.findings[0].reason == (
        "60 of 120 scans have NaN or infinite values. Nothing else was measured of it."
    )
    assert any(caution.startswith("conv (vector) is not measured") for caution in parts.cautions)


def test_a_layer_that_gives_few_different_rows_is_named(make_set: Any, describe: Describe) -> None:
    layers = make_layers()
    layers["conv"] = layers["conv"][np.arange(SCANS) % 4]
    layers["copy"][:] = 3.5
    parts = describe(make_set(layers))
    reasons = {finding.candidate: finding.reason for finding in parts.findings}
    assert reasons["conv (vector)"] == (
        "It has only 4 different rows of values for 120 scans; another layer has 120."
    )
    assert reasons["copy (vector)"] == "All 120 scans have the same values."
    assert get_cells(parts, "conv (vector)")["Equal scans"] == 116
    assert "copy (vector)" not in {lists.candidate for lists in parts.neighbors}
    assert "copy (vector)" not in {scan_map.candidate for scan_map in parts.maps}


def test_the_table_says_that_ranks_are_not_comparable_and_explains_every_column(
    make_set: Any, describe: Describe
) -> None:
    health = describe(make_set(make_latents(4))).health
    assert "not comparable in quality" in health.reading
    assert set(health.explanations) == set(health.columns[1:])
    assert all(text.count(". ") == 0 and text.endswith(".") for text in health.explanations.values())


def test_a_rank_near_the_cap_is_marked(make_set: Any, describe: Describe) -> None:
    noise = np.random.default_rng(0).normal(size=(30, 200))
    cell = get_cells(describe(make_set({"noise": noise})), "noise (vector)")["Effective rank"]
    assert str(cell).endswith("near the cap of 29")


def test_of_many_scans_sums_are_exact_and_the_rest_is_of_a_sample_with_the_outliers(
    make_set: Any, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "MAX_SCANS", 50)
    monkeypatch.setattr(whole, "MAX_SHOWN", 50)
    layers = make_layers(400)
    layers["conv"][123] *= 20
    features = make_set(layers)
    parts = describe(features)
    assert len(parts.measures.sample) == 50
    assert 123 in parts.shown
    assert parts.scans.ids == tuple(features.scan_ids[row] for row in parts.shown)
    assert len(parts.scans.ids) <= 50 + measure.MAX_OUTLIERS
    assert parts.scans.ids[parts.outliers[0].scan] == "scan-00123"
    stored = [file.read(slice(None)) for file in features.files]
    for candidate, values in zip(parts.measures.candidates, stored, strict=True):
        assert candidate.sample.rank.scans == 400
        assert candidate.sample.rank.effective_rank == pytest.approx(measure_rank(values).effective_rank)
    np.testing.assert_allclose(parts.agreement[0].values, compare_features(stored).cka, atol=1e-9)
    assert "from 400 scans" in parts.agreement[0].reading
    (caution,) = parts.cautions
    assert caution.startswith(
        "Maps, neighbors and the intrinsic dimension are from at most 50 of 400 scans, drawn at random"
    )
    assert all(np.isfinite(scan_map.x).all() for scan_map in parts.maps)
    ids = np.array(parts.shown)
    nearest = parts.neighbors[0].neighbors
    values = (stored[0] - stored[0][ids].mean(axis=0)) / stored[0][ids].std(axis=0)
    distances = np.linalg.norm(values[ids][:, None] - values[ids], axis=2) + np.diag(
        np.full(len(ids), np.inf)
    )
    np.testing.assert_array_equal(nearest[:, 0], distances.argmin(axis=1))


def test_wide_layers_shrink_the_sample_and_are_compared_on_it(
    make_set: Any, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "MAX_SAMPLE_BYTES", 8 * 40 * 60)
    monkeypatch.setattr(measure, "_MAX_PRODUCT_UNITS", 10)
    parts = describe(make_set(make_layers()))
    assert len(parts.measures.sample) == 60
    assert {candidate.sample.rank.scans for candidate in parts.measures.candidates} == {60}
    assert parts.cautions == (
        "Maps, neighbors, the intrinsic dimension, ranks, duplicate units and the similarity of layers are "
        "from at most 60 of 120 scans, drawn at random, because a layer has 40 values per scan.",
    )
    assert "from 60 scans" in parts.agreement[0].reading
    assert len(parts.scans.ids) == SCANS
    others = np.isnan(parts.maps[0].x)
    assert others.sum() == SCANS - len(parts.measures.compared)
    assert ((parts.neighbors[0].neighbors == -1).all(axis=1) == others).all()


def test_maps_have_captions_and_the_preferred_candidates_come_first(
    make_set: Any, describe: Describe
) -> None:
    layers = make_layers()
    layers["conv"][:, 10:] = 0
    parts = describe(make_set(layers), preferred=["z_mean (vector)", "HU histogram"])
    names = [(scan_map.candidate, scan_map.method) for scan_map in parts.maps]
    order = ["z_mean (vector)", "copy (vector)", "conv (vector)"]
    assert names == [(name, method) for name in order for method in ("PCA", "t-SNE")]
    assert [lists.candidate for lists in parts.neighbors] == order
    assert all("mislead" in scan_map.caption for scan_map in parts.maps if scan_map.method == "t-SNE")
    variances = np.linalg.eigvalsh(np.corrcoef(layers["encoder/z_mean"].T))
    assert f"hold {100 * variances[-2:].sum() / 6:.0f} % of the variance" in parts.maps[0].caption


def test_the_number_of_maps_is_limited(
    make_set: Any, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_module, "MAX_TSNE_SCANS", SCANS)
    monkeypatch.setattr(map_module, "_MAX_MAP_BYTES", 3 * SCANS * map_module._SVG_POINT_BYTES)
    parts = describe(make_set(make_layers()))
    assert [(scan_map.candidate, scan_map.method) for scan_map in parts.maps] == [
        ("conv (vector)", "PCA"),
        ("conv (vector)", "t-SNE"),
        ("copy (vector)", "PCA"),
    ]
    assert "1 layer has no map, because the page would become too large." in parts.cautions
    assert any(caution.startswith("2 layers without a t-SNE map") for caution in parts.cautions)


def test_progress_grows_from_0_to_1(make_set: Any, describe: Describe) -> None:
    shares: list[float] = []
    describe(make_set(make_layers()), on_step=lambda text, share: shares.append(share))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def test_the_page_and_the_numbers_hold_all_parts(make_set: Any, describe: Describe, render: Any) -> None:
    labels = (Column("contrast", tuple("yes" if number % 3 else None for number in range(SCANS))),)
    features = make_set(make_latents(4), {"format": ["nifti", "dicom"] * 60})
    parts = describe(features, columns=labels)
    files = render(features, parts)
    page = files["report.html"].decode()
    for text in ("Kullback-Leibler", "Similarity of layers", "t-SNE", "collapsed in part", "contrast"):
        assert text in page
    document = json.loads(files["report.json"])
    assert document["health"]["rows"][0][0] == "z_mean (vector)"
    numbers = parts.numbers.to_pylist()
    assert [row["candidate"] for row in numbers] == ["z_mean (vector)", "z_log_var (vector)"]
    assert (numbers[0]["latents_in_use"], numbers[0]["collapse"]) == (4, "partial")
    assert numbers[1]["latents"] is None
    assert numbers[0]["rank_scans"] == SCANS
