"""The cluster of a run: joined where it has an address, else started on this machine; and what it has."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

from featray.config import LimitsConfig, RunConfig
from featray.errors import ConfigError
from featray.hardware import count_usable_cores
from featray.terminal.native_stderr import filter_stderr

log = logging.getLogger(__name__)

_CHATTER = re.compile(rb".* logging\.cc:\d+: Set ray log level")
_KNOCK_S = 10.0


def connect(run: RunConfig, limits: LimitsConfig) -> bool:
    """Join the cluster of `run.address` or RAY_ADDRESS, or start a local one; return whether it was started.

    Raises:
        ConfigError: Nothing answers at the address, or a local Ray has not what a stage claims.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own chatter; user code still speaks
    # A thread of Ray Data that outlives a stopped run would else start a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Ray alone would try a task for ever that it kills for lack of memory.
    os.environ.setdefault("RAY_task_oom_retries", str(limits.attempts - 1))
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # ours are handled; these are of Ray's own
    # What a local Ray would tell its makers about this machine is for its owner to allow.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local Ray starts workers at once; they import meanwhile what they will need.
    os.environ.setdefault("RAY_preload_python_modules", "ray.data")
    import ray

    address = named_address(run)
    _refuse_unreachable(address)
    starts = not ray.is_initialized()
    if starts:
        with filter_stderr(_CHATTER):
            ray.init(
                address=address or "local",  # none: whatever else runs on this machine, not that
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else _local()),
            )
    import ray.data  # here, and not where the run waits for it

    try:
        compare_claims(run, ray.cluster_resources(), grows=bool(address))
    except ConfigError:
        if starts:
            ray.shutdown()
        raise
    return starts


def is_to_start(run: RunConfig) -> bool:
    """Return whether `connect` would start a local Ray: none is named, and this process is in none."""
    ray = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    return not (named_address(run) or joined)


def named_address(run: RunConfig) -> str | None:
    """Return where the cluster is, as configured or as the environment says; None where none is named."""
    return run.address or os.environ.get("RAY_ADDRESS")


def cpus() -> float:
    """Return how many CPUs all nodes together have."""
    import ray

    return float(ray.cluster_resources().get("CPU", 1))


def nodes() -> list[dict[str, float]]:
    """Return what the nodes have that can decode."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in found if node.get("CPU") and node.get("memory")]


def _refuse_unreachable(address: str | None) -> None:
    """Knock at HOST:PORT first: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\s\]]+)\]?:(\d+)", address or "")
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_KNOCK_S).close()
    except OSError as error:
        problem = f"run.address: nothing answers at {address} ({type(error).__name__})"
        raise ConfigError(f"{problem}; is the cluster up, and the port that of its head?") from None


def _local() -> dict[str, Any]:
    """Return how to start a Ray on this machine: an actor and a decode task share a lone core."""
    return {"include_dashboard": False, **({"num_cpus": 2} if count_usable_cores() < 2 else {})}


def compare_claims(run: RunConfig, resources: Mapping[str, float], *, grows: bool) -> None:
    """Refuse claims a local Ray can never meet: Ray would wait for ever. A cluster may still grow."""
    pool = run.actors.min * run.actors.num_cpus
    beside = run.decode.num_cpus if run.actors.num_gpus else 0
    claims = {
        "run.actors.num_cpus": (run.actors.num_cpus, "CPU"),
        "run.actors.num_gpus": (run.actors.num_gpus, "GPU"),
        "run.decode.num_cpus": (beside, "CPU"),
        "run.decode.memory": (run.decode.memory or 0, "memory"),
        "run.actors (min times num_cpus) beside run.decode": (pool + beside, "CPU"),
    }
    problems = [
        f"{key}: {claim:g} is claimed, Ray has {resources.get(kind, 0):g} {kind}"
        for key, (claim, kind) in claims.items()
        if claim > resources.get(kind, 0)
    ]
    if problems and not grows:
        raise ConfigError(problems)
    for problem in problems:
        log.warning("%s now; waiting for the cluster to grow", problem)
