"""Decode scans of an output again, once, and take the inputs of the report from them.

A table of scans and a config in; baselines, middle slices, features of random weights and stability out. The
scans are decoded by worker processes on all cores. Anything that cannot be read or computed is left out, and
a sentence says so; only errors of the temporary folder are raised.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from featray.commands.report.feature_set import FeatureFile
from featray.commands.report.inputs.found_config import FoundConfig
from featray.commands.report.inputs.input_decoder import InputDecoder
from featray.commands.report.inputs.load_models import load_random_models, load_trained_model
from featray.commands.report.inputs.perturb import make_perturbations
from featray.commands.report.inputs.random_features import RandomFeatures, RandomModelRuns
from featray.commands.report.inputs.select_scans import SelectedScans, select_scans
from featray.commands.report.inputs.stability import LayerStability, StabilityTest
from featray.commands.report.inputs.summary_files import SummaryFiles
from featray.commands.report.page.model import Slice
from featray.config import Config
from featray.engines.base import Decoding
from featray.engines.inline import InlineEngine
from featray.errors import FeatrayError
from featray.hardware import DEFAULT_THREADS
from featray.stages.input_cache import InputCache

_NO_HISTOGRAM = (
    "The baseline of the histogram is left out, because arrays without preprocess.window have no known range "
    "of values."
)
_NO_VOXELS = (
    "The baseline of resized voxels is left out, because the model inputs have more than three axes or "
    "different numbers of values."
)
_NO_STABILITY = (
    "The stability was not measured, because noise in HU and shifts by a voxel have no meaning for arrays "
    "without preprocess.window and preprocess.size."
)


@dataclass(frozen=True)
class InputRequest:
    """The inputs that the report needs, and the scans that give them.

    Attributes:
        scans: Scans to decode: columns scan_id, content and recipe of the table `scans`. Decoding costs as
            much as in `extract`, so take a sample of a large output.
        slice_ids: Ids of the scans of which a middle slice is wanted.
        recipes: Layer → recipe id of its features, for random weights and stability.
        random_seeds: Seeds of the models with random weights; empty for none.
        stability_ids: Ids of the scans whose stability is measured; empty for none.
    """

    scans: pa.Table
    slice_ids: Collection[str] = ()
    recipes: Mapping[str, str] = field(default_factory=dict)
    random_seeds: Sequence[int] = ()
    stability_ids: Collection[str] = ()


@dataclass(frozen=True)
class ReportInputs:
    """The results from the scans.

    Attributes:
        scan_ids: Ids of the scans that were decoded, in the order of the request. Rows of all files below.
        histogram: Shares of the voxels in 64 bins; None if it was left out.
        voxels: Resized model inputs, such as 16³ values; None if they were left out.
        slices: Scan id → middle slice.
        random: Features of models with random weights, by seed and layer.
        stability: Stability of the layers, by perturbation.
        stability_scans: Number of scans whose stability was measured.
        cautions: Sentences about everything that was left out.
    """

    scan_ids: tuple[str, ...] = ()
    histogram: FeatureFile | None = None
    voxels: FeatureFile | None = None
    slices: Mapping[str, Slice] = field(default_factory=dict)
    random: tuple[RandomFeatures, ...] = ()
    stability: tuple[LayerStability, ...] = ()
    stability_scans: int = 0
    cautions: tuple[str, ...] = ()


def read_inputs(
    found: FoundConfig, request: InputRequest, folder: Path, on_scan: Callable[[], None]
) -> ReportInputs:
    """Return the inputs of the report from the scans.

    Args:
        found: The config of the user, or the one that `find_recorded_config` found.
        request: The scans, and the results that are needed from them.
        folder: Folder for the temporary files of the result.
        on_scan: Called once for each scan of the request, unless the source cannot be listed.
    """
    problem = found.explain_source()
    if found.config is None or problem:
        return ReportInputs(cautions=(f"{problem} {found.way_out}",))
    try:
        selected = select_scans(found.config, request.scans)
    except FeatrayError as error:
        text = f"The scans were not read again: {str(error).rstrip('.')}. {found.way_out}"
        return ReportInputs(cautions=(text,))
    for _ in range(len(request.scans) - len(selected.scans)):
        on_scan()
    if not selected.scans:
        return ReportInputs(cautions=(*_describe_skipped(selected.skipped), found.way_out))
    with _open_engine(found.config, selected, request) as engine:
        engine.prefetch_scans(selected.scans)  # the worker processes decode while the model is loaded
        reading = _Reading(found, request, selected, folder)
        reading.decode(engine, on_scan)
    return reading.finish()


def _open_engine(config: Config, selected: SelectedScans, request: InputRequest) -> InlineEngine:
    """Return an engine that decodes and summarizes; its lists have one scan each."""
    all_ids = [scan.scan_id for scan in selected.scans]
    decoder = replace(
        InputDecoder.from_config(config, InputCache.from_config(config)),
        slice_ids=frozenset(request.slice_ids),
        tensor_ids=frozenset(all_ids if request.random_seeds else request.stability_ids),
    )
    decoding = Decoding(decoder, 1, config.limits, config.run.decode.memory)
    return InlineEngine(config.run.decode.workers, decoding, DEFAULT_THREADS)


class _Reading:
    """One pass through the scans: the parts that take something from each scan, and their results."""

    def __init__(
        self, found: FoundConfig, request: InputRequest, selected: SelectedScans, folder: Path
    ) -> None:
        assert found.config is not None
        self._config, self._request, self._selected = found.config, request, selected
        self._cautions = _describe_skipped(selected.skipped)
        self._ids = [scan.scan_id for scan in selected.scans]
        self._summaries = SummaryFiles(self._ids, folder)
        self._runs: RandomModelRuns | None = None
        self._test: StabilityTest | None = None
        problem = found.explain_model()
        if problem and (request.random_seeds or request.stability_ids):
            self._cautions.append(f"{problem} {found.way_out}")
        elif not problem:
            self._runs, self._test = self._load_random_models(folder), self._load_trained_model()

    def decode(self, engine: InlineEngine, on_scan: Callable[[], None]) -> None:
        """Decode all scans and give them to all parts."""
        parts = [part for part in (self._summaries, self._runs, self._test) if part is not None]
        try:
            with contextlib.closing(engine.decode_batches(self._selected.scans, threading.Event())) as lists:
                for decoded in itertools.chain.from_iterable(lists):
                    for part in parts:
                        part.add(decoded)
                    on_scan()
        except FeatrayError as error:
            self._cautions.append(f"Not all scans were read again: {str(error).rstrip('.')}.")

    def finish(self) -> ReportInputs:
        """Return the results."""
        rows = self._summaries.rows
        histogram, voxels = self._summaries.take_histogram(), self._summaries.take_voxels()
        random, missing = self._runs.take(rows) if self._runs is not None else ((), ())
        stability = self._test.measure() if self._test is not None else ()
        cautions = [*self._cautions, *self._summaries.describe_failures()]
        if rows and histogram is None:
            cautions.append(_NO_HISTOGRAM)
        if rows and voxels is None:
            cautions.append(_NO_VOXELS)
        if missing:
            cautions.append(
                f"The baseline of random weights for {', '.join(missing)} is left out, because such a model "
                "fails on a scan, or gives values that are not finite or of different number."
            )
        if self._test is not None and self._test.failed:
            cautions.append(f"Scans of the stability test on which the model failed: {self._test.failed}.")
        return ReportInputs(
            scan_ids=tuple(self._ids[row] for row in rows),
            histogram=histogram,
            voxels=voxels,
            slices=self._summaries.slices,
            random=random,
            stability=stability,
            stability_scans=self._test.scans if self._test is not None else 0,
            cautions=tuple(cautions),
        )

    def _load_random_models(self, folder: Path) -> RandomModelRuns | None:
        request = self._request
        models, cautions = load_random_models(self._config, request.recipes, request.random_seeds)
        self._cautions += cautions
        return RandomModelRuns(models, self._ids, self._group_size, folder) if models else None

    def _load_trained_model(self) -> StabilityTest | None:
        wanted = set(self._request.stability_ids)
        if not wanted:
            return None
        preprocess = self._config.preprocess
        is_ct = preprocess.window is not None and preprocess.size is not None
        if self._config.source.format == "npy" and not is_ct:
            self._cautions.append(_NO_STABILITY)
            return None
        model, cautions = load_trained_model(self._config, self._request.recipes)
        self._cautions += cautions
        if model is None:
            return None
        ids = [scan_id for scan_id in self._ids if scan_id in wanted]
        return StabilityTest(model, make_perturbations(preprocess), ids, self._group_size)

    @property
    def _group_size(self) -> int:
        """Number of scans that run together; the patches of one scan fill the batches."""
        has_patches = self._config.preprocess.fit == "patches" or self._config.source.rows
        return 1 if has_patches else self._config.model.batch_size


def _describe_skipped(skipped: Mapping[str, int]) -> list[str]:
    return [f"Scans that {reason}: {count}. They were not read again." for reason, count in skipped.items()]
