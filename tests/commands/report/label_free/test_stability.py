"""Intraclass correlations of the published table of Shrout and Fleiss, and cosines of known angles."""

from __future__ import annotations

import numpy as np
import pytest

from featray.commands.report.label_free.stability import measure_cosines, measure_reliability

SHROUT_AND_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], np.float32
)
"""Ratings of six targets (rows) by four judges: Shrout and Fleiss 1979, table 2."""


def test_the_table_of_shrout_and_fleiss_has_the_published_correlations() -> None:
    reliability = measure_reliability(SHROUT_AND_FLEISS[:, :, None])
    assert (reliability.scans, reliability.repeats) == (6, 4)
    assert reliability.icc_1_1[0] == pytest.approx(0.17, abs=0.005)
    assert reliability.icc_2_1[0] == pytest.approx(0.29, abs=0.005)
    assert reliability.icc_3_1[0] == pytest.approx(0.71, abs=0.005)


def test_the_table_has_the_correlations_of_its_mean_squares() -> None:
    between, within, judges, error = 11.24, 6.26, 32.49, 1.02  # table 3 of the paper
    reliability = measure_reliability(SHROUT_AND_FLEISS[:, :, None])
    assert reliability.icc_1_1[0] == pytest.approx((between - within) / (between + 3 * within), abs=0.001)
    agreement = between + 3 * error + 4 * (judges - error) / 6
    assert reliability.icc_2_1[0] == pytest.approx((between - error) / agreement, abs=0.001)
    assert reliability.icc_3_1[0] == pytest.approx((between - error) / (between + 3 * error), abs=0.001)


def test_units_are_independent_and_offsets_and_scales_do_not_matter() -> None:
    table = SHROUT_AND_FLEISS.astype(np.float64)
    features = np.stack([table, table * -1e-6, table + 1e8, table[:, ::-1]], axis=2)
    reliability = measure_reliability(features)
    for values in (reliability.icc_1_1, reliability.icc_2_1, reliability.icc_3_1):
        np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_equal_repeats_are_perfectly_reliable() -> None:
    features = np.repeat(np.random.default_rng(0).normal(size=(20, 1, 3)), 4, axis=1)
    reliability = measure_reliability(features)
    for values in (reliability.icc_1_1, reliability.icc_2_1, reliability.icc_3_1):
        np.testing.assert_allclose(values, 1)
    assert reliability.good_share == 1


def test_a_shift_of_all_scans_counts_for_agreement_only() -> None:
    first = np.random.default_rng(1).normal(size=(200, 1))
    reliability = measure_reliability(np.stack([first, first + 1], axis=1))
    assert reliability.icc_3_1[0] == pytest.approx(1)
    variance = first.var(ddof=1)
    # mean squares: between 2 v, error 0, repeats n / 2
    assert reliability.icc_2_1[0] == pytest.approx(2 * variance / (2 * variance + 1))


def test_noise_gives_the_share_of_the_variance_of_the_scans() -> None:
    rng = np.random.default_rng(2)
    scans = rng.normal(size=(20000, 1, 2)) * [2, 1]
    reliability = measure_reliability(scans + rng.normal(size=(20000, 3, 2)))
    np.testing.assert_allclose(reliability.icc_3_1, [0.8, 0.5], atol=0.02)
    np.testing.assert_allclose(reliability.icc_2_1, [0.8, 0.5], atol=0.02)
    assert reliability.good_share == 0.5


def test_a_unit_without_variation_is_not_defined_and_not_counted() -> None:
    features = np.repeat(np.random.default_rng(3).normal(size=(20, 1, 3)), 2, axis=1).astype(np.float32)
    features[:, :, 1] = 0.1
    features[:, :, 2] = 1
    features[::2, 0, 2] = np.nextafter(np.float32(1), np.float32(2))
    reliability = measure_reliability(features)
    assert reliability.is_defined.tolist() == [True, False, False]
    assert reliability.icc_2_1[1:].tolist() == [0, 0]
    assert reliability.good_share == 1


def test_equal_scans_with_unequal_repeats_are_not_reliable() -> None:
    features = np.tile(np.array([1.0, 2.0])[:, None], (30, 1, 1))
    reliability = measure_reliability(features)
    assert reliability.is_defined.tolist() == [True]
    assert reliability.icc_2_1[0] == reliability.icc_3_1[0] == 0
    assert reliability.icc_1_1[0] == -1


@pytest.mark.parametrize(("scans", "repeats"), [(1, 2), (2, 2), (2, 5), (3, 2)])
def test_few_scans_are_measured_but_not_summarized(scans: int, repeats: int) -> None:
    reliability = measure_reliability(np.random.default_rng(4).normal(size=(scans, repeats, 50)))
    assert reliability.good_share is None
    assert reliability.is_defined.all() == (scans > 1)
    for values in (reliability.icc_1_1, reliability.icc_2_1, reliability.icc_3_1):
        assert np.isfinite(values).all()
        assert (np.abs(values) <= 1 + 1e-9).all() or repeats == 2


@pytest.mark.parametrize("shape", [(5, 1, 3), (5, 3), (0, 2, 3)])
def test_other_shapes_are_an_error(shape: tuple[int, ...]) -> None:
    for measure in (measure_reliability, measure_cosines):
        with pytest.raises(ValueError, match="expected"):
            measure(np.zeros(shape))


def test_values_that_are_not_finite_are_an_error() -> None:
    features = np.zeros((3, 2, 2))
    features[1, 1, 1] = np.inf
    for measure in (measure_reliability, measure_cosines):
        with pytest.raises(ValueError, match="NaN or infinity"):
            measure(features)


def test_cosines_are_those_of_known_angles() -> None:
    features = np.array([[[1, 0], [1, 1], [0, 5]], [[2, 0], [1, 0], [-3, 0]]], np.float32)
    stability = measure_cosines(features)
    np.testing.assert_allclose(stability.cosine, [np.sqrt(0.5) / 2, 0], atol=1e-12)
    assert stability.is_defined.all()
    assert (stability.scans, stability.repeats) == (2, 3)


def test_the_scale_of_a_scan_does_not_change_its_cosine() -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(10, 3, 6))
    scaled = features * rng.uniform(1e-30, 1e30, size=(10, 3, 1))
    np.testing.assert_allclose(measure_cosines(scaled).cosine, measure_cosines(features).cosine)
    assert measure_cosines(features[:, :1].repeat(2, 1) * 1e200).cosine == pytest.approx(1)


def test_cosines_between_scans_are_those_of_all_pairs() -> None:
    originals = np.random.default_rng(6).normal(size=(7, 4)) + 1
    directions = originals / np.linalg.norm(originals, axis=1, keepdims=True)
    pairs = (directions @ directions.T)[np.triu_indices(7, 1)]
    stability = measure_cosines(np.stack([originals, originals], axis=1))
    assert stability.between_scans == pytest.approx(pairs.mean())


def test_a_large_common_offset_brings_all_cosines_near_one() -> None:
    features = np.random.default_rng(7).normal(size=(10, 2, 8)) + 1000
    stability = measure_cosines(features)
    assert stability.cosine.min() > 0.9999
    assert stability.between_scans is not None
    assert stability.between_scans > 0.9999


def test_a_scan_of_zeros_has_no_cosine() -> None:
    features = np.ones((3, 2, 4))
    features[0] = 0
    features[1, 1] = 0
    stability = measure_cosines(features)
    assert stability.is_defined.tolist() == [False, False, True]
    assert stability.cosine.tolist() == [0, 0, 1]
    assert stability.between_scans is None
