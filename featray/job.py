"""One run: its scope, its options, its engine, its model, and the stages made from them."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from featray import config as configuration
from featray.config import Config
from featray.engines.base import Decoding, Engine, Stages
from featray.engines.choice import choose_engine
from featray.errors import HeldOutputError, ModelError
from featray.hardware import DEFAULT_THREADS, ModelPlace, ModelThreads
from featray.model import Extractor, ModelFacts, remembered, runtime
from featray.model.model_facts import refuse_changed_model
from featray.output.dataset import Dataset, Snapshot, make_partition_name
from featray.output.lease import Lease
from featray.output.lease_wait import LeaseWait
from featray.output.ledger import Ledger
from featray.recipe import RecipeIds, make_recipe, make_recipe_ids
from featray.schema import Receipt
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.stages.input_cache import InputCache
from featray.stages.list import Listing
from featray.stages.plan import Plan, make_plan
from featray.stages.report import Run
from featray.stages.write import write
from featray.storage.names import MAX_NAME_BYTES
from featray.storage.ray_job import find_submission_id, refuse_package

log = logging.getLogger(__name__)

MIN_SCANS_PER_FILE = 8
MAX_FILE_BYTES = 64 * 2**20

Instrument = Callable[[str, Any], Any]
"""Takes the name of a stage (`decode`, `model`, `write`) and its callable; returns a callable with the same
behavior that does more, such as timing each call."""


def keep_stage(name: str, stage: Any) -> Any:  # noqa: ARG001  # every instrument gets the name
    """Return the stage unchanged: the instrument of a run that is not measured."""
    return stage


@dataclass(frozen=True)
class RunScope:
    """Which scans a run processes besides new ones.

    Attributes:
        refresh: Whether changed scans and cells of another recipe are computed again, and scans that are no
            longer listed are removed.
        retry: Reasons of failed scans that are tried again although nothing has changed, in addition to
            `storage`.
        drop_layers: Whether layers that the config does not name are removed.
    """

    refresh: bool = False
    retry: Collection[str] | None = None
    drop_layers: bool = False

    @property
    def command(self) -> str:
        """Name of the command with this scope."""
        return "refresh" if self.refresh else "extract"


@dataclass(frozen=True)
class RunOptions:
    """How the caller watches, stops and measures a run.

    Attributes:
        show: Whether to show progress on stderr.
        stop: Event that stops the run cleanly when it is set.
        wait_s: Seconds to wait for an output that another run holds.
        started: Time at which the command began, in seconds since the epoch.
        instrument: Wraps each stage, for measurements.
    """

    show: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    wait_s: float = 0.0
    started: float = field(default_factory=time.time)
    instrument: Instrument = keep_stage

    @classmethod
    def create(cls, *, show: bool, stop: threading.Event | None, wait_s: float) -> RunOptions:
        """Return the options of a run that begins now."""
        return cls(show=show, stop=stop or threading.Event(), wait_s=wait_s)


@dataclass(frozen=True)
class Job:
    """The config of one run with the model loaded and the recipes known."""

    config: Config
    extractor: Extractor
    run: Run
    recipes: RecipeIds
    threads: ModelThreads
    scope: RunScope
    options: RunOptions

    @classmethod
    def prepare(
        cls, config: Config, engine: Engine, scope: RunScope | None = None, options: RunOptions | None = None
    ) -> Job:
        """Load the model and make the recipes.

        Args:
            config: Checked config.
            engine: The engine that the run uses, or would use.
            scope: Which scans are due; None for those of `extract`.
            options: How the caller watches, stops and measures the run; None for the defaults.

        Raises:
            ModelError: The model cannot be loaded, or cannot be truncated as configured.
        """
        scope, options = scope or RunScope(), options or RunOptions()
        extractor = load_extractor(config, engine.threads, engine.place, remember=True)
        recipe = make_recipe(config, extractor.recipe_part())
        recipes = make_recipe_ids(recipe)
        run = Run(
            run_id=new_run_id(),
            command=scope.command,
            started=options.started,
            engine=engine.name,
            engine_reason=choose_engine(config.run).reason,
            recipe_id=recipes.inputs,
            recipe=recipe,
            layers=tuple(layer.name for layer in extractor.layers),
            layer_recipes=recipes.layers,
            layer_positions={layer.name: layer.position for layer in extractor.layers},
            sampling_layers=tuple(sorted(extractor.sampling_layers)),
            model_sha256=extractor.files["model"],
            config=configuration.mask_secrets(config),
            max_failed_fraction=config.limits.max_failed_fraction,
            submission_id=find_submission_id(),
        )
        return cls(config, extractor, run, recipes, engine.threads, scope, options)

    def identify(self, receipt: Receipt) -> Receipt:
        """Write this run and its recipes into the records of a receipt, and return it."""
        receipt.set_run(self.recipes.inputs, self.recipes.layers, self.run.run_id)
        return receipt

    def make_plan(self, listing: Listing, stored: Snapshot | None, scope: RunScope | None = None) -> Plan:
        """Return the plan for the listed and the stored scans; the default scope is that of the run."""
        scope = scope or self.scope
        ledger = Ledger.read(stored, self.run.recipe)
        return make_plan(listing, ledger, self.recipes, refresh=scope.refresh, retry=scope.retry)

    def open_committer(self, dataset: Dataset, listing: Listing, lease: Lease) -> Committer:
        """Open the output for this run's commits, and complete the commit of a run that was killed."""
        output = self.config.output
        return Committer(
            dataset,
            output.partition_by,
            extra_columns(self.config, listing),
            run_id=self.run.run_id,
            keep_versions_days=output.keep_versions_days,
            check_lease=lease.check,
        )

    def make_stages(self, dataset: Dataset, scans: int) -> Stages:
        """Return the stages after decoding for a run over `scans` scans."""
        config, run, instrument = self.config, self.run, self.options.instrument
        load = functools.partial(
            load_same_extractor, config, self.threads, self.extractor.sha256, self.extractor.facts
        )
        write_run = functools.partial(
            write,
            dataset=dataset,
            partition_by=config.output.partition_by,
            recipes=self.recipes.layers,
            run_id=run.run_id,
        )
        return Stages(
            extractor=instrument("model", self.extractor),
            load_extractor=functools.partial(_load_instrumented, load, instrument),
            recipe=self.recipes.seed,
            write=instrument("write", write_run),
            load_here=self.extractor.load,
            scans_per_file=_scans_per_file(scans, sum(layer.values for layer in self.extractor.layers)),
            run_id=run.run_id,
            model=config.model,
        )


def make_engine(config: Config, instrument: Instrument = keep_stage) -> Engine:
    """Return the engine of a config; for `auto`, say which one was chosen and why."""
    from featray.engines.inline import InlineEngine

    decoding = make_decoding(config, instrument, InputCache.from_config(config))
    name, reason = choose_engine(config.run)
    if config.run.engine == "auto":
        log.info("engine %s, because %s; set run.engine to choose yourself", name, reason)
    if name == "inline":
        return InlineEngine(config.run.decode.workers, decoding)
    from featray.engines.ray.engine import RayEngine

    return RayEngine(config.run, decoding)


def make_decoding(
    config: Config, instrument: Instrument = keep_stage, cache: InputCache | None = None
) -> Decoding:
    """Return how an engine decodes the scans of a config, with this input cache or without one."""
    has_patches = config.preprocess.fit == "patches" or config.source.rows
    return Decoding(
        decoder=instrument("decode", Decoder.from_config(config, cache)),
        batch_scans=1 if has_patches else config.model.batch_size,  # the patches of one scan fill batches
        limits=config.limits,
        memory=config.run.decode.memory,
    )


def load_extractor(
    config: Config,
    threads: ModelThreads = DEFAULT_THREADS,
    place: ModelPlace = ModelPlace.ANY,
    *,
    remember: bool = False,
) -> Extractor:
    """Load the model for the inputs that preprocessing makes.

    Args:
        config: Checked config.
        threads: CPU threads of the model.
        place: Where the model runs.
        remember: Whether to use facts that an earlier run found out about the model, and to keep them for
            later runs. The model is then loaded when it is first used.

    Raises:
        ModelError: As `Extractor`; or the config keeps each scan's own size, but the model needs a fixed one;
            or the name of a layer is too long for the name of its folder in the output.
    """
    input_zyx = config.input_zyx
    # A model that runs elsewhere is checked in another way.
    remembers = remember and place is not ModelPlace.ELSEWHERE
    key = remembered.make_key(config.model, input_zyx, "extractor") if remembers else None
    facts = ModelFacts.parse(remembered.read(key))
    extractor = Extractor(config.model, input_zyx=input_zyx, threads=threads, place=place, facts=facts)
    if facts is None and extractor.facts is not None:
        remembered.save(key, extractor.facts.to_dict())
    is_volume = config.source.format != "npy"
    if is_volume and input_zyx and None in input_zyx and None not in extractor.input_shape:
        raise ModelError(
            "preprocess.size: null keeps each scan's own size, but the model takes only "
            f"{extractor.input_shape} (z, y, x, channel); give that size"
        )
    _refuse_long_names(layer.name for layer in extractor.layers)
    return extractor


def _refuse_long_names(layers: Iterable[str]) -> None:
    problems = [
        f"model.layers: the layer {name[:40]}... needs a folder with a name of {size} bytes, but file "
        f"systems allow {MAX_NAME_BYTES}; give it a shorter name: {{layer: ..., as: NAME}}"
        for name in layers
        if (size := len(make_partition_name("layer", name).encode())) > MAX_NAME_BYTES
    ]
    if problems:
        raise ModelError(problems)


def load_same_extractor(
    config: Config, threads: ModelThreads, sha256: str, facts: ModelFacts | None
) -> Extractor:
    """Load the model in an actor, on the GPUs that actors claim, or on the CPU.

    With GPUs it is checked again, because its first runs there prepare later ones.

    Args:
        config: Checked config.
        threads: CPU threads of the model.
        sha256: Digest of the model that the recipe was made from.
        facts: Facts that this process found out about the model.

    Raises:
        ModelError: The model is not the one that the recipe was made from.
    """
    runtime.claim_gpus(config.run.actors.num_gpus)
    if facts is not None and not config.run.actors.num_gpus:
        extractor = Extractor(config.model, input_zyx=config.input_zyx, threads=threads, facts=facts)
        extractor.load()
        return extractor
    extractor = load_extractor(config, threads)
    refuse_changed_model(extractor.sha256, sha256)
    return extractor


def extra_columns(config: Config, listing: Listing) -> list[str]:
    """Return the names of further columns of `scans`: the manifest's, and the DICOM tags of the config."""
    names = listing.extra_columns
    return [*names, *(tag for tag in config.privacy.dicom_tags if tag not in names)]


def new_run_id() -> str:
    """Return a new run id; ids are unique and sort by time."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03}-{os.urandom(3).hex()}"


@contextlib.contextmanager
def lock_output(dataset: Dataset, wait_s: float = 0.0) -> Iterator[Committer]:
    """Yield a committer of an existing output, and hold the lease of the output until the `with` block ends.

    For commands that change an output without a config, such as `featray vacuum`.

    Args:
        dataset: The output.
        wait_s: Seconds to wait for an output that another run holds.

    Raises:
        ConfigError: The location holds no featray output, or its changes would be lost with a Ray job.
        HeldOutputError: A run holds the output.
    """
    refuse_package(dataset.store.uri, "OUTPUT")
    partition_by = dataset.open_snapshot().partition_by
    run_id = new_run_id()
    with contextlib.ExitStack() as stack:
        lease = _take_lease(stack, dataset, run_id, LeaseWait(wait_s))
        committer = Committer(dataset, partition_by, run_id=run_id, check_lease=lease.check)
        if lease.was_taken_over:
            committer.exclude_earlier_driver()
        yield committer


def _take_lease(stack: contextlib.ExitStack, dataset: Dataset, run_id: str, waiting: LeaseWait) -> Lease:
    """Take the lease of an output as soon as no other run holds it; `stack` releases it."""
    lease = Lease(dataset.store, run_id)
    while True:
        try:
            return stack.enter_context(lease)
        except HeldOutputError as error:
            waiting.wait(dataset.store, error)


def _load_instrumented(load: Callable[[], Extractor], instrument: Instrument) -> Any:
    return instrument("model", load())


def _scans_per_file(scans: int, values: int) -> int:
    """Return the number of scans that share a file: the square root of all scans, within limits.

    A kill loses at most that many scans. A run makes about as many commits as a file has scans. The features
    of one model input per scan take at most 64 MB in all layers together, unless one scan alone takes more.

    Args:
        scans: Scans of the run.
        values: Values of all layers for one model input.
    """
    target = max(MIN_SCANS_PER_FILE, math.isqrt(scans))
    return max(1, min(target, MAX_FILE_BYTES // (4 * max(1, values))))
