"""Make the baselines that a layer must be better than: header, HU histogram, voxels, untrained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.commands.report.feature_set import FeatureFile, FeatureSet
from featray.commands.report.labeled.answer import Candidate, Reader
from featray.commands.report.labeled.baselines import make_header_matrix
from featray.commands.report.labeled.components import find_varying_columns
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.leakage import make_facts
from featray.commands.report.leakage.facts import collect_scanner_facts
from featray.commands.report.page.model import Candidate as PageCandidate

HEADER, HISTOGRAM, VOXELS, UNTRAINED = "header", "HU histogram", "PCA of voxels", "untrained"
_GEOMETRY = ("spacing", "shape", "orientation")


@dataclass(frozen=True, eq=False)
class BaselineFeatures:
    """Features for which scans were read again.

    Attributes:
        rows: Positions of these scans among the scans of the report, in ascending order.
        histogram: HU histograms, or None; the rows are `rows`.
        voxels: Resized voxels, or None; the rows are `rows`.
        untrained: Name of a view and seed → features of the model with random weights; the rows are `rows`.
    """

    rows: NDArray[np.intp]
    histogram: FeatureFile | None = None
    voxels: FeatureFile | None = None
    untrained: Mapping[tuple[str, int], FeatureFile] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether no baseline needs these scans."""
        return self.histogram is None and self.voxels is None and not self.untrained


@dataclass(frozen=True)
class Baselines:
    """The baselines of a report.

    Attributes:
        probed: The baselines, as candidates of a probe.
        shown: The same, as the page shows them.
    """

    probed: tuple[Candidate, ...]
    shown: tuple[PageCandidate, ...]


def make_baselines(
    features: FeatureSet, again: BaselineFeatures | None, labels: Iterable[Label]
) -> Baselines:
    """Return all baselines for which there are features.

    Args:
        features: The candidates of the report.
        again: Features for which scans were read again; None without them.
        labels: The labels. A scanner fact of the same name is not part of the header.
    """
    header = _make_header(features.scans, labels)
    pairs = [] if header is None else [_pair(HEADER, "", header.shape[1], (header.__getitem__,))]
    if again is not None:
        pairs += _pair_files(again)
        pairs += _pair_untrained(features, again)
    return Baselines(tuple(probed for probed, _ in pairs), tuple(shown for _, shown in pairs))


def _pair(layer: str, view: str, units: int, readers: tuple[Reader, ...]) -> tuple[Candidate, PageCandidate]:
    shown = PageCandidate(layer, view, units, 4 * units, 0, is_baseline=True)
    return Candidate(shown.name, units, readers), shown


def _pair_files(again: BaselineFeatures) -> Iterator[tuple[Candidate, PageCandidate]]:
    for name, file in ((HISTOGRAM, again.histogram), (VOXELS, again.voxels)):
        if file is not None:
            yield _pair(name, "", file.units, (_make_reader(again.rows, file),))


def _pair_untrained(
    features: FeatureSet, again: BaselineFeatures
) -> Iterator[tuple[Candidate, PageCandidate]]:
    """Yield one baseline per view, with one reader per seed."""
    for view in features.views:
        files = [
            file for (name, _), file in sorted(again.untrained.items(), key=_get_key) if name == view.name
        ]
        if files:
            readers = tuple(_make_reader(again.rows, file) for file in files)
            yield _pair(f"{UNTRAINED} {view.layer}", view.view, view.units, readers)


def _get_key(item: tuple[tuple[str, int], FeatureFile]) -> tuple[str, int]:
    return item[0]


def _make_reader(rows: NDArray[np.intp], file: FeatureFile) -> Reader:
    """Return a reader of a file that holds only the scans at `rows`."""
    return lambda scans: file.read(np.searchsorted(rows, scans))


def _make_header(scans: pa.Table, labels: Iterable[Label]) -> NDArray[np.float32] | None:
    """Return geometry and scanner facts as numbers (scans, columns); None if all scans are equal."""
    geometry = {
        name: scans[name].to_pylist() if name in scans.column_names else [None] * len(scans)
        for name in _GEOMETRY
    }
    facts, _ = make_facts(
        collect_scanner_facts(scans, [label.name for label in labels]), np.arange(len(scans))
    )
    columns = [make_header_matrix(geometry).values, *map(_encode_fact, facts)]
    matrix: NDArray[np.float32] = np.concatenate(columns, axis=1)
    return matrix if find_varying_columns(matrix).any() else None


def _encode_fact(fact: Label) -> NDArray[np.float32]:
    """Return one column of 0 and 1 per class, or the number and whether it is missing."""
    if fact.kind == "classes":
        is_class: NDArray[np.bool_] = fact.values[:, None] == np.arange(len(fact.classes))
        return is_class.astype(np.float32)
    filled = np.where(fact.known, fact.values, np.median(fact.values[fact.known]))
    return np.stack([filled, ~fact.known], axis=1).astype(np.float32)
