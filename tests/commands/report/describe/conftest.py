"""Describes sets of features, and makes pages of the parts without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from featray.commands.report.describe.describe_features import Emphasis, LabelFreeParts, describe_features
from featray.commands.report.describe.measure import measure_features
from featray.commands.report.describe.progress import Span
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.page.files import make_files
from featray.commands.report.page.model import Candidate, PageModel


def describe_with_defaults(features: FeatureSet, **options: Any) -> LabelFreeParts:
    seed, on_step = options.pop("seed", 0), options.pop("on_step", lambda text, share: None)
    measuring, mapping = Span(on_step).divide(0.6, 1.0)
    measures = measure_features(features, seed, measuring)
    return describe_features(features, measures, Emphasis(**options), seed, mapping.report)


@pytest.fixture
def describe() -> Callable[..., LabelFreeParts]:
    """Return a function that describes features, with defaults for everything except the features."""
    return describe_with_defaults


def make_page_files(features: FeatureSet, parts: LabelFreeParts) -> dict[str, bytes]:
    candidates = tuple(
        Candidate(view.layer, view.view, view.units, 4 * view.units, 400 * view.units)
        for view in features.views
    )
    names = ("health", "vetoes", "agreement", "scans", "maps", "neighbors", "outliers", "methods", "cautions")
    content = {name: getattr(parts, name) for name in names}
    return make_files(PageModel(title="output", candidates=candidates, **content))


@pytest.fixture
def render() -> Callable[[FeatureSet, LabelFreeParts], dict[str, bytes]]:
    """Return a function that makes the files of a page that has only the parts without labels."""
    return make_page_files
