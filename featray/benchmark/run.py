"""`featray benchmark`: config in, a `Report` out, with its table, JSON and plot on disk.

Every measurement is a fresh process, so that start-up counts and nothing is left warm by another. Within a
round they take turns, stages alone before each run; rounds are repeated. The config's own output is never
touched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from featray.benchmark import sample as collection
from featray.benchmark import scripts
from featray.benchmark.instrument import Work, noted
from featray.benchmark.metrics import RunFigures, Stage, WayFigures, alone_of, way_of
from featray.benchmark.plot import plot
from featray.benchmark.process_monitor import Watched, watch
from featray.benchmark.report import Difference, Report
from featray.benchmark.sample import Sample
from featray.benchmark.settings import Plan
from featray.config import Config, ConfigInput, load
from featray.errors import ExitCode, FeatrayError
from featray.hardware import DEFAULT_THREADS, ModelThreads, count_usable_cores

DIRECTORY = "featray-benchmark"
"""In the working directory; where JSON and plot go unless told otherwise."""

MAX_ALONE = 24
"""Distinct scans that are measured alone, unless a batch is larger."""
REPEATS = 2
"""Of each stage, each time; that is often, for how fast a shared machine is changes within minutes."""

_PACKAGES = ("featray", "tensorflow", "keras", "ray", "numpy", "deflate")
_FINISHED = (ExitCode.OK, ExitCode.TOO_MANY_FAILED)


def benchmark(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    plan: Plan | None = None,
    directory: str | os.PathLike[str] = DIRECTORY,
    show: bool = False,
) -> Report:
    """Measure stages alone and whole runs, write `benchmark.json` and `benchmark.svg`, return the report.

    Runs on this machine: engine ray starts a local Ray of its own, whatever `run.address` says.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that win over the file.
        plan: What to measure; None: the defaults.
        directory: Made if missing.
        show: Whether to say on stderr what is being measured.

    Raises:
        UsageError: The config, the source or the model cannot be used.
        FeatrayError: A measured run ended with an error; the text is its own.
    """
    checked, plan = load(config, overrides), plan or Plan()
    with tempfile.TemporaryDirectory(prefix="featray-benchmark-") as name:
        folder = Path(name)
        sample = _sample(checked, plan, folder, show)
        report = _Bench(sample, plan, folder, show).report()
    return _written(report, Path(directory))


def _sample(config: Config, plan: Plan, folder: Path, show: bool) -> Sample:
    if plan.make is None:
        return collection.sample_of(config, plan.sample)
    place = Path(plan.keep) if plan.keep else folder / "made"
    _say(show, f"making {plan.make} scans")
    return collection.made_for(config, plan.make, place)


class _Bench:
    """One benchmark while it runs: what it measures, and where its processes write."""

    def __init__(self, sample: Sample, plan: Plan, folder: Path, show: bool) -> None:
        self._sample, self._plan, self._folder, self._show = sample, plan, folder, show
        self._few, self._many = plan.sizes(len(sample.scans))
        self._values = _for_measuring(sample.config, folder / "out")
        self._stages: list[dict[str, Any]] = []
        self._expected: scripts.Features = {}
        self._differences: dict[str, tuple[Difference, ...]] = {}

    def report(self) -> Report:
        """Measure everything."""
        model_rounds, runs = [], []
        for number in range(self._plan.rounds):
            _say(self._show, f"round {number + 1} of {self._plan.rounds}")
            # Which of the two is faster depends on the model.
            model_rounds += [
                self._alone(model_only=True, threads=threads)
                for threads in (DEFAULT_THREADS, ModelThreads.for_whole_machine())
            ]
            runs += list(self._round())
        names = dict.fromkeys(run.way for run in runs)
        return Report(
            machine=_machine(),
            scans={
                "distinct": len(self._sample.scans),
                "found": self._sample.found,
                "made": self._sample.made,
                "few": self._few,
                "many": self._many,
            },
            listing_s=self._sample.listing_s,
            alone=alone_of(self._stages, model_rounds),
            ways=tuple(way_of([run for run in runs if run.way == name]) for name in names),
            cores=count_usable_cores(),
            rounds=self._plan.rounds,
            scaling=dict(self._scaling()),
            growth=tuple(self._growth()),
            differences=self._differences,
        )

    def _round(self) -> Iterator[RunFigures]:
        for engine in self._plan.engines:
            self._measure_stages()
            yield self._engine(engine, self._few)
            if self._plan.beside and engine == self._plan.engines[0]:
                self._expected = scripts.features_of(self._folder / "out", self._layers())
            self._measure_stages()
            yield self._engine(engine, self._many)
        for name, script in self._plan.beside.items():
            yield self._script(name, script, self._few)
            yield self._script(name, script, self._many)

    def _scaling(self) -> Iterator[tuple[str, WayFigures]]:
        """Yield engines with other numbers of workers and actors, both sizes in each round."""
        tried: list[tuple[str, str, dict[str, Any]]] = [
            (f"inline, {count} decode workers", "inline", {"decode": {"workers": count}})
            for count in self._plan.workers
        ]
        tried += [
            (f"ray, {count} actors", "ray", {"actors": {"min": count, "max": count}})
            for count in self._plan.actors
        ]
        for name, engine, run in tried:
            runs = [
                self._engine(engine, count, run)
                for _ in range(self._plan.rounds)
                for count in (self._few, self._many)
            ]
            yield name, way_of(runs)

    def _growth(self) -> Iterator[RunFigures]:
        for count in self._plan.growth:
            for engine in self._plan.engines:
                yield self._engine(engine, count)

    def _measure_stages(self) -> None:
        """Measure each stage alone, so that the ideal is of the same minutes as the run that comes next."""
        _say(self._show, "stages alone")
        self._stages.append(self._alone(model_only=False, threads=ModelThreads(each=1)))

    def _layers(self) -> list[dict[str, str]]:
        """Return the layers that are measured, as the stages alone named them."""
        layers: list[dict[str, str]] = self._stages[-1]["layers"]
        return layers

    def _alone(self, *, model_only: bool, threads: ModelThreads) -> dict[str, Any]:
        # A whole batch at least: models are slower per input on a part of one.
        scans = self._sample.scans[: max(MAX_ALONE, self._sample.config.model.batch_size)]
        given = {
            "config": self._values,
            "scans": [scan.to_json() for scan in scans],
            "repeats": REPEATS,
            "model_only": model_only,
            "calls": threads.calls,
        }
        seen = watch(_module("alone"), given, _environment(_threads(threads)))
        found: dict[str, Any] = json.loads(_output(seen, "stages alone", (ExitCode.OK,)))
        return found

    def _engine(self, engine: str, count: int, run: Mapping[str, Any] | None = None) -> RunFigures:
        _say(self._show, f"engine {engine}, {count} scans {json.dumps(run) if run else ''}".rstrip())
        out, notes = self._folder / "out", self._folder / "notes"
        for place in (out, notes):
            shutil.rmtree(place, ignore_errors=True)
        notes.mkdir()
        values = {**self._values, "run": _merged(self._values["run"], {"engine": engine, **(run or {})})}
        scans = [scan.to_json() for scan in self._sample.first(count)]
        seen = watch(
            _module("once"), {"config": values, "scans": scans, "notes": str(notes)}, _environment({})
        )
        summary = json.loads(_output(seen, f"engine {engine}", _FINISHED))
        if summary["done"] != count:
            raise FeatrayError(f"engine {engine}: only {summary['done']} of {count} scans came through")
        return _figures(engine, count, seen, noted(notes))

    def _script(self, name: str, script: str | os.PathLike[str], count: int) -> RunFigures:
        _say(self._show, f"{name}, {count} scans")
        out = self._folder / f"{name}.parquet"
        out.unlink(missing_ok=True)
        scans = self._sample.first(count)
        given = scripts.given(self._sample.config, scans, self._layers(), out)
        seen = watch([sys.executable, str(script)], given, _environment({}))
        _output(seen, name, (ExitCode.OK,))
        if count == self._few:
            self._differences[name] = scripts.differences(out, scans, self._expected)
        return _figures(name, count, seen, {})


def _for_measuring(config: Config, out: Path) -> dict[str, Any]:
    """Return the config with an output of our own, on this machine alone."""
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    values["output"] = {"uri": str(out), "partition_by": values["output"]["partition_by"]}
    values["run"]["address"] = None
    return values


def _merged(values: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: {**values[key], **value} for key, value in other.items() if isinstance(value, dict)}
    return {**values, **other, **nested}


def _threads(threads: ModelThreads) -> dict[str, str]:
    if threads.each is None:
        return {}
    return {"TF_NUM_INTRAOP_THREADS": str(threads.each), "TF_NUM_INTEROP_THREADS": str(threads.calls)}


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a measured process: no cluster but its own, no threads but the given ones."""
    dropped = ("RAY_ADDRESS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, **more}


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"featray.benchmark.{name}"]


def _output(seen: Watched, what: str, fine: Sequence[int]) -> str:
    """Return the last line of what a process printed, once it has ended well."""
    lines = seen.output.strip().splitlines()
    if seen.exit_code in fine:
        return lines[-1] if lines else ""
    said = seen.errors.strip().splitlines()[-8:]
    raise FeatrayError("\n".join([f"{what} ended with exit code {seen.exit_code}:", *said]))


def _figures(way: str, count: int, seen: Watched, work: Mapping[str, Work]) -> RunFigures:
    roles = _roles(seen, work)
    by_role: dict[str, float] = {}
    for pid, seconds in seen.cpu_s.items():
        role = roles.get(pid, seen.names[pid])
        by_role[role] = by_role.get(role, 0.0) + seconds
    peaks = {"tree": seen.peak_bytes, "driver": seen.peak_by_process.get(seen.pid, 0)}
    for role, what in (("decoders", "largest decoder"), ("model", "largest model")):
        of_role = [peak for pid, peak in seen.peak_by_process.items() if roles.get(pid) == role]
        peaks |= {what: max(of_role)} if of_role else {}
    return RunFigures(
        way=way,
        scans=count,
        wall_s=seen.wall_s,
        cpu_s=sum(seen.cpu_s.values()),
        cpu_by_role=by_role,
        first_opened_s=work["decode"].first_s - seen.started_s if "decode" in work else None,
        stages={name: Stage(one.wall_s, one.cpu_s, one.at_once) for name, one in work.items()},
        peak_bytes=peaks,
        store_bytes=seen.store_bytes,
        spilled=seen.spilled,
        others_cores=seen.others_cores,
    )


def _roles(seen: Watched, work: Mapping[str, Work]) -> dict[int, str]:
    """Return what each process is known to have done; the driver is the driver, whatever else it does."""
    roles: dict[int, str] = {}
    for stage, role in (("write", "writers"), ("decode", "decoders"), ("model", "model")):
        roles |= dict.fromkeys(work[stage].pids, role) if stage in work else {}
    return {**roles, seen.pid: "driver"}


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cores": count_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _written(report: Report, directory: Path) -> Report:
    """Write JSON and plot, and return the report that names them."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_svg = directory / "benchmark.json", directory / "benchmark.svg"
    as_json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    as_svg.write_text(plot("Where the cores' time goes", report.bars(), report.rates()), encoding="utf-8")
    return replace(report, files=(str(as_json), str(as_svg)))


def _say(show: bool, words: str) -> None:
    if show:
        sys.stderr.write(f"featray: {words}\n")
        sys.stderr.flush()
