"""Tests of single units: correlations, false-discovery control, mutual information and the histogram."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import pearsonr, pointbiserialr
from sklearn.metrics import roc_auc_score

from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.units import (
    MAX_INFORMATION_SCANS,
    UnitTests,
    compute_unit_auc,
    control_discoveries,
    correlate_units,
    count_histogram,
    estimate_information,
)

SCANS = 100
PATIENTS = np.arange(SCANS)
GENERATOR = np.random.default_rng(3)
NOISE: NDArray[np.float32] = GENERATOR.normal(size=(SCANS, 50)).astype(np.float32)
NUMBER = Label("size", "number", GENERATOR.normal(50, 10, SCANS))
CLASSES = Label("contrast", "classes", (np.arange(SCANS) % 2).astype(float), ("no", "yes"))
PHASES = Label("phase", "classes", (np.arange(SCANS) % 3).astype(float), ("a", "b", "c"))


def run_tests(
    *features: NDArray[np.float32],
    label: Label = NUMBER,
    patients: NDArray[np.intp] = PATIENTS,
    rows: int = 33,
) -> UnitTests:
    """Return the tests for one label, with the features in blocks."""
    starts = range(0, len(features[0]), rows)
    blocks = ([part[start : start + rows] for part in features] for start in starts)
    (tests,) = correlate_units(blocks, [part.shape[1] for part in features], [label], patients)
    return tests


def test_the_unit_that_holds_a_number_is_found_and_noise_is_not() -> None:
    features = NOISE.copy()
    features[:, 17] = -0.1 * NUMBER.values + 0.5 * NOISE[:, 17]
    tests = run_tests(NOISE, features)
    assert [tests.count_related(candidate) for candidate in range(2)] == [0, 1]
    assert tests.find_strongest(1, 3)[0] == 17
    assert tests.correlations[1][17] < -0.8
    assert len(tests.find_strongest(1, 3)) == 3


@pytest.mark.parametrize("rows", [7, SCANS])
def test_correlations_are_those_of_scipy_in_blocks_of_any_size(rows: int) -> None:
    tests = run_tests(NOISE + np.float32(1000), label=NUMBER, rows=rows)
    expected = [pearsonr(NOISE[:, unit] + np.float32(1000), NUMBER.values) for unit in range(50)]
    np.testing.assert_allclose(tests.correlations[0], [one.statistic for one in expected], atol=1e-6)
    p, _ = control_discoveries(tests.correlations[0], SCANS)
    np.testing.assert_allclose(p, [one.pvalue for one in expected], rtol=1e-3)


def test_labels_with_different_missing_values_are_correlated_in_one_pass() -> None:
    values = NUMBER.values.copy()
    values[::2] = np.nan
    features = NOISE.copy()
    labels = [Label("size", "number", values), CLASSES, PHASES]
    first, second, third = correlate_units([[features]], [50], labels, PATIENTS)
    expected = pearsonr(NOISE[1::2, 4], NUMBER.values[1::2]).statistic
    assert first.correlations[0][4] == pytest.approx(expected, abs=1e-6)
    assert (first.scans, second.scans) == (50, 100)
    assert second.correlations[0][4] == pytest.approx(pearsonr(NOISE[:, 4], CLASSES.values).statistic)
    of_class = [pearsonr(NOISE[:, 4], PHASES.values == code).statistic for code in range(3)]
    assert third.correlations[0][4] == pytest.approx(max(of_class, key=abs), abs=1e-6)
    assert third.classes[0][4] == int(np.argmax(np.abs(of_class)))


def test_features_of_scans_without_any_value_are_ignored() -> None:
    values = NUMBER.values.copy()
    values[:10] = np.nan
    features = NOISE.copy()
    features[:10] = np.nan
    tests = run_tests(features, label=Label("size", "number", values))
    assert np.isfinite(tests.correlations[0]).all()


def test_the_correlation_with_two_classes_is_point_biserial_and_the_auc_has_its_direction() -> None:
    features = NOISE.copy()
    features[:, 4] -= 2 * CLASSES.values
    tests = run_tests(features, label=CLASSES)
    assert tests.find_strongest(0, 1) == [4]
    expected = pointbiserialr(CLASSES.values, features[:, 4]).statistic
    assert tests.correlations[0][4] == pytest.approx(expected)
    auc = compute_unit_auc(features[:, 4], CLASSES, int(tests.classes[0][4]))
    assert auc == pytest.approx(roc_auc_score(CLASSES.values, -features[:, 4]))
    assert np.isnan(compute_unit_auc(features[:, 4], NUMBER, 0))


def test_a_unit_that_holds_one_of_three_classes_is_found() -> None:
    features = NOISE.copy()
    features[:, 8] += 3 * (PHASES.values == 1)
    tests = run_tests(features, label=PHASES)
    assert tests.find_strongest(0, 1) == [8]
    assert tests.classes[0][8] == 1
    assert compute_unit_auc(features[:, 8], PHASES, 1) > 0.9


def test_q_values_are_those_of_benjamini_and_hochberg_over_all_candidates() -> None:
    correlations = np.array([0.5, 0.3, 0.25, 0.0])
    p, q = control_discoveries(correlations, 50)
    ordered = p * 4 / np.arange(1, 5)
    np.testing.assert_allclose(q, [min(ordered[place:]) for place in range(4)])
    assert p[3] == q[3] == 1
    alone, together = run_tests(NOISE), run_tests(NOISE[:, :20], NOISE[:, 20:])
    np.testing.assert_allclose(np.concatenate(together.q), alone.q[0])


def test_few_of_many_unrelated_units_are_called_related() -> None:
    features = np.random.default_rng(8).normal(size=(SCANS, 2000)).astype(np.float32)
    tests = run_tests(features)
    p, _ = control_discoveries(tests.correlations[0], SCANS)
    assert (p < 0.05).sum() > 50  # without control about 100 units seem to be related
    assert tests.count_related(0) <= 1


def test_several_scans_of_a_patient_do_not_make_a_correlation_certain() -> None:
    few = np.repeat(np.arange(10), 10)
    label = Label("size", "number", NUMBER.values[:10][few])
    by_patient = run_tests(NOISE[:10][few], label=label, patients=few)
    by_scan = run_tests(NOISE[:10][few], label=label)
    assert by_scan.count_related(0) > 10
    assert by_patient.count_related(0) <= 1
    assert (by_patient.scans, by_patient.patients) == (100, 10)


def test_constant_units_have_no_correlation() -> None:
    tests = run_tests(np.full((SCANS, 3), 0.1, np.float32))
    assert tests.correlations[0].tolist() == [0, 0, 0]
    assert tests.q[0].tolist() == [1, 1, 1]
    assert tests.find_strongest(0, 2) == []


def test_the_histogram_counts_every_scan_also_those_far_away() -> None:
    unit = NOISE[:, 0].copy()
    unit[5] = 1e6
    of_number = count_histogram(unit, NUMBER)
    assert of_number.counts.shape == (12, 8)
    assert of_number.counts.sum() == SCANS
    assert of_number.unit_edges[-1] < 4
    of_classes = count_histogram(unit, CLASSES)
    assert of_classes.counts.shape == (12, 2)
    assert of_classes.counts.sum(axis=0).tolist() == [50, 50]
    assert of_classes.label_edges.size == 0


def test_a_unit_with_one_value_for_nearly_all_scans_has_a_histogram() -> None:
    unit = np.zeros(SCANS)
    unit[3] = 5
    assert count_histogram(unit, CLASSES).counts.sum() == SCANS


def test_the_mutual_information_of_a_copy_of_two_equal_classes_is_about_one_bit() -> None:
    features = np.stack([CLASSES.values * 100 + NOISE[:, 0], NOISE[:, 1]], axis=1)
    copy, noise = estimate_information(features, CLASSES)
    assert copy == pytest.approx(np.log(2), abs=0.05)
    assert noise < 0.2
    assert np.isnan(estimate_information(features[:5], Label("x", "number", NUMBER.values[:5]))).all()


def test_the_mutual_information_is_estimated_from_a_sample() -> None:
    values = np.random.default_rng(0).normal(size=MAX_INFORMATION_SCANS + 100)
    label = Label("size", "number", values)
    information = estimate_information(values[:, None], label)
    assert information[0] > 2
    np.testing.assert_array_equal(information, estimate_information(values[:, None], label))
