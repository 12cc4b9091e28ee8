"""Baselines without a model: the header, the histogram of HU, and resized voxels."""

from __future__ import annotations

import numpy as np
import pytest

from featray.commands.report.labeled.baselines import (
    count_hu_histogram,
    make_box_weights,
    make_header_matrix,
    resize_voxels,
)


def test_the_header_becomes_logarithms_and_one_column_per_orientation() -> None:
    matrix = make_header_matrix(
        {
            "spacing": [[2.0, 0.5, 0.5], [1.0, 1.0, 1.0]],
            "shape": [[64, 512, 512], [128, 256, 256]],
            "orientation": ["LPS", "RAS"],
        }
    )
    values = dict(zip(matrix.names, matrix.values.T, strict=True))
    assert values["spacing z"].tolist() == [1, 0]
    assert values["voxels z"].tolist() == [6, 7]
    assert values["size z"].tolist() == [7, 7]
    assert values["orientation LPS"].tolist() == [1, 0]
    assert len(matrix.names) == 11


def test_missing_geometry_becomes_the_median_and_is_marked() -> None:
    matrix = make_header_matrix(
        {
            "spacing": [[2.0, 1.0, 1.0], None, [2.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
            "shape": [[64, 64, 64]] * 4,
            "orientation": ["LPS", None, "LPS", "LPS"],
        }
    )
    values = dict(zip(matrix.names, matrix.values.T, strict=True))
    assert np.isfinite(matrix.values).all()
    assert values["spacing z"].tolist() == [1, 1, 1, 1]
    assert values["geometry is missing"].tolist() == [0, 1, 0, 1]
    assert values["orientation LPS"].tolist() == [1, 0, 1, 1]


def test_a_table_without_any_geometry_has_finite_columns() -> None:
    matrix = make_header_matrix({"spacing": [None] * 2, "shape": [None] * 2, "orientation": [None] * 2})
    assert np.isfinite(matrix.values).all()


def test_the_histogram_holds_shares_and_counts_values_outside_in_the_last_bins() -> None:
    volume = np.array([-3000, -1000, 0, 1000, 3000, 3000, 3000, 3000], np.int16).reshape(2, 2, 2)
    histogram = count_hu_histogram(volume)
    assert histogram.shape == (64,)
    assert histogram.sum() == pytest.approx(1)
    assert (histogram[0], histogram[32], histogram[-1]) == (0.25, 0.125, 0.625)


def test_resized_voxels_are_means_over_boxes() -> None:
    volume = np.random.default_rng(0).normal(size=(32, 48, 64)).astype(np.float32)
    boxes = volume.reshape(16, 2, 16, 3, 16, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(resize_voxels(volume), boxes.ravel(), atol=1e-6)


def test_boxes_that_divide_voxels_keep_the_mean() -> None:
    volume = np.random.default_rng(0).normal(size=(20, 5, 16)).astype(np.float32)
    resized = resize_voxels(volume)
    assert resized.shape == (4096,)
    assert resized.mean() == pytest.approx(volume.mean(), abs=1e-6)
    np.testing.assert_allclose(make_box_weights(5, 2), [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
