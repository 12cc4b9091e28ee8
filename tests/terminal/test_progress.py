"""Test the progress of a run and of reading files where stderr is not a terminal."""

from __future__ import annotations

import re
import time

import pytest

from featray.schema import ScanRecord
from featray.terminal import progress
from featray.terminal.progress import Progress, format_bytes, format_scans


def make_record(status: str, size: int) -> ScanRecord:
    return ScanRecord(
        "a", "/a", "nifti", content="c", recipe="r", run_id="run", status=status, bytes_read=size
    )  # type: ignore[arg-type]


def test_a_line_names_done_and_failed_scans_rates_and_eta() -> None:
    with Progress(4, show=False) as shown:
        shown._start -= 2.0  # two seconds ago
        shown.add_records([make_record("ok", 3_000_000), make_record("failed", 1_000_000)])
        line = format_scans(shown.state())
    assert re.fullmatch(r"2/4 scans, 1 failed, (0\.9\d|1\.00) scans/s, [12] MB/s, ETA 2 s", line)


def test_a_line_names_bytes_read_rate_and_eta() -> None:
    with Progress(8_000_000, unit="B", show=False) as shown:
        assert format_bytes(shown.state()) == "read 0 of 8 MB, 0 MB/s, ETA unknown"
        shown._start -= 2.0  # two seconds ago
        shown.add_bytes(4_000_000)
        line = format_bytes(shown.state())
    assert re.fullmatch(r"read 4 of 8 MB, 2 MB/s, ETA 2 s", line)


@pytest.mark.parametrize(
    ("unit", "start"), [("scan", "featray: 0/4 scans"), ("B", "featray: read 0 of 0 MB")]
)
def test_lines_are_printed_at_intervals_if_stderr_is_not_a_terminal(
    unit: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.05)
    with Progress(4, show=True, unit=unit):  # type: ignore[arg-type]
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith(start) for line in lines)


def test_nothing_is_printed_without_show(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, show=False) as shown:
        shown.add_records([make_record("ok", 1)])
    assert capsys.readouterr().err == ""
