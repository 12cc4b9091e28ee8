"""Sizes of a Ray run: tasks, memory of decoding, actors in a pool, and the nodes on which they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from featray.config import RunConfig
from featray.engines.ray import sizing
from featray.hardware import ModelThreads, Workers
from featray.schema import Scan


def make_scan(name: str) -> Scan:
    return Scan(name, f"/{name}", "nifti", (f"/{name}",), "c")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "tasks"),
    [
        ([60_000_000] * 30, 8),
        ([60_000_000] * 1_000, 224),
        ([1_000] * 30, 8),
        ([1_000] * 6_400, 16),
        ([1_000] * 64_000, 125),
    ],
    ids=["batches are full", "many bytes", "few tiny scans", "no idle CPU", "many tiny scans"],
)
def test_small_or_many_scans_share_tasks(sizes: list[int], tasks: int) -> None:
    scans = [replace(make_scan(f"s{n}"), size=size) for n, size in enumerate(sizes)]
    assert sizing.task_count(scans, cpus=2, batch=4) == tasks


def test_tasks_are_larger_where_several_cpus_work_on_each() -> None:
    scans = [replace(make_scan(f"s{n}"), size=64 * 2**20) for n in range(512)]
    assert sizing.task_count(scans, cpus=16, batch=4) == 128
    assert sizing.task_count(scans, cpus=16, batch=4, cpus_per_task=8) == 16


@pytest.mark.parametrize(
    ("actors", "cpus"), [({}, 1), ({"num_cpus": 0.5}, 1), ({"num_cpus": 16}, 8), ({"num_gpus": 1}, 1)]
)
def test_the_cpus_of_an_actor_are_shared_by_its_calls(actors: dict[str, Any], cpus: float) -> None:
    assert sizing.count_task_cpus(make_run(**actors)) == cpus


def test_large_scans_claim_memory_and_are_processed_apart() -> None:
    sizes = {"small": 10 * 2**20, "large": 500 * 2**20, "huge": 3 * 2**30, "too huge": 100 * 2**30}
    scans = [replace(make_scan(name), size=size) for name, size in sizes.items()]
    groups = list(sizing.group_by_memory(scans, per_cpu=2 * 2**30, largest=20 * 2**30))
    assert [(claim and claim / 2**30, [scan.scan_id for scan in claimed]) for claim, claimed in groups] == [
        (None, ["small"]),
        (4, ["large"]),
        (16, ["huge"]),
        (20, ["too huge"]),
    ]


@pytest.mark.parametrize(
    ("share", "actors"), [(1, 2), (0.5, 4), (0.4, 4), (0.1, 20), (2, 1)], ids=lambda value: f"{value:g}"
)
def test_as_many_actors_share_the_gpus_of_a_node_as_fit_on_single_gpus(share: float, actors: int) -> None:
    run = RunConfig.model_validate({"actors": {"num_gpus": share, "num_cpus": 1}})
    assert sizing.gpu_pool_size(run, [{"CPU": 33, "GPU": 2, "memory": 1e9}]).most == actors


NODE = {"CPU": 4.0, "memory": 8.0 * 2**30}


def make_run(decode: dict[str, Any] | None = None, **actors: Any) -> RunConfig:
    return RunConfig.model_validate({"actors": actors, "decode": decode or {}})


@pytest.mark.parametrize(
    ("actors", "nodes", "expected"),
    [
        ({}, [], (1, 1, None)),
        ({}, [NODE, NODE], (1, 8, None)),
        ({"min": 3, "max": 5}, [], (3, 3, 5)),
        ({"num_cpus": 2, "resources": {"ct": 1}}, [NODE, {**NODE, "ct": 1.0}], (1, 1, None)),
    ],
    ids=["no nodes yet", "present nodes are used at once", "configured", "custom resource"],
)
def test_the_pool_of_a_cluster_that_may_grow_has_no_maximum_of_its_own(
    actors: dict[str, Any], nodes: list[dict[str, float]], expected: tuple[int, int, int | None]
) -> None:
    assert sizing.cpu_pool_size(make_run(**actors), nodes, tasks=100, memory=0, grows=True) == expected


def test_the_pool_of_a_local_ray_fills_its_cpus() -> None:
    assert sizing.cpu_pool_size(make_run(), [NODE], tasks=100, memory=0) == (1, 4, 4)
    assert sizing.cpu_pool_size(make_run(), [NODE], tasks=2, memory=0) == (1, 2, 4)


@pytest.mark.parametrize(
    ("nodes", "most"), [([], None), ([{**NODE, "GPU": 1.0}, NODE], None), ([{**NODE, "GPU": 4.0}], 3)]
)
def test_a_pool_with_gpus_grows_unless_its_actors_could_take_the_cpus_of_decoding(
    nodes: list[dict[str, float]], most: int | None
) -> None:
    assert sizing.gpu_pool_size(make_run(num_gpus=1), nodes, grows=True) == (1, 1, most)


def test_workers_are_counted_on_the_nodes_that_the_selectors_leave() -> None:
    assert sizing.count_workers(make_run(num_cpus=2), [NODE, NODE], [NODE, NODE]) == Workers(8, 8, 8)
    gpus = make_run(num_gpus=0.5, decode={"num_cpus": 2})
    assert sizing.count_workers(gpus, [{**NODE, "GPU": 1.0}], [NODE, NODE]) == Workers(3, 4, 8, has_gpus=True)


@pytest.mark.parametrize(
    ("memory_gib", "processes"), [(0, 4), (2, 4), (3, 2), (8, 1), (100, 1)], ids=lambda value: f"{value}"
)
def test_an_actor_decodes_in_as_many_processes_as_there_is_memory_for(
    memory_gib: int, processes: int
) -> None:
    run = make_run(num_cpus=4)
    assert sizing.count_processes(run, [NODE], memory_gib * 2**30) == processes


@pytest.mark.parametrize(
    ("processes", "memory", "expected"), [(1, 0, (1, 1)), (3, 0, (2, 2)), (3, 2**30, (2, 1)), (4, 0, (2, 2))]
)
def test_the_tasks_of_an_actor_share_its_processes_without_claiming_more_memory(
    processes: int, memory: int, expected: tuple[int, int]
) -> None:
    assert sizing.divide_processes(make_run(num_cpus=4), processes, memory) == expected


@pytest.mark.parametrize(
    ("actors", "cores", "cpus"),
    [
        ({}, 1, 1),
        ({}, 12, 12),
        ({}, 48, 24),
        ({"min": 2}, 12, 6),
        ({"min": 20}, 12, 1),
        ({"num_cpus": 1.5}, 12, 1.5),
        ({"num_gpus": 1}, 12, 1),
    ],
    ids=["one core", "one actor", "more than one keeps busy", "two", "too many", "configured", "GPUs"],
)
def test_actors_of_a_local_ray_are_as_large_as_possible_unless_they_are_configured(
    actors: dict[str, Any], cores: int, cpus: float
) -> None:
    assert sizing.enlarge_actors(make_run(**actors), cores).actors.cpus == cpus


@pytest.mark.parametrize(
    ("actors", "threads"),
    [({}, ModelThreads(1, 1)), ({"num_cpus": 4}, ModelThreads(3, 2)), ({"num_gpus": 1}, ModelThreads(1, 2))],
)
def test_a_model_with_several_cpus_or_a_gpu_has_two_calls_at_once(
    actors: dict[str, Any], threads: ModelThreads
) -> None:
    assert sizing.count_threads(make_run(**actors)) == threads


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ("gpu", True),
        ("cpu", False),
        ("!gpu", False),
        ("!cpu", True),
        ("in(cpu, gpu)", True),
        ("!in(cpu,gpu)", False),
        ("!in(a, b)", True),
    ],
)
def test_label_selectors_mean_what_they_mean_in_ray(condition: str, matches: bool) -> None:
    assert sizing.matches_labels({"pool": "gpu"}, {"pool": condition}) is matches
    assert sizing.matches_labels({}, {"pool": condition}) is condition.startswith("!")


def test_resources_with_keys_of_their_own_and_wrong_conditions_are_refused() -> None:
    with pytest.raises(ValidationError, match="GPU is not a custom resource; use num_gpus"):
        make_run(resources={"GPU": 1})
    with pytest.raises(ValidationError, match="label_selector"):
        make_run(label_selector={"pool": "in("})
