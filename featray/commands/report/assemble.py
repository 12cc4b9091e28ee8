"""Put all parts of a report together: results in, the content of the page out. Computes no measure."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np

from featray.commands.report.answer.answer_labels import LabeledParts
from featray.commands.report.answer.changes import list_general_changes, write_summary
from featray.commands.report.describe.describe_features import Emphasis, LabelFreeParts
from featray.commands.report.describe.stability_table import make_stability_table
from featray.commands.report.describe.texts import count
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.labels import LabelTable
from featray.commands.report.leakage.measure_leaks import LeakParts
from featray.commands.report.options import ReportOptions
from featray.commands.report.page.model import Candidate, Extreme, Extremes, PageModel, Slice
from featray.commands.report.read_again import Again
from featray.output.dataset import Dataset
from featray.storage.urls import mask_url

LIBRARIES = ("featray", "numpy", "scipy", "scikit-learn", "pyarrow")


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything that was computed for a report.

    Attributes:
        features: The candidates. Their temporary files may be gone.
        table: The labels; None without labels.
        free: The parts of the page that need no labels.
        labeled: The parts of the page that need labels; None without labels.
        leaks: The leakage.
        again: Results from scans that were read again.
    """

    features: FeatureSet
    table: LabelTable | None
    free: LabelFreeParts
    labeled: LabeledParts | None
    leaks: LeakParts
    again: Again


def choose_emphasis(labeled: LabeledParts | None) -> Emphasis:
    """Return the items that the answers emphasize: recommended candidates, labels, extreme scans."""
    if labeled is None:
        return Emphasis()
    chosen = [score.candidate for result in labeled.labels for score in result.scores if score.is_chosen]
    return Emphasis(labeled.columns, chosen, [extreme.scan for extreme in _list_extremes(labeled.extremes)])


def assemble_page(dataset: Dataset, parts: Parts, options: ReportOptions) -> PageModel:
    """Return the content of the page.

    Args:
        dataset: The output, which the title names.
        parts: Everything that was computed.
        options: Options of the report.
    """
    features, free, labeled, leaks = parts.features, parts.free, parts.labeled, parts.leaks
    slices = _place_slices(parts) if options.images else {}
    names = {view.layer: view.name for view in features.views}
    return PageModel(
        title=PurePosixPath(mask_url(dataset.store.uri)).name or "output",
        facts=tuple(_list_facts(features)),
        summary=write_summary(parts.table),
        labels=labeled.labels if labeled else (),
        candidates=(*_make_candidates(features), *(labeled.baselines if labeled else ())),
        leaks=leaks.leaks,
        vetoes=(*free.vetoes, *leaks.vetoes),
        collection_scans=len(features.scan_ids),
        changes=(*list_general_changes(features, parts.table), *(labeled.changes if labeled else ())),
        extremes=_place_extremes(labeled.extremes, free) if labeled else None,
        health=free.health,
        stability=make_stability_table(parts.again.stability, names, parts.again.stability_scans),
        scans=free.scans,
        maps=free.maps,
        neighbors=free.neighbors,
        units=(*(labeled.units if labeled else ()), *leaks.sharing),
        agreement=free.agreement,
        outliers=free.outliers,
        slices=slices,
        methods=(*(labeled.methods if labeled else ()), *free.methods, *leaks.methods),
        versions=_find_versions(),
        cautions=tuple(_list_cautions(parts)),
    )


def _list_facts(features: FeatureSet) -> Iterator[str]:
    yield count(len(features.scan_ids), "scan")
    yield count(len(features.views), "layer")
    yield f"version {features.version} of the output"
    yield datetime.now(UTC).strftime("%Y-%m-%d")


def _make_candidates(features: FeatureSet) -> Iterator[Candidate]:
    scans = len(features.scan_ids)
    rows = sum(features.scans["patches"].to_pylist()) / scans
    for view in features.views:
        size = 4 * view.units * rows
        yield Candidate(view.layer, view.view, view.units, round(size), round(size * scans))


def _list_extremes(extremes: Extremes | None) -> tuple[Extreme, ...]:
    return () if extremes is None else (*extremes.low, *extremes.high)


def _place_extremes(extremes: Extremes | None, free: LabelFreeParts) -> Extremes | None:
    """Return extremes with their scans as positions among the shown scans."""
    if extremes is None:
        return None
    low, high = (
        tuple(replace(one, scan=int(np.searchsorted(free.shown, one.scan))) for one in part)
        for part in (extremes.low, extremes.high)
    )
    return replace(extremes, low=low, high=high)


def _place_slices(parts: Parts) -> dict[int, Slice]:
    """Return the slices of the shown scans by their positions."""
    slices: Mapping[str, Slice] = parts.again.slices
    ids = parts.free.scans.ids
    return {place: slices[scan_id] for place, scan_id in enumerate(ids) if scan_id in slices}


def _list_cautions(parts: Parts) -> Iterator[str]:
    features = parts.features
    yield from features.cautions
    for layer, reason in features.left_out:
        yield f"{layer} is not compared: {reason}."
    if features.patches > 1:
        yield "Some scans have several patches; their features are the mean over the patches."
    yield from parts.labeled.cautions if parts.labeled else ()
    yield from parts.again.cautions
    yield from parts.free.cautions
    yield from parts.leaks.cautions


def _find_versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES
    }
