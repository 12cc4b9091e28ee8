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
of `moments.py` streams it. For candidates with more units than scans, `compare_features` gets |XᵀY|² from the
Gram matrices, which needs less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import (
    Block,
    Products,
    Values,
    compute_moments,
    convert_block,
    split_rows,
)

MIN_SCANS = 4
"""The estimator divides by scans - 3."""
REDUNDANT = 0.95
"""Two candidates above this CKA hold nearly the same: the smaller one suffices. A working value, not a
result."""
_ROUNDING = 1e-11
"""HSIC below this multiple of its largest term is rounding."""


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


def compare_features(features: Sequence[Block]) -> Similarity:
    """Return the similarity of candidates in memory, each (scans, units) with the same scans.

    Memory: float64 copies of two candidates, and 1,024 x scans values of their Gram matrices.

    Raises:
        ValueError: The candidates have different numbers of scans, or values are not finite.
    """
    if len({len(block) for block in features}) != 1:
        raise ValueError("all candidates need the same scans")
    count, scans = len(features), len(features[0])
    cross, norms = np.zeros((count, count)), np.zeros((count, scans))
    for a in range(count):
        first = _center(features[a])
        norms[a] = np.square(first).sum(axis=1)
        for b in range(a, count):
            second = first if a == b else _center(features[b])
            cross[a, b] = cross[b, a] = _sum_gram_products(first, second)
    return _compare(scans, cross, norms @ norms.T, norms.sum(axis=1))


def _center(features: Block) -> Values:
    moments = compute_moments(features)
    return convert_block(features, moments.units) - moments.mean


def _sum_gram_products(first: Values, second: Values) -> float:
    """Return the sum of all products of the two Gram matrices, |XᵀY|², by the cheaper of two ways."""
    scans, units = len(first), first.shape[1] + second.shape[1]
    if first.shape[1] * second.shape[1] < scans * units:
        product = first.T @ second
        return float(np.vdot(product, product))
    parts = split_rows(scans)
    return float(sum(np.vdot(first[part] @ first.T, second[part] @ second.T) for part in parts))


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
