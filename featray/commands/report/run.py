"""`featray report`: which layer to use. The steps of a report, from top to bottom.

    output -> candidates -> measures -> scans read again -> answers, leakage -> page -> files

Reads one version of an output, and with labels or for slices, some scans of the collection again. Writes a
page and its numbers to a folder. The output itself is not changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featray.commands.report.answer.answer_labels import answer_labels
from featray.commands.report.answer.probe_plan import ProbePlan, group_scans, plan_probes
from featray.commands.report.assemble import Parts, assemble_page, choose_emphasis
from featray.commands.report.describe.describe_features import describe_features
from featray.commands.report.describe.measure import Measures, measure_features
from featray.commands.report.describe.progress import OnStep, Span
from featray.commands.report.feature_set import FeatureSet, read_feature_set
from featray.commands.report.inputs.found_config import FoundConfig, find_recorded_config
from featray.commands.report.label_file import read_labels
from featray.commands.report.labeled.labels import LabelTable
from featray.commands.report.leakage.measure_leaks import LeakScope, measure_leaks
from featray.commands.report.options import ReportOptions
from featray.commands.report.page.data import make_document
from featray.commands.report.page.files import PAGE_NAME, make_files
from featray.commands.report.read_again import choose_wanted, read_again
from featray.config import is_config_file, load
from featray.output.dataset import FEATURES, Dataset, Snapshot, count_values
from featray.output.query import Output, open_output, read_one_version
from featray.storage.store import Store
from featray.storage.urls import mask_url
from featray.terminal.progress import StepProgress

FOLDER = "report"
"""Default folder of the report, below the output."""


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: Path or URL of the HTML page, without credentials.
        files: Names of all files in its folder.
        sentences: The verdict or refusal for each label; one sentence without labels.
        document: All numbers and sentences of the page, as in report.json.
    """

    page: str
    files: tuple[str, ...]
    sentences: tuple[str, ...]
    document: Mapping[str, Any] = field(repr=False)

    def text(self) -> str:
        """Return the sentences and the path of the page."""
        return "\n".join([*self.sentences, f"page: {self.page}"])


def report(  # noqa: PLR0913  # public function with the options of the command
    output: Output,
    labels: str | os.PathLike[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[str] = (),
    version: int | None = None,
    images: bool = True,
    random_weights: bool = False,
    stability: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    show: bool = False,
) -> Report:
    """Write which layer to use: a page, and its numbers as JSON and Parquet.

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `Dataset`. With a config,
            the scans and the model can be read again wherever they are.
        labels: Path or URL of a table (CSV or Parquet) with columns scan_id, optionally patient, and one
            column per label; None for a report without labels.
        directory: Local path or URL of a folder to write to; None for the folder `report` of the output.
        layers: Names of the layers to compare, with `/` or `.`; empty for all.
        version: Version of the output; None for the newest.
        images: Whether the page may hold middle slices of scans, which are patient data.
        random_weights: Whether to compare with the same model with random weights. Needs model and scans.
        stability: Whether to measure how much noise, a shift and resampling change the features of some
            scans. Needs model and scans.
        storage_options: fsspec options of output, labels and directory; None for those of the config.
        show: Whether to show the progress on stderr.

    Raises:
        ConfigError: The output or the version does not exist.
        UsageError: The labels cannot be read, or the output has no layer that can be compared.
        StorageError: A store does not answer, or the folder cannot be written.
    """
    options = ReportOptions(layers, version, images, random_weights, stability, show=show)
    dataset = open_output(output, storage_options)
    target = _open_target(dataset, directory)
    target.check_writable()
    with (
        tempfile.TemporaryDirectory(prefix="featray-report-") as name,
        StepProgress(show=show) as progress,
    ):
        parts = _compute_parts(_Request(output, dataset, labels, options), Path(name), Span(progress.report))
        model = assemble_page(dataset, parts, options)
        files = make_files(model, parts.free.numbers, include_images=images)
    for file, content in files.items():
        target.write(file, content)
    return Report(
        page=mask_url(target.path(PAGE_NAME)),
        files=tuple(files),
        sentences=tuple(result.sentence for result in model.labels) or (model.summary,),
        document=make_document(model),
    )


@dataclass(frozen=True)
class _Request:
    """The output as the user named it and opened, the labels, and the options."""

    output: Output
    dataset: Dataset
    labels: str | os.PathLike[str] | None
    options: ReportOptions


def _compute_parts(request: _Request, folder: Path, span: Span) -> Parts:
    """Compute everything that the page shows. The temporary files in `folder` are not needed afterwards."""
    options = request.options
    parts = span.divide(0.1, 0.3, 0.5, 0.8, 0.9, 1.0)
    reading, measuring, rereading, answering, leaking, describing = (part.report for part in parts)
    features = _read_features(request, folder, reading)
    table = _read_labels(request, features)
    measures = measure_features(features, options.seed, Span(measuring))
    plan = _plan_probes(features, table, measures, options.seed)
    wanted = choose_wanted(measures, plan, options)
    again = read_again(_find_config(request, features), features, wanted, folder, rereading)
    labeled = None
    if table is not None and plan is not None:
        labeled = answer_labels(features, table, plan, again.baselines, answering)
    leaks = measure_leaks(features, _make_leak_scope(features, table, plan, measures, options.seed), leaking)
    free = describe_features(features, measures, choose_emphasis(labeled), options.seed, describing)
    return Parts(features, table, free, labeled, leaks, again)


def _open_target(dataset: Dataset, directory: str | os.PathLike[str] | None) -> Store:
    """Return the store of the folder to write to. It has the options of the output for the same protocol."""
    source = dataset.store
    if directory is None:
        return Store(f"{source.uri.rstrip('/')}/{FOLDER}", source.options)
    uri = os.fspath(directory)
    return Store(uri, source.find_options(uri), config_key="--out")


def _read_features(request: _Request, folder: Path, on_step: OnStep) -> FeatureSet:
    options = request.options

    def read(snapshot: Snapshot) -> FeatureSet:
        sizes = [file.size for file in snapshot.files(FEATURES)]
        done = 0

        def count_bytes(size: int) -> None:
            nonlocal done
            done += size
            on_step("Reading the features", min(1.0, done / max(1, sum(sizes))))

        return read_feature_set(snapshot, folder, options.layers, count_bytes)

    return read_one_version(request.dataset, options.version, read)


def _read_labels(request: _Request, features: FeatureSet) -> LabelTable | None:
    if request.labels is None:
        return None
    options = request.dataset.store.find_options(os.fspath(request.labels))
    return read_labels(request.labels, features.scan_ids, options)


def _plan_probes(
    features: FeatureSet, table: LabelTable | None, measures: Measures, seed: int
) -> ProbePlan | None:
    if table is None:
        return None
    scope = measures.scope
    return plan_probes(features, table, usable=scope.used, candidates=scope.candidates, seed=seed)


def _find_config(request: _Request, features: FeatureSet) -> FoundConfig:
    """Return the config with which scans can be read again: the user's, or the one of the newest run."""
    output = request.output
    if not isinstance(output, Dataset) and is_config_file(uri := os.fspath(output)):
        return FoundConfig(load(uri))
    recipes = count_values(features.scans["recipe"])
    return find_recorded_config(request.dataset, recipes.most_common(1)[0][0])


def _make_leak_scope(
    features: FeatureSet,
    table: LabelTable | None,
    plan: ProbePlan | None,
    measures: Measures,
    seed: int,
) -> LeakScope:
    labels = () if plan is None else plan.labels
    scope = measures.scope
    return LeakScope(group_scans(features.scans, table, seed), labels, scope.used, scope.candidates)
