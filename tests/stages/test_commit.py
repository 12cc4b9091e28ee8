"""Commits: each changes both tables in one step, also if a process is killed, and leaves no files behind."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from commits import (
    LATER,
    RUN,
    assert_cells_agree,
    assert_consistent,
    list_committed,
    list_stored,
    make_committer,
    make_decoded,
    make_failed_receipt,
    read_statuses,
    read_values,
    run_until_killed,
    write_receipt,
)

from featray.commands.vacuum import vacuum
from featray.errors import ConfigError, FeatrayError, OutputBusyError, Reason, StorageError
from featray.output import delta_log, rewrite
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.output.orphans import find_orphans
from featray.stages import commit as commit_module
from featray.stages.commit import Committer
from featray.storage.store import Store


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


# Changes of one commit


def test_a_changed_scan_replaces_only_its_own_rows_in_every_layer(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit(
        [write_receipt(dataset, make_decoded("a", 1, patches=3), make_decoded("b", 2), make_decoded("c", 3))]
    )
    committer.commit([write_receipt(dataset, make_decoded("b", 9), make_decoded("a", 7))])
    assert read_values(dataset) == {"a": 7, "b": 9, "c": 3}
    assert_consistent(dataset)


def test_features_of_a_scan_that_now_fails_are_removed(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.commit([make_failed_receipt("a"), write_receipt(dataset, make_decoded("c", 3))])
    assert read_values(dataset) == {"b": 2, "c": 3}
    assert read_statuses(dataset) == {"a": "failed", "b": "ok", "c": "ok"}
    assert_consistent(dataset)


def test_a_failed_scan_that_is_now_ok_has_one_row(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1)), make_failed_receipt("b", Reason.STORAGE)])
    committer.commit([write_receipt(dataset, make_decoded("b", 2))])
    assert read_statuses(dataset) == {"a": "ok", "b": "ok"}
    assert_consistent(dataset)


def test_deleted_scans_are_in_neither_table(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit(
        [write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2)), make_failed_receipt("c")]
    )
    committer.delete_scans(["a", "c", "never-there"])
    assert read_values(dataset) == {"b": 2}
    assert read_statuses(dataset) == {"b": "ok"}
    assert_consistent(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 5))])
    assert read_values(dataset) == {"a": 5, "b": 2}


def test_deleting_all_scans_leaves_empty_tables(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.delete_scans(["a", "b"])
    assert (read_values(dataset), read_statuses(dataset)) == ({}, {})
    assert_consistent(dataset)


def test_partition_values_that_need_quoting_can_be_replaced(dataset: Dataset) -> None:
    by = ("layer", "site")
    committer = Committer(dataset, by, ["site"], run_id=RUN)
    for value in (1, 2):
        scan = make_decoded("a", value)
        scan.record.columns["site"] = "A/B ü%=1"
        committer.commit([write_receipt(dataset, scan, partition_by=by)])
    assert read_values(dataset) == {"a": 2}
    assert_consistent(dataset)
    found = pl.scan_delta(str(dataset.store.path("features"))).filter(pl.col("layer") == "map").collect()
    assert found.select("scan_id", "site").rows() == [("a", "A/B ü%=1")]


def test_a_missing_file_fails_the_commit_before_it_changes_a_table(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    lost = write_receipt(dataset, make_decoded("a", 1))
    dataset.store.delete([f"features/{lost.files[0].path}"])
    with pytest.raises(FileNotFoundError, match="nothing was committed"):
        committer.commit([lost])
    assert len(dataset.read_scans(("scan_id",))) == 0


def test_the_message_about_a_damaged_file_names_featray_verify(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    dataset.store.delete(sorted(list_committed(dataset))[:1])
    with pytest.raises(FeatrayError, match="featray verify"):
        committer.commit([write_receipt(dataset, make_decoded("a", 3))])
    assert read_statuses(dataset) == {"a": "ok", "b": "ok"}


def test_other_partition_columns_than_those_of_the_output_are_a_config_error(dataset: Dataset) -> None:
    make_committer(dataset)
    with pytest.raises(ConfigError, match="partitioned by"):
        Committer(dataset, ("layer", "site"), ["site"], run_id=RUN)


# Kills


CHANGES: dict[str, Callable[[Committer, Dataset], None]] = {
    "new": lambda c, d: c.commit([write_receipt(d, make_decoded("new", 5))]),
    "replaced": lambda c, d: c.commit([write_receipt(d, make_decoded("a", 5), make_decoded("c", 6))]),
    "failed": lambda c, d: c.commit([make_failed_receipt("a"), make_failed_receipt("x")]),
    "mixed": lambda c, d: c.commit(
        [
            make_failed_receipt("a"),
            write_receipt(d, make_decoded("b", 5), make_decoded("new", 6)),
            make_failed_receipt("y"),
        ]
    ),
    "deleted": lambda c, d: c.delete_scans(["a", "x"]),
    "compacted": lambda c, d: c.compact(2) and None,
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_step_of_any_change_leaves_consistent_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for kill_at in itertools.count():
        dataset = Dataset(Store(str(tmp_path / f"out{kill_at}")))
        committer = make_committer(dataset)
        committer.commit(
            [write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2)), make_failed_receipt("x")]
        )
        committer.commit([write_receipt(dataset, make_decoded("c", 3)), make_failed_receipt("y")])
        before = read_values(dataset), read_statuses(dataset)
        killed = run_until_killed(lambda: CHANGES[change](committer, dataset), monkeypatch, kill_at)  # noqa: B023  # called at once
        seen = read_values(dataset), read_statuses(dataset)
        assert_cells_agree(dataset)
        after = make_committer(dataset, LATER)
        assert (read_values(dataset), read_statuses(dataset)) == seen, "recovery changed what readers see"
        after.delete_orphans()
        assert_consistent(dataset)
        if not killed:
            assert kill_at > 3
            assert change == "compacted" or seen != before
            return


def test_programs_that_read_each_log_alone_never_see_an_ok_scan_without_its_features(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = make_committer(dataset)
    original, moments = TableLog.append, []

    def watched(self: TableLog, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tables = [pl.scan_delta(str(dataset.store.path(table))).collect() for table in (FEATURES, SCANS)]
        ok = set(tables[1].filter(pl.col("status") == "ok")["scan_id"])
        moments.append(ok <= set(tables[0]["scan_id"]))

    monkeypatch.setattr(TableLog, "append", watched)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.commit(
        [make_failed_receipt("a"), write_receipt(dataset, make_decoded("b", 3), make_decoded("c", 4))]
    )
    committer.delete_scans(["b"])
    assert moments == [True] * 8


def test_files_of_a_killed_writer_are_not_visible_and_are_deleted_at_the_next_start(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])
    write_receipt(dataset, make_decoded("lost", 9))
    dataset.store.write(f"features/layer=map/part-{RUN}-0123456789abcdef.parquet.{'0' * 32}.tmp", b"half")
    dataset.store.write(f"runs/{RUN}/run.json.{'0' * 32}.tmp", b"half")
    dataset.store.write("features/_delta_log/_commit_1234.json.tmp", b"half")
    assert "lost" not in read_values(dataset)
    assert len(make_committer(dataset, LATER).delete_orphans()) == 5
    assert_consistent(dataset)


def test_files_that_no_run_has_written_are_not_deleted(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])
    foreign = ["features/notes.txt", "features/layer=map/mine.parquet", "scans/part-mine.parquet"]
    for name in foreign:
        dataset.store.write(name, b"mine")
    assert committer.delete_orphans() == []
    assert all(dataset.store.get_size(name) == 4 for name in foreign)


# Two drivers


def test_a_second_driver_that_planned_on_the_same_version_cannot_commit(dataset: Dataset) -> None:
    make_committer(dataset)
    first, second = make_committer(dataset), make_committer(dataset, LATER)
    first.commit([write_receipt(dataset, make_decoded("a", 1))])
    with pytest.raises(OutputBusyError, match="another run"):
        second.commit([write_receipt(dataset, make_decoded("a", 5))])
    assert read_values(dataset) == {"a": 1}


def test_a_driver_that_has_lost_its_lease_commits_and_deletes_nothing(dataset: Dataset) -> None:
    is_lost = False

    def check_lease() -> None:
        if is_lost:
            raise OutputBusyError("taken over")

    committer = make_committer(dataset, check_lease=check_lease)
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])
    fresh = write_receipt(dataset, make_decoded("b", 2))
    before, is_lost = list_stored(dataset), True
    for operation in (
        lambda: committer.commit([fresh]),
        committer.delete_orphans,
        lambda: committer.delete_scans(["a"]),
    ):
        with pytest.raises(OutputBusyError):
            operation()
    assert (list_stored(dataset), read_values(dataset)) == (before, {"a": 1})


def test_a_driver_that_was_suspended_within_its_commit_cannot_finish_it_after_another_took_the_output(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = make_committer(dataset)
    earlier.commit([write_receipt(dataset, make_decoded("a", 1.0))])
    receipt = write_receipt(dataset, make_decoded("b", 2.0))

    def take_output_over() -> None:  # while the earlier driver is suspended after its last check
        monkeypatch.setattr(earlier, "_check_lease", lambda: None)
        later = make_committer(dataset, LATER)
        later.exclude_earlier_driver()
        later.delete_orphans()

    monkeypatch.setattr(earlier, "_check_lease", take_output_over)
    with pytest.raises(OutputBusyError):
        earlier.commit([receipt])
    assert read_values(dataset) == {"a": 1.0}
    assert_consistent(dataset)
    make_committer(dataset, LATER).commit([write_receipt(dataset, make_decoded("b", 3.0))])
    assert read_values(dataset) == {"a": 1.0, "b": 3.0}


def test_a_driver_that_loses_the_lease_while_it_lists_orphans_deletes_none(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = make_committer(dataset)
    write_receipt(dataset, make_decoded("a", 1.0))
    before = list_stored(dataset)

    def list_slowly(*arguments: Any) -> Any:
        def refuse() -> None:
            raise OutputBusyError("taken over")

        committer._check_lease = refuse
        return find_orphans(*arguments)

    monkeypatch.setattr("featray.stages.commit.find_orphans", list_slowly)
    with pytest.raises(OutputBusyError):
        committer.delete_orphans()
    assert list_stored(dataset) == before


@pytest.mark.slow
def test_a_driver_that_was_suspended_until_its_log_entries_were_trimmed_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_log, "MIN_LOG_ENTRIES", 10)
    asleep = make_committer(dataset)
    awake = make_committer(dataset, LATER)
    for n in range(120):
        awake.commit([make_failed_receipt(f"s{n:03}")])
    with pytest.raises(OutputBusyError):
        asleep.commit([write_receipt(dataset, make_decoded("a", 1))])
    assert len(read_statuses(dataset)) == 120


def test_a_commit_whose_answer_was_lost_is_not_repeated(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake import DeltaTable

    original, calls = DeltaTable.create_write_transaction, []

    def write_then_fail(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(self)
        raise OSError("connection reset")

    committer = make_committer(dataset)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", write_then_fail)
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])
    monkeypatch.undo()
    committer.commit([write_receipt(dataset, make_decoded("b", 2))])
    assert len(calls) == 2
    assert read_values(dataset) == {"a": 1, "b": 2}


@pytest.mark.parametrize("arrives", [False, True], ids=["it never arrives", "it arrives late"])
def test_a_commit_whose_connection_broke_is_repeated_and_counts_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    from deltalake import DeltaTable

    original, is_entry_written = DeltaTable.create_write_transaction, TableLog._is_entry_written
    calls, late = [], []

    def broken_once(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            if arrives:
                late.append(lambda: original(self, *args, **kwargs))
            raise OSError("Error performing PUT: connection error: Connection reset by peer (os error 104)")
        original(self, *args, **kwargs)

    def check_then_write(self: TableLog, *args: Any) -> bool:
        is_written = is_entry_written(self, *args)
        while late:
            late.pop()()
        return is_written

    committer = make_committer(dataset)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", broken_once)
    monkeypatch.setattr(TableLog, "_is_entry_written", check_then_write)
    committer.commit([write_receipt(dataset, make_decoded("a", 1))])
    monkeypatch.undo()
    assert len(calls) == 3, "features twice, scans once"
    committer.commit([write_receipt(dataset, make_decoded("b", 2))])
    assert read_values(dataset) == {"a": 1, "b": 2}
    assert dataset.open_snapshot().version == 2


@pytest.mark.parametrize("arrives", [False, True], ids=["it never arrives", "only the answer is lost"])
@pytest.mark.parametrize("method", ["add_columns", "set_table_properties"])
def test_a_table_is_altered_once_although_the_connection_breaks(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, method: str, arrives: bool
) -> None:
    from deltalake.table import TableAlterer

    original, calls = getattr(TableAlterer, method), []

    def broken_once(self: TableAlterer, *args: Any) -> None:
        calls.append(self)
        if len(calls) > 1 or arrives:
            original(self, *args)
        if len(calls) == 1:
            raise OSError("Error performing PUT: connection error: Connection reset by peer (os error 104)")

    make_committer(dataset)
    log = TableLog.open(dataset.store, SCANS)
    assert log is not None
    monkeypatch.setattr(TableAlterer, method, broken_once)
    change = {
        "add_columns": lambda: log.add_columns(pa.schema([("site", pa.string())])),
        "set_table_properties": lambda: log.set_retention_days(3),
    }
    change[method]()
    assert len(calls) == (1 if arrives else 2)
    assert log.version == 1
    again = TableLog.open(dataset.store, SCANS)
    assert again is not None
    assert ("site" in again.schema.names, again.retention_days) == (
        (True, 0) if method == "add_columns" else (False, 3)
    )


def test_a_table_that_cannot_be_altered_is_a_storage_error(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake.exceptions import DeltaError
    from deltalake.table import TableAlterer

    def broken(self: TableAlterer, *args: Any) -> None:
        raise DeltaError("https://user:SECRET@host refused")

    make_committer(dataset)
    monkeypatch.setattr(TableAlterer, "set_table_properties", broken)
    with pytest.raises(StorageError, match=r"^features cannot be changed \(DeltaError\)$"):
        make_committer(dataset, keep_versions_days=1)


def test_a_failed_commit_is_an_error_without_secrets_and_can_be_repeated(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake import DeltaTable

    def broken(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        raise OSError("https://user:SECRET@host refused")

    committer, fresh = make_committer(dataset), write_receipt(dataset, make_decoded("a", 1))
    monkeypatch.setattr(DeltaTable, "create_write_transaction", broken)
    with pytest.raises(FeatrayError) as caught:
        committer.commit([fresh])
    assert "SECRET" not in str(caught.value)
    monkeypatch.undo()
    committer.commit([fresh])
    assert read_values(dataset) == {"a": 1}


# Versions, compaction, logs


def test_a_retained_version_can_be_read_until_it_is_too_old(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = make_committer(dataset, keep_versions_days=1)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    earlier = dataset.open_snapshot()
    committer.commit([make_failed_receipt("x")])
    committer.commit([write_receipt(dataset, make_decoded("a", 9))])
    committer.delete_scans(["b"])
    assert committer.delete_orphans() == []
    assert vacuum(dataset).deleted == 0

    again = dataset.open_snapshot(earlier.version)
    rows = again.read(FEATURES, ("scan_id", "feature"), pads.field("layer") == "z_mean").to_pylist()
    assert {row["scan_id"]: row["feature"][0] for row in rows} == {"a": 1, "b": 2}
    assert again.read_scans(("scan_id",))["scan_id"].to_pylist() == ["a", "b"]
    assert read_values(dataset) == {"a": 9}

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 24 * 3600)
    assert vacuum(dataset).deleted > 0
    assert_consistent(dataset)


def test_the_message_about_a_deleted_version_says_how_long_versions_are_kept(dataset: Dataset) -> None:
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    with pytest.raises(ConfigError, match=r"no version 99.*kept for 0 days"):
        dataset.open_snapshot(99)


def test_the_retention_of_versions_can_be_changed_later(dataset: Dataset) -> None:
    make_committer(dataset)
    assert dataset.open_snapshot().retention_days == 0
    make_committer(dataset, keep_versions_days=2.5)
    assert dataset.open_snapshot().retention_days == 2.5
    before = dataset.open_snapshot().versions
    make_committer(dataset, keep_versions_days=2.5)
    assert dataset.open_snapshot().versions == before
    make_committer(dataset, keep_versions_days=0)
    assert dataset.open_snapshot().retention_days == 0


@pytest.mark.slow
def test_compaction_moves_rows_and_does_not_change_them(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    for n in range(12):
        committer.commit([write_receipt(dataset, make_decoded(f"s{n:02}", n, patches=2))])
    before = sorted(map(str, dataset.read(FEATURES).to_pylist()))
    assert len(list_committed(dataset)) == 24
    assert committer.compact() == 0, "there are too few files per partition"
    assert committer.compact(at_least=2) == 22
    assert len(list_committed(dataset)) == 2
    assert sorted(map(str, dataset.read(FEATURES).to_pylist())) == before
    assert_consistent(dataset)
    assert committer.compact(at_least=2) == 0


@pytest.mark.slow
def test_compaction_keeps_partitions_and_the_file_size_limit(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (commit_module, rewrite):
        monkeypatch.setattr(module, "TARGET_FILE_BYTES", 12_000)
    by = ("layer", "site")
    committer = Committer(dataset, by, ["site"], run_id=RUN)
    for n in range(16):
        scan = make_decoded(f"s{n:02}", n)
        scan.record.columns["site"] = "AB"[n % 2]
        committer.commit([write_receipt(dataset, scan, partition_by=by)])
    committer.compact(at_least=2)
    sizes = [file.size for file in dataset.open_snapshot().files(FEATURES)]
    assert 4 < len(sizes) < 32
    assert max(sizes) < 12_000
    found = pl.scan_delta(str(dataset.store.path("features"))).collect()
    assert len(found) == 32
    assert set(found.filter(pl.col("site") == "B")["scan_id"]) == {f"s{n:02}" for n in range(1, 16, 2)}


def test_compaction_keeps_a_file_that_has_no_other_to_merge_with(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = make_committer(dataset)
    for n in range(3):
        committer.commit([write_receipt(dataset, make_decoded(f"s{n}", n))])
    for module in (commit_module, rewrite):  # two files together are as large as a merged file may be
        monkeypatch.setattr(module, "TARGET_FILE_BYTES", 6_000)
    assert committer.compact(at_least=2) == 2
    assert read_values(dataset) == {"s0": 0, "s1": 1, "s2": 2}
    assert_consistent(dataset)


def test_a_commit_of_the_same_rows_again_changes_nothing(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    receipts = [write_receipt(dataset, make_decoded("a", 1)), make_failed_receipt("b")]
    committer.commit(receipts)
    before = list_committed(dataset) | list_committed(dataset, SCANS)
    committer.commit(receipts)
    assert list_committed(dataset) | list_committed(dataset, SCANS) == before
    assert_consistent(dataset)


@pytest.mark.slow
def test_the_scans_table_stays_in_few_files_and_its_log_is_trimmed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_log, "MIN_LOG_ENTRIES", 50)
    committer = make_committer(dataset)
    for n in range(305):
        committer.commit([make_failed_receipt(f"s{n:04}")])
    assert len(read_statuses(dataset)) == 305
    assert len(list_committed(dataset, SCANS)) <= 9
    for table in (FEATURES, SCANS):
        assert (
            len([name for name in dataset.store.list_files(f"{table}/_delta_log") if name.endswith("json")])
            < 210
        )
    assert_consistent(dataset)


def test_vacuum_deletes_orphans_and_merges_small_files_and_reports_it(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    for n in range(3):
        committer.commit([write_receipt(dataset, make_decoded(f"s{n}", n))])
    write_receipt(dataset, make_decoded("lost", 9))
    found = vacuum(dataset)
    assert (found.deleted, found.merged) == (2, 4)
    assert "deleted 2 files" in found.text()
    assert vacuum(dataset).text() == "nothing to delete or to merge"
    assert_consistent(dataset)


def test_the_commit_info_in_the_log_contains_no_rows(dataset: Dataset) -> None:
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    entry = json.loads(dataset.store.read("features/_delta_log/00000000000000000001.json").splitlines()[0])
    assert entry["commitInfo"]["featray"].keys() == {"number", "run_id", "owes"}
