"""A source that goes away for good ends the run; unreadable scans alone do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.commands.status import status
from featray.config import PolicyConfig, SourceConfig
from featray.engines.source_outage import IN_A_ROW, stop_when_source_is_gone
from featray.errors import Reason, StorageError
from featray.output.dataset import Dataset
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.commit import Committer
from featray.stages.read import Reader
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

NAMES = [f"{number:03}.nii" for number in range(100)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "ct"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def reader(source: Path) -> Reader:
    return Reader(SourceConfig(uri=str(source)), PolicyConfig(), 1)


@pytest.fixture
def scans(source: Path) -> list[Scan]:
    paths = [str(source / name) for name in NAMES]
    return [Scan(Path(path).name, path, "nifti", (path,), "c") for path in paths]


def receipt_of(scan: Scan, reason: Reason | None = None) -> Receipt:
    record = ScanRecord.of(scan, "r", "run")
    record.bytes_read = 0 if reason is Reason.STORAGE else 1
    if reason is not None:
        record.status, record.reason = "failed", str(reason)
    return Receipt((), (record,))


def receipts(scans: list[Scan], gone_from: int, between: Any = lambda: None) -> Iterator[Receipt]:
    for number, scan in enumerate(scans):
        if number == gone_from:
            between()
        yield receipt_of(scan, Reason.STORAGE if number >= gone_from else None)


def test_a_run_ends_when_what_was_fetched_before_is_gone_too(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    seen: list[Receipt] = []
    coming = receipts(scans, 5, lambda: source.rename(tmp_path / "away"))
    with pytest.raises(StorageError, match=r"the last 20 scans .* run the same command again"):
        seen.extend(stop_when_source_is_gone(coming, scans, reader))
    assert len(seen) == 5 + IN_A_ROW, "what was done before must be committed"


def test_unreadable_scans_stop_nothing_while_the_source_is_there(reader: Reader, scans: list[Scan]) -> None:
    found = list(stop_when_source_is_gone(receipts(scans, 5), scans, reader))
    assert len(found) == len(scans)


def test_a_run_that_never_fetched_anything_goes_on(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    source.rename(tmp_path / "away")
    assert len(list(stop_when_source_is_gone(receipts(scans, 0), scans, reader))) == len(scans)


def test_other_failures_are_no_outage(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    source.rename(tmp_path / "away")
    failed = [receipt_of(scan, Reason.TRUNCATED) for scan in scans]
    assert len(list(stop_when_source_is_gone(iter(failed), scans, reader))) == len(scans)


def test_a_run_goes_on_where_it_was_when_the_source_is_back(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, away = tmp_path / "ct", tmp_path / "away"
    make_collection(source, 70, shape_zyx=(8, 16, 16), seed=4, dicom_count=0)
    config = config_of()
    config["source"] = {"uri": str(source)}
    commit = Committer.commit

    def unmount(self: Committer, some: Any) -> None:
        commit(self, some)
        if source.exists():
            source.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(Committer, "commit", unmount)
        with pytest.raises(StorageError, match="source is gone"):
            featray.extract(config)
    away.rename(source)
    assert 0 < status(Dataset(Store(config["output"]["uri"]))).ok < 70 - IN_A_ROW
    summary = featray.extract(config)
    assert (summary.ok, summary.failed) == (70, 0)
