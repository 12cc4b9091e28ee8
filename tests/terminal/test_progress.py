"""Progress: one plain line at a time where there is no terminal."""

from __future__ import annotations

import re
import time

import pytest

from featray.schema import ScanRecord
from featray.terminal import progress
from featray.terminal.progress import Progress, line_of


def record(status: str, size: int) -> ScanRecord:
    return ScanRecord("a", "/a", "nifti", "c", "r", "run", status=status, bytes_read=size)  # type: ignore[arg-type]


def test_a_line_tells_done_failed_rates_and_eta() -> None:
    with Progress(4, show=False) as shown:
        shown._start -= 2.0  # two seconds ago
        shown.add([record("ok", 3_000_000), record("failed", 1_000_000)])
        line = line_of(shown.state())
    assert re.fullmatch(r"2/4 scans, 1 failed, (0\.9\d|1\.00) scans/s, [12] MB/s, ETA 2 s", line)


def test_lines_come_by_themselves_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    with Progress(4, show=True):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("featray: 0/4 scans") for line in lines)


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, show=False) as shown:
        shown.add([record("ok", 1)])
    assert capsys.readouterr().err == ""
