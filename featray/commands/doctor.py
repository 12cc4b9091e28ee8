"""`featray doctor`: check everything that a run needs, before the run. Each result is one line, with advice.

The checks use the real collection, model and output: they decode a few scans and run the model on them. In an
object store they also write a small file and delete it. Nothing else is changed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from featray import config as configuration
from featray.checks import check_source
from featray.collection.listing import sample_by_size
from featray.config import Config, ConfigInput
from featray.errors import ExitCode, FeatrayError
from featray.hardware import count_usable_cores
from featray.job import load_extractor, make_engine
from featray.model import Extractor, OutputLayer, check_invariance, list_layers
from featray.output.dataset import SCANS, Dataset, Snapshot
from featray.output.lease import raise_if_locked
from featray.output.ledger import Ledger
from featray.recipe import make_recipe, make_recipe_ids
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.input_cache import InputCache
from featray.stages.list import Listing
from featray.stages.plan import make_plan
from featray.storage.store import Store

CheckStatus = Literal["PASS", "WARN", "FAIL"]
Outcomes = Iterator[tuple[CheckStatus, str]]
"""Status and message of each result of a check."""

SAMPLE_SCANS = 6
"""Scans that the check `scans` decodes, from small to large."""

_MAX_LISTED_FAILURES = 3
_TEST_FILE = ".featray-doctor"
_FLAG_ADVICE = {
    "sigma": "is the spread of the latent, not the position of the scan; use the mean to compare scans",
    "batch_dependent": "depends on the other inputs in the batch; set model.batch_size: 1",
    "dead_units_possible": "comes from a ReLU: units may be 0 for every scan; consider the layer before",
    "stochastic": "is sampled at random; use z_mean instead",
}
_SCAN_ADVICE = "repair the scan, or leave it: the run records it as failed with this reason"
_DECODE_COPIES = 2.5
"""Peak memory of decoding one scan, in multiples of the size of its int16 volume."""
_PROCESS_BYTES = 0.3e9
"""Memory of a decode worker process apart from the scan."""
_DISK_SHARE = 0.9
"""Share of the free disk space above which the expected size of the output is a warning."""


@dataclass(frozen=True)
class CheckResult:
    """One result of a check.

    Attributes:
        check: Name of the check.
        status: PASS, WARN or FAIL.
        message: The result; for WARN and FAIL with advice.
    """

    check: str
    status: CheckStatus
    message: str


@dataclass(frozen=True)
class DoctorResult:
    """The results of all checks, in the order in which a run needs the checked things."""

    results: tuple[CheckResult, ...]

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 2, as for a config that cannot be run, if a check failed."""
        return ExitCode.USAGE if self._count("FAIL") else ExitCode.OK

    def text(self) -> str:
        """Return the results as text for the terminal: one line per result, and a line of counts."""
        lines = [f"{result.status}  {result.check:<12} {result.message}" for result in self.results]
        statuses: tuple[CheckStatus, ...] = ("PASS", "WARN", "FAIL")
        return "\n".join([*lines, ", ".join(f"{self._count(status)} {status}" for status in statuses)])

    def _count(self, status: CheckStatus) -> int:
        return sum(result.status == status for result in self.results)


def doctor(config: ConfigInput, overrides: list[str] | None = None) -> DoctorResult:
    """Check config, source, sample scans, model, layers, output, cache, memory, accelerators and engine.

    Problems are results, not errors.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts, which take precedence over the file.
    """
    checked, problems = configuration.load_partly(config, overrides)
    results = [CheckResult("config", "FAIL", problem) for problem in problems]
    if checked is None:
        return DoctorResult(tuple(results))
    if not problems:
        results.append(CheckResult("config", "PASS", f"{configuration.get_name(config)} has no unknown keys"))
    checks = _Checks(checked)
    by_name: dict[str, Callable[[], Outcomes]] = {
        "source": checks.check_source,
        "scans": checks.check_scans,
        "model": checks.check_model,
        "layers": checks.check_layers,
        "invariance": checks.check_invariance,
        "output": checks.check_output,
        "cache": checks.check_cache,
        "memory": checks.check_memory,
        "accelerator": checks.check_accelerators,
        "engine": checks.check_engine,
    }
    for name, check in by_name.items():
        known_messages = {result.message for result in results}  # two checks may meet the same problem
        results += [result for result in _run_check(name, check) if result.message not in known_messages]
    return DoctorResult(tuple(results))


def _run_check(name: str, check: Callable[[], Outcomes]) -> list[CheckResult]:
    """Return the results of one check; an exception becomes a result with status FAIL."""
    results: list[CheckResult] = []
    try:
        results += [CheckResult(name, status, message) for status, message in check()]
    except FeatrayError as error:
        problems = getattr(error, "problems", None) or [str(error)]
        results += [CheckResult(name, "FAIL", problem) for problem in problems]
    except Exception as error:  # stores raise exceptions of many types, whose texts may hold credentials
        message = f"{type(error).__name__}; check storage_options, credentials and endpoint"
        results.append(CheckResult(name, "FAIL", message))
    return results


class _Checks:
    """The checks of one config, to be called in order.

    A check keeps its results for later checks. A later check does without them if the earlier check failed.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._listing = Listing(())
        self._decoded: list[Decoded] = []
        self._extractor: Extractor | None = None

    def check_source(self) -> Outcomes:
        """List the collection."""
        self._listing = check_source(self._config)
        scans = self._listing.scans
        yield "PASS", f"{len(scans)} scans ({_count_formats(self._listing)})"
        failing = [scan for scan in scans if scan.reason is not None and not scan.excluded]
        for scan in failing[:_MAX_LISTED_FAILURES]:
            yield "WARN", f"{scan.scan_id} will fail: {scan.reason}: {scan.message}; {_SCAN_ADVICE}"
        if (others := len(failing) - _MAX_LISTED_FAILURES) > 0:
            yield (
                "WARN",
                f"{others} other scans will fail; after the run, `featray failures` lists their reasons",
            )

    def check_scans(self) -> Outcomes:
        """Decode a few scans of different sizes."""
        decoder = Decoder.from_config(self._config)
        readable = [scan for scan in self._listing.scans if scan.reason is None]
        sample = [decoder(scan) for scan in sample_by_size(readable, SAMPLE_SCANS)]
        self._decoded = [decoded for decoded in sample if decoded.record.status == "ok"]
        for record in (decoded.record for decoded in sample):
            if record.status != "ok":
                status: CheckStatus = "WARN" if self._decoded else "FAIL"
                yield status, f"{record.scan_id} fails: {record.reason}: {record.message}; {_SCAN_ADVICE}"
            elif record.warnings:
                codes = ", ".join(record.warnings)
                yield "WARN", f"{record.scan_id}: {codes}; check its picture with `featray preview`"
        if self._decoded:
            shapes = {"x".join(map(str, decoded.tensor.shape)) for decoded in self._decoded}
            yield (
                "PASS",
                f"{len(self._decoded)} of {len(sample)} sample scans decode, to {', '.join(shapes)}",
            )

    def check_model(self) -> Outcomes:
        """Load the model and truncate it behind the deepest layer."""
        self._extractor = load_extractor(self._config)
        versions = ", ".join(f"{name} {version}" for name, version in self._extractor.versions.items())
        yield "PASS", f"loads and is truncated ({versions}, weights {self._extractor.sha256[:12]})"

    def check_layers(self) -> Outcomes:
        """Report shape and flags of each layer of the config."""
        if self._extractor is None:
            return
        listed = list_layers(self._config.model, input_zyx=self._config.input_zyx)
        flags = {layer.path: layer.flags for layer in listed}
        for layer in self._extractor.layers:
            yield "PASS", f"{layer.name}: {_format_shape(layer)}, pool {layer.pool}"
            for flag in flags.get(layer.path, ()):
                if flag in _FLAG_ADVICE:
                    yield "WARN", f"{layer.name} {_FLAG_ADVICE[flag]} ({flag})"

    def check_invariance(self) -> Outcomes:
        """Check that values of the layers do not depend on the other inputs in the batch."""
        samples = [decoded.tensor[:1] for decoded in self._decoded]
        equal_shapes = [sample for sample in samples if sample.shape == samples[0].shape]
        batch: NDArray[np.float32] | None = np.concatenate(equal_shapes) if equal_shapes else None
        report = check_invariance(self._config.model, self._config.input_zyx, batch)
        yield ("FAIL" if report.problems else "PASS"), report.to_text()

    def check_output(self) -> Outcomes:
        """Check access to the output, its lock, the recipes of its features, and the free disk space."""
        store = Store(self._config.output.uri, self._config.output.storage_options)
        store.check_writable()
        raise_if_locked(store)
        if not store.is_local:
            yield _check_exclusive_create(store)
        snapshot = Dataset(store).find_snapshot()
        scans = sum(file.rows for file in snapshot.files(SCANS)) if snapshot else 0
        yield "PASS", f"writable; holds {scans} scans"
        if self._extractor is not None:
            yield from self._check_recipes(snapshot, self._extractor)
        yield from self._check_disk(store)

    def _check_recipes(self, snapshot: Snapshot | None, extractor: Extractor) -> Outcomes:
        """Warn if stored cells of the config's layers have another recipe."""
        recipe = make_recipe(self._config, extractor.recipe_part())
        plan = make_plan(self._listing, Ledger.read(snapshot, recipe), make_recipe_ids(recipe))
        if plan.other_recipe:
            problem = "holds features of another recipe than that of this config"
            yield "WARN", f"{problem}; `extract` refuses to add to them, `featray refresh` replaces them"

    def _check_disk(self, store: Store) -> Outcomes:
        if not store.is_local or self._extractor is None or not self._decoded:
            return
        patches = sum(len(decoded.tensor) for decoded in self._decoded) / len(self._decoded)
        values = sum(layer.values for layer in self._extractor.layers)
        needed = 4 * values * patches * len(self._listing.scans)
        free = shutil.disk_usage(_find_existing_parent(store.root)).free
        text = f"up to {needed / 1e6:.3g} MB of values for {free / 1e9:.3g} GB of free disk space"
        if needed > _DISK_SHARE * free:
            yield "WARN", f"{text}; free some space, or choose fewer layers or a smaller pool"
        else:
            yield "PASS", text

    def check_cache(self) -> Outcomes:
        """Check access to the input cache; report its expected size, and that it holds image data."""
        cache = InputCache.from_config(self._config)
        if cache is None:
            return
        cache.store.check_writable()
        yield "PASS", f"{cache.shown_uri} is writable"
        if self._decoded:
            mean = sum(decoded.tensor.nbytes for decoded in self._decoded) / len(self._decoded)
            expected, limit = mean * len(self._listing.scans), cache.max_bytes
            text = f"will hold up to {expected / 1e9:.3g} GB of model inputs before compression"
            if expected > limit:
                problem = f"{text}, but cache.max_gb is {limit / 1e9:g}"
                yield "WARN", f"{problem}; the next run decodes the rest of the scans again"
            else:
                yield "PASS", text
        yield "PASS", "it holds image data of the scans; protect it as you protect the scans"

    def check_memory(self) -> Outcomes:
        """Compare the memory that decode workers and model may need with the free memory."""
        if not self._decoded:
            return
        largest = max(2 * math.prod(decoded.record.shape or ()) for decoded in self._decoded)
        workers = self._config.run.decode.workers
        count = min(count_usable_cores() if workers is None else workers, len(self._listing.scans))
        tensor = max(decoded.tensor.nbytes for decoded in self._decoded)
        per_worker = _DECODE_COPIES * largest + tensor + _PROCESS_BYTES
        needed = count * per_worker + psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
        text = (
            f"about {needed / 1e9:.1f} GB for {count} decode workers and the model, {free / 1e9:.1f} GB free"
        )
        if needed <= free:
            yield "PASS", text
        else:
            yield "WARN", f"{text}; lower run.decode.workers or limits.max_voxels"

    def check_accelerators(self) -> Outcomes:
        """Compare the GPUs that the config requests with those that TensorFlow sees."""
        from featray.model.runtime import list_gpu_names

        requested, names = self._config.run.actors.num_gpus, list_gpu_names()
        if names:
            yield "PASS", f"TensorFlow sees {', '.join(names)} on this machine"
            if not requested:
                yield "WARN", "run.actors.num_gpus is 0, so engine ray leaves the GPUs idle; set it to 1"
        elif requested:
            problem = f"run.actors.num_gpus is {requested:g}, but TensorFlow sees no GPU on this machine"
            yield "WARN", f"{problem}; set it to 0 unless nodes of the cluster have GPUs"
        else:
            yield "PASS", f"no GPU on this machine; the model runs on {count_usable_cores()} cores"

    def check_engine(self) -> Outcomes:
        """Start the engine, or join the cluster."""
        engine = make_engine(self._config)
        with engine:
            engine.connect()
        yield "PASS", f"{engine.name}, for {len(self._listing.scans)} scans"


def _count_formats(listing: Listing) -> str:
    formats = sorted({scan.format for scan in listing.scans})
    return ", ".join(f"{sum(scan.format == name for scan in listing.scans)} {name}" for name in formats)


def _format_shape(layer: OutputLayer) -> str:
    return "x".join("any" if size is None else str(size) for size in layer.shape) or "1"


def _find_existing_parent(path: str) -> str:
    """Return the path itself if it exists, otherwise the nearest existing folder above it."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _check_exclusive_create(store: Store) -> tuple[CheckStatus, str]:
    """Create a file twice: the store must refuse the second time, because commits rely on it."""
    name = f"{_TEST_FILE}-{os.urandom(4).hex()}"
    try:
        first, second = store.create(name, b"1"), store.create(name, b"2")
    finally:
        store.delete([name])
    if first and not second:
        return "PASS", "the store refuses to create a file that exists, as commits require"
    return (
        "FAIL",
        "the store overwrites a file that exists, so two runs at once could lose commits; use another store",
    )
