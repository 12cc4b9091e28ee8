"""The Ray cluster of a run: join it at its address, or start one on this machine; and its resources."""

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

_RAY_LOG_LINES = re.compile(rb".* logging\.cc:\d+: Set ray log level")
_CONNECT_TIMEOUT_S = 10.0


def connect(run: RunConfig, limits: LimitsConfig) -> bool:
    """Join the cluster of `run.address` or RAY_ADDRESS, or start a local one.

    Returns:
        Whether this call connected to Ray; false if this process had connected before.

    Raises:
        ConfigError: Nothing answers at the address, or a local Ray lacks the resources that a stage claims.
    """
    # Ray's own log lines are hidden; output of user code is still shown.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Otherwise a thread of Ray Data that outlives a stopped run starts a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Otherwise Ray retries a task without end if it kills the task because memory runs out.
    os.environ.setdefault("RAY_task_oom_retries", str(limits.attempts - 1))
    # Errors of featray's tasks are handled; the unhandled ones are Ray's own.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Usage statistics leave this machine only if its owner switches them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local Ray starts workers at once; they import this module before the first task.
    os.environ.setdefault("RAY_preload_python_modules", "ray.data")
    import ray

    address = named_address(run)
    _refuse_unreachable(address)
    connects = not ray.is_initialized()
    if connects:
        with filter_stderr(_RAY_LOG_LINES):
            ray.init(
                address=address or "local",  # "local" never joins another Ray on this machine
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else _local_options()),
            )
    import ray.data  # takes seconds: here it runs while the model is loaded

    try:
        check_claims(run, ray.cluster_resources(), grows=bool(address))
    except ConfigError:
        if connects:
            ray.shutdown()
        raise
    return connects


def is_to_start(run: RunConfig) -> bool:
    """Return whether `connect` would start a local Ray: no address is given, and no cluster is joined."""
    ray = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    return not (named_address(run) or joined)


def named_address(run: RunConfig) -> str | None:
    """Return the address from the config or from RAY_ADDRESS; None if neither gives one."""
    return run.address or os.environ.get("RAY_ADDRESS")


def cpus() -> float:
    """Return the number of CPUs of all nodes together."""
    import ray

    return float(ray.cluster_resources().get("CPU", 1))


def nodes() -> list[dict[str, float]]:
    """Return the resources of each node that can decode."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in found if node.get("CPU") and node.get("memory")]


def _refuse_unreachable(address: str | None) -> None:
    """Try HOST:PORT before Ray does, because Ray itself tries for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\s\]]+)\]?:(\d+)", address or "")
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        problem = f"run.address: nothing answers at {address} ({type(error).__name__})"
        raise ConfigError(
            f"{problem}; check that the cluster is up and that the port is the one of its head node"
        ) from None


def _local_options() -> dict[str, Any]:
    """Return options for a Ray on this machine; on one core, an actor and a decode task share it."""
    return {"include_dashboard": False, **({"num_cpus": 2} if count_usable_cores() < 2 else {})}


def check_claims(run: RunConfig, resources: Mapping[str, float], *, grows: bool) -> None:
    """Refuse claims that a local Ray can never meet, because Ray would wait for ever.

    Args:
        run: Claims of actors and decode tasks.
        resources: Resources of all nodes together.
        grows: Whether the cluster may still grow; then claims that it cannot meet are only logged.

    Raises:
        ConfigError: Lists every claim that is too large.
    """
    actor_cpus = run.actors.min * run.actors.num_cpus
    decode_cpus = run.decode.num_cpus if run.actors.num_gpus else 0
    claims = {
        "run.actors.num_cpus": (run.actors.num_cpus, "CPU"),
        "run.actors.num_gpus": (run.actors.num_gpus, "GPU"),
        "run.decode.num_cpus": (decode_cpus, "CPU"),
        "run.decode.memory": (run.decode.memory or 0, "memory"),
        "run.actors (min times num_cpus) plus run.decode": (actor_cpus + decode_cpus, "CPU"),
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
