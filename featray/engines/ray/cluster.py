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
from featray.engines.ray.sizing import count_threads, count_workers, matches_labels
from featray.engines.ray.start_up import (
    install_native_handlers,
    keep_sigterm_action,
    make_join_error,
    make_local_options,
    make_start_error,
    shut_down,
)
from featray.errors import ConfigError
from featray.hardware import Capacity
from featray.terminal.native_stderr import filter_stderr

log = logging.getLogger(__name__)

_RAY_LOG_LINES = re.compile(
    rb".* (?:logging\.cc:\d+: Set ray log level|gcs_client\.cc:\d+: Failed to get cluster ID)"
)
"""Lines that Ray writes at any log level: at its start, and each second while a cluster refuses a token."""
_CONNECT_TIMEOUT_S = 10.0
_ADDRESS = re.compile(r"(?:ray://)?(\[[^\s\]]+\]|[^\s:/\[\]]+):(\d{1,5})")
_OTHER_CLIENT = re.compile(r"(?!https?:|ray:)\w+://")
"""Addresses of clients that other packages register with Ray."""
_MAX_PORT = 65535
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The beginning of a gRPC connection: the preface of HTTP/2, and an empty frame of settings."""
_FRAME_TYPE, _SETTINGS = 3, b"\4"
"""Position of the type in a frame, and the type of the first frame that a server sends."""


def connect(run: RunConfig, limits: LimitsConfig) -> bool:
    """Join the cluster of `run.address` or RAY_ADDRESS, or start a local one.

    Returns:
        Whether this call connected to Ray; false if this process had connected before.

    Raises:
        ConfigError: Ray cannot be joined or started, or a local Ray lacks the resources that a stage claims.
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
    _refuse_unreachable(_name_source(run), address)
    connects = not ray.is_initialized()
    if connects:
        _init(run, address)
    import ray.data  # takes seconds: here it runs while the model is loaded

    try:
        check_claims(run, ray.cluster_resources(), grows=bool(address))
        _check_labels(run, grows=bool(address))
    except ConfigError:
        if connects:
            shut_down()
        raise
    return connects


def _init(run: RunConfig, address: str | None) -> None:
    """Call `ray.init`; turn its errors into messages with a remedy."""
    import ray

    # With GPUs, an actor and a decode task claim a core each.
    local_options = {} if address else make_local_options(min_cpus=2 if run.actors.num_gpus else 1)

    # CRITICAL, because Ray logs its errors with tracebacks before it raises them.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        with filter_stderr(_RAY_LOG_LINES), keep_sigterm_action(install_native_handlers):
            # "local" never joins another Ray on this machine.
            ray.init(address=address or "local", **options, **local_options)
    except Exception as error:  # Ray raises errors of many types, also plain `Exception`
        log.debug("Ray did not start", exc_info=True)
        shut_down()  # ends the processes that have started
        problem = make_join_error(_name_source(run), address, error) if address else make_start_error(error)
        raise problem from None
    logging.getLogger("ray").setLevel(logging.ERROR)


def is_to_start(run: RunConfig) -> bool:
    """Return whether `connect` would start a local Ray: no address is given, and no cluster is joined."""
    return not (named_address(run) or is_connected())


def is_connected() -> bool:
    """Return whether this process is connected to Ray, without importing it."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # absent while Ray is imported
    return is_initialized is not None and is_initialized()


def named_address(run: RunConfig) -> str | None:
    """Return the address from the config or from RAY_ADDRESS; None for a Ray on this machine."""
    address = run.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def _name_source(run: RunConfig) -> str:
    return "run.address" if run.address else "RAY_ADDRESS"


def cpus() -> float:
    """Return the number of CPUs of all nodes together."""
    import ray

    return float(ray.cluster_resources().get("CPU", 1))


def can_grow(run: RunConfig) -> bool:
    """Return whether nodes may join the cluster during the run: it is not a Ray on this machine alone."""
    return named_address(run) is not None


def nodes(label_selector: Mapping[str, str] | None = None) -> list[dict[str, float]]:
    """Return the resources of each node that can decode and whose labels meet a selector."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"]]
    return [
        node["Resources"]
        for node in found
        if node["Resources"].get("CPU")
        and node["Resources"].get("memory")
        and matches_labels(node["Labels"], label_selector or {})
    ]


def actor_nodes(run: RunConfig) -> list[dict[str, float]]:
    """Return the resources of each node on which actors may run."""
    return nodes(run.actors.label_selector)


def decode_nodes(run: RunConfig) -> list[dict[str, float]]:
    """Return the resources of each node that may decode: without GPUs, actors decode."""
    return nodes(run.decode.label_selector) if run.actors.num_gpus else actor_nodes(run)


def measure_capacity(run: RunConfig) -> Capacity:
    """Return the nodes, cores and GPUs that a run may use at present, and its workers there."""
    for_actors, for_decoding = actor_nodes(run), decode_nodes(run)
    usable = for_decoding + [node for node in for_actors if node not in for_decoding]
    workers = count_workers(run, for_actors, for_decoding)
    return Capacity(
        nodes=len(usable),
        cores=workers.cores,
        gpus=sum(node.get("GPU", 0) for node in for_actors),
        actors=workers.model // count_threads(run).calls,
        workers=workers,
    )


def _refuse_unreachable(source: str, address: str | None) -> None:
    """Try HOST:PORT before Ray does, because Ray itself tries for minutes.

    Raises:
        ConfigError: `address` is not that of a Ray cluster, or nothing answers there.
    """
    if address is None or address == "auto" or _OTHER_CLIENT.match(address):
        return
    found = _ADDRESS.fullmatch(address)
    if not found or int(found[2]) > _MAX_PORT:
        raise ConfigError(
            f"{source}: {address} is no address of a Ray cluster; give HOST:PORT of its head node (the port "
            "is often 6379), ray://HOST:PORT or auto, or none to start Ray on this machine. An http address, "
            "as `ray job submit` takes it, is that of the dashboard"
        )
    try:
        is_ray = _speaks_grpc(found[1].strip("[]"), int(found[2]))
    except OSError as error:
        problem = f"{source}: nothing answers at {address} ({type(error).__name__})"
        raise ConfigError(
            f"{problem}; check that the cluster is up and that the port is the one of its head node"
        ) from None
    if not is_ray:
        raise ConfigError(
            f"{source}: what answers at {address} is no Ray cluster; give the port of its head node (often "
            "6379), not that of the dashboard"
        )


def _speaks_grpc(host: str, port: int) -> bool:
    """Return whether the server at an address speaks the protocol of Ray; true if TLS hides it.

    Raises:
        OSError: Nothing answers.
    """
    with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return True
        try:
            connection.sendall(_HTTP2_GREETING)
            answer = connection.recv(_FRAME_TYPE + 1, socket.MSG_WAITALL)
        except OSError:  # it closes the connection, or waits for another greeting
            return False
        return answer[_FRAME_TYPE:] == _SETTINGS


def check_claims(run: RunConfig, resources: Mapping[str, float], *, grows: bool) -> None:
    """Refuse claims that a local Ray can never meet, because Ray would wait for ever.

    Args:
        run: Claims of actors and decode tasks.
        resources: Resources of all nodes together.
        grows: Whether the cluster may still grow; then claims that it cannot meet are only logged.

    Raises:
        ConfigError: Lists every claim that is too large.
    """
    actor_cpus = run.actors.min * run.actors.cpus
    decode_cpus = run.decode.num_cpus if run.actors.num_gpus else 0
    claims = {
        "run.actors.num_cpus": (run.actors.cpus, "CPU"),
        "run.actors.num_gpus": (run.actors.num_gpus, "GPU"),
        "run.decode.num_cpus": (decode_cpus, "CPU"),
        "run.decode.memory": (run.decode.memory or 0, "memory"),
        "run.actors (min times num_cpus) plus run.decode": (actor_cpus + decode_cpus, "CPU"),
        **{f"run.actors.resources.{kind}": (claim, kind) for kind, claim in run.actors.resources.items()},
        **{f"run.decode.resources.{kind}": (claim, kind) for kind, claim in run.decode.resources.items()},
    }
    problems = [
        f"{key}: {claim:g} is claimed, Ray has {resources.get(kind, 0):g} {kind}"
        for key, (claim, kind) in claims.items()
        if claim > resources.get(kind, 0)
    ]
    _refuse_or_wait(problems, grows=grows)


def _check_labels(run: RunConfig, *, grows: bool) -> None:
    """Refuse label selectors that no node of a local Ray meets."""
    selectors = {"run.actors": run.actors.label_selector, "run.decode": run.decode.label_selector}
    _refuse_or_wait(
        [
            f"{key}.label_selector: no node of Ray has such labels"
            for key, selector in selectors.items()
            if selector and not nodes(selector)
        ],
        grows=grows,
    )


def _refuse_or_wait(problems: list[str], *, grows: bool) -> None:
    """Raise ConfigError for claims that are not met, or log them if the cluster may still grow."""
    if problems and not grows:
        raise ConfigError(problems)
    for problem in problems:
        log.warning("%s now; waiting for the cluster to grow", problem)
