"""`featray doctor`: what speaks against a run, looked at before it: one line per result, with what to do.

Tries the real things (three sample scans, the model on them, a file in the output that it takes away
again) and changes nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from featray.output.dataset import Dataset
from featray.output.lease import raise_if_locked
from featray.recipe import make_recipe, recipe_id
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.list import Listing
from featray.storage.store import Store

Verdict = Literal["PASS", "WARN", "FAIL"]
Found = Iterator[tuple[Verdict, str]]

SAMPLE_SCANS = 6
"""Scans that the check `scans` decodes, from small to large."""
_PROBE = ".featray-doctor"
_FLAGS = {
    "sigma": "says how sure the model is, not where the scan lies; to compare scans take the mean",
    "batch_dependent": "follows what else is in the batch; it needs model.batch_size: 1",
    "dead_units_possible": "ends in a ReLU: some units may be 0 for every scan",
}
_RAW_COPIES = 2.5
"""Peak of decoding one scan, in sizes of its int16 volume."""


@dataclass(frozen=True)
class CheckResult:
    """One line: what was looked at, the verdict, and for WARN and FAIL what to do."""

    check: str
    status: Verdict
    message: str


@dataclass(frozen=True)
class DoctorResult:
    """Every result, in the order of a run."""

    results: tuple[CheckResult, ...]

    @property
    def exit_code(self) -> int:
        """Exit code of the command: that of a config that cannot be run, if anything failed."""
        failed = any(result.status == "FAIL" for result in self.results)
        return ExitCode.USAGE if failed else ExitCode.OK

    def text(self) -> str:
        """Return the results for a person."""
        lines = [f"{found.status}  {found.check:<12} {found.message}" for found in self.results]
        counts = {
            status: sum(found.status == status for found in self.results)
            for status in ("PASS", "WARN", "FAIL")
        }
        return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def doctor(config: ConfigInput, overrides: list[str] | None = None) -> DoctorResult:
    """Return what was found about config, source, output, model, layers, memory and accelerators."""
    checked, problems = configuration.load_partly(config, overrides)
    results = [CheckResult("config", "FAIL", problem) for problem in problems]
    if checked is None:
        return DoctorResult(tuple(results))
    if not problems:
        results.append(CheckResult("config", "PASS", f"{configuration.get_name(config)} has no unknown keys"))
    patient = _Patient(checked)
    steps: dict[str, Callable[[], Found]] = {
        "source": patient.source,
        "scans": patient.scans,
        "model": patient.model,
        "layers": patient.layers,
        "invariance": patient.invariance,
        "output": patient.output,
        "memory": patient.memory,
        "accelerator": patient.accelerators,
        "engine": patient.engine,
    }
    for name, look in steps.items():
        said = {result.message for result in results}
        results += [found for found in _run_check(name, look) if found.message not in said]
    return DoctorResult(tuple(results))


def _run_check(name: str, look: Callable[[], Found]) -> list[CheckResult]:
    """Return what one look found; an error it ends with is a result as well."""
    results: list[CheckResult] = []
    try:
        results += [CheckResult(name, verdict, message) for verdict, message in look()]
    except FeatrayError as error:
        problems = getattr(error, "problems", None) or [str(error)]
        results += [CheckResult(name, "FAIL", problem) for problem in problems]
    except Exception as error:  # every store has errors of its own, and their texts may hold credentials
        message = f"{type(error).__name__}; check storage_options, credentials and endpoint"
        results.append(CheckResult(name, "FAIL", message))
    return results


class _Patient:
    """A config under examination; a look keeps what later ones need, which do without if it failed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._listing = Listing(())
        self._decoded: list[Decoded] = []
        self._extractor: Extractor | None = None

    def source(self) -> Found:
        self._listing = check_source(self._config)
        scans = self._listing.scans
        kinds = ", ".join(f"{sum(s.format == kind for s in scans)} {kind}" for kind in _kinds(self._listing))
        yield "PASS", f"{len(scans)} scans ({kinds})"
        settled = [scan for scan in scans if scan.reason is not None and not scan.excluded]
        for scan in settled[:3]:
            yield "WARN", f"{scan.scan_id} will fail: {scan.reason}: {scan.message}"
        if len(settled) > 3:
            yield "WARN", f"{len(settled) - 3} more will fail by what the listing shows alone"

    def scans(self) -> Found:
        config = self._config
        decoder = Decoder.from_config(config)
        sample = [
            decoder(scan)
            for scan in sample_by_size([s for s in self._listing.scans if s.reason is None], SAMPLE_SCANS)
        ]
        self._decoded = [one for one in sample if one.record.status == "ok"]
        for one in sample:
            record = one.record
            if record.status != "ok":
                verdict: Verdict = "WARN" if self._decoded else "FAIL"
                yield verdict, f"{record.scan_id} fails: {record.reason}: {record.message}"
            elif record.warnings:
                yield "WARN", f"{record.scan_id}: {', '.join(record.warnings)}; look at `featray preview`"
        if self._decoded:
            shapes = {"x".join(map(str, one.tensor.shape)) for one in self._decoded}
            yield "PASS", f"{len(self._decoded)} of {len(sample)} sample scans decode, to {', '.join(shapes)}"

    def model(self) -> Found:
        self._extractor = load_extractor(self._config)
        versions = ", ".join(f"{name} {version}" for name, version in self._extractor.versions.items())
        yield "PASS", f"loads and is cut ({versions}, weights {self._extractor.sha256[:12]})"

    def layers(self) -> Found:
        if self._extractor is None:
            return
        known = {
            layer.path: layer for layer in list_layers(self._config.model, input_zyx=self._config.input_zyx)
        }
        for layer in self._extractor.layers:
            yield "PASS", f"{layer.name}: {_shape(layer)}, pool {layer.pool}"
            flags = known[layer.path].flags if layer.path in known else ()
            for flag in flags:
                if flag in _FLAGS:
                    yield "WARN", f"{layer.name} {_FLAGS[flag]} ({flag})"
                elif flag == "stochastic":
                    yield "WARN", f"{layer.name} is drawn at random (stochastic); take z_mean"

    def invariance(self) -> Found:
        samples = [one.tensor[:1] for one in self._decoded]
        same = [one for one in samples if one.shape == samples[0].shape]
        batch: NDArray[np.float32] | None = np.concatenate(same) if same else None
        found = check_invariance(self._config.model, self._config.input_zyx, batch)
        yield ("FAIL" if found.problems else "PASS"), found.to_text()

    def output(self) -> Found:
        config = self._config
        store = Store(config.output.uri, config.output.storage_options)
        store.check_writable()
        raise_if_locked(store)
        if not store.is_local:
            yield _try_writing(store)
        rows = Dataset(store).read_scans(("status", "recipe")).to_pylist()
        stored = {row["recipe"] for row in rows if row["status"] == "ok"}
        yield "PASS", f"can be written; {len(rows)} scans are there"
        if self._extractor is not None:
            mine = recipe_id(make_recipe(config, self._extractor.recipe_part()))
            if stored - {mine}:
                other = f"holds features of another recipe than this config's ({mine})"
                yield "WARN", f"{other}: `featray refresh` makes them anew, `extract` refuses"
        yield from self._disk(store)

    def _disk(self, store: Store) -> Found:
        if not store.is_local or self._extractor is None or not self._decoded:
            return
        patches = sum(len(one.tensor) for one in self._decoded) / len(self._decoded)
        values = sum(layer.values for layer in self._extractor.layers)
        needed = 4 * values * patches * len(self._listing.scans)
        free = shutil.disk_usage(_existing(store.root)).free
        verdict: Verdict = "WARN" if needed > 0.9 * free else "PASS"
        yield verdict, f"up to {needed / 1e6:.3g} MB of values for {free / 1e9:.3g} GB free"

    def memory(self) -> Found:
        if not self._decoded:
            return
        largest = max(2 * math.prod(one.record.shape or ()) for one in self._decoded)
        workers = self._config.run.decode.workers
        count = count_usable_cores() if workers is None else workers
        one = _RAW_COPIES * largest + max(decoded.tensor.nbytes for decoded in self._decoded) + 0.3e9
        needed, there = count * one + psutil.Process().memory_info().rss, psutil.virtual_memory().available
        text = f"about {needed / 1e9:.1f} GB for {count} decoders and the model, {there / 1e9:.1f} GB free"
        if needed <= there:
            yield "PASS", text
        else:
            yield "WARN", f"{text}; lower run.decode.workers or limits.max_voxels"

    def accelerators(self) -> Found:
        from featray.model.runtime import list_gpu_names

        asked, there = self._config.run.actors.num_gpus, list_gpu_names()
        if there:
            yield "PASS", f"TensorFlow sees {', '.join(there)} on this machine"
            if not asked:
                yield "WARN", "run.actors.num_gpus is 0: with engine ray the GPUs stay idle"
        elif asked:
            yield "WARN", f"run.actors.num_gpus is {asked:g}, but TensorFlow sees no GPU on this machine"
        else:
            yield "PASS", f"no GPU on this machine; the model runs on {count_usable_cores()} cores"

    def engine(self) -> Found:
        engine = make_engine(self._config, len(self._listing.scans))
        with engine:
            engine.connect()
        yield "PASS", f"{engine.name}, for {len(self._listing.scans)} scans"


def _kinds(listing: Listing) -> Sequence[str]:
    return sorted({scan.format for scan in listing.scans})


def _shape(layer: OutputLayer) -> str:
    return "x".join("any" if size is None else str(size) for size in layer.shape) or "1"


def _existing(path: str) -> str:
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _try_writing(store: Store) -> tuple[Verdict, str]:
    """Put a file where there is none, once and again: only the first may succeed."""
    name = f"{_PROBE}-{os.urandom(4).hex()}"
    try:
        first, second = store.create(name, b"1"), store.create(name, b"2")
    finally:
        store.delete([name])
    if first and not second:
        return "PASS", "the store creates files and refuses to create them twice, as commits need"
    return "FAIL", "the store overwrites where it must refuse: two runs at once could lose commits here"
