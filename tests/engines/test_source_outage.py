"""A source that becomes unreachable ends the run; unreadable scans alone do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.commands.status import status
from featray.config import PolicyConfig, SourceConfig
from featray.engines.source_outage import MAX_FETCH_FAILURES, SourceOutageDetector
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
    """Return a folder of 100 files; they can be fetched, and no test decodes them."""
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


def make_receipt(scan: Scan, reason: Reason | None = None) -> Receipt:
    record = replace(ScanRecord.from_scan(scan), recipe="r", run_id="run")
    record.bytes_read = 0 if reason is Reason.STORAGE else 1
    if reason is not None:
        record.status, record.reason = "failed", str(reason)
    return Receipt((), (record,))


def check_all(detector: SourceOutageDetector, receipts: Iterable[Receipt]) -> list[Receipt]:
    """Give all receipts to the detector; return them."""
    return check_each(detector, receipts, [])


def check_each(
    detector: SourceOutageDetector, receipts: Iterable[Receipt], seen: list[Receipt]
) -> list[Receipt]:
    """Give the receipts to the detector; add each one to `seen` before it is checked."""
    for receipt in receipts:
        seen.append(receipt)
        detector.check(receipt)
    return seen


def make_receipts(scans: list[Scan], first_failed: int, at_outage: Any = lambda: None) -> Iterator[Receipt]:
    """Yield a receipt per scan; from scan number `first_failed` on, the scan could not be fetched.

    `at_outage` is called before the first failed receipt.
    """
    for number, scan in enumerate(scans):
        if number == first_failed:
            at_outage()
        yield make_receipt(scan, Reason.STORAGE if number >= first_failed else None)


def test_a_run_ends_when_a_scan_that_was_fetched_before_is_missing_too(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    seen: list[Receipt] = []
    detector = SourceOutageDetector(scans, reader)
    receipts = make_receipts(scans, 5, lambda: source.rename(tmp_path / "away"))
    with pytest.raises(StorageError, match=r"the last 20 scans .* run the same command again"):
        check_each(detector, receipts, seen)
    assert len(seen) == 5 + MAX_FETCH_FAILURES


def test_unreadable_scans_do_not_end_a_run_while_the_source_is_reachable(
    reader: Reader, scans: list[Scan]
) -> None:
    detector = SourceOutageDetector(scans, reader)
    assert len(check_all(detector, make_receipts(scans, 5))) == len(scans)


def test_a_run_that_has_fetched_no_scan_is_not_ended(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    source.rename(tmp_path / "away")
    detector = SourceOutageDetector(scans, reader)
    assert len(check_all(detector, make_receipts(scans, 0))) == len(scans)


def test_failures_other_than_storage_are_no_outage(
    reader: Reader, scans: list[Scan], source: Path, tmp_path: Path
) -> None:
    source.rename(tmp_path / "away")
    failed = [make_receipt(scan, Reason.TRUNCATED) for scan in scans]
    assert len(check_all(SourceOutageDetector(scans, reader), failed)) == len(scans)


@pytest.mark.slow
def test_a_second_run_completes_the_output_when_the_source_is_reachable_again(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, away = tmp_path / "ct", tmp_path / "away"
    make_collection(source, 70, shape_zyx=(8, 16, 16), seed=4, dicom_count=0)
    config = config_of()
    config["source"] = {"uri": str(source)}
    commit = Committer.commit

    def commit_then_unmount(self: Committer, receipts: Any) -> None:
        commit(self, receipts)
        if source.exists():
            source.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(Committer, "commit", commit_then_unmount)
        with pytest.raises(StorageError, match="source is unreachable"):
            featray.extract(config)
    away.rename(source)
    assert 0 < status(Dataset(Store(config["output"]["uri"]))).ok < 70 - MAX_FETCH_FAILURES
    summary = featray.extract(config)
    assert (summary.ok, summary.failed) == (70, 0)
