"""t-SNE keeps groups apart and gives the same map again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from featray.commands.report.describe.describe_features import LabelFreeParts


@pytest.mark.slow
def test_t_sne_keeps_neighborhoods_and_is_deterministic(
    make_set: Any, describe: Callable[..., LabelFreeParts]
) -> None:
    rng = np.random.default_rng(0)
    group = np.arange(60) % 3
    features = make_set({"conv": 8 * np.eye(3)[group] @ rng.normal(size=(3, 80)) + rng.normal(size=(60, 80))})
    first, second = (describe(features, seed=4).maps[1] for _ in range(2))
    assert first.method == "t-SNE"
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(first.y, second.y)
    points = np.stack([first.x, first.y], 1)
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(60, np.inf))
    assert (group[distances.argmin(axis=1)] == group).all()
