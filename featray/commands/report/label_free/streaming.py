"""Read the features of all candidates twice, in blocks, for the measures that need all scans.

Memory: the matrices of `ProductSum` (see `estimate_product_bytes`), one block of all candidates as float64,
and about 70 bytes per scan and candidate. With 5 candidates of 2,048 values and blocks of 1,024 scans the
process needs 0.8 GB, and one core 6 s per block for the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.health import (
    Outliers,
    Positions,
    RowChecks,
    RowHealth,
    find_outliers,
    measure_distances,
)
from featray.commands.report.label_free.moments import (
    Block,
    Moments,
    MomentSum,
    Products,
    ProductSum,
    Values,
    estimate_product_bytes,
)

MAX_PRODUCT_BYTES = 1_500_000_000
ReadBlocks = Callable[[], Iterable[Sequence[Block]]]
"""Reads the features from the start at each call: one block of the same scans per candidate."""


@dataclass(frozen=True)
class StreamedMeasures:
    """Results of both passes; sequences have one entry per candidate.

    Attributes:
        scans: Number of scans that were read.
        used: Positions of the scans whose values are finite in all candidates. All other results except
            `rows` are of these scans.
        rows: Scans with values that are not finite, and equal scans, as positions among all scans.
        moments: Statistics of the units.
        outliers: Outliers; their positions are among all scans, and their scores are those of `used`.
        products: Sums of products for similarity and rank; None if they would need more memory than allowed.
    """

    scans: int
    used: Positions
    rows: tuple[RowHealth, ...]
    moments: tuple[Moments, ...]
    outliers: tuple[Outliers, ...]
    products: Products | None


def measure_streams(
    read_blocks: ReadBlocks, units: Sequence[int], max_product_bytes: int = MAX_PRODUCT_BYTES
) -> StreamedMeasures:
    """Return the measures of all scans.

    Args:
        read_blocks: Called twice. Both times it must give the same scans in the same order.
        units: Number of values per scan of each candidate.
        max_product_bytes: Memory that the products may use. If they need more, compare and rank a sample
            instead.

    Raises:
        ValueError: No scan has finite values in all candidates, or the second pass read other scans.
    """
    rows, moments, is_used = _read_first(read_blocks(), units)
    has_products = estimate_product_bytes(units) <= max_product_bytes
    total = ProductSum([one.mean for one in moments]) if has_products else None
    distances = _read_second(read_blocks(), moments, total)
    used = np.flatnonzero(is_used)
    if any(len(one) != len(used) for one in distances):
        raise ValueError("the second pass over the features read other scans than the first")
    return StreamedMeasures(
        scans=len(is_used),
        used=used,
        rows=tuple(rows),
        moments=tuple(moments),
        outliers=tuple(_move_rows(find_outliers(one), used) for one in distances),
        products=total.finish() if total else None,
    )


def _read_first(
    blocks: Iterable[Sequence[Block]], units: Sequence[int]
) -> tuple[list[RowHealth], list[Moments], NDArray[np.bool_]]:
    """Return the row checks and the moments of each candidate, and which scans are finite in all of them."""
    checks, sums = [RowChecks() for _ in units], [MomentSum(count) for count in units]
    masks = [np.empty(0, bool)]
    for candidates in blocks:
        masks.append(_find_finite(candidates))
        for check, total, block in zip(checks, sums, candidates, strict=True):
            check.add(block)
            total.add(block[masks[-1]])
    return [check.finish() for check in checks], [total.finish() for total in sums], np.concatenate(masks)


def _read_second(
    blocks: Iterable[Sequence[Block]], moments: Sequence[Moments], total: ProductSum | None
) -> list[Values]:
    """Add the products to `total`, and return the distances (scans,) of each candidate."""
    distances: list[list[Values]] = [[] for _ in moments]
    for candidates in blocks:
        is_finite = _find_finite(candidates)
        kept = [block[is_finite] for block in candidates]
        if total:
            total.add(kept)
        for parts, block, statistics in zip(distances, kept, moments, strict=True):
            parts.append(measure_distances(block, statistics))
    return [np.concatenate([np.empty(0), *parts]) for parts in distances]


def _find_finite(candidates: Sequence[Block]) -> NDArray[np.bool_]:
    is_finite = np.ones(len(candidates[0]), bool)
    for block in candidates:
        is_finite &= np.isfinite(block).all(axis=1)
    return is_finite


def _move_rows(outliers: Outliers, used: Positions) -> Outliers:
    """Return outliers with positions among all scans instead of the used ones."""
    rows = None if outliers.rows is None else used[outliers.rows]
    return Outliers(rows, outliers.scores, outliers.scans)
