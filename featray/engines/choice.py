"""Choose the engine of a run: its config and this machine in, the name of the engine and the reason out.

Engine `auto` takes Ray where there is something that one process cannot use: a cluster, several GPUs, or more
cores than one process keeps busy. The number of scans does not matter, because a local Ray is never faster on
cores that one process keeps busy, and costs memory and time to start.

The limit for cores comes from a model of the cost. A scan costs C CPU seconds in all. Two parts of it do not
run on all cores: the process that drives the run takes D seconds for each scan (it hands out work, copies
inputs and commits), and a call of the model, which takes M seconds, is serial for a share p of them, in two
calls at once. So one process keeps up to min(C / D, 2 C / (p M)) cores busy. Measured on two cores: D is at
most 0.005 s for inputs of (32, 256, 256), C is 0.27 s for CT volumes, and p is 0.05. That gives 54 cores for
the driver, and at least 40 for the model, however large it is (M <= C). The default of
`run.inline_max_cores`, 32, is below both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from featray.config import RunConfig
from featray.engines.ray.cluster import is_connected, named_address
from featray.hardware import count_usable_cores
from featray.storage.ray_job import find_submission_id

_DEVICES = Path("/dev")
_GPU_DEVICE = re.compile(r"nvidia\d+")


class EngineChoice(NamedTuple):
    """An engine (`inline` or `ray`), and why it was chosen, in words that follow "because"."""

    engine: str
    reason: str


def choose_engine(run: RunConfig) -> EngineChoice:
    """Return the engine for the section `run` of a config."""
    if run.engine != "auto":
        return EngineChoice(run.engine, "run.engine names it")
    if named_address(run):
        return EngineChoice("ray", _describe_address(run))
    gpus, cores = count_gpus(), count_usable_cores()
    if gpus > 1 and run.actors.num_gpus:
        return EngineChoice("ray", f"this machine has {gpus} GPUs, and run.actors.num_gpus claims them")
    if cores > run.inline_max_cores:
        limit = f"run.inline_max_cores, {run.inline_max_cores}"
        return EngineChoice("ray", f"{cores} cores are more than one process keeps busy ({limit})")
    if is_connected():
        return EngineChoice("ray", "this process is connected to Ray")
    reason = f"no cluster is named, and one process keeps {cores} {'core' if cores == 1 else 'cores'} busy"
    if gpus > 1:
        reason += f"; it uses one of {gpus} GPUs, and run.actors.num_gpus=1 uses them all"
    return EngineChoice("inline", reason)


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use, without loading CUDA.

    CUDA_VISIBLE_DEVICES limits them; an entry that is -1 or that does not exist ends its list.
    """
    count = sum(bool(_GPU_DEVICE.fullmatch(path.name)) for path in _DEVICES.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    entries = visible.replace(" ", "").split(",")
    end = next((number for number, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    return min(count, end)


def _describe_address(run: RunConfig) -> str:
    if run.address:
        return "run.address names a cluster"
    if find_submission_id():
        return "this process runs inside a Ray job"
    return "RAY_ADDRESS names a cluster"
