"""Debiased CKA: the streamed form equals the formula on Gram matrices, and known cases have known values."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import compute_products
from featray.commands.report.label_free.similarity import Similarity, compare_features, compare_products

Values = NDArray[np.float64]


def compute_reference(a: Values, b: Values) -> float:
    """Return debiased CKA with the unbiased HSIC estimator of Song et al. on whole Gram matrices."""

    def estimate(k: Values, m: Values) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        first = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2))
        return float((first - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)) / (n * (n - 3)))

    k, m = a @ a.T, b @ b.T
    return float(estimate(k, m) / np.sqrt(estimate(k, k) * estimate(m, m)))


def make_layers(scans: int, seed: int = 0) -> list[Values]:
    """Return two layers that share a latent of five values, and an unrelated one."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(scans, 5))
    return [
        latent @ rng.normal(size=(5, 40)) + 0.1 * rng.normal(size=(scans, 40)),
        latent @ rng.normal(size=(5, 300)) + 0.1 * rng.normal(size=(scans, 300)) + 2,
        rng.normal(size=(scans, 64)),
    ]


def compare_both_ways(layers: list[Values]) -> tuple[Similarity, Similarity]:
    return compare_products(compute_products(layers)), compare_features(layers)


@pytest.mark.parametrize("scans", [4, 5, 30, 200])
def test_both_ways_equal_the_formula(scans: int) -> None:
    layers = make_layers(scans)
    expected = [[compute_reference(a, b) for b in layers] for a in layers]
    for similarity in compare_both_ways(layers):
        assert similarity.scans == scans
        assert similarity.is_defined.all()
        np.testing.assert_allclose(similarity.cka, expected, rtol=0, atol=1e-10)


def test_a_shared_latent_is_found_and_an_unrelated_layer_is_not() -> None:
    cka = compare_features(make_layers(300)).cka
    assert cka[0, 1] > 0.8
    assert abs(cka[0, 2]) < 0.05


def test_unrelated_layers_wider_than_the_scans_are_not_similar() -> None:
    rng = np.random.default_rng(1)
    layers = [rng.normal(size=(50, 2000)), rng.normal(size=(50, 2000))]
    k, m = (one @ one.T for one in (layer - layer.mean(axis=0) for layer in layers))
    biased = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert biased > 0.95
    for similarity in compare_both_ways(layers):
        assert abs(similarity.cka[0, 1]) < 0.1


def test_a_rotated_scaled_and_shifted_copy_has_similarity_one() -> None:
    features = make_layers(80)[0]
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 40)))[0]
    for similarity in compare_both_ways([features, features @ rotation * 1e-4 + 7]):
        assert similarity.cka[0, 1] == pytest.approx(1, abs=1e-10)


def test_a_large_offset_does_not_change_the_similarity() -> None:
    layers = make_layers(100)
    moved = [layers[0] + 1e7, layers[1] - 1e7, layers[2]]
    for similarity in compare_both_ways(moved):
        np.testing.assert_allclose(similarity.cka, compare_features(layers).cka, atol=1e-7)


def test_very_small_and_very_large_scales_do_not_overflow() -> None:
    layers = make_layers(50)
    expected = compare_features(layers).cka
    for similarity in compare_both_ways([layers[0] * 1e38, layers[1] * 1e-38, layers[2]]):
        np.testing.assert_allclose(similarity.cka, expected, atol=1e-9)


def test_a_constant_candidate_has_similarity_zero_and_is_not_defined() -> None:
    layers = [np.full((30, 8), 0.1), make_layers(30)[0]]
    for similarity in compare_both_ways(layers):
        assert similarity.is_defined.tolist() == [False, True]
        assert similarity.cka.tolist() == [[0, 0], [0, 1]]


def test_variation_in_a_single_scan_is_not_defined() -> None:
    lonely = np.zeros((30, 8))
    lonely[3] = 5
    for similarity in compare_both_ways([lonely, make_layers(30)[0]]):
        assert similarity.is_defined.tolist() == [False, True]
        assert similarity.cka[0, 1] == 0


@pytest.mark.parametrize("scans", [1, 2, 3])
def test_fewer_than_four_scans_are_not_defined(scans: int) -> None:
    for similarity in compare_both_ways(make_layers(scans)):
        assert not similarity.is_defined.any()
        assert not similarity.cka.any()


def test_one_unit_can_be_compared() -> None:
    unit = np.random.default_rng(3).normal(size=(40, 1))
    for similarity in compare_both_ways([unit, -3 * unit]):
        assert similarity.cka[0, 1] == pytest.approx(1)


def test_candidates_with_different_scans_are_an_error() -> None:
    layers = make_layers(20)
    with pytest.raises(ValueError, match="same scans"):
        compare_features([layers[0], layers[1][:10]])
