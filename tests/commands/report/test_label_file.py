"""Reading a table of labels from local paths and URLs."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from featray.commands.report.label_file import read_labels
from featray.errors import ConfigError, UsageError

IDS = ["scan00", "scan01"]
TABLE = b"scan_id,x\nscan00,a\nscan01,b\n"


def test_a_local_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(TABLE)
    assert read_labels(tmp_path / "labels.csv", IDS).labels[0].classes == ("a", "b")


def test_a_file_in_a_store_is_read() -> None:
    fsspec.filesystem("memory").pipe_file("/labels/table.csv", TABLE)
    assert read_labels("memory://labels/table.csv", IDS).labels[0].classes == ("a", "b")


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--labels: .*labels.csv does not exist"):
        read_labels(tmp_path / "labels.csv", IDS)
    with pytest.raises(UsageError, match="does not exist"):
        read_labels("memory://labels/missing.csv", IDS)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        read_labels(tmp_path, IDS)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        read_labels("nosuchstore://labels.csv", IDS)
