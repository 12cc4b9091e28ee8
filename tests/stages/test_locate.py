"""Locating: a scan that listing left open gets its files or a reason, never an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featray.config import PolicyConfig, SourceConfig
from featray.schema import Scan
from featray.stages import locate as locate_stage
from featray.stages.locate import locate
from featray.synthetic.phantom import make_phantom, write_dicom_series


def make_open_scan(folder: Path) -> Scan:
    return Scan("a", str(folder), "auto", (), "c", open_path=str(folder))


def test_an_open_scan_gets_its_files_and_keeps_its_content(tmp_path: Path) -> None:
    write_dicom_series(make_phantom(0, (4, 8, 8)), tmp_path / "s")
    scan = locate(make_open_scan(tmp_path / "s"), SourceConfig(uri=str(tmp_path)), PolicyConfig())
    assert (scan.scan_id, scan.format, scan.content, len(scan.files)) == ("a", "dicom", "c", 4)


def test_an_unexpected_error_is_the_reason_of_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Scan:
        raise RuntimeError("JANE DOE")

    monkeypatch.setattr(locate_stage, "find_files", fail)
    scan = locate(make_open_scan(tmp_path), SourceConfig(uri=str(tmp_path)), PolicyConfig())
    assert (scan.reason, scan.message) == ("unreadable", "looking for the scan's files raised RuntimeError")
