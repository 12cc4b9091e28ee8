"""An output that is deleted while a run works: one message says what is gone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commits import (
    LATER,
    RUN,
    list_stored,
    make_committer,
    make_decoded,
    make_failed_receipt,
    read_statuses,
    write_receipt,
)

from featray.cli.main import main
from featray.commands.status import status
from featray.errors import ConfigError, FeatrayError, MissingFileError, OutputBusyError, StorageError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.lease import Lease
from featray.schema import Receipt
from featray.stages.commit import Committer
from featray.storage.store import Store

BOTH = "deleted the log of features and scans"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


def delete(dataset: Dataset, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(dataset.store.path(folder))


def commit_one(dataset: Dataset, committer: Committer) -> None:
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("",), BOTH),
        (("features", "scans"), BOTH),
        (("features/_delta_log", "scans/_delta_log"), BOTH),
        (("features",), "deleted the log of features while"),
        (("features/_delta_log",), "deleted the log of features while"),
        (("scans",), "deleted the log of scans while"),
        (("scans/_delta_log",), "deleted the log of scans while"),
        (("runs",), "the folder runs of the output was deleted"),
    ],
)
@pytest.mark.parametrize("has_failed", [False, True])
def test_a_deleted_output_ends_the_run_with_one_message(
    dataset: Dataset, folders: tuple[str, ...], message: str, has_failed: bool
) -> None:
    with Lease(dataset.store, RUN) as lease:
        committer = make_committer(dataset, check_lease=lease.check)
        commit_one(dataset, committer)
        fresh = write_receipt(dataset, make_decoded("b", 1), make_decoded("c", 2))
        delete(dataset, *folders)
        change = make_failed_receipt("a") if has_failed else fresh
        with pytest.raises(StorageError, match=message):
            committer.commit([change])
    logs = {name.partition("/")[0] for name in dataset.store.list_files() if "_delta_log" in name}
    deleted = {FEATURES, SCANS} if folders == ("",) else {folder.partition("/")[0] for folder in folders}
    assert logs == {FEATURES, SCANS} - deleted


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_run_whose_output_is_deleted_ends_with_exit_code_1_and_one_message(
    where: str,
    config_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    output: dict[str, Any] = {"uri": str(tmp_path / "out")}
    if where == "s3":
        options = request.getfixturevalue("s3_options")
        output = {"uri": request.getfixturevalue("s3_folder"), "storage_options": options}
    config = config_of()
    config["output"] = output
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["extract", str(tmp_path / "config.yaml"), "--quiet"]
    write_commit = Committer.commit

    def delete_and_commit(self: Committer, receipts: Sequence[Receipt]) -> None:
        self.dataset.store.delete(self.dataset.store.list_files())
        write_commit(self, receipts)

    monkeypatch.setattr(Committer, "commit", delete_and_commit)
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert BOTH in errors
    assert "Traceback" not in errors
    monkeypatch.undo()
    store = Store(output["uri"], output.get("storage_options"))
    assert not any("_delta_log" in name for name in store.list_files())
    store.delete(store.list_files())
    assert main(command) == 0


def test_an_output_that_another_run_has_taken_over_is_busy(dataset: Dataset) -> None:
    with Lease(dataset.store, RUN) as lease:
        committer = make_committer(dataset, check_lease=lease.check)
        commit_one(dataset, committer)
        shutil.rmtree(dataset.store.path("runs/lease"))
        dataset.store.write("runs/other/run.json", b"{}")
        with pytest.raises(OutputBusyError, match="taken over"):
            commit_one(dataset, committer)


@pytest.mark.parametrize("table", [FEATURES, SCANS])
def test_without_one_of_its_tables_an_output_is_neither_read_nor_continued(
    dataset: Dataset, table: str
) -> None:
    commit_one(dataset, make_committer(dataset))
    delete(dataset, table)
    before = dataset.store.list_files()
    for use in (
        lambda: make_committer(dataset),
        lambda: status(dataset),
        dataset.find_snapshot,
    ):
        with pytest.raises(ConfigError, match=f"has no table {table}.*Restore the folder {table}"):
            use()
    assert dataset.store.list_files() == before


def test_files_of_features_without_a_log_are_not_taken_for_orphans(dataset: Dataset) -> None:
    commit_one(dataset, make_committer(dataset))
    stored = list_stored(dataset)
    delete(dataset, "features/_delta_log", "scans")
    with pytest.raises(ConfigError, match="holds 2 files of earlier runs, but no log"):
        make_committer(dataset, LATER)
    assert list_stored(dataset) == stored


def test_an_output_that_was_deleted_completely_is_started_again(dataset: Dataset) -> None:
    commit_one(dataset, make_committer(dataset))
    delete(dataset, "")
    commit_one(dataset, make_committer(dataset))
    assert read_statuses(dataset) == {"a": "ok"}


def test_a_missing_file_is_an_error_of_the_store_and_of_a_file(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    fresh = write_receipt(dataset, make_decoded("a", 1))
    dataset.store.delete([f"features/{fresh.files[0].path}"])
    with pytest.raises(MissingFileError, match="nothing was committed"):
        committer.commit([fresh])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Generic LocalFileSystem error: No space left on device (os error 28)", "No space left on device"),
        ("Unable to create file: Permission denied (os error 13)", "Permission denied"),
        ("unknown", "OSError"),
    ],
)
def test_a_commit_that_the_system_refuses_says_why(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    from deltalake import DeltaTable

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error)

    committer = make_committer(dataset)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", refuse)
    with pytest.raises(StorageError, match=message):
        commit_one(dataset, committer)
    monkeypatch.undo()
    assert read_statuses(dataset) == {}
    commit_one(dataset, committer)
    assert read_statuses(dataset) == {"a": "ok"}


def test_a_damaged_file_is_reported_without_saying_that_nothing_was_committed(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.commit([write_receipt(dataset, make_decoded("c", 1))])
    file = next(file for file in dataset.open_snapshot().files(FEATURES) if file.min_id == "c")
    dataset.store.delete([f"features/{file.path}"])
    batch = [make_failed_receipt("a"), write_receipt(dataset, make_decoded("c", 3))]
    with pytest.raises(FeatrayError, match="earlier commits are kept"):
        committer.commit(batch)
    assert read_statuses(dataset) == {"a": "failed", "b": "ok", "c": "ok"}
