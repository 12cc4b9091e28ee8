"""Folds: a patient is in one part, classes have equal shares, and the same seed gives the same folds."""

from __future__ import annotations

import numpy as np
import pytest

from featray.commands.report.labeled.folds import make_folds, sample_scans

GENERATOR = np.random.default_rng(5)
PATIENTS = GENERATOR.integers(0, 60, 150)
CLASSES = GENERATOR.integers(0, 3, 150)


def test_there_are_five_repeats_of_four_folds_that_hold_each_scan_once_per_repeat() -> None:
    folds = make_folds(PATIENTS, CLASSES, 0)
    assert [fold.repeat for fold in folds] == [repeat for repeat in range(5) for _ in range(4)]
    for repeat in range(5):
        tests = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        np.testing.assert_array_equal(np.sort(tests), np.arange(150))


def test_no_patient_is_in_both_parts() -> None:
    for fold in make_folds(PATIENTS, CLASSES, 0):
        assert not set(PATIENTS[fold.train]) & set(PATIENTS[fold.test])
        assert len(fold.train) + len(fold.test) == 150


def test_repeats_differ_and_the_seed_decides() -> None:
    folds, again, others = (make_folds(PATIENTS, CLASSES, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))
    assert not all(np.array_equal(a.test, b.test) for a, b in zip(folds, others, strict=True))
    assert not np.array_equal(folds[0].test, folds[4].test)


def test_classes_have_equal_shares_if_patients_have_one_scan() -> None:
    classes = np.repeat([0, 1], [41, 15])
    for fold in make_folds(np.arange(56), classes, 3):
        assert len(fold.test) in (13, 14, 15)
        assert int(classes[fold.test].sum()) in (3, 4)


def test_classes_have_nearly_equal_shares_if_patients_have_many_scans() -> None:
    shares = [np.bincount(CLASSES[fold.test], minlength=3) for fold in make_folds(PATIENTS, CLASSES, 0)]
    expected = np.bincount(CLASSES) / 4
    assert np.abs(shares - expected).max() <= 4


def test_folds_of_numbers_have_equal_sizes() -> None:
    assert {len(fold.test) for fold in make_folds(np.arange(50), None, 0)} == {12, 13}


def test_fewer_patients_than_folds_are_an_error() -> None:
    with pytest.raises(ValueError, match="need 4 patients"):
        make_folds(np.array([0, 0, 1, 1, 2, 2]), None, 0)


def test_a_sample_holds_whole_patients_and_at_most_the_limit() -> None:
    scans = sample_scans(PATIENTS, None, 50, 0)
    assert 40 <= len(scans) <= 50
    sampled = set(PATIENTS[scans])
    np.testing.assert_array_equal(scans, np.flatnonzero(np.isin(PATIENTS, list(sampled))))
    np.testing.assert_array_equal(sample_scans(PATIENTS, CLASSES, 150, 0), np.arange(150))


def test_a_sample_holds_equal_shares_of_the_classes_as_far_as_they_have_scans() -> None:
    classes = np.repeat([0, 1, 2], [5000, 20, 1000])
    scans = sample_scans(np.arange(6020), classes, 200, 0)
    assert np.bincount(classes[scans]).tolist() == [90, 20, 90]
    by_patient = sample_scans(PATIENTS, CLASSES, 90, 0)
    assert len(by_patient) <= 90
    assert np.bincount(CLASSES[by_patient]).min() >= 20
