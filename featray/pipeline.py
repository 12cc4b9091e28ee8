"""START HERE. The way of a scan: listed → read → preprocessed → extracted → written → committed → reported.

`extract` shows it on one screen. Each step is one file of `featray/stages`; the engines run the middle
ones, on helper processes or on Ray; this file alone knows their order.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from featray import config as configuration
from featray.config import Config, ConfigInput
from featray.dataset import Dataset
from featray.engines import Engine, Stages
from featray.errors import ConfigError, FeatrayError, ModelError, UsageError
from featray.lease import Lease, refuse_if_held
from featray.model import Extractor
from featray.planning import Plan, make_plan
from featray.progress import Progress
from featray.recipe import recipe, recipe_id
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, Receipt, Scan, ScanRecord
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.stages.list import Listing, list_scans
from featray.stages.report import Run, Summary, Tally, report
from featray.stages.write import write
from featray.storage import Store

log = logging.getLogger(__name__)

HANDFUL = 100
"""Scans up to which engine auto does without Ray when no cluster is named."""
MAX_SCANS_PER_FILE = 128
MAX_FILE_BYTES = 64 * 2**20


def extract(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    show: bool = False,
    stop: threading.Event | None = None,
) -> Summary:
    """Extract the features of every scan that has none yet; a second call resumes or does nothing.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that win over the file.
        show: Whether to report progress on stderr.
        stop: Set it from another thread to stop cleanly after what is in flight.

    Returns:
        What was found and done; its `exit_code` is the one of the command line.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
        OutputBusyError: Another run holds the output.
    """
    started = time.time()
    config, listing = check(config, overrides)
    dataset = Dataset(Store(config.output.uri, config.output.storage_options))
    _look_at_output(dataset.store)
    stop = stop or threading.Event()
    with choose_engine(config, len(listing.scans)) as engine:
        job = Job.prepare(config, engine.name, started)
        with Lease(dataset.store, job.run.run_id):
            committer = Committer(dataset, config.output.partition_by, _carried(config, listing.scans))
            committer.recover()
            plan, done = job.plan(listing, dataset), Tally()
            _refuse_other_recipe(plan, job.run.recipe_id)
            committer.remove_orphans()
            if plan.todo:
                with Progress(len(plan.todo), show=show) as progress:
                    for receipt in _receipts(engine, plan, job, dataset, stop):
                        committer.commit([receipt], job.run.run_id)
                        progress.add(receipt.records)
                        done.add(receipt)
                committer.remove_orphans()
            return report(job.run, dataset, listing, plan, done, interrupted=stop.is_set())


def _receipts(
    engine: Engine, plan: Plan, job: Job, dataset: Dataset, stop: threading.Event
) -> Iterator[Receipt]:
    """Yield the receipts of scans that listing has settled, then those of the engine's."""
    settled = [scan for scan in plan.todo if scan.reason is not None]
    readable = [scan for scan in plan.todo if scan.reason is None]
    if settled:
        yield Receipt((), tuple(ScanRecord.of(scan, job.run.recipe_id, job.run.run_id) for scan in settled))
    if readable:
        yield from engine.receipts(readable, job.stages(dataset, len(readable)), stop)


@dataclass(frozen=True)
class Job:
    """One run's config with the model loaded and the recipe known."""

    config: Config
    extractor: Extractor
    run: Run

    @classmethod
    def prepare(cls, config: Config, engine: str, started: float) -> Job:
        """Load the model and fix the recipe."""
        extractor = load_extractor(config)
        made = recipe(config, extractor.recipe_part())
        run = Run(
            run_id=new_run_id(),
            started=started,
            engine=engine,
            recipe_id=recipe_id(made),
            recipe=made,
            layers=tuple(layer.name for layer in extractor.layers),
            model_sha256=extractor.files["model"],
            config=configuration.without_secrets(config),
            max_failed_fraction=config.limits.max_failed_fraction,
        )
        return cls(config, extractor, run)

    def plan(self, listing: Listing, dataset: Dataset) -> Plan:
        """Return what is left to do."""
        return make_plan(listing.scans, dataset.ledger(), self.run.recipe_id)

    def stages(self, dataset: Dataset, scans: int) -> Stages:
        """Return what the engine runs for that many scans."""
        config, run = self.config, self.run
        has_patches = config.preprocess.fit == "patches" or config.source.rows
        decoder = Decoder.of(config, run.recipe_id, run.run_id)
        threads = max(1, int(config.run.actors.num_cpus))
        return Stages(
            decode=decoder,
            extractor=self.extractor,
            load_extractor=functools.partial(_load_same, config, threads, self.extractor.sha256),
            write=functools.partial(
                write,
                dataset=dataset,
                partition_by=config.output.partition_by,
                recipe=run.recipe_id,
                run_id=run.run_id,
            ),
            batch_scans=1 if has_patches else config.model.batch_size,
            scans_per_file=_scans_per_file(scans, sum(layer.values for layer in self.extractor.layers)),
        )


def check(config: ConfigInput, overrides: list[str] | None = None) -> tuple[Config, Listing]:
    """Return the config and the listing once nothing in the YAML or the source speaks against a run.

    Raises:
        ConfigError: Lists every problem; if there is any, also those of the model and its layers.
    """
    checked, problems = configuration.load_partly(config, overrides)
    where = configuration.name_of(config)
    if checked is None:
        raise ConfigError(problems, where)
    listing = Listing(())
    try:
        listing = check_source(checked)
    except UsageError as error:
        problems += error.problems
    if problems:  # the run will not happen; the model is loaded only to report its problems too
        size_is_sound = not any(problem.startswith("preprocess.size") for problem in problems)
        problems += _problems_of_model(checked, size_is_sound)
        raise ConfigError(problems, where)
    return checked, listing


def check_source(config: Config) -> Listing:
    """Return the listing once nothing in the source, or of what the config asks of it, speaks against a run.

    Raises:
        ConfigError: Lists every problem.
    """
    problems = _problems_not_built_yet(config) + _problems_of_tags(config)
    listing = Listing(())
    try:
        listing = list_scans(config.source, config.policy)
        problems += _problems_of_partitions(config, listing) + _problems_of_centers(config, listing)
    except UsageError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return listing


def choose_engine(config: Config, scans: int) -> Engine:
    """Return the engine asked for; `auto` takes Ray for many scans or a named cluster."""
    from featray.engines.inline import InlineEngine

    address = config.run.address or os.environ.get("RAY_ADDRESS")
    small = scans <= HANDFUL and not address
    name = config.run.engine
    if name == "auto":
        name = "inline" if small else "ray"
        why = f"{scans} scans and {'a' if address else 'no'} cluster address"
        log.info("engine %s, chosen for %s; set run.engine to choose yourself", name, why)
    if name == "inline":
        return InlineEngine(config.run.decode.workers, config.limits)
    from featray.engines.ray_data import RayEngine

    return RayEngine(config.run, config.limits)


def load_extractor(config: Config, threads: int | None = None) -> Extractor:
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


def _look_at_output(store: Store) -> None:
    """Refuse an output that is held or cannot be used, before anything slow is done for nothing."""
    try:
        store.refuse_unwritable()
        refuse_if_held(store)
    except FeatrayError:
        raise
    except Exception as error:  # every store has errors of its own, and their texts may hold credentials
        problem = (
            f"output.uri: {configuration.mask_url(store.uri)} cannot be reached ({type(error).__name__})"
        )
        raise ConfigError(f"{problem}; check storage_options, credentials and endpoint") from None


def _refuse_other_recipe(plan: Plan, recipe: str) -> None:
    if plan.other_recipe:
        raise ConfigError(
            f"output.uri: {len(plan.other_recipe)} of its scans have features of another recipe than this "
            f"config's ({recipe}), and a table must not mix them. Choose another output.uri, or the "
            "earlier config."
        )


def new_run_id() -> str:
    """Return an id that sorts by time and is unique."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03}-{os.urandom(3).hex()}"


def _load_same(config: Config, threads: int, sha256: str) -> Extractor:
    """Load the model in another process, where it must be what the recipe was made from."""
    extractor = load_extractor(config, threads)
    if extractor.sha256 != sha256:
        raise ModelError("the model or its code changed while the run was starting; start it again")
    return extractor


def _problems_not_built_yet(config: Config) -> list[str]:
    """Refuse keys of the documented config that nothing here honours yet, rather than ignore them."""
    asked = {
        "output.keep_versions_days above 0": config.output.keep_versions_days > 0,
    }
    return [
        f"{key} is not supported yet by this version of featray"
        for key, is_asked in asked.items()
        if is_asked
    ]


def _problems_of_tags(config: Config) -> list[str]:
    if not config.privacy.dicom_tags:
        return []
    from featray.ct.dicom_tags import unknown_keywords

    unknown = unknown_keywords(config.privacy.dicom_tags)
    return [f"privacy.dicom_tags: DICOM knows no keyword {keyword!r}" for keyword in unknown]


def _problems_of_partitions(config: Config, listing: Listing) -> list[str]:
    texts = [field.name for field in SCAN_COLUMNS if pa.types.is_string(field.type)]
    known = [name for name in texts if name not in FEATURE_COLUMNS.names]  # those are inside the files
    known += [name for name in _carried(config, listing.scans) if name not in SCAN_COLUMNS.names]
    further = config.output.partition_by[1:]
    problems = [
        f"output.partition_by: {name!r} is none of {', '.join(known)}"
        for name in further
        if name not in known
    ]
    if len(set(further)) < len(further):
        problems.append(f"output.partition_by: {list(further)} names a column twice")
    return problems


def _problems_of_centers(config: Config, listing: Listing) -> list[str]:
    is_cut = config.preprocess.fit == "crop_pad" and config.preprocess.size is not None
    if is_cut or not any(scan.center_lps for scan in listing.scans):
        return []
    return ["preprocess.fit: the manifest's center_x, center_y, center_z need fit: crop_pad and a size"]


def _problems_of_model(config: Config, size_is_sound: bool) -> list[str]:
    try:
        load_extractor(config) if size_is_sound else Extractor(config.model)
    except UsageError as error:
        return error.problems
    return []


def _carried(config: Config, scans: Sequence[Scan]) -> list[str]:
    """Return the names of further columns of `scans`: the manifest's and the asked-for DICOM tags."""
    names = {name: None for scan in scans for name in scan.columns}
    return [*names, *(tag for tag in config.privacy.dicom_tags if tag not in names)]


def _scans_per_file(scans: int, values: int) -> int:
    """Return how many scans share a file: about 16 commits a run, files of at most 64 MB a layer."""
    wanted = min(MAX_SCANS_PER_FILE, max(8, -(-scans // 16)))
    return max(1, min(wanted, MAX_FILE_BYTES // (4 * max(1, values))))
