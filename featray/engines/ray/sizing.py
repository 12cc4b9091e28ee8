"""How much at once: tasks that scans make, memory that they claim, actors in a pool. Knows no Ray.

A node is what it has of each resource: `CPU`, `memory` in bytes, and `GPU` where it has some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from featray.config import RunConfig
from featray.schema import Scan

_BLOCK_BYTES = 256 * 2**20
_BLOCK_SCANS = 512
"""Scans share a task, for a task costs some 30 ms: up to so many bytes of files and so many scans."""
_TASKS_PER_CPU = 8
"""Tasks that the scans make at least, for each CPU, as long as each fills a batch: else some CPUs would be
idle in the end."""
_INFLATED = 5
"""Bytes that decoding takes for each one of a file: compressed, inflated, and what is made of it."""
_BASE_BYTES = 2**28
"""What a helper takes before it has read anything."""

Node = Mapping[str, float]


def task_count(scans: Sequence[Scan], cpus: float, batch: int, alone: bool) -> int:
    """Return how many tasks the scans make; each fills a batch of the model where it can."""
    if alone:
        return len(scans)
    by_size = math.ceil(sum(scan.size for scan in scans) / _BLOCK_BYTES)
    by_count = math.ceil(len(scans) / _BLOCK_SCANS)
    wanted = max(by_size, by_count, int(_TASKS_PER_CPU * cpus))
    return min(wanted, math.ceil(len(scans) / batch))


def memory_claims(
    scans: Sequence[Scan], run: RunConfig, nodes: Sequence[Node]
) -> Iterator[tuple[int | None, Sequence[Scan]]]:
    """Yield the memory that each worker claims that decodes, and scans to do with that claim.

    It is as asked; without nodes, on a cluster that is still to grow, none is claimed.
    """
    asked = run.decode.memory
    if asked is not None or not nodes:
        yield asked, scans
        return
    per_cpu = min(int(node["memory"] / node["CPU"]) for node in nodes)
    most = int(max(node["memory"] for node in nodes) / max(1, int(run.actors.num_cpus)))
    yield from by_memory(scans, per_cpu, most)


def by_memory(scans: Sequence[Scan], per_cpu: int, most: int) -> Iterator[tuple[int | None, Sequence[Scan]]]:
    """Yield scans of which one fits beside each CPU, without a claim; then larger ones, each with its like.

    A claim keeps Ray from decoding more of them at once than there is memory for.

    Args:
        scans: As listed.
        per_cpu: Bytes there are for each CPU.
        most: Bytes that can be claimed at all.
    """
    classes: dict[int, list[Scan]] = {}
    for scan in scans:
        need = _BASE_BYTES + _INFLATED * scan.size
        classes.setdefault(max(0, math.ceil(math.log2(need / per_cpu))), []).append(scan)
    for doublings in sorted(classes):
        yield (min(per_cpu * 2**doublings, most) if doublings else None), classes[doublings]


class PoolSize(NamedTuple):
    """Actors: at least, to begin with, at most."""

    least: int
    first: int
    most: int


def cpu_pool_size(run: RunConfig, nodes: Sequence[Node], tasks: int, memory: int) -> PoolSize:
    """Return the size of the pool of actors that decode for themselves: as asked, or one for each CPU.

    It starts as large as there is room and work for, since nothing else needs the CPUs.
    """
    actors = run.actors
    fit = sum(
        int(min(node["CPU"] / max(actors.num_cpus, 0.1), node["memory"] / max(memory, 1))) for node in nodes
    )
    most = max(actors.min, fit if actors.max is None else actors.max)
    first = max(actors.min, min(fit, most, tasks))
    return PoolSize(actors.min, first, most)


def gpu_pool_size(run: RunConfig, nodes: Sequence[Node]) -> PoolSize:
    """Return the size of the pool of actors that have GPUs.

    It is as asked, or what leaves every node a CPU to decode with.
    """
    actors, decode = run.actors, run.decode.num_cpus
    fit = sum(
        int(min(node.get("GPU", 0) / actors.num_gpus, (node["CPU"] - decode) / max(actors.num_cpus, 1e-3)))
        for node in nodes
        if node["CPU"] > decode
    )
    most = max(actors.min, fit if actors.max is None else actors.max)
    return PoolSize(actors.min, actors.min, most)
