"""Place the scans in a plane: principal components, and t-SNE of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.describe.measure import CandidateMeasures, Measures
from featray.commands.report.describe.progress import Span
from featray.commands.report.describe.sample import Projection
from featray.commands.report.describe.texts import count, format_share
from featray.commands.report.label_free.health import Positions
from featray.commands.report.page.model import ScanMap
from featray.commands.report.page.panels import MAX_SVG_POINTS

MIN_SCANS_OF_TSNE = 20
MAX_TSNE_MAPS = 12
MAX_TSNE_SCANS = 15_000
"""Scans of all t-SNE maps together. A map of 5,000 scans takes some 40 s on one core."""
PERPLEXITY = 30
_MAX_MAP_BYTES = 2_000_000
"""Part of the page that maps may use, of 5 MB."""
_SVG_POINT_BYTES, _CANVAS_POINT_BYTES = 110, 40


@dataclass(frozen=True)
class Maps:
    """Maps of the scans.

    Attributes:
        maps: The maps; those of the preferred candidates first.
        without_map: Number of candidates without a map, because there are too many of them.
        without_tsne: Number of candidates without a map of t-SNE, because it would take too long.
    """

    maps: tuple[ScanMap, ...]
    without_map: int
    without_tsne: int


def make_maps(measures: Measures, shown: Positions, order: Sequence[str], seed: int, span: Span) -> Maps:
    """Return the maps of the compared scans.

    Args:
        measures: All measures.
        shown: Positions of the scans that the page shows, which include the compared ones.
        order: Names of the candidates, from those whose maps matter most.
        seed: Decides t-SNE.
        span: Receives the progress.
    """
    by_name = {candidate.view.name: candidate for candidate in measures.candidates}
    candidates = [by_name[name] for name in order if by_name[name].sample.projection.shares.any()]
    scans = len(measures.compared)
    possible = [candidate for candidate in candidates if _can_run_tsne(candidate.sample.projection)]
    most = _count_maps(scans)
    embedded = possible[: min(most // 2, MAX_TSNE_MAPS, MAX_TSNE_SCANS // max(scans, 1))]
    mapped = candidates[: max(1, most - len(embedded))]
    places = np.searchsorted(shown, measures.compared)
    maps = []
    for candidate in mapped:
        projection = candidate.sample.projection
        maps.append(_make_map(candidate, "PCA", projection.coordinates, places, len(shown)))
        if candidate in embedded:
            done = embedded.index(candidate)
            text = f"Map {done + 1} of {len(embedded)}: t-SNE of {candidate.view.name}"
            span.report(text, done, len(embedded))
            maps.append(_make_map(candidate, "t-SNE", _run_tsne(projection, seed), places, len(shown)))
    return Maps(tuple(maps), len(candidates) - len(mapped), len(possible) - len(embedded))


def _can_run_tsne(projection: Projection) -> bool:
    scans, components = projection.coordinates.shape
    return bool(scans >= MIN_SCANS_OF_TSNE and components >= 2)


def _count_maps(scans: int) -> int:
    """Return how many maps fit in the page."""
    point_bytes = _SVG_POINT_BYTES if scans <= MAX_SVG_POINTS else _CANVAS_POINT_BYTES
    return max(1, _MAX_MAP_BYTES // (point_bytes * max(scans, 1)))


def _make_map(
    candidate: CandidateMeasures,
    method: str,
    points: NDArray[np.floating],
    places: NDArray[np.intp],
    shown: int,
) -> ScanMap:
    xy = np.full((2, shown), np.nan)
    xy[:, places] = 0.0
    for axis in range(min(2, points.shape[1])):
        xy[axis, places] = points[:, axis]
    projection = candidate.sample.projection
    caption = _describe_tsne(projection) if method == "t-SNE" else _describe_pca(projection)
    return ScanMap(candidate.view.name, method, xy[0], xy[1], caption)


def _describe_pca(projection: Projection) -> str:
    shares = projection.shares
    if len(shares) == 1:
        return "There is one principal component; the map is a line."
    held = float(min(1.0, shares[:2].sum()))
    return (
        f"The first two principal components hold {format_share(held)} of the variance of the standardized "
        f"values of {count(projection.scans, 'scan')}. Scans that are close here can differ in the other "
        "components."
    )


def _describe_tsne(projection: Projection) -> str:
    components = count(projection.coordinates.shape[1], "principal component")
    return (
        f"From {components}. Distances between groups and sizes of groups mislead: t-SNE keeps only "
        "neighborhoods, and it shows groups in noise too."
    )


def _run_tsne(projection: Projection, seed: int) -> NDArray[np.float32]:
    """Return two coordinates per scan.

    One thread computes them: with several threads, the order of the sums would change the map.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    scans = len(projection.coordinates)
    model = TSNE(init="pca", perplexity=min(PERPLEXITY, (scans - 1) / 3), random_state=seed)
    with threadpool_limits(1):
        return np.asarray(model.fit_transform(projection.coordinates), np.float32)
