"""The folder of a run, `runs/RUN_ID`: `run.json` for programs and `summary.md` for people.

A run.json without `summary` belongs to a run that has not ended, was killed, ended with an error, or was
interrupted before its first commit.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from featray.hardware import count_usable_cores
from featray.output.dataset import RUNS, Dataset
from featray.stages.report.summary import Summary

PACKAGES = (
    "featray",
    "keras",
    "tf_keras",
    "tensorflow",
    "ray",
    "numpy",
    "pyarrow",
    "deltalake",
    "nibabel",
    "pydicom",
)
"""Packages whose versions are recorded."""


@dataclass(frozen=True)
class Run:
    """Facts of a run that are known at its beginning.

    Attributes:
        run_id: Id of the run; ids sort by time.
        command: `extract` or `refresh`.
        started: Time at which the command began, in seconds since the epoch.
        engine: `inline` or `ray`.
        engine_reason: Why this engine was chosen, in words that follow "because".
        recipe_id: Recipe id of reading and preprocessing.
        recipe: Everything that decides the values of the features.
        layers: Names of the layers in the output.
        layer_recipes: Layer → its recipe id.
        layer_positions: Layer → its position in the order of computation of the model.
        sampling_layers: Layers that sample.
        model_sha256: Digest of the model file.
        config: Config of the run, with masked secrets.
        max_failed_fraction: Share of failed scans above which the exit code is 3.
        submission_id: Submission id of the Ray job that this run is; None outside of jobs.
    """

    run_id: str
    command: str
    started: float
    engine: str
    engine_reason: str
    recipe_id: str
    recipe: dict[str, Any]
    layers: tuple[str, ...]
    layer_recipes: dict[str, str]
    layer_positions: dict[str, int]
    sampling_layers: tuple[str, ...]
    model_sha256: str
    config: dict[str, Any]
    max_failed_fraction: float
    submission_id: str | None = None


def write_start(run: Run, dataset: Dataset) -> None:
    """Write run.json without a summary."""
    _write_json(run, dataset, {})


def write_summary(run: Run, summary: Summary, dataset: Dataset) -> None:
    """Write run.json with the summary, and summary.md."""
    _write_json(run, dataset, {"summary": asdict(summary)})
    dataset.store.write(f"{RUNS}/{run.run_id}/summary.md", _make_markdown(run, summary).encode())


def _write_json(run: Run, dataset: Dataset, more: dict[str, Any]) -> None:
    content = {**asdict(run), **more, "versions": _find_versions(), "machine": _describe_machine()}
    dataset.store.write(f"{RUNS}/{run.run_id}/run.json", json.dumps(content, indent=2).encode())


def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _describe_machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpus": count_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "peak_driver_bytes": _peak_bytes(resource.RUSAGE_SELF),
        "peak_largest_child_bytes": _peak_bytes(resource.RUSAGE_CHILDREN),
    }


def _peak_bytes(who: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def _make_markdown(run: Run, summary: Summary) -> str:
    lines = "\n".join(f"- {line}" for line in summary.lines())
    layers = "\n".join(f"- `{name}` (recipe {run.layer_recipes[name]})" for name in summary.layers)
    return (
        f"# Run {run.run_id}\n\n{lines}\n\n## Layers\n\n{layers}\n\n## Recipe\n\n"
        f"```json\n{json.dumps(run.recipe, indent=2)}\n```\n\nModel sha256 `{run.model_sha256}`.\n"
    )
