"""Tests of single units: correlations, false-discovery control, mutual information and the histogram."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import pearsonr, pointbiserialr
from sklearn.metrics import roc_auc_score

from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.units import (
    control_discoveries,
    correlate_units,
    count_histogram,
    measure_units,
)

SCANS = 100
PATIENTS = np.arange(SCANS)
GENERATOR = np.random.default_rng(3)
NOISE: NDArray[np.float32] = GENERATOR.normal(size=(SCANS, 50)).astype(np.float32)
NUMBER = Label("size", "number", GENERATOR.normal(50, 10, SCANS))
CLASSES = Label("contrast", "classes", (np.arange(SCANS) % 2).astype(float), ("no", "yes"))


def test_the_unit_that_holds_a_number_is_found_and_noise_is_not() -> None:
    features = NOISE.copy()
    features[:, 17] = -0.1 * NUMBER.values + 0.5 * NOISE[:, 17]
    tests = measure_units(features, NUMBER, PATIENTS)
    assert tests.related == 1
    assert tests.best[0].number == 17
    assert tests.best[0].correlation < -0.8
    assert tests.best[0].information > 0.4
    assert np.isnan(tests.best[0].auc)
    assert len(tests.best) == 10


def test_correlations_and_p_values_are_those_of_scipy() -> None:
    tests = measure_units(NOISE, NUMBER, PATIENTS)
    expected = [pearsonr(NOISE[:, unit], NUMBER.values) for unit in range(50)]
    np.testing.assert_allclose(tests.correlations, [one.statistic for one in expected], atol=1e-5)
    np.testing.assert_allclose(tests.p, [one.pvalue for one in expected], rtol=1e-3)


def test_the_correlation_with_two_classes_is_point_biserial_and_the_auc_has_its_direction() -> None:
    features = NOISE.copy()
    features[:, 4] -= 2 * CLASSES.values
    tests = measure_units(features, CLASSES, PATIENTS)
    best = tests.best[0]
    assert best.number == 4
    assert best.correlation == pytest.approx(pointbiserialr(CLASSES.values, features[:, 4]).statistic)
    assert best.auc == pytest.approx(roc_auc_score(CLASSES.values, -features[:, 4]))


def test_a_unit_that_holds_one_of_three_classes_is_found() -> None:
    label = Label("phase", "classes", (np.arange(SCANS) % 3).astype(float), ("a", "b", "c"))
    features = NOISE.copy()
    features[:, 8] += 3 * (label.values == 1)
    best = measure_units(features, label, PATIENTS).best[0]
    assert best.number == 8
    assert best.auc > 0.9


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    correlations = np.array([0.5, 0.3, 0.25, 0.0])
    p, q = control_discoveries(correlations, 50)
    ordered = p * 4 / np.arange(1, 5)
    np.testing.assert_allclose(q, [min(ordered[place:]) for place in range(4)])
    assert p[3] == q[3] == 1


def test_few_of_many_unrelated_units_are_called_related() -> None:
    features = np.random.default_rng(8).normal(size=(SCANS, 2000))
    tests = measure_units(features, NUMBER, PATIENTS)
    assert (tests.p < 0.05).sum() > 50  # without control about 100 units seem to be related
    assert tests.related <= 1


def test_several_scans_of_a_patient_do_not_make_a_correlation_certain() -> None:
    few = np.repeat(np.arange(10), 10)
    features, values = NOISE[:10][few], NUMBER.values[:10][few]
    by_patient = measure_units(features, Label("size", "number", values), few)
    by_scan = measure_units(features, Label("size", "number", values), PATIENTS)
    assert by_scan.related > 10
    assert by_patient.related <= 1
    assert (by_patient.scans, by_patient.patients) == (100, 10)


def test_scans_without_a_value_are_left_out() -> None:
    values = NUMBER.values.copy()
    values[::2] = np.nan
    tests = measure_units(NOISE, Label("size", "number", values), PATIENTS)
    expected = correlate_units(NOISE[1::2], NUMBER.values[1::2])
    np.testing.assert_array_equal(tests.correlations, expected)
    assert tests.scans == 50


def test_constant_units_have_no_correlation() -> None:
    tests = measure_units(np.full((SCANS, 3), 0.1, np.float32), NUMBER, PATIENTS)
    assert tests.correlations.tolist() == [0, 0, 0]
    assert tests.q.tolist() == [1, 1, 1]
    assert tests.best == ()
    assert tests.histogram is None


def test_the_histogram_counts_every_scan() -> None:
    of_number = count_histogram(NOISE[:, 0], NUMBER, NUMBER.values)
    assert of_number.counts.shape == (20, 20)
    assert of_number.counts.sum() == SCANS
    of_classes = count_histogram(NOISE[:, 0], CLASSES, CLASSES.values)
    assert of_classes.classes == ("no", "yes")
    assert of_classes.counts.shape == (20, 2)
    assert of_classes.counts.sum(axis=0).tolist() == [50, 50]
    assert of_classes.label_edges.size == 0


def test_the_mutual_information_of_a_copy_of_two_equal_classes_is_about_one_bit() -> None:
    features = NOISE.copy()
    features[:, 0] = CLASSES.values * 100 + NOISE[:, 0]
    best = measure_units(features, CLASSES, PATIENTS).best[0]
    assert best.information == pytest.approx(np.log(2), abs=0.05)
