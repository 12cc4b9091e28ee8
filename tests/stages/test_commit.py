"""The committer: each change is one visible step of both tables, whatever dies, and is tidied up after."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.dataset as pads
import pytest

from featray.commands.vacuum import vacuum
from featray.errors import ConfigError, FeatrayError, OutputBusyError, Reason, ScanError, StorageError
from featray.output import delta_log
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.schema import Decoded, Receipt, ScanRecord
from featray.stages import commit as commit_module
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LATER = "20260102T000000000-abcdef"


class Killed(BaseException):
    """Stands in for SIGKILL: nothing may catch it, and nothing after it happens."""


def layers_of(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Stand in for a model: two layers whose values say which input they came from."""
    first = batch[:, 0, 0, 0]
    return {"z_mean": np.stack([first, first + 1], axis=1), "map": np.tile(first[:, None, None], (1, 2, 3))}


def decoded(scan_id: str, value: float, patches: int = 1, recipe: str = "r0") -> Decoded:
    record = ScanRecord(scan_id, f"/data/{scan_id}", "nifti", "c0", recipe, RUN)
    tensor = np.full((patches, 2, 2, 2), value, np.float32)
    return Decoded(record, tensor, np.zeros((patches, 3), np.int32))


def receipt(dataset: Dataset, *scans: Decoded, partition_by: tuple[str, ...] = ("layer",)) -> Receipt:
    return write(extract(layers_of, scans), dataset, partition_by, "r0", RUN)


def failed(scan_id: str, reason: Reason = Reason.TRUNCATED) -> Receipt:
    record = decoded(scan_id, 0).record
    record.fail("read", ScanError(reason, "gone"))
    return Receipt((), (record,))


def values(dataset: Dataset) -> dict[str, float]:
    """Return {scan: first value of z_mean}; every row of every layer is there once."""
    rows = dataset.read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    keys = [(row["scan_id"], row["layer"], row["patch"]) for row in rows]
    assert len(set(keys)) == len(keys), "a row is there twice"
    return {row["scan_id"]: row["feature"][0] for row in rows if row["layer"] == "z_mean"}


def statuses(dataset: Dataset) -> dict[str, str]:
    rows = dataset.read_scans(("scan_id", "status")).to_pylist()
    assert len({row["scan_id"] for row in rows}) == len(rows), "a scan is there twice"
    return {row["scan_id"]: row["status"] for row in rows}


def on_disk(dataset: Dataset, table: str = FEATURES) -> set[str]:
    return {name for name in dataset.store.list_files(table) if "/_delta_log/" not in name}


def live(dataset: Dataset, table: str = FEATURES) -> set[str]:
    return {f"{table}/{file.path}" for file in dataset.open_snapshot().files(table)}


def assert_in_order(dataset: Dataset) -> None:
    """Both tables agree, and the folder holds what the tables do and nothing else."""
    ok = {scan for scan, status in statuses(dataset).items() if status == "ok"}
    assert values(dataset).keys() == ok
    for table in (FEATURES, SCANS):
        assert on_disk(dataset, table) == live(dataset, table)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


def committer_of(dataset: Dataset, run_id: str = RUN, **more: Any) -> Committer:
    return Committer(dataset, ("layer",), run_id=run_id, **more)


# What one commit changes


def test_a_changed_scan_replaces_its_rows_in_every_layer_and_leaves_its_neighbours(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1, patches=3), decoded("b", 2), decoded("c", 3))])
    committer.commit([receipt(dataset, decoded("b", 9), decoded("a", 7))])
    assert values(dataset) == {"a": 7, "b": 9, "c": 3}
    assert_in_order(dataset)


def test_a_scan_that_fails_now_loses_its_features(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    committer.commit([failed("a"), receipt(dataset, decoded("c", 3))])
    assert values(dataset) == {"b": 2, "c": 3}
    assert statuses(dataset) == {"a": "failed", "b": "ok", "c": "ok"}
    assert_in_order(dataset)


def test_a_failed_scan_that_is_ok_now_has_one_row(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1)), failed("b", Reason.STORAGE)])
    committer.commit([receipt(dataset, decoded("b", 2))])
    assert statuses(dataset) == {"a": "ok", "b": "ok"}
    assert_in_order(dataset)


def test_forgotten_scans_are_in_neither_table(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2)), failed("c")])
    committer.delete_scans(["a", "c", "never-there"])
    assert values(dataset) == {"b": 2}
    assert statuses(dataset) == {"b": "ok"}
    assert_in_order(dataset)
    committer.commit([receipt(dataset, decoded("a", 5))])
    assert values(dataset) == {"a": 5, "b": 2}


def test_forgetting_every_scan_leaves_empty_tables(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    committer.delete_scans(["a", "b"])
    assert (values(dataset), statuses(dataset)) == ({}, {})
    assert_in_order(dataset)


def test_partition_values_that_need_quoting_can_be_replaced(dataset: Dataset) -> None:
    by = ("layer", "site")
    committer = Committer(dataset, by, ["site"], run_id=RUN)
    for value in (1, 2):
        scan = decoded("a", value)
        scan.record.columns["site"] = "A/B ü%=1"
        committer.commit([receipt(dataset, scan, partition_by=by)])
    assert values(dataset) == {"a": 2}
    assert_in_order(dataset)
    found = pl.scan_delta(str(dataset.store.path("features"))).filter(pl.col("layer") == "map").collect()
    assert found.select("scan_id", "site").rows() == [("a", "A/B ü%=1")]


def test_a_missing_file_stops_the_commit_before_anything_is_visible(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    lost = receipt(dataset, decoded("a", 1))
    dataset.store.delete([f"features/{lost.files[0].path}"])
    with pytest.raises(FileNotFoundError, match="nothing was committed"):
        committer.commit([lost])
    assert len(dataset.read_scans(("scan_id",))) == 0


def test_a_damaged_file_in_the_way_names_the_command_that_mends(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    dataset.store.delete(sorted(live(dataset))[:1])
    with pytest.raises(FeatrayError, match="featray verify"):
        committer.commit([receipt(dataset, decoded("a", 3))])
    assert statuses(dataset) == {"a": "ok", "b": "ok"}


def test_an_output_partitioned_otherwise_is_refused(dataset: Dataset) -> None:
    committer_of(dataset)
    with pytest.raises(ConfigError, match="partitioned by"):
        Committer(dataset, ("layer", "site"), ["site"], run_id=RUN)


# Kills


def steps_until_killed(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch, kill_at: int) -> bool:
    """Run `work` and kill it at its n-th step; return whether it came to that step."""
    steps = itertools.count()

    def step(original: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            if before and next(steps) == kill_at:
                raise Killed
            result = original(*args, **kwargs)
            if not before and next(steps) == kill_at:
                raise Killed
            return result

        return stepping

    with monkeypatch.context() as patch:
        patch.setattr(TableLog, "append", step(step(TableLog.append, True), False))
        patch.setattr(Store, "delete", step(Store.delete, True))
        patch.setattr(Dataset, "write_file", step(Dataset.write_file, False))
        try:
            work()
        except Killed:
            return True
    return False


CHANGES: dict[str, Callable[[Committer, Dataset], None]] = {
    "new": lambda c, d: c.commit([receipt(d, decoded("new", 5))]),
    "replaced": lambda c, d: c.commit([receipt(d, decoded("a", 5), decoded("c", 6))]),
    "failing": lambda c, d: c.commit([failed("a"), failed("x")]),
    "mixed": lambda c, d: c.commit(
        [failed("a"), receipt(d, decoded("b", 5), decoded("new", 6)), failed("y")]
    ),
    "forgotten": lambda c, d: c.delete_scans(["a", "x"]),
    "compacted": lambda c, d: c.compact(2) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_step_of_any_change_leaves_both_tables_in_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for kill_at in itertools.count():
        dataset = Dataset(Store(str(tmp_path / f"out{kill_at}")))
        committer = committer_of(dataset)
        committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2)), failed("x")])
        committer.commit([receipt(dataset, decoded("c", 3)), failed("y")])
        before = values(dataset), statuses(dataset)
        killed = steps_until_killed(lambda: CHANGES[change](committer, dataset), monkeypatch, kill_at)  # noqa: B023  # called at once
        seen = values(dataset), statuses(dataset)
        assert seen[0].keys() == {scan for scan, status in seen[1].items() if status == "ok"}
        after = committer_of(dataset, LATER)
        assert (values(dataset), statuses(dataset)) == seen, "mending changed what readers see"
        after.delete_orphans()
        assert_in_order(dataset)
        if not killed:
            assert kill_at > 3
            assert change == "compacted" or seen != before
            return


def test_readers_of_the_log_alone_never_see_an_ok_scan_without_its_rows(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = committer_of(dataset)
    original, moments = TableLog.append, []

    def watched(self: TableLog, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tables = [pl.scan_delta(str(dataset.store.path(table))).collect() for table in (FEATURES, SCANS)]
        ok = set(tables[1].filter(pl.col("status") == "ok")["scan_id"])
        moments.append(ok <= set(tables[0]["scan_id"]))

    monkeypatch.setattr(TableLog, "append", watched)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    committer.commit([failed("a"), receipt(dataset, decoded("b", 3), decoded("c", 4))])
    committer.delete_scans(["b"])
    assert moments == [True] * 8


def test_files_of_a_killed_writer_are_invisible_and_go_at_the_next_start(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1))])
    receipt(dataset, decoded("lost", 9))
    dataset.store.write(f"features/layer=map/part-{RUN}-0123456789abcdef.parquet.{'0' * 32}.tmp", b"half")
    dataset.store.write(f"runs/{RUN}/run.json.{'0' * 32}.tmp", b"half")
    dataset.store.write("features/_delta_log/_commit_1234.json.tmp", b"half")
    assert "lost" not in values(dataset)
    assert len(committer_of(dataset, LATER).delete_orphans()) == 5
    assert_in_order(dataset)


def test_files_that_no_run_writes_are_left_alone(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    committer.commit([receipt(dataset, decoded("a", 1))])
    foreign = ["features/notes.txt", "features/layer=map/mine.parquet", "scans/part-mine.parquet"]
    for name in foreign:
        dataset.store.write(name, b"mine")
    assert committer.delete_orphans() == []
    assert all(dataset.store.get_size(name) == 4 for name in foreign)


# Two drivers


def test_a_second_driver_that_planned_on_the_same_version_cannot_commit(dataset: Dataset) -> None:
    committer_of(dataset)
    first, second = committer_of(dataset), committer_of(dataset, LATER)
    first.commit([receipt(dataset, decoded("a", 1))])
    with pytest.raises(OutputBusyError, match="another run"):
        second.commit([receipt(dataset, decoded("a", 5))])
    assert values(dataset) == {"a": 1}


def test_a_driver_that_lost_its_lease_commits_and_deletes_nothing(dataset: Dataset) -> None:
    is_lost = False

    def check_lease() -> None:
        if is_lost:
            raise OutputBusyError("taken over")

    committer = committer_of(dataset, check_lease=check_lease)
    committer.commit([receipt(dataset, decoded("a", 1))])
    fresh = receipt(dataset, decoded("b", 2))
    before, is_lost = on_disk(dataset), True
    for work in (
        lambda: committer.commit([fresh]),
        committer.delete_orphans,
        lambda: committer.delete_scans(["a"]),
    ):
        with pytest.raises(OutputBusyError):
            work()
    assert (on_disk(dataset), values(dataset)) == (before, {"a": 1})


def test_a_driver_that_slept_until_its_log_entries_were_trimmed_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_log, "MIN_LOG_ENTRIES", 10)
    asleep = committer_of(dataset)
    awake = committer_of(dataset, LATER)
    for n in range(120):
        awake.commit([failed(f"s{n:03}")])
    with pytest.raises(OutputBusyError):
        asleep.commit([receipt(dataset, decoded("a", 1))])
    assert len(statuses(dataset)) == 120


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake import DeltaTable

    original, calls = DeltaTable.create_write_transaction, []

    def unheard(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(self)
        raise OSError("connection reset")

    committer = committer_of(dataset)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", unheard)
    committer.commit([receipt(dataset, decoded("a", 1))])
    monkeypatch.undo()
    committer.commit([receipt(dataset, decoded("b", 2))])
    assert len(calls) == 2
    assert values(dataset) == {"a": 1, "b": 2}


@pytest.mark.parametrize("arrives", [False, True], ids=["it never arrives", "it arrives late"])
def test_a_commit_whose_connection_broke_is_made_again_and_counts_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    from deltalake import DeltaTable

    original, looked = DeltaTable.create_write_transaction, TableLog._is_entry_written
    calls, late = [], []

    def broken_once(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            if arrives:
                late.append(lambda: original(self, *args, **kwargs))
            raise OSError("Error performing PUT: connection error: Connection reset by peer (os error 104)")
        original(self, *args, **kwargs)

    def then_it_arrives(self: TableLog, *args: Any) -> bool:
        found = looked(self, *args)
        while late:
            late.pop()()
        return found

    committer = committer_of(dataset)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", broken_once)
    monkeypatch.setattr(TableLog, "_is_entry_written", then_it_arrives)
    committer.commit([receipt(dataset, decoded("a", 1))])
    monkeypatch.undo()
    assert len(calls) == 3, "features twice, scans once"
    committer.commit([receipt(dataset, decoded("b", 2))])
    assert values(dataset) == {"a": 1, "b": 2}
    assert dataset.open_snapshot().version == 2


@pytest.mark.parametrize("arrives", [False, True], ids=["it never arrives", "only the answer is lost"])
@pytest.mark.parametrize("method", ["add_columns", "set_table_properties"])
def test_a_table_is_altered_once_though_the_connection_breaks(
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

    committer_of(dataset)
    log = TableLog.open(dataset.store, SCANS)
    assert log is not None
    monkeypatch.setattr(TableAlterer, method, broken_once)
    change = {
        "add_columns": lambda: log.add_columns(["site"]),
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


def test_a_table_that_cannot_be_altered_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalake.exceptions import DeltaError
    from deltalake.table import TableAlterer

    def broken(self: TableAlterer, *args: Any) -> None:
        raise DeltaError("https://user:SECRET@host refused")

    committer_of(dataset)
    monkeypatch.setattr(TableAlterer, "set_table_properties", broken)
    with pytest.raises(StorageError, match=r"^features cannot be changed \(DeltaError\)$"):
        committer_of(dataset, keep_versions_days=1)


def test_a_commit_that_did_not_arrive_says_so_and_can_be_repeated(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake import DeltaTable

    def broken(self: DeltaTable, *args: Any, **kwargs: Any) -> None:
        raise OSError("https://user:SECRET@host refused")

    committer, fresh = committer_of(dataset), receipt(dataset, decoded("a", 1))
    monkeypatch.setattr(DeltaTable, "create_write_transaction", broken)
    with pytest.raises(FeatrayError) as caught:
        committer.commit([fresh])
    assert "SECRET" not in str(caught.value)
    monkeypatch.undo()
    committer.commit([fresh])
    assert values(dataset) == {"a": 1}


# Versions, compaction, logs


def test_with_versions_kept_an_older_version_can_be_read_until_it_is_too_old(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = committer_of(dataset, keep_versions_days=1)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    earlier = dataset.open_snapshot()
    committer.commit([failed("x")])
    committer.commit([receipt(dataset, decoded("a", 9))])
    committer.delete_scans(["b"])
    assert committer.delete_orphans() == []
    assert vacuum(dataset).deleted == 0

    again = dataset.open_snapshot(earlier.version)
    rows = again.read(FEATURES, ("scan_id", "feature"), pads.field("layer") == "z_mean").to_pylist()
    assert {row["scan_id"]: row["feature"][0] for row in rows} == {"a": 1, "b": 2}
    assert again.read_scans(("scan_id",))["scan_id"].to_pylist() == ["a", "b"]
    assert values(dataset) == {"a": 9}

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 24 * 3600)
    assert vacuum(dataset).deleted > 0
    assert_in_order(dataset)


def test_a_version_that_is_gone_says_how_long_versions_are_kept(dataset: Dataset) -> None:
    committer_of(dataset).commit([receipt(dataset, decoded("a", 1))])
    with pytest.raises(ConfigError, match=r"no version 99.*kept for 0 days"):
        dataset.open_snapshot(99)


def test_the_keeping_of_versions_can_be_changed_later(dataset: Dataset) -> None:
    committer_of(dataset)
    assert dataset.open_snapshot().retention_days == 0
    committer_of(dataset, keep_versions_days=2.5)
    assert dataset.open_snapshot().retention_days == 2.5
    before = dataset.open_snapshot().versions
    committer_of(dataset, keep_versions_days=2.5)
    assert dataset.open_snapshot().versions == before
    committer_of(dataset, keep_versions_days=0)
    assert dataset.open_snapshot().retention_days == 0


def test_compaction_moves_rows_and_changes_none(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    for n in range(12):
        committer.commit([receipt(dataset, decoded(f"s{n:02}", n, patches=2))])
    before = sorted(map(str, dataset.read(FEATURES).to_pylist()))
    assert len(live(dataset)) == 24
    assert committer.compact() == 0, "not worth it yet"
    assert committer.compact(at_least=2) == 22
    assert len(live(dataset)) == 2
    assert sorted(map(str, dataset.read(FEATURES).to_pylist())) == before
    assert_in_order(dataset)
    assert committer.compact(at_least=2) == 0


def test_compaction_keeps_partitions_and_the_size_of_files(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "TARGET_FILE_BYTES", 12_000)
    by = ("layer", "site")
    committer = Committer(dataset, by, ["site"], run_id=RUN)
    for n in range(16):
        scan = decoded(f"s{n:02}", n)
        scan.record.columns["site"] = "AB"[n % 2]
        committer.commit([receipt(dataset, scan, partition_by=by)])
    committer.compact(at_least=2)
    sizes = [file.size for file in dataset.open_snapshot().files(FEATURES)]
    assert 4 < len(sizes) < 32
    assert max(sizes) < 12_000
    found = pl.scan_delta(str(dataset.store.path("features"))).collect()
    assert len(found) == 32
    assert set(found.filter(pl.col("site") == "B")["scan_id"]) == {f"s{n:02}" for n in range(1, 16, 2)}


def test_the_ledger_stays_in_few_files_and_its_log_is_trimmed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_log, "MIN_LOG_ENTRIES", 50)
    committer = committer_of(dataset)
    for n in range(305):
        committer.commit([failed(f"s{n:04}")])
    assert len(statuses(dataset)) == 305
    assert len(live(dataset, SCANS)) <= 9
    for table in (FEATURES, SCANS):
        assert (
            len([name for name in dataset.store.list_files(f"{table}/_delta_log") if name.endswith("json")])
            < 210
        )
    assert_in_order(dataset)


def test_vacuum_tidies_what_runs_left_and_says_so(dataset: Dataset) -> None:
    committer = committer_of(dataset)
    for n in range(3):
        committer.commit([receipt(dataset, decoded(f"s{n}", n))])
    receipt(dataset, decoded("lost", 9))
    found = vacuum(dataset)
    assert (found.deleted, found.merged) == (2, 4)
    assert "deleted 2 files" in found.text()
    assert vacuum(dataset).text() == "nothing to tidy"
    assert_in_order(dataset)


def test_what_a_commit_says_of_itself_holds_no_row(dataset: Dataset) -> None:
    committer_of(dataset).commit([receipt(dataset, decoded("a", 1))])
    entry = json.loads(dataset.store.read("features/_delta_log/00000000000000000001.json").splitlines()[0])
    assert entry["commitInfo"]["featray"].keys() == {"number", "run_id", "owes"}
