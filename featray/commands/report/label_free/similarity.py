"""Compare candidates by debiased linear CKA.

Linear CKA is 1 for two candidates that are rotated and scaled copies of each other, and the debiased form is
about 0 for unrelated ones, also if there are more units than scans. Sources: S. Kornblith et al., "Similarity
of neural network representations revisited", ICML 2019; L. Song et al., "Feature selection via dependence
maximization", JMLR 2012 (unbiased estimator of HSIC); T. Nguyen et al., "Do wide and deep networks learn the
same things?", ICLR 2021.

The estimator needs the Gram matrix of the scans without its diagonal. With centered features X and Y, whose
rows x_i and y_i have the squared norms p_i and q_i, it is exactly

    n (n - 3) HSIC = |XᵀY|² - n/(n - 2) sum p_i q_i + (sum p_i)(sum q_i) / ((n - 1)(n - 2)),

because centering does not change the estimator and makes all row sums of the Gram matrix 0. So `ProductSum`
of `moments.py` streams it. For samples and for candidates with many units, `compare_features` gets |XᵀY|² as
the sum of the products of the two Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import (
    Block,
    Products,
    Values,
    compute_moments,
    convert_block,
)

MIN_SCANS = 4
"""The estimator divides by scans - 3."""
REDUNDANT = 0.95
"""Two candidates above this CKA hold nearly the same: the smaller one suffices. A working value, not a
result."""
_ROUNDING = 1e-11
"""HSIC below this multiple of its largest term is rounding."""
_MAX_GRAM_BYTES = 600_000_000


@dataclass(frozen=True)
class Similarity:
    """Debiased linear CKA between all candidates.

    Attributes:
        scans: Number of scans that were used.
        cka: (candidates, candidates), symmetric, at most 1 and 1 on the diagonal. Unrelated candidates have
            values around 0, also below it. It never holds NaN: pairs that are not defined have 0.
        is_defined: (candidates,) whether the candidate can be compared. False for candidates without
            variation, for candidates whose variation is all in one scan, and for all if there are fewer than
            `MIN_SCANS` scans.
    """

    scans: int
    cka: Values
    is_defined: NDArray[np.bool_]


def compare_products(products: Products) -> Similarity:
    """Return the similarity of all candidates from their streamed products."""
    count = len(products.norms)
    cross = np.zeros((count, count))
    for (a, b), scatter in products.scatter.items():
        cross[a, b] = cross[b, a] = np.vdot(scatter, scatter)
    totals = np.array([np.trace(products.scatter[a, a]) for a in range(count)])
    return _compare(products.scans, cross, products.norms, totals)


def compare_features(features: Iterable[Block]) -> Similarity:
    """Return the similarity of candidates, each (scans, units) with the same scans.

    Each candidate is taken once, so an iterator can read one after the other. Memory: float64 copies of one
    candidate, and the Gram matrix (scans, scans) of every candidate; see `count_gram_scans`.

    Raises:
        ValueError: The candidates have different numbers of scans, or values are not finite.
    """
    grams = [_compute_gram(block) for block in features]
    if len({len(gram) for gram in grams}) != 1:
        raise ValueError("all candidates need the same scans")
    count = len(grams)
    cross = np.zeros((count, count))
    for a, b in combinations_with_replacement(range(count), 2):
        cross[a, b] = cross[b, a] = np.vdot(grams[a], grams[b])
    norms = np.stack([gram.diagonal() for gram in grams])
    return _compare(len(grams[0]), cross, norms @ norms.T, norms.sum(axis=1))


def count_gram_scans(candidates: int) -> int:
    """Return the largest number of scans for which the Gram matrices of `compare_features` need 600 MB."""
    return math.isqrt(_MAX_GRAM_BYTES // (8 * max(candidates, 1)))


def _compute_gram(features: Block) -> Values:
    moments = compute_moments(features)
    values = convert_block(features, moments.units) - moments.mean
    return np.asarray(values @ values.T, np.float64)


def _compare(scans: int, cross: Values, norms: Values, totals: Values) -> Similarity:
    """Return the similarity from |XᵀY|², sum p_i q_i and sum p_i of all pairs of candidates."""
    count = len(totals)
    if scans < MIN_SCANS:
        return Similarity(scans, np.zeros((count, count)), np.zeros(count, bool))
    n = float(scans)
    hsic = cross - norms * (n / (n - 2)) + np.outer(totals, totals) / ((n - 1) * (n - 2))
    own = hsic.diagonal()
    is_defined = own > _ROUNDING * cross.diagonal()
    root = np.sqrt(np.where(is_defined, own, 1.0))
    cka = np.where(np.outer(is_defined, is_defined), hsic / root[:, None] / root, 0.0)
    return Similarity(scans, np.clip(cka, -1.0, 1.0), is_defined)
