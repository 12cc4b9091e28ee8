"""Sizes of a Ray run: number of tasks, the memory that they claim, actors in a pool. Knows no Ray.

A node is a mapping of its resources: `CPU`, `memory` in bytes, and `GPU` if it has any.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from featray.config import RunConfig
from featray.hardware import ModelThreads, Workers
from featray.schema import Scan

GPU_CALLS = 2
"""Batches that an actor with a GPU has at once: one is put together and sent while one is computed."""
CPUS_BEFORE_GROWTH = 32
"""CPUs for which a cluster that has no nodes yet gets tasks enough."""
_MAX_TASK_BYTES = 256 * 2**20
"""Limit of the scans in one task, for each CPU that works on it."""
_MAX_TASK_SCANS = 512
"""Limit of the scans in one task; scans share tasks because a task costs about 30 ms."""
_MIN_TASKS_PER_CPU = 8
"""Tasks at least for each CPU (or group of CPUs that works on one task), as long as each task fills a batch;
with fewer, some CPUs are idle at the end."""
_DECODE_BYTES_PER_FILE_BYTE = 5
"""Memory that decoding takes per byte of a file: the compressed bytes, the inflated ones, and the result."""
_BASE_BYTES = 2**28
"""Memory of a worker process before it reads a scan."""

Node = Mapping[str, float]


def task_count(scans: Sequence[Scan], cpus: float, batch: int, cpus_per_task: float = 1) -> int:
    """Return the number of tasks for the scans; each task fills a batch of the model if possible.

    Args:
        scans: Scans to process.
        cpus: CPUs of the cluster.
        batch: Scans per call of the model.
        cpus_per_task: CPUs that work on one task.
    """
    by_size = math.ceil(sum(scan.size for scan in scans) / (_MAX_TASK_BYTES * cpus_per_task))
    by_count = math.ceil(len(scans) / _MAX_TASK_SCANS)
    tasks = max(by_size, by_count, int(_MIN_TASKS_PER_CPU * cpus / cpus_per_task))
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
    yield from group_by_memory(scans, per_cpu, largest=int(max(node["memory"] for node in nodes)))


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
    """Number of actors in a pool: minimum, at the start, maximum (None: as many as the cluster gets)."""

    least: int
    first: int
    most: int | None


def cpu_pool_size(
    run: RunConfig, nodes: Sequence[Node], tasks: int, memory: int, *, grows: bool = False
) -> PoolSize:
    """Return the size of the pool of actors without GPUs: as configured, or one actor per `num_cpus` CPUs.

    The pool starts as large as CPUs, memory and tasks allow, because nothing else needs the CPUs. On a
    cluster that may grow, the pool has no maximum unless one is configured.
    """
    actors = run.actors
    fit = _count_fitting(nodes, {"CPU": max(actors.cpus, 0.1), "memory": max(memory, 1), **actors.resources})
    limit = max(actors.min, fit) if actors.max is None else actors.max
    first = max(actors.min, min(fit, limit, tasks))
    return PoolSize(actors.min, first, None if grows and actors.max is None else limit)


def gpu_pool_size(run: RunConfig, nodes: Sequence[Node], *, grows: bool = False) -> PoolSize:
    """Return the size of the pool of actors with GPUs.

    It is as configured, or the number of actors that leaves one decode task's CPUs free on every node. On a
    cluster that may grow, the pool has no maximum if the GPUs of each present node are taken before its CPUs.
    """
    actors = run.actors
    if grows and actors.max is None and all(_leaves_decode_cpus(run, node) for node in nodes):
        return PoolSize(actors.min, actors.min, None)
    most = max(actors.min, count_gpu_actors(run, nodes) if actors.max is None else actors.max)
    return PoolSize(actors.min, actors.min, most)


def count_workers(
    run: RunConfig, actor_nodes: Sequence[Node], decode_nodes: Sequence[Node], memory: int = 0
) -> Workers:
    """Return the workers that the engine has as soon as its actors run on all of these nodes.

    Args:
        run: Claims of actors and decode tasks.
        actor_nodes: Nodes on which actors may run.
        decode_nodes: Nodes that may decode.
        memory: Bytes that decoding one scan claims.
    """
    actors = run.actors
    cores = sum(node["CPU"] for node in decode_nodes)
    if actors.num_gpus:
        count = min(max(actors.min, count_gpu_actors(run, actor_nodes)), actors.max or math.inf)
        tasks = (cores - count * actors.cpus) / run.decode.num_cpus
        return Workers(max(1, int(tasks)), int(count) * GPU_CALLS, cores, has_gpus=True)
    processes = count_processes(run, actor_nodes, memory)
    size = cpu_pool_size(run, actor_nodes, sys.maxsize, processes * memory)
    calls, per_call = divide_processes(run, processes, memory)
    return Workers(size.first * calls * per_call, size.first * calls, cores)


def count_processes(run: RunConfig, nodes: Sequence[Node], memory: int) -> int:
    """Return the number of worker processes that decode in each actor without GPUs.

    It has one per CPU, or as many as there is memory for on some node.

    Args:
        run: Claims of actors.
        nodes: Nodes on which actors may run.
        memory: Bytes that decoding one scan claims; 0 for no claim.
    """
    by_cpus = max(1, int(run.actors.cpus))
    if not memory or not nodes:
        return by_cpus
    by_memory = int(max(node["memory"] for node in nodes) / memory)
    return max(1, min(by_cpus, by_memory))


class ActorTasks(NamedTuple):
    """Tasks that an actor works on at once, and the worker processes of each of them."""

    calls: int
    processes_per_call: int


def divide_processes(run: RunConfig, processes: int, memory: int) -> ActorTasks:
    """Return how the tasks of an actor share its worker processes.

    Args:
        run: Claims of actors.
        processes: Worker processes of an actor. Without a claim of memory there may be one more, so that all
            tasks have equally many.
        memory: Bytes that each process claims; 0 for no claim.
    """
    calls = min(count_threads(run).calls, processes)
    return ActorTasks(calls, processes // calls if memory else math.ceil(processes / calls))


def count_threads(run: RunConfig) -> ModelThreads:
    """Return how the model of one actor uses the CPUs that the actor claims."""
    cpus = max(1, int(run.actors.cpus))
    if run.actors.num_gpus:
        return ModelThreads(each=cpus, calls=GPU_CALLS)
    return ModelThreads.for_cores(cpus)


def count_task_cpus(run: RunConfig) -> float:
    """Return the number of CPUs that work on one task: those of an actor, shared by its calls."""
    return 1 if run.actors.num_gpus else max(1, run.actors.cpus / count_threads(run).calls)


def enlarge_actors(run: RunConfig, cores: int) -> RunConfig:
    """Return the section for a local Ray: actors as large as possible, if the config leaves that open.

    Each actor holds TensorFlow and the model, so fewer actors take less memory and start in less time.

    Args:
        run: Section of the config.
        cores: Cores of this machine.
    """
    if run.actors.num_cpus is not None or run.actors.num_gpus:
        return run
    count = max(run.actors.min, math.ceil(cores / run.inline_max_cores))
    actors = run.actors.model_copy(update={"num_cpus": max(1, cores // count)})
    return run.model_copy(update={"actors": actors})


def count_gpu_actors(run: RunConfig, nodes: Sequence[Node]) -> int:
    """Return the number of actors with GPUs that these nodes can run next to one decode task each."""
    reduced = [
        {**node, "CPU": node["CPU"] - run.decode.num_cpus, "GPU": _gpu_places(node, run.actors.num_gpus)}
        for node in nodes
    ]
    return _count_fitting([node for node in reduced if node["CPU"] > 0], _claim_gpu_actor(run))


def _gpu_places(node: Node, share: float) -> float:
    """Return the number of actors for which a node has GPUs; a share below 1 lies on one GPU."""
    return int(node.get("GPU", 0)) * int(1 / share + 1e-6) if share < 1 else node.get("GPU", 0) / share


def _claim_gpu_actor(run: RunConfig) -> dict[str, float]:
    """Return the claims of an actor on a node whose GPUs are counted as places for actors."""
    actors = run.actors
    return {"GPU": 1, "CPU": max(actors.cpus, 1e-3), **actors.resources}


def _leaves_decode_cpus(run: RunConfig, node: Node) -> bool:
    """Return whether actors that take all GPUs of a node leave the CPUs of a decode task."""
    by_gpus = int(_gpu_places(node, run.actors.num_gpus))
    return not by_gpus or node["CPU"] >= by_gpus * run.actors.cpus + run.decode.num_cpus


def _count_fitting(nodes: Iterable[Node], claims: Mapping[str, float]) -> int:
    """Return the number of workers with these claims that fit on the nodes."""
    return sum(int(min(node.get(kind, 0) / claim for kind, claim in claims.items())) for node in nodes)


def matches_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether a node with these labels meets all conditions: `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    for key, condition in selector.items():
        text = condition.removeprefix("!")
        values = text[3:-1].split(",") if text.startswith("in(") else [text]
        is_among = labels.get(key) in [value.strip() for value in values]
        if is_among == condition.startswith("!"):
            return False
    return True
