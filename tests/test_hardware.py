"""The number of cores that a process may use, in containers too."""

from __future__ import annotations

from pathlib import Path

import pytest

from featray import hardware
from featray.hardware import count_usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _pid: set(range(8)))


def write_limits(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Let a process find the files of control groups that `texts` names, with these texts, and no others."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    files = ((str(folder / "max"),), (str(folder / "quota"), str(folder / "period")))
    monkeypatch.setattr(hardware, "_CGROUP_CPU_LIMITS", files)


@pytest.mark.parametrize(
    ("texts", "cores"),
    [
        ({}, 8),
        ({"max": "max 100000\n"}, 8),
        ({"max": "400000 100000\n"}, 4),
        ({"max": "150000 100000\n"}, 2),
        ({"max": "20000 100000\n"}, 1),
        ({"max": "1600000 100000\n"}, 8),
        ({"quota": "-1\n", "period": "100000\n"}, 8),
        ({"quota": "300000\n", "period": "100000\n"}, 3),
    ],
)
def test_the_cpu_limit_of_a_container_counts(
    texts: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_limits(tmp_path, monkeypatch, **texts)
    assert count_usable_cores() == cores


def test_the_cpu_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_limits(tmp_path, monkeypatch, max="400000 100000")
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _pid: {0, 5})
    assert count_usable_cores() == 2
