"""`featray benchmark`: from a config to a `BenchmarkReport`, and its JSON document and plot on disk.

Every measurement is a fresh process, so that its start-up counts and no cache of an earlier one helps it. In
each round, the stages are measured in isolation before each run of an engine. The output of the config is
never changed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from featray.benchmark import scripts
from featray.benchmark.instrument import read_recordings
from featray.benchmark.metrics import (
    RunMetrics,
    VariantMetrics,
    combine_isolated_stages,
    combine_runs,
)
from featray.benchmark.plot import plot
from featray.benchmark.process_monitor import CommandUsage, monitor_command
from featray.benchmark.report import BenchmarkReport, FeatureDifference
from featray.benchmark.run_metrics import add_first_commit, make_run_metrics
from featray.benchmark.sample import Sample, sample_collection, sample_phantoms
from featray.benchmark.settings import BenchmarkSettings
from featray.benchmark.start_up import combine_start_up, find_first_commit
from featray.config import CacheConfig, Config, ConfigInput, load
from featray.errors import ExitCode, FeatrayError
from featray.hardware import DEFAULT_THREADS, ModelThreads, count_usable_cores
from featray.model import runtime
from featray.schema import Scan
from featray.storage.ray_job import refuse_package
from featray.storage.urls import mask_url

DIRECTORY = "featray-benchmark"
"""Default folder of the JSON document and the plot, in the working directory."""
MAX_ISOLATED_SCANS = 24
"""Number of distinct scans that are measured in isolation, unless a batch is larger."""
REPEATS = 2
"""Number of times that each stage is called for each scan in one measurement. It is small because the stages
are measured before each run: the speed of a shared machine changes within minutes."""

_UNLIMITED_GB = 10_000
"""Size of the input cache that no benchmark reaches."""
_PACKAGES = ("featray", "tensorflow", "keras", "ray", "numpy", "deflate")
_FINISHED = (ExitCode.OK, ExitCode.TOO_MANY_FAILED)


def benchmark(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    settings: BenchmarkSettings | None = None,
    directory: str | os.PathLike[str] = DIRECTORY,
    show: bool = False,
) -> BenchmarkReport:
    """Measure stages and whole runs, write `benchmark.json` and `benchmark.svg`, and return the report.

    All runs are on this machine. Engine ray starts a local Ray of its own and ignores `run.address`.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: Texts `key.path=value` that override keys of the config.
        settings: Measurements and their sizes; None for the defaults.
        directory: Folder to write to; it is created if it does not exist.
        show: Whether to print the current measurement on stderr.

    Raises:
        UsageError: The config, the source or the model cannot be used.
        FeatrayError: A measured process ended with an error; the message includes its last lines of stderr.
    """
    checked, settings = load(config, overrides), settings or BenchmarkSettings()
    refuse_package(directory, "--out")
    if settings.keep is not None:
        refuse_package(settings.keep, "--keep")
    runtime.use_onednn()  # also for the scripts, whose model would be slower without it on some CPUs
    with tempfile.TemporaryDirectory(prefix="featray-benchmark-") as name:
        folder = Path(name)
        sample = _choose_scans(checked, settings, folder, show=show)
        runner = _BenchmarkRunner.create(sample, settings, folder, show=show)
        report = runner.measure_all()
    return _write_report(report, Path(directory))


def _choose_scans(config: Config, settings: BenchmarkSettings, folder: Path, *, show: bool) -> Sample:
    if settings.phantoms is None:
        return sample_collection(config, settings.sample)
    phantom_folder = Path(settings.keep) if settings.keep else folder / "phantoms"
    _print_progress(f"making {settings.phantoms} phantoms", show=show)
    return sample_phantoms(config, settings.phantoms, phantom_folder)


@dataclass
class _BenchmarkRunner:
    """Runs the measurements of one benchmark and collects their results.

    Attributes:
        sample: The scans to measure.
        settings: Measurements and their sizes.
        folder: Temporary folder for the files of the measured processes.
        show: Whether to print the current measurement on stderr.
        small: Number of scans of the smaller run.
        large: Number of scans of the larger run.
        config: Config of the measured processes, JSON-ready.
        isolated: Figures of the stages in isolation, one document for each measurement.
        expected: Features that featray wrote, to compare scripts with.
        differences: Differences of the features from featray's, by script.
        failed_scripts: Error of each script that failed.
        cache_bytes: Size of the input cache per scan; 0 if it is not measured.
    """

    sample: Sample
    settings: BenchmarkSettings
    folder: Path
    show: bool
    small: int
    large: int
    config: dict[str, Any]
    isolated: list[dict[str, Any]] = field(default_factory=list)
    expected: scripts.FeaturesByLayer = field(default_factory=dict)
    differences: dict[str, tuple[FeatureDifference, ...]] = field(default_factory=dict)
    failed_scripts: dict[str, str] = field(default_factory=dict)
    cache_bytes: float = 0.0

    @classmethod
    def create(
        cls, sample: Sample, settings: BenchmarkSettings, folder: Path, *, show: bool
    ) -> _BenchmarkRunner:
        """Return a runner that has measured nothing yet."""
        small, large = settings.choose_run_sizes(len(sample.scans))
        config = _make_measured_config(sample.config, folder / "out")
        return cls(sample, settings, folder, show, small, large, config)

    def measure_all(self) -> BenchmarkReport:
        """Run all measurements and return the report, without its files."""
        model_rounds, runs, single = [], [], []
        for number in range(self.settings.rounds):
            self._print(f"round {number + 1} of {self.settings.rounds}")
            # Both settings are measured, because it depends on the model which one is faster.
            model_rounds += [
                self._measure_isolated(model_only=True, threads=threads)
                for threads in (DEFAULT_THREADS, ModelThreads.for_cores(count_usable_cores()))
            ]
            runs += list(self._measure_round())
            single += list(self._measure_start_up())
        runs = [run for run in runs if run.variant not in self.failed_scripts]
        single = [run for run in single if run.variant not in self.failed_scripts]
        variants = {
            name: combine_runs([run for run in runs if run.variant == name])
            for name in dict.fromkeys(run.variant for run in runs)
        }
        cached = {name for engine in self.settings.engines for name in _name_cached_runs(engine)}
        return BenchmarkReport(
            machine=_describe_host(),
            scans={
                "source": mask_url(self.sample.config.source.uri),
                "distinct": len(self.sample.scans),
                "found": self.sample.found,
                "made": self.sample.made,
                "small": self.small,
                "large": self.large,
            },
            listing_s=self.sample.listing_s,
            isolated=combine_isolated_stages(self.isolated, model_rounds),
            variants=tuple(variant for name, variant in variants.items() if name not in cached),
            cached=tuple(variant for name, variant in variants.items() if name in cached),
            cache_bytes=self.cache_bytes,
            start_up=tuple(
                combine_start_up(
                    [run for run in single if run.variant == name],
                    [run for run in runs if run.variant == name],
                )
                for name in dict.fromkeys(run.variant for run in single)
            ),
            cores=count_usable_cores(),
            rounds=self.settings.rounds,
            scaling=dict(self._measure_scaling()),
            collection_sizes=tuple(self._measure_collection_sizes()),
            differences=self.differences,
            failed_scripts=self.failed_scripts,
        )

    def _measure_round(self) -> Iterator[RunMetrics]:
        """Yield the smaller and the larger run of every engine and script."""
        for engine in self.settings.engines:
            self._measure_stages()
            yield self._run_engine(engine, self.sample.take(self.small))
            if self.settings.compare and engine == self.settings.engines[0]:
                self.expected = scripts.read_features(self.folder / "out", self._layers)
            self._measure_stages()
            yield self._run_engine(engine, self.sample.take(self.large))
            if self.settings.cache:
                yield from self._run_with_cache(engine)
        for name, script in self.settings.compare.items():
            yield from self._try_script(
                name, script, self.sample.take(self.small), self.sample.take(self.large)
            )

    def _measure_start_up(self) -> Iterator[RunMetrics]:
        """Yield a run of one scan, the smallest, of every engine and script."""
        smallest = [min(self.sample.scans, key=lambda scan: scan.size)]
        for engine in self.settings.engines:
            yield self._run_engine(engine, smallest)
        for name, script in self.settings.compare.items():
            yield from self._try_script(name, script, smallest)

    def _run_with_cache(self, engine: str) -> Iterator[RunMetrics]:
        """Yield the smaller and the larger run of an engine with an empty cache, then with a filled one."""
        folder = self.folder / "cache"
        sections = {"cache": {"uri": str(folder), "max_gb": _UNLIMITED_GB}}
        for count in (self.small, self.large):
            shutil.rmtree(folder, ignore_errors=True)
            for name in _name_cached_runs(engine):
                yield replace(self._run_engine(engine, self.sample.take(count), sections), variant=name)
            files = [path for path in folder.rglob("*") if path.is_file()]
            self.cache_bytes = sum(path.stat().st_size for path in files) / count
        shutil.rmtree(folder)

    def _measure_scaling(self) -> Iterator[tuple[str, VariantMetrics]]:
        """Yield the figures of engines with other numbers of workers and actors, by a description."""
        variants: list[tuple[str, str, dict[str, Any]]] = [
            (f"inline, decode workers: {count}", "inline", {"decode": {"workers": count}})
            for count in self.settings.workers
        ]
        variants += [
            (f"ray, actors: {count}", "ray", {"actors": {"min": count, "max": count}})
            for count in self.settings.actors
        ]
        for name, engine, run_section in variants:
            runs = [
                self._run_engine(engine, self.sample.take(count), {"run": run_section})
                for _ in range(self.settings.rounds)
                for count in (self.small, self.large)
            ]
            yield name, combine_runs(runs)

    def _measure_collection_sizes(self) -> Iterator[RunMetrics]:
        for count in self.settings.collection_sizes:
            for engine in self.settings.engines:
                yield self._run_engine(engine, self.sample.take(count))

    def _measure_stages(self) -> None:
        """Measure the stages in isolation shortly before a run, when the machine is equally fast."""
        self._print("stages in isolation")
        self.isolated.append(self._measure_isolated(model_only=False, threads=ModelThreads(each=1)))

    @property
    def _layers(self) -> list[dict[str, str]]:
        """Name, path and pooling of each layer, as the latest measurement in isolation reported them."""
        layers: list[dict[str, str]] = self.isolated[-1]["layers"]
        return layers

    def _measure_isolated(self, *, model_only: bool, threads: ModelThreads) -> dict[str, Any]:
        # At least a full batch, because models take longer per input for a smaller batch.
        scans = self.sample.scans[: max(MAX_ISOLATED_SCANS, self.sample.config.model.batch_size)]
        document = {
            "config": self.config,
            "scans": [scan.to_json() for scan in scans],
            "repeats": REPEATS,
            "model_only": model_only,
            "calls": threads.calls,
        }
        usage = monitor_command(
            _make_command("stage_timing"), document, _make_environment(_make_thread_variables(threads))
        )
        figures: dict[str, Any] = json.loads(_get_output(usage, "stages in isolation", (ExitCode.OK,)))
        return figures

    def _run_engine(
        self, engine: str, scans: Sequence[Scan], sections: Mapping[str, Mapping[str, Any]] | None = None
    ) -> RunMetrics:
        """Run an engine over the scans, with changes to sections of the config."""
        sections, count = sections or {}, len(scans)
        changes = f" {json.dumps(sections)}" if sections else ""
        self._print(f"engine {engine}, {count} scans{changes}")
        out, recordings = self.folder / "out", self.folder / "recordings"
        for place in (out, recordings):
            shutil.rmtree(place, ignore_errors=True)
        recordings.mkdir()
        config = {name: _merge_section(self.config[name], changes) for name, changes in sections.items()}
        config["run"] = {**config.get("run", self.config["run"]), "engine": engine}
        document = {
            "config": {**self.config, **config},
            "scans": [scan.to_json() for scan in scans],
            "recordings": str(recordings),
        }
        usage = monitor_command(_make_command("measured_run"), document, _make_environment({}))
        summary = json.loads(_get_output(usage, f"engine {engine}", _FINISHED))
        if summary["done"] != count:
            raise FeatrayError(
                f"engine {engine} processed only {summary['done']} of {count} scans; "
                "`featray extract` says why"
            )
        metrics = make_run_metrics(engine, count, usage, read_recordings(recordings))
        return add_first_commit(metrics, usage, find_first_commit(out))

    def _try_script(
        self, name: str, script: str | os.PathLike[str], *samples: Sequence[Scan]
    ) -> list[RunMetrics]:
        """Run a script over each sample; if it fails, return nothing and do not run it again.

        A failure is part of the report, so that the figures of the engines are kept.
        """
        if name in self.failed_scripts:
            return []
        try:
            return [self._run_script(name, script, scans) for scans in samples]
        except FeatrayError as error:
            self.failed_scripts[name] = str(error)
            return []

    def _run_script(self, name: str, script: str | os.PathLike[str], scans: Sequence[Scan]) -> RunMetrics:
        self._print(f"{name}, {len(scans)} scans")
        out = self.folder / f"{name}.parquet"
        out.unlink(missing_ok=True)
        document = scripts.make_input(self.sample.config, scans, self._layers, out)
        usage = monitor_command([sys.executable, str(script)], document, _make_environment({}))
        _get_output(usage, name, (ExitCode.OK,))
        if len(scans) == self.small:
            self.differences[name] = scripts.compare_features(out, scans, self.expected)
        return make_run_metrics(name, len(scans), usage, {})

    def _print(self, message: str) -> None:
        _print_progress(message, show=self.show)


def _make_measured_config(config: Config, out: Path) -> dict[str, Any]:
    """Return the config with a temporary output, without the address of a cluster and cache, JSON-ready."""
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    # With the user's cache, a run would measure no decoding, and leave entries of repeated scans in it.
    values["cache"] = CacheConfig().model_dump(mode="json")
    values["output"] = {"uri": str(out), "partition_by": values["output"]["partition_by"]}
    values["run"]["address"] = "local"  # also for a few scans
    return values


def _name_cached_runs(engine: str) -> tuple[str, str]:
    return f"{engine}, cache empty", f"{engine}, cache filled"


def _merge_section(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the changes; a dict among the changes is merged into the one it changes."""
    nested = {key: {**values[key], **value} for key, value in changes.items() if isinstance(value, dict)}
    return {**values, **changes, **nested}


def _make_thread_variables(threads: ModelThreads) -> dict[str, str]:
    """Return the environment variables that set TensorFlow's threads."""
    if threads.each is None:
        return {}
    return {"TF_NUM_INTRAOP_THREADS": str(threads.each), "TF_NUM_INTEROP_THREADS": str(threads.calls)}


def _make_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a measured process: with no Ray cluster, and with only the given threads."""
    removed = ("RAY_ADDRESS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return {**{key: value for key, value in os.environ.items() if key not in removed}, **variables}


def _make_command(module: str) -> list[str]:
    return [sys.executable, "-m", f"featray.benchmark.{module}"]


def _get_output(usage: CommandUsage, measurement: str, accepted: Sequence[int]) -> str:
    """Return the last line that a process printed on stdout.

    Args:
        usage: The finished process.
        measurement: Name of the measurement for the error message.
        accepted: Exit codes of a successful process.

    Raises:
        FeatrayError: The process ended with another exit code.
    """
    lines = usage.output.strip().splitlines()
    if usage.exit_code in accepted:
        return lines[-1] if lines else ""
    last_errors = usage.errors.strip().splitlines()[-8:]
    raise FeatrayError("\n".join([f"{measurement}: ended with exit code {usage.exit_code}:", *last_errors]))


def _describe_host() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cores": count_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _write_report(report: BenchmarkReport, directory: Path) -> BenchmarkReport:
    """Write the JSON document and the plot, and return the report with their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    json_path, svg_path = directory / "benchmark.json", directory / "benchmark.svg"
    json_path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    svg = plot("Core-seconds per scan by use", report.bars(), report.rates())
    svg_path.write_text(svg, encoding="utf-8")
    return replace(report, files=(str(json_path), str(svg_path)))


def _print_progress(message: str, *, show: bool) -> None:
    if show:
        sys.stderr.write(f"featray: {message}\n")
        sys.stderr.flush()
