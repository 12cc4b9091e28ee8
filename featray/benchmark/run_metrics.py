"""The figures of one run from its process tree, its recorded stages and its first commit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from featray.benchmark.instrument import StageCalls
from featray.benchmark.metrics import RunMetrics, StageUsage
from featray.benchmark.process_monitor import CommandUsage


def make_run_metrics(
    variant: str, count: int, usage: CommandUsage, stages: Mapping[str, StageCalls]
) -> RunMetrics:
    """Return the figures of a run.

    Args:
        variant: Name of the engine or script.
        count: Number of scans that it processed.
        usage: Resources that its process tree used.
        stages: The recorded calls of its stages; empty for a script.
    """
    roles = _assign_roles(usage, stages)
    cpu_by_role: dict[str, float] = {}
    for pid, seconds in usage.cpu_s.items():
        role = roles.get(pid, usage.names[pid])
        cpu_by_role[role] = cpu_by_role.get(role, 0.0) + seconds
    peaks = {"tree": usage.peak_bytes, "driver": usage.peak_by_process.get(usage.pid, 0)}
    for role, key in (("decoders", "largest decoder"), ("model", "largest model")):
        role_peaks = [peak for pid, peak in usage.peak_by_process.items() if roles.get(pid) == role]
        peaks |= {key: max(role_peaks)} if role_peaks else {}
    return RunMetrics(
        variant=variant,
        scans=count,
        wall_s=usage.wall_s,
        cpu_s=sum(usage.cpu_s.values()),
        cpu_by_role=cpu_by_role,
        first_opened_s=stages["decode"].first_s - usage.started_s if "decode" in stages else None,
        stages={
            name: StageUsage(calls.wall_s, calls.cpu_s, calls.max_concurrent)
            for name, calls in stages.items()
        },
        peak_bytes=peaks,
        store_bytes=usage.store_bytes,
        spilled=usage.spilled,
        background_cores=usage.background_cores,
    )


def add_first_commit(metrics: RunMetrics, usage: CommandUsage, committed: float | None) -> RunMetrics:
    """Return the metrics with the cost until the first commit, which happened at `committed` (epoch, s)."""
    if committed is None:
        return metrics
    clock = committed - time.time() + time.monotonic()
    seconds = clock - usage.started_s
    return replace(metrics, first_commit_s=seconds, first_commit_cpu_s=usage.get_cpu_s(seconds))


def _assign_roles(usage: CommandUsage, stages: Mapping[str, StageCalls]) -> dict[int, str]:
    """Return the role of each process that ran a stage; the driver stays the driver if it ran stages too."""
    roles: dict[int, str] = {}
    for stage, role in (("write", "writers"), ("decode", "decoders"), ("model", "model")):
        roles |= dict.fromkeys(stages[stage].pids, role) if stage in stages else {}
    return {**roles, usage.pid: "driver"}
