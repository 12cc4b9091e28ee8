"""Choose which scans of a report are read again, and match the results with its scans and layers.

Baselines need the scans that some label probes. Slices are wanted for outliers and for some of the scans that
the page shows. All of them are decoded in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.answer.baselines import BaselineFeatures
from featray.commands.report.answer.probe_plan import ProbePlan
from featray.commands.report.describe.measure import MAX_OUTLIERS, Measures
from featray.commands.report.describe.progress import OnStep
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.inputs.found_config import FoundConfig
from featray.commands.report.inputs.read_inputs import InputRequest, ReportInputs, read_inputs
from featray.commands.report.inputs.stability import LayerStability
from featray.commands.report.label_free.sampling import draw_sample
from featray.commands.report.options import ReportOptions
from featray.commands.report.page.model import Slice

MAX_PICTURES = 200
"""Scans besides outliers and probed ones that are read again for their slices."""
STABILITY_SCANS = 30
RANDOM_SEEDS = (1, 2, 3)
"""Seeds of the models with random weights."""

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Again:
    """Results from scans that were read again.

    Attributes:
        baselines: Features of baselines; None if nothing was read again.
        slices: Scan id → middle slice.
        stability: Stability of the layers, by perturbation.
        stability_scans: Number of scans whose stability was measured.
        cautions: Sentences about missing results.
    """

    baselines: BaselineFeatures | None = None
    slices: Mapping[str, Slice] = field(default_factory=dict)
    stability: tuple[LayerStability, ...] = ()
    stability_scans: int = 0
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Wanted:
    """Scans to read again, as positions among the scans of the report, by purpose.

    Attributes:
        probed: Scans for baselines.
        pictured: Scans for slices.
        tested: Scans for stability.
        random_seeds: Seeds of models with random weights; empty for none.
        has_images: Whether slices of all scans that are read again are wanted.
    """

    probed: Positions
    pictured: Positions
    tested: Positions
    random_seeds: Sequence[int]
    has_images: bool

    @property
    def all(self) -> Positions:
        """All scans, in ascending order."""
        return np.unique(np.concatenate([self.probed, self.pictured, self.tested]))


def choose_wanted(measures: Measures, plan: ProbePlan | None, options: ReportOptions) -> Wanted:
    """Return which scans are read again.

    Args:
        measures: The measures, with outliers and compared scans.
        plan: Which scans are probed; None without labels.
        options: Options of the report.
    """
    none = np.zeros(0, np.int64)
    probed = none if plan is None else plan.union
    tested = none
    if options.stability:
        tested = measures.scope.used[
            draw_sample(len(measures.scope.used), STABILITY_SCANS, options.seed).rows
        ]
    return Wanted(
        probed=probed,
        pictured=_choose_pictured(measures) if options.images else none,
        tested=tested,
        random_seeds=RANDOM_SEEDS if options.random_weights and len(probed) else (),
        has_images=options.images,
    )


def _choose_pictured(measures: Measures) -> Positions:
    """Return the described outliers, and compared scans at regular distances."""
    compared = measures.compared
    step = max(1, len(compared) // MAX_PICTURES)
    outliers = [outlier.scan for outlier in measures.outliers[:MAX_OUTLIERS]]
    return np.union1d(compared[::step], np.array(outliers, np.int64))


def read_again(
    found: FoundConfig, features: FeatureSet, wanted: Wanted, folder: Path, on_step: OnStep
) -> Again:
    """Read the wanted scans, and return the results.

    Args:
        found: The config with which they are read.
        features: The candidates.
        wanted: The scans.
        folder: Folder for temporary files.
        on_step: Called with the current step in words and the share of the work that is done.
    """
    rows = wanted.all
    if not len(rows):
        return Again()
    done = 0

    def count_scan() -> None:
        nonlocal done
        done += 1
        on_step(f"Reading scans again: {done:,} of {len(rows):,}", done / len(rows))

    ids = np.array(features.scan_ids, object)
    request = InputRequest(
        scans=features.scans.take(rows),
        slice_ids=set(ids[rows]) if wanted.has_images else (),
        recipes={view.layer: view.recipe for view in features.views},
        random_seeds=wanted.random_seeds,
        stability_ids=set(ids[wanted.tested]),
    )
    inputs = read_inputs(found, request, folder, count_scan)
    return Again(
        baselines=_pair_baselines(features, inputs),
        slices=inputs.slices,
        stability=inputs.stability,
        stability_scans=inputs.stability_scans,
        cautions=inputs.cautions,
    )


def _pair_baselines(features: FeatureSet, inputs: ReportInputs) -> BaselineFeatures:
    names = {view.layer: view.name for view in features.views}
    rows = np.searchsorted(np.array(features.scan_ids, object), np.array(inputs.scan_ids, object))
    return BaselineFeatures(
        rows=rows,
        histogram=inputs.histogram,
        voxels=inputs.voxels,
        untrained={(names[part.layer], part.seed): part.file for part in inputs.random},
    )
