"""One run: its config, its model, its recipe and its engine."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from featray import config as configuration
from featray.config import Config
from featray.engines.base import Engine, Stages
from featray.errors import ModelError
from featray.hardware import DEFAULT_THREADS, ModelThreads
from featray.model import Extractor
from featray.output.dataset import Dataset, Snapshot
from featray.output.lease import Lease
from featray.recipe import recipe, recipe_id
from featray.schema import SCAN_COLUMNS
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.stages.list import Listing
from featray.stages.plan import PLANNING_COLUMNS, Plan, make_plan
from featray.stages.report import Run
from featray.stages.write import write

log = logging.getLogger(__name__)

INLINE_MAX_SCANS = 100
"""Scans up to which engine auto does without Ray when no cluster is named."""


MIN_SCANS_PER_FILE = 8


MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RunScope:
    """What a command takes up beside new scans.

    Attributes:
        refresh: Changed scans and stale recipes; and scans that are no longer listed go.
        retry: Reasons of failed scans to try again though nothing has changed; None for the passing ones.
    """

    refresh: bool = False
    retry: Collection[str] | None = None

    @property
    def command(self) -> str:
        """Name of the command that wants this."""
        return "refresh" if self.refresh else "extract"


def early_decoder(config: Config) -> Decoder:
    """Return the decoder of a run whose recipe is not known yet."""
    return Decoder.of(config)


@dataclass(frozen=True)
class Job:
    """One run's config with the model loaded and the recipe known."""

    config: Config
    extractor: Extractor
    run: Run
    threads: ModelThreads

    @classmethod
    def prepare(
        cls,
        config: Config,
        engine: str,
        started: float,
        command: str = "plan",
        threads: ModelThreads = DEFAULT_THREADS,
    ) -> Job:
        """Load the model and fix the recipe."""
        extractor = load_extractor(config, threads)
        made = recipe(config, extractor.recipe_part())
        run = Run(
            run_id=new_run_id(),
            command=command,
            started=started,
            engine=engine,
            recipe_id=recipe_id(made),
            recipe=made,
            layers=tuple(layer.name for layer in extractor.layers),
            model_sha256=extractor.files["model"],
            config=configuration.without_secrets(config),
            max_failed_fraction=config.limits.max_failed_fraction,
        )
        return cls(config, extractor, run, threads)

    def plan(self, listing: Listing, stored: Snapshot | None, wanted: RunScope) -> Plan:
        """Return what is left to do, given what is stored."""
        ledger = SCAN_COLUMNS.empty_table() if stored is None else stored.read_scans(PLANNING_COLUMNS)
        return make_plan(listing, ledger, self.run.recipe_id, refresh=wanted.refresh, retry=wanted.retry)

    def committer(self, dataset: Dataset, listing: Listing, lease: Lease) -> Committer:
        """Open the output for this run's commits, and finish what a killed one left half done."""
        output = self.config.output
        return Committer(
            dataset,
            output.partition_by,
            carried(self.config, listing),
            run_id=self.run.run_id,
            keep_versions_days=output.keep_versions_days,
            check_lease=lease.check,
        )

    def stages(self, dataset: Dataset, scans: int) -> Stages:
        """Return what the engine runs for that many scans."""
        config, run = self.config, self.run
        decoder = Decoder.of(config, run.recipe_id, run.run_id)
        return Stages(
            decode=decoder,
            extractor=self.extractor,
            load_extractor=functools.partial(_load_same, config, self.threads, self.extractor.sha256),
            write=functools.partial(
                write,
                dataset=dataset,
                partition_by=config.output.partition_by,
                recipe=run.recipe_id,
                run_id=run.run_id,
            ),
            batch_scans=_batch_scans(config),
            scans_per_file=_scans_per_file(scans, sum(layer.values for layer in self.extractor.layers)),
        )


def choose_engine(config: Config, scans: int) -> Engine:
    """Return the engine asked for; `auto` takes Ray for many scans or a named cluster."""
    from featray.engines.inline import InlineEngine
    from featray.engines.ray.cluster import named_address

    address = named_address(config.run)
    small = scans <= INLINE_MAX_SCANS and not address
    name = config.run.engine
    if name == "auto":
        name = "inline" if small else "ray"
        why = f"{scans} scans and {'a' if address else 'no'} cluster address"
        log.info("engine %s, chosen for %s; set run.engine to choose yourself", name, why)
    if name == "inline":
        return InlineEngine(config.run.decode.workers, config.limits, config.run.decode.memory)
    from featray.engines.ray.engine import RayEngine

    return RayEngine(config.run, config.limits)


def _load_same(config: Config, threads: ModelThreads, sha256: str) -> Extractor:
    """Load the model in another process, where it must be what the recipe was made from."""
    extractor = load_extractor(config, threads)
    if extractor.sha256 != sha256:
        raise ModelError("the model or its code changed while the run was starting; start it again")
    return extractor


def _batch_scans(config: Config) -> int:
    """Return how many scans the model is given at once; one that has patches fills its batches alone."""
    has_patches = config.preprocess.fit == "patches" or config.source.rows
    return 1 if has_patches else config.model.batch_size


def _scans_per_file(scans: int, values: int) -> int:
    """Return how many scans share a file, and are lost at most by a kill: the square root of all.

    So a run has about as many commits as a file has scans; files are of at most 64 MB a layer.
    """
    wanted = max(MIN_SCANS_PER_FILE, math.isqrt(scans))
    return max(1, min(wanted, MAX_FILE_BYTES // (4 * max(1, values))))


def load_extractor(config: Config, threads: ModelThreads = DEFAULT_THREADS) -> Extractor:
    """Load the model for the inputs that preprocessing gives.

    Raises:
        ModelError: As `Extractor`; or it cannot take each scan at its own size, as asked.
    """
    asked = config.input_zyx
    extractor = Extractor(config.model, input_zyx=asked, threads=threads)
    is_volume = config.source.format != "npy"
    if is_volume and asked and None in asked and None not in extractor.input_shape:
        raise ModelError(
            "preprocess.size: null keeps each scan's own size, but the model takes "
            f"{extractor.input_shape} only (z, y, x, channel); give that size"
        )
    return extractor


def carried(config: Config, listing: Listing) -> list[str]:
    """Return the names of further columns of `scans`: the manifest's and the asked-for DICOM tags."""
    names = listing.extra_columns
    return [*names, *(tag for tag in config.privacy.dicom_tags if tag not in names)]


def new_run_id() -> str:
    """Return an id that sorts by time and is unique."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03}-{os.urandom(3).hex()}"


@contextlib.contextmanager
def lock_output(dataset: Dataset) -> Iterator[Committer]:
    """Yield a committer of an existing output, and hold the lease of the output until the `with` block ends.

    For commands that change an output without a config, such as `featray vacuum`.

    Raises:
        ConfigError: There is no featray output here.
        OutputBusyError: A run holds the output.
    """
    partition_by = dataset.open_snapshot().partition_by
    run_id = new_run_id()
    with Lease(dataset.store, run_id) as lease:
        yield Committer(dataset, partition_by, run_id=run_id, check_lease=lease.check)
