"""Sizes of a Ray run: how many tasks the scans share, and how much memory decoding claims."""

from __future__ import annotations

from dataclasses import replace

import pytest

from featray.engines.ray import sizing
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
    assert sizing.task_count(scans, cpus=2, batch=4, isolates=False) == tasks


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
