"""`featray plan`: count the scans that `extract` and `refresh` would process, and estimate time and size.

Configuration in, counts and an estimate (`run_estimate.py`) out. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from featray.checks import check
from featray.collection.listing import Listing
from featray.commands.run_estimate import Estimate, estimate_run
from featray.config import ConfigInput
from featray.engines.base import Engine
from featray.hardware import ModelPlace
from featray.job import Job, RunScope, make_engine
from featray.model.runtime import list_gpu_names
from featray.output.dataset import Dataset
from featray.stages.plan import STATES, Plan
from featray.stages.report import (
    describe_cleared_failures,
    describe_lost_layers,
    describe_other_layers,
    format_layer_counts,
)


@dataclass(frozen=True)
class PlanResult:
    """Counts of the scans that `extract` and `refresh` would process, and an estimate.

    Attributes:
        found: Number of listed scans.
        new: Number of scans without a row in the scans table.
        changed: Number of scans with other content than their row.
        stale: Number of scans with cells of another recipe, or that failed with another recipe.
        failed: Number of unchanged scans that failed before.
        incomplete: Number of unchanged scans that lack layers of the config.
        removed: Number of stored scans that are no longer listed; `refresh` would remove them.
        up_to_date: Number of unchanged scans that are stored or excluded.
        todo: Number of scans that `extract` would process. It refuses if `other_recipe` is not 0.
        refresh_todo: Number of scans that `refresh` would process.
        other_recipe: Number of scans with cells of another recipe.
        can_keep_both: Whether one output can hold these cells and those of this config under other names.
        unreachable: Number of stored scans that the listing could not reach; their rows are kept.
        recipe: Recipe id of reading and preprocessing of this config.
        engine: Engine that `extract` would use.
        layers: Output names.
        layer_recipes: Layer of the config → its recipe id.
        cells: State → number of cells (scan x layer of the config); `new` are those of new scans, `missing`
            those that stored scans lack.
        work: A sentence about the work to do and the up-to-date layers; empty without work.
        other_layers: Stored layer that the config does not name → number of scans that have it.
        lost_layers: The same layers → number of scans whose cell a refresh removes, because their content
            has changed.
        incompatible_layers: The same layers → number of scans whose cell `refresh --drop-layers` removes,
            because they were read or preprocessed in another way; without the option, `refresh` refuses.
        cleared_failures: Number of failed scans that a run sets to ok without computing, because they have
            all layers of the config.
        renamed_layers: Stored layer → its name in the config, for layers that only have another name.
        ignored: File name suffix → number of files that belong to no scan.
        estimate: Estimate of the next run.
        scans: scan_id, state and why of every scan; empty unless requested.
    """

    found: int
    new: int
    changed: int
    stale: int
    failed: int
    incomplete: int
    removed: int
    up_to_date: int
    todo: int
    refresh_todo: int
    other_recipe: int
    can_keep_both: bool
    unreachable: int
    recipe: str
    engine: str
    layers: tuple[str, ...]
    layer_recipes: dict[str, str] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    work: str = ""
    other_layers: dict[str, int] = field(default_factory=dict)
    lost_layers: dict[str, int] = field(default_factory=dict)
    incompatible_layers: dict[str, int] = field(default_factory=dict)
    renamed_layers: dict[str, str] = field(default_factory=dict)
    cleared_failures: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    estimate: Estimate = field(default_factory=Estimate)
    scans: Sequence[dict[str, str]] = ()

    def text(self) -> str:
        """Return the result as text for the terminal."""
        states = ", ".join(f"{getattr(self, state)} {state.replace('_', ' ')}" for state in STATES)
        lines = [f"found {self.found} scans: {states}"]
        if any(self.cells.values()):
            lines.append(f"cells (scan x layer): {_format_states(self.cells)}")
        if self.unreachable:
            lines.append(f"{self.unreachable} stored scans cannot be reached now; their features are kept")
        if self.cleared_failures:
            lines.append(describe_cleared_failures(self.cleared_failures))
        if self.other_layers:
            lines.append(describe_other_layers(self.other_layers))
        table_changes = self.removed or self.renamed_layers or self.cleared_failures
        if not (self.todo or self.refresh_todo or table_changes):
            return "\n".join([*lines, "nothing to do", *self._describe_scans()])
        if self.work:
            lines.append(f"to compute: {self.work}")
        if self.renamed_layers:
            names = ", ".join(f"{old} to {new}" for old, new in self.renamed_layers.items())
            lines.append(f"to rename, without computing: layer {names}")
        lines += [self._describe_extract(), self._describe_refresh()]
        run = f"{len(self.layers)} layers, engine {self.engine}"
        lines.append(f"{run}; `--why ID` explains the state of one scan")
        return "\n".join([*lines, *self._describe_estimate(), *self._describe_scans()])

    def _describe_scans(self) -> list[str]:
        return [f"{scan['scan_id']}: {scan['why']}" for scan in self.scans]

    def _describe_extract(self) -> str:
        if self.other_recipe:
            problem = f"{self.other_recipe} scans have features of another recipe"
            way = (
                "give the layers of this config other names"
                if self.can_keep_both
                else "choose another output"
            )
            return (
                f"extract: refuses, because {problem}, which `featray refresh` replaces; to keep both, {way}"
            )
        has_work = self.todo or self.renamed_layers or self.cleared_failures
        return f"extract: would process {self.todo} scans" if has_work else "extract: nothing to do"

    def _describe_refresh(self) -> str:
        work = f"process {self.refresh_todo} scans and remove {self.removed}"
        lost = f"; {describe_lost_layers(self.lost_layers)}" if self.lost_layers else ""
        if not self.incompatible_layers:
            return f"refresh: would {work}{lost}"
        layers = format_layer_counts(self.incompatible_layers)
        problem = f"it would remove layers that were read or preprocessed in another way: {layers}"
        return f"refresh: refuses, because {problem}; with --drop-layers it would {work}{lost}"

    def _describe_estimate(self) -> list[str]:
        estimate = self.estimate
        if not estimate.sampled:
            return []
        cached = f" ({estimate.from_cache} of them in the input cache)" if estimate.from_cache else ""
        duration, size = _format_duration(estimate.seconds), _format_size(estimate.output_bytes)
        cluster = (
            f" on {estimate.nodes} nodes with {estimate.cores:g} cores, {estimate.gpus:g} GPUs and "
            f"{estimate.actors} actors"
            if estimate.nodes
            else ""
        )
        return [
            f"estimate of {estimate.command} from {estimate.sampled} scans{cached}{cluster}: "
            f"{estimate.scans_per_s:.2f} scans/s, {duration}, "
            f"{size} of values, {estimate.memory_bytes / 1e9:.1f} GB of memory per process"
        ]


def plan(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    explain: bool = False,
    show: bool = False,
) -> PlanResult:
    """Count the scans that `extract` and `refresh` would process, and estimate the run. Write nothing.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts, which take precedence over the file.
        explain: Whether to explain the state of every scan; the result then has an entry for each.
        show: Whether to show progress on stderr while the source is listed.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
    """
    checked, listing = check(config, overrides, show=show)
    dataset = Dataset.open(checked.output)
    with make_engine(checked) as engine:
        if engine.place is ModelPlace.ELSEWHERE and list_gpu_names():
            engine.place = ModelPlace.ANY  # the estimate runs the model here, on a GPU as the actors will
        return _make_result(Job.prepare(checked, engine), engine, dataset, listing, explain=explain)


def _make_result(
    job: Job, engine: Engine, dataset: Dataset, listing: Listing, *, explain: bool
) -> PlanResult:
    stored = dataset.find_snapshot()
    extract_plan = job.make_plan(listing, stored, RunScope())
    return PlanResult(
        found=len(listing.scans),
        **extract_plan.counts,
        todo=len(extract_plan.todo),
        refresh_todo=extract_plan.refresh_todo,
        other_recipe=extract_plan.other_recipe,
        can_keep_both=extract_plan.can_keep_both,
        unreachable=extract_plan.unreachable,
        recipe=job.run.recipe_id,
        engine=engine.name,
        layers=job.run.layers,
        layer_recipes=job.recipes.layers,
        cells=extract_plan.count_cells(),
        work=extract_plan.describe_work(),
        other_layers=dict(extract_plan.other_layers),
        lost_layers=dict(extract_plan.lost_layers),
        incompatible_layers=dict(extract_plan.incompatible_layers),
        renamed_layers=dict(extract_plan.renames),
        cleared_failures=len(extract_plan.cleared_failures),
        ignored=listing.ignored,
        estimate=_estimate_next_run(job, engine, dataset, listing, extract_plan),
        scans=list(extract_plan.explain_all()) if explain else (),
    )


def explain_scan(config: ConfigInput, scan_id: str, overrides: list[str] | None = None) -> str:
    """Return one sentence about a scan: its state and the facts that the state follows from.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        scan_id: Id of a listed or stored scan.
        overrides: `key.path=value` texts, which take precedence over the file.

    Raises:
        UsageError: The config, the source or the model cannot be used, or no scan has this id.
    """
    checked, listing = check(config, overrides)
    dataset = Dataset.open(checked.output)
    job = Job.prepare(checked, make_engine(checked))
    return job.make_plan(listing, dataset.find_snapshot(), RunScope()).explain_scan(scan_id)


def _format_states(cells: Mapping[str, int]) -> str:
    """Return the states that any cell has, with their numbers of cells."""
    return ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in cells.items() if count)


def _format_duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds:.0f} s"


def _format_size(size_bytes: int) -> str:
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes / 1e3:.1f} kB"


def _estimate_next_run(job: Job, engine: Engine, dataset: Dataset, listing: Listing, plan: Plan) -> Estimate:
    """Estimate `extract`, or `refresh` if `extract` refuses or has nothing to do.

    Args:
        job: The run.
        engine: Its engine.
        dataset: The output.
        listing: Every scan of the collection.
        plan: The plan of `extract`.
    """
    if plan.refresh_todo and (plan.other_recipe or not plan.todo):
        refresh = RunScope(refresh=True)
        refresh_plan = job.make_plan(listing, dataset.find_snapshot(), refresh)
        return replace(estimate_run(job, engine, dataset, refresh_plan), command=refresh.command)
    return estimate_run(job, engine, dataset, plan)
