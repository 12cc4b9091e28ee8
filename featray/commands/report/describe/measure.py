"""Measure all candidates: all scans where sums over scans suffice, a sample where all pairs are compared.

All scans: constant and dead units, zeros, broken and equal scans, outliers, use of the latents. Ranks,
duplicate units and CKA are of all scans too if the sums of products fit in memory, otherwise of a sample. A
sample: intrinsic dimension, neighbors and coordinates for maps.

Memory: 0.8 GB for the sums of products and, while a candidate is measured on the sample, about four times
`MAX_SAMPLE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.describe.latent_names import LatentPair, find_latents
from featray.commands.report.describe.progress import Span
from featray.commands.report.describe.sample import ExactSums, SampleMeasures, measure_sample
from featray.commands.report.describe.scope import Scope, draw_scans, find_scope, read_blocks
from featray.commands.report.feature_set import FeatureSet, Floats, View
from featray.commands.report.label_free.health import (
    Outliers,
    Positions,
    RowHealth,
    UnitHealth,
    describe_units,
)
from featray.commands.report.label_free.latents import (
    Collapse,
    Latents,
    LogVariances,
    LogVarianceSum,
    describe_latents,
)
from featray.commands.report.label_free.moments import Moments, Products, split_rows
from featray.commands.report.label_free.sampling import draw_sample
from featray.commands.report.label_free.similarity import (
    Similarity,
    compare_features,
    compare_products,
    count_gram_scans,
)
from featray.commands.report.label_free.streaming import (
    MAX_PRODUCT_BYTES,
    StreamedMeasures,
    measure_streams,
)

MAX_OUTLIERS = 30
"""Outlier scans that are described and that are always among the compared scans."""
_MAX_PRODUCT_UNITS = 4096
"""Units of the widest candidate for which the covariance is decomposed, which takes time units³."""


@dataclass(frozen=True, eq=False)
class CandidateMeasures:
    """All measures of one candidate.

    Attributes:
        view: The candidate.
        units: Constant and dead units, zeros and signs.
        rows: Broken and equal scans, as positions among all scans.
        outliers: Scans far from the others; positions among all scans, scores of the used scans.
        sample: Measures on the sample, or on all scans if the products fit in memory.
        latents: Use of the latents; None if the candidate holds no means of latents.
    """

    view: View
    units: UnitHealth
    rows: RowHealth
    outliers: Outliers
    sample: SampleMeasures
    latents: Latents | None


@dataclass(frozen=True)
class RankedOutlier:
    """A scan that is an outlier in at least one candidate.

    Attributes:
        scan: Position among all scans.
        candidate: Position among the measured candidates of the one with the highest score.
        score: This score.
        candidates: Number of candidates in which the scan is an outlier.
    """

    scan: int
    candidate: int
    score: float
    candidates: int


@dataclass(frozen=True, eq=False)
class Measures:
    """All measures of all candidates.

    Attributes:
        scope: Which candidates and scans are measured.
        sample: Positions of the scans that represent all of them in measures of all pairs.
        compared: Positions of the sample and of the described outliers, whose neighbors and maps are made.
        candidates: The measured candidates.
        similarity: Debiased CKA between them; None without candidates.
        outliers: All outliers, the highest score first.
        latents: Pairs of measured candidates, as positions in `candidates`.
    """

    scope: Scope
    sample: Positions
    compared: Positions
    candidates: tuple[CandidateMeasures, ...]
    similarity: Similarity | None
    outliers: tuple[RankedOutlier, ...]
    latents: tuple[LatentPair, ...]


def measure_features(features: FeatureSet, seed: int, span: Span) -> Measures:
    """Return the measures of all candidates.

    Args:
        features: The candidates.
        seed: Decides the sample and the principal components.
        span: Receives the progress.
    """
    first, rest = span.divide(0.05, 1.0)
    scope = find_scope(features, first)
    if not scope.candidates:
        none = np.empty(0, np.int64)
        return Measures(scope, none, none, (), None, (), ())
    return _measure_scope(features, scope, seed, rest)


def _measure_scope(features: FeatureSet, scope: Scope, seed: int, span: Span) -> Measures:
    first, second, last = span.divide(0.5, 0.9, 1.0)
    views = [features.views[place] for place in scope.candidates]
    sample = draw_scans(scope.used, [view.units for view in views], seed)
    streams = _measure_streams(features, scope, len(sample), first)
    outliers = _rank_outliers(streams.outliers, scope.used)
    described = np.array([outlier.scan for outlier in outliers[:MAX_OUTLIERS]], np.int64)
    compared = np.union1d(sample, described)
    pairs = tuple(find_latents(views))
    latents = _measure_latents(features, scope, pairs, streams.moments)
    is_sample = np.isin(compared, sample)
    samples = [
        measure_sample(
            block, is_sample, _get_exact(streams, number), _select_units(latents.get(number)), seed
        )
        for number, block in _read_candidates(features, scope, compared, second)
    ]
    candidates = tuple(
        CandidateMeasures(
            view=view,
            units=describe_units(streams.moments[number]),
            rows=streams.rows[number],
            outliers=streams.outliers[number],
            sample=samples[number],
            latents=latents.get(number),
        )
        for number, view in enumerate(views)
    )
    similarity = _compare_candidates(features, scope, sample, streams.products, last)
    return Measures(scope, sample, compared, candidates, similarity, outliers, pairs)


def _measure_streams(features: FeatureSet, scope: Scope, sample: int, span: Span) -> StreamedMeasures:
    """Read all features twice; sum the products unless all scans fit in memory or the matrices are large."""
    units = [features.views[place].units for place in scope.candidates]
    fits = sample == len(scope.used) <= count_gram_scans(len(units))
    max_bytes = 0 if fits or max(units) > _MAX_PRODUCT_UNITS else MAX_PRODUCT_BYTES
    passes = iter(span.divide(0.2, 1.0))
    return measure_streams(
        lambda: read_blocks(features, scope.candidates, next(passes), "Reading all values"), units, max_bytes
    )


def _rank_outliers(candidates: Sequence[Outliers], used: Positions) -> tuple[RankedOutlier, ...]:
    """Return the outliers of all candidates, each scan once, with its highest score."""
    scores: dict[int, list[tuple[float, int]]] = {}
    for number, outliers in enumerate(candidates):
        rows = np.empty(0, np.int64) if outliers.rows is None else outliers.rows
        for scan, score in zip(rows, outliers.scores[np.searchsorted(used, rows)], strict=True):
            scores.setdefault(int(scan), []).append((float(score), -number))
    ranked = []
    for scan, found in scores.items():
        score, number = max(found)
        ranked.append(RankedOutlier(scan, -number, score, len(found)))
    return tuple(sorted(ranked, key=lambda outlier: (-outlier.score, outlier.scan)))


def _get_exact(streams: StreamedMeasures, number: int) -> ExactSums | None:
    """Return the covariance of all scans of a candidate, if its products were summed."""
    if streams.products is None:
        return None
    return ExactSums(streams.products.compute_covariance(number), streams.moments[number])


def _select_units(latents: Latents | None) -> NDArray[np.bool_] | None:
    """Return the latents in use, by which scans are compared; None for all units of the candidate."""
    if latents is None or latents.verdict is Collapse.TOO_FEW_SCANS or not latents.in_use:
        return None
    return latents.is_in_use


def _read_candidates(
    features: FeatureSet, scope: Scope, rows: Positions, span: Span
) -> Iterator[tuple[int, Floats]]:
    """Yield the number of each measured candidate and its features (rows, units)."""
    for number, place in enumerate(scope.candidates):
        text = f"Comparing {len(rows):,} scans in {features.views[place].name}"
        span.report(text, number, len(scope.candidates))
        yield number, features.files[place].read(rows)


def _compare_candidates(
    features: FeatureSet, scope: Scope, sample: Positions, products: Products | None, span: Span
) -> Similarity:
    if products is not None:
        return compare_products(products)
    limit = count_gram_scans(len(scope.candidates))
    rows = sample[draw_sample(len(sample), limit).rows]

    return compare_features(block for _, block in _read_candidates(features, scope, rows, span))


def _measure_latents(
    features: FeatureSet, scope: Scope, pairs: Sequence[LatentPair], moments: Sequence[Moments]
) -> dict[int, Latents]:
    """Return the use of the latents of each measured candidate that holds means."""
    latents = {}
    for pair in pairs:
        log_variances = None
        if pair.log_variance is not None:
            place = scope.candidates[pair.log_variance]
            log_variances = _sum_log_variances(features, place, scope.used)
        latents[pair.mean] = describe_latents(moments[pair.mean], log_variances)
    return latents


def _sum_log_variances(features: FeatureSet, place: int, used: Positions) -> LogVariances:
    total = LogVarianceSum(features.views[place].units)
    rows = max(1, 2**22 // features.views[place].units)
    for part in split_rows(len(used), rows):
        total.add(features.files[place].read(used[part]))
    return total.finish()
