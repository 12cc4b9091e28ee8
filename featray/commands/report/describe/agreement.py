"""Compare all candidates with each other, as heat maps."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from featray.commands.report.describe.measure import Measures
from featray.commands.report.describe.texts import count
from featray.commands.report.label_free.neighbors import NeighborAgreement, compare_neighbors
from featray.commands.report.label_free.similarity import REDUNDANT, Similarity
from featray.commands.report.page.model import Matrix

MIN_SCANS_OF_CKA = 10
"""With fewer scans, chance decides the similarity."""
MAX_CHANCE = 0.5
"""Share of common neighbors of unrelated candidates above which the shares say nothing."""


def make_agreement(measures: Measures) -> tuple[Matrix, ...]:
    """Return the similarity and the common neighbors of all pairs; nothing for a single candidate."""
    if len(measures.candidates) < 2 or measures.similarity is None:
        return ()
    names = tuple(candidate.view.name for candidate in measures.candidates)
    matrices = (_make_cka_matrix(names, measures.similarity), _make_neighbor_matrix(names, measures))
    return tuple(matrix for matrix in matrices if matrix is not None)


def _make_cka_matrix(names: tuple[str, ...], similarity: Similarity) -> Matrix | None:
    is_defined = similarity.is_defined
    if similarity.scans < MIN_SCANS_OF_CKA or not is_defined.any():
        return None
    return Matrix(
        title="Similarity of layers",
        reading=(
            f"Debiased linear CKA from {count(similarity.scans, 'scan')}: 1 if the values of one layer are a "
            "rotated and scaled copy of the values of the other layer, about 0 if they are unrelated. Above "
            f"{REDUNDANT} two layers hold nearly the same. A dash marks a layer without variation."
        ),
        rows=names,
        columns=names,
        values=np.where(np.outer(is_defined, is_defined), similarity.cka, np.nan),
        row_title="Layer (view)",
    )


def _make_neighbor_matrix(names: tuple[str, ...], measures: Measures) -> Matrix | None:
    neighbors = [candidate.sample.neighbors for candidate in measures.candidates]
    pairs = {
        (first, second): compare_neighbors(neighbors[first], neighbors[second])
        for first, second in combinations(range(len(names)), 2)
    }
    any_pair = pairs[0, 1]
    if any_pair.chance > MAX_CHANCE:
        return None
    values = np.full((len(names), len(names)), np.nan)
    for (first, second), pair in pairs.items():
        values[first, second] = values[second, first] = np.nan if pair.share is None else pair.share
    for place, own in enumerate(neighbors):
        values[place, place] = np.nan if own.is_tied.all() else 1.0
    return Matrix(
        title="Common neighbors",
        reading=(
            f"Share of the {any_pair.neighbors} nearest neighbors of a scan that are the same in both "
            f"layers, mean over {_count_scans(list(pairs.values()))}. Two unrelated layers have "
            f"{any_pair.chance:.2g} by chance. Scans with equal distances to several others are left out; a "
            "dash marks pairs for which no scan remains."
        ),
        rows=names,
        columns=names,
        values=values,
        row_title="Layer (view)",
    )


def _count_scans(pairs: list[NeighborAgreement]) -> str:
    numbers = sorted({pair.scans for pair in pairs})
    if len(numbers) == 1:
        return count(numbers[0], "scan")
    return f"{numbers[0]:,} to {numbers[-1]:,} scans"
