"""Sizes of a Ray run: number of tasks, the memory that they claim, actors in a pool. Knows no Ray.

A node is a mapping of its resources: `CPU`, `memory` in bytes, and `GPU` if it has any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from featray.config import RunConfig
from featray.schema import Scan

_MAX_TASK_BYTES = 256 * 2**20
_MAX_TASK_SCANS = 512
"""Limits of the scans in one task; scans share tasks because a task costs about 30 ms."""
_MIN_TASKS_PER_CPU = 8
"""Tasks per CPU at least, as long as each task fills a batch; with fewer, some CPUs are idle at the end."""
_DECODE_BYTES_PER_FILE_BYTE = 5
"""Memory that decoding takes per byte of a file: the compressed bytes, the inflated ones, and the result."""
_BASE_BYTES = 2**28
"""Memory of a worker process before it reads a scan."""

Node = Mapping[str, float]


def task_count(scans: Sequence[Scan], cpus: float, batch: int, *, isolates: bool) -> int:
    """Return the number of tasks for the scans; each task fills a batch of the model if possible.

    Args:
        scans: Scans to process.
        cpus: CPUs of the cluster.
        batch: Scans per call of the model.
        isolates: Whether each scan gets a task of its own.
    """
    if isolates:
        return len(scans)
    by_size = math.ceil(sum(scan.size for scan in scans) / _MAX_TASK_BYTES)
    by_count = math.ceil(len(scans) / _MAX_TASK_SCANS)
    tasks = max(by_size, by_count, int(_MIN_TASKS_PER_CPU * cpus))
    return min(tasks, math.ceil(len(scans) / batch))


def memory_claims(
    scans: Sequence[Scan], run: RunConfig, nodes: Sequence[Node]
) -> Iterator[tuple[int | None, Sequence[Scan]]]:
    """Yield the memory that each decoding worker claims, and the scans to process with that claim.

    A configured claim is used for all scans. Without nodes, on a cluster that has yet to grow, nothing is
    claimed.
    """
    configured = run.decode.memory
    if configured is not None or not nodes:
        yield configured, scans
        return
    per_cpu = min(int(node["memory"] / node["CPU"]) for node in nodes)
    largest = int(max(node["memory"] for node in nodes) / max(1, int(run.actors.num_cpus)))
    yield from group_by_memory(scans, per_cpu, largest)


def group_by_memory(
    scans: Sequence[Scan], per_cpu: int, largest: int
) -> Iterator[tuple[int | None, Sequence[Scan]]]:
    """Yield the scans that fit into the memory of one CPU, without a claim; then larger ones by size class.

    A claim keeps Ray from decoding more scans at once than there is memory for.

    Args:
        scans: Listed scans.
        per_cpu: Bytes of memory per CPU.
        largest: Largest claim in bytes that some node can meet.
    """
    size_classes: dict[int, list[Scan]] = {}
    for scan in scans:
        needed = _BASE_BYTES + _DECODE_BYTES_PER_FILE_BYTE * scan.size
        size_classes.setdefault(max(0, math.ceil(math.log2(needed / per_cpu))), []).append(scan)
    for doublings in sorted(size_classes):
        claim = min(per_cpu * 2**doublings, largest) if doublings else None
        yield claim, size_classes[doublings]


class PoolSize(NamedTuple):
    """Number of actors in a pool: minimum, at the start, maximum."""

    least: int
    first: int
    most: int


def cpu_pool_size(run: RunConfig, nodes: Sequence[Node], tasks: int, memory: int) -> PoolSize:
    """Return the size of the pool of actors without GPUs: as configured, or one actor per `num_cpus` CPUs.

    The pool starts as large as CPUs, memory and tasks allow, because nothing else needs the CPUs.
    """
    actors = run.actors
    fit = sum(
        int(min(node["CPU"] / max(actors.num_cpus, 0.1), node["memory"] / max(memory, 1))) for node in nodes
    )
    most = max(actors.min, fit if actors.max is None else actors.max)
    first = max(actors.min, min(fit, most, tasks))
    return PoolSize(actors.min, first, most)


def gpu_pool_size(run: RunConfig, nodes: Sequence[Node]) -> PoolSize:
    """Return the size of the pool of actors with GPUs.

    It is as configured, or the number of actors that leaves one decode task's CPUs free on every node.
    """
    actors, decode = run.actors, run.decode.num_cpus
    fit = sum(
        int(min(node.get("GPU", 0) / actors.num_gpus, (node["CPU"] - decode) / max(actors.num_cpus, 1e-3)))
        for node in nodes
        if node["CPU"] > decode
    )
    most = max(actors.min, fit if actors.max is None else actors.max)
    return PoolSize(actors.min, actors.min, most)
