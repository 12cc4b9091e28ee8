"""`featray verify`: each fault, really planted, is found, named and mended, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import featray
from featray.cli.main import main
from featray.commands.verify import Kind, Verification, data_file, verify
from featray.commands.verify.read_scans import covered, join
from featray.errors import ConfigError, OutputBusyError, Reason, ScanError, StorageError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import FileChange, TableLog
from featray.schema import DataFile, Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LATER = "20260102T000000000-abcdef"
LAYERS = ("z_mean", "map")
Change = Callable[[pa.Table], pa.Table]


def record(scan_id: str, recipe: str = "r0", run_id: str = RUN) -> ScanRecord:
    site = "north" if scan_id < "c" else ""
    return ScanRecord(scan_id, f"/data/{scan_id}", "nifti", "c0", recipe, run_id, columns={"site": site})


def decoded(scan_id: str, value: float, patches: int = 1, **more: str) -> Decoded:
    tensor = np.full((patches, 2, 2, 2), value, np.float32)
    return Decoded(record(scan_id, **more), tensor, np.zeros((patches, 3), np.int32))


def layers_of(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Stand in for a model: two layers whose values say which input they came from."""
    first = batch[:, 0, 0, 0]
    return {"z_mean": np.stack([first, first + 1], axis=1), "map": np.tile(first[:, None, None], (1, 2, 3))}


def receipt(
    dataset: Dataset,
    *scans: Decoded,
    run_id: str = RUN,
    recipe: str = "r0",
    extractor: Any = layers_of,
    partition_by: Sequence[str] = ("layer",),
) -> Receipt:
    return write(extract(extractor, scans), dataset, partition_by, recipe, run_id)


def failed(scan_id: str, status: str = "failed") -> ScanRecord:
    row = record(scan_id)
    row.fail("read", ScanError(Reason.EMPTY, "the file is empty"))
    row.status = status  # type: ignore[assignment]
    return row


def fill(dataset: Dataset, partition_by: Sequence[str] = ("layer",)) -> None:
    """Commit a and b in one file per layer, c with two patches, d, which failed, and e, left out."""
    committer = Committer(dataset, partition_by, ["site"], run_id=RUN)
    for scans in ((decoded("b", 2), decoded("a", 1)), (decoded("c", 3, patches=2),)):
        committer.commit([receipt(dataset, *scans, partition_by=partition_by)])
    committer.commit([Receipt((), (failed("d"), failed("e", "excluded")))])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(Store(str(tmp_path / "out")))
    fill(made)
    return made


def write_run(dataset: Dataset, size: list[int] | None, layers: Sequence[str] = LAYERS) -> None:
    """Leave the file that a run leaves at its end."""
    run = {"recipe_id": "r0", "layers": layers, "config": {"preprocess": {"size": size}}}
    dataset.store.write(f"runs/{RUN}/run.json", json.dumps(run).encode())


def the_file(dataset: Dataset, table: str, scan_id: str, layer: str | None = None) -> DataFile:
    """Return the file that holds a scan (of a layer)."""
    snapshot = dataset.open_snapshot()
    (found,) = (
        file
        for file in snapshot.files(table)
        if file.partition_values.get("layer") == layer
        and scan_id in snapshot.read(table, ["scan_id"], files=[file])["scan_id"].to_pylist()
    )
    return found


def log_change(dataset: Dataset, table: str, add: Sequence[DataFile], remove: Sequence[DataFile]) -> None:
    """Make the log say something, in a commit as any other."""
    for name in (FEATURES, SCANS):
        log = TableLog.open(dataset.store, name)
        assert log is not None
        change = FileChange(tuple(add), tuple(remove)) if name == table else FileChange()
        log.append(change, log.commit_number + 1, LATER)
    dataset.store.delete([f"{table}/{file.path}" for file in remove])


def rewrite(
    dataset: Dataset, table: str, scan_id: str, change: Change, layer: str | None = None, **stats: Any
) -> None:
    """Replace the file that holds a scan by one with other rows; `stats` is what the log says of it."""
    file = the_file(dataset, table, scan_id, layer)
    rows = pq.read_table(dataset.store.path(f"{table}/{file.path}"), partitioning=None)
    new = dataset.write_file(table, file.partition_values, change(rows), LATER)
    log_change(dataset, table, [replace(new, **stats)], [file])


def setting(column: str, scan_id: str, value: Any, patch: int | None = None) -> Change:
    """Return a change that sets a column's value in the rows of a scan."""

    def change(rows: pa.Table) -> pa.Table:
        hit = pc.equal(rows["scan_id"], scan_id)
        if patch is not None:
            hit = pc.and_(hit, pc.equal(rows["patch"], patch))
        pairs = zip(rows[column].to_pylist(), hit.to_pylist(), strict=True)
        values = pa.array([value if is_hit else old for old, is_hit in pairs], rows.schema.field(column).type)
        return rows.set_column(rows.column_names.index(column), rows.schema.field(column), values)

    return change


def without(scan_id: str, patch: int | None = None) -> Change:
    def change(rows: pa.Table) -> pa.Table:
        hit = pc.equal(rows["scan_id"], scan_id)
        return rows.filter(pc.invert(hit if patch is None else pc.and_(hit, pc.equal(rows["patch"], patch))))

    return change


def again(scan_id: str, **changed: Any) -> Change:
    """Return a change that adds a scan's first row once more, with other values."""

    def change(rows: pa.Table) -> pa.Table:
        (row,) = rows.filter(pc.equal(rows["scan_id"], scan_id)).slice(0, 1).to_pylist()
        return pa.concat_tables([rows, pa.Table.from_pylist([{**row, **changed}], rows.schema)])

    return change


def retyped(column: str, kind: pa.DataType) -> Change:
    return lambda rows: rows.set_column(
        rows.column_names.index(column), column, rows[column].combine_chunks().cast(kind)
    )


def path_of(dataset: Dataset, table: str, scan_id: str, layer: str | None = None) -> Path:
    return Path(dataset.store.path(f"{table}/{the_file(dataset, table, scan_id, layer).path}"))


def contents(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of both tables."""
    snapshot = dataset.open_snapshot()
    keys = {FEATURES: ("scan_id", "layer", "patch"), SCANS: ("scan_id",)}
    return {
        table: sorted(snapshot.read(table).to_pylist(), key=lambda row: [row[k] for k in keys[table]])
        for table in keys
    }


def kinds(found: Verification) -> dict[str, set[str]]:
    """Return the scans of each kind that was found, over all layers."""
    return {kind: {i for f in found.findings if f.kind == kind for i in f.scan_ids} for kind in
            {str(f.kind) for f in found.findings}}  # fmt: skip


# What is planted


def lose_file(dataset: Dataset) -> None:
    path_of(dataset, FEATURES, "a", "map").unlink()


def cut_file(dataset: Dataset) -> None:
    path = path_of(dataset, FEATURES, "a", "map")
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(dataset: Dataset) -> None:
    path = path_of(dataset, FEATURES, "a", "map")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def write_no_parquet(dataset: Dataset) -> None:
    old, data = the_file(dataset, FEATURES, "a", "map"), b"PAR1 this is not Parquet PAR1"
    path = f"layer=map/part-{LATER}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    dataset.store.write(f"{FEATURES}/{path}", data)
    log_change(dataset, FEATURES, [DataFile(path, len(data), {"layer": "map"}, 2, "a", "b")], [old])


def lose_ledger_file(dataset: Dataset) -> None:
    path_of(dataset, SCANS, "a").unlink()


def cut_ledger_file(dataset: Dataset) -> None:
    path = path_of(dataset, SCANS, "a")
    path.write_bytes(path.read_bytes()[:200])


def double_in_another_file(dataset: Dataset) -> None:
    file = the_file(dataset, FEATURES, "a", "map")
    rows = pq.read_table(dataset.store.path(f"{FEATURES}/{file.path}"), partitioning=None)
    log_change(dataset, FEATURES, [dataset.write_file(FEATURES, file.partition_values, rows, LATER)], [])


def empty_all_layers(dataset: Dataset) -> None:
    for layer in LAYERS:
        rewrite(dataset, FEATURES, "a", without("a"), layer)


def move_to_another_folder(dataset: Dataset) -> None:
    old = the_file(dataset, FEATURES, "a", "map")
    moved = old.path.replace("layer=map", "layer=z_mean")
    data = dataset.store.read(f"{FEATURES}/{old.path}")
    dataset.store.write(f"{FEATURES}/{moved}", data)
    file = DataFile(moved, old.size, old.partition_values, old.rows, old.min_id, old.max_id)
    log_change(dataset, FEATURES, [file], [old])


@dataclass(frozen=True)
class Case:
    """One planted fault: its id, what plants it, what must be found of which scans.

    `lost` are scans without features whose ledger rows go with a broken file; nothing can name them.
    """

    id: str
    plant: Callable[[Dataset], None]
    found: dict[str, set[str]]
    lost: frozenset[str] = frozenset()


def features(
    change: Change, scan_id: str = "b", layer: str = "z_mean", **stats: Any
) -> Callable[[Dataset], None]:
    return lambda dataset: rewrite(dataset, FEATURES, scan_id, change, layer, **stats)


def ledger(change: Change, scan_id: str = "a", **stats: Any) -> Callable[[Dataset], None]:
    return lambda dataset: rewrite(dataset, SCANS, scan_id, change, **stats)


REST = frozenset({"d", "e"})
CASES = [
    Case("a file is missing", lose_file, {"missing_file": {"a", "b"}}),
    Case("a file is cut", cut_file, {"truncated_file": {"a", "b"}}),
    Case("a byte is another", change_a_byte, {"changed_file": {"a", "b"}}),
    Case("a file is no Parquet", write_no_parquet, {"unreadable_file": {"a", "b"}}),
    Case("a ledger file is missing", lose_ledger_file, {"missing_file": {"a", "b", "c"}}, REST),
    Case("a ledger file is cut", cut_ledger_file, {"truncated_file": {"a", "b", "c"}}, REST),
    Case("the log says another number of rows", features(again("b", patch=0), rows=9),
         {"wrong_row_count": {"a", "b"}, "doubled_row": {"b"}}),
    Case("the log says other ids", features(setting("feature", "b", [7.0, 8.0]), max_id="aa"),
         {"wrong_id_range": {"a", "b"}}),
    Case("the log says nothing of a file", features(again("b", patch=0), rows=None, min_id=None, max_id=None),
         {"wrong_row_count": {"a", "b"}, "wrong_id_range": {"a", "b"}, "doubled_row": {"b"}}),
    Case("a row is twice in a file", features(again("b")), {"doubled_row": {"b"}}),
    Case("rows are in two files", double_in_another_file, {"doubled_row": {"a", "b"}}),
    Case("a ledger row is doubled", ledger(again("b")), {"doubled_row": {"b"}}),
    Case("a patch is missing", features(without("c", patch=1), "c"), {"missing_patch": {"c"}}),
    Case("a layer is missing for one scan", features(without("a"), "a"), {"missing_patch": {"a"}}),
    Case("a patch more than promised", features(again("c", patch=2), "c"), {"surplus_patch": {"c"}}),
    Case("a negative patch", features(setting("patch", "a", -1), "a"),
         {"surplus_patch": {"a"}, "missing_patch": {"a"}}),
    Case("a value short", features(setting("feature", "b", [1.0])), {"wrong_width": {"b"}}),
    Case("NaN", features(setting("feature", "b", [1.0, float("nan")])), {"not_finite": {"b"}}),
    Case("infinity", features(setting("feature", "c", [float("inf"), 1.0], patch=1), "c"),
         {"not_finite": {"c"}}),
    Case("a value is null", features(setting("feature", "b", [1.0, None])),
         {"null_value": {"b"}, "missing_patch": {"b"}}),
    Case("a shape is null", features(setting("shape", "b", None)),
         {"null_value": {"b"}, "missing_patch": {"b"}}),
    Case("a row without scan_id", features(setting("scan_id", "b", None), max_id="a"),
         {"null_value": {"a"}, "missing_patch": {"b"}}),
    Case("ok without features", empty_all_layers, {"ledger_without_features": {"a"}}),
    Case("features without a row", ledger(without("a")), {"features_without_ledger": {"a"}}),
    Case("features of a failed scan",
         ledger(lambda rows: setting("status", "b", "failed")(setting("patches", "b", 0)(rows))),
         {"features_without_ledger": {"b"}, "wrong_state": {"b"}}),
    Case("another recipe", features(setting("recipe", "b", "r9")), {"other_recipe": {"b"}}),
    Case("another run", features(setting("run_id", "b", LATER)), {"other_run": {"b"}}),
    Case("more patches promised", ledger(setting("patches", "b", 2)), {"missing_patch": {"b"}}),
    Case("an absurd number of patches promised", ledger(setting("patches", "b", 2**31 - 1)),
         {"missing_patch": {"b"}}),
    Case("ok with no patch", ledger(setting("patches", "b", 0)),
         {"wrong_state": {"b"}, "surplus_patch": {"b"}}),
    Case("ok with a reason", ledger(setting("reason", "b", "empty")), {"wrong_state": {"b"}}),
    Case("failed without a reason", ledger(setting("reason", "d", None), "d"), {"wrong_state": {"d"}}),
    Case("failed with patches", ledger(setting("patches", "d", 1), "d"), {"wrong_state": {"d"}}),
    Case("an unknown reason", ledger(setting("reason", "d", "bad_luck"), "d"), {"unknown_code": {"d"}}),
    Case("an unknown warning", ledger(setting("warnings", "b", ["oblique", "hm"])), {"unknown_code": {"b"}}),
    Case("an unknown status", ledger(setting("status", "d", "done"), "d"),
         {"unknown_code": {"d"}, "books": {"d"}}),
    Case("a column of the ledger is null", ledger(setting("content", "b", None)), {"null_value": {"b"}}),
    Case("a type is another", features(retyped("patch", pa.int64())), {"wrong_schema": {"a", "b"}}),
    Case("fixed-size lists", features(retyped("feature", pa.list_(pa.float32(), 2))),
         {"wrong_schema": {"a", "b"}}),
    Case("a column is missing", features(lambda rows: rows.drop_columns("origin")),
         {"wrong_schema": {"a", "b"}}),
    Case("a column too many", features(lambda rows: rows.append_column("more", rows["patch"])),
         {"wrong_schema": {"a", "b"}}),
    Case("the ledger lacks a column", ledger(lambda rows: rows.drop_columns("uri")),
         {"wrong_schema": {"a", "b", "c"}}, REST),
    Case("another folder", move_to_another_folder, {"wrong_partition": {"a", "b"}}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_planted_fault_is_found_and_what_mends_it_touches_nothing_else(
    case: Case, dataset: Dataset
) -> None:
    before = contents(dataset)
    case.plant(dataset)
    found = verify(dataset)
    assert kinds(found) == case.found
    assert found.exit_code == 3
    assert all("--forget-damaged" in finding.mend for finding in found.findings)
    again = verify(dataset, forget_damaged=True)
    assert (again.findings, again.exit_code) == ((), 0), again.text()
    assert verify(dataset).findings == ()
    gone = set.union(*case.found.values()) | case.lost
    after = contents(dataset)
    for table, rows in before.items():
        left = {row["scan_id"] for row in after[table]}
        assert not left & gone
        assert [row for row in after[table] if row["scan_id"] in left] == [
            row for row in rows if row["scan_id"] not in gone
        ]


def test_ids_are_found_and_ranges_covered_as_a_plain_search_would() -> None:
    rng = np.random.default_rng(5)
    texts = sorted({f"{number:b}" for number in rng.integers(1, 400, 150)})
    ids, files = pa.array(texts, pa.large_string()), []
    for _ in range(6):
        first, last = sorted(f"{number:b}" for number in rng.integers(1, 400, 2))
        files.append(DataFile("", 0, {}, 0, first, last))
    expected = [any(f.min_id <= text <= f.max_id for f in files[:3]) for text in texts]
    assert covered(ids, files[:3]).tolist() == expected
    assert not covered(ids, []).any()
    assert covered(ids[:0], files).tolist() == []
    rows = pa.table({"scan_id": texts, "status": ["ok"] * len(texts), "recipe": texts, "run_id": texts})
    rows = rows.append_column("patches", pa.array([1] * len(texts), pa.int32()))
    whole, _ = join([rows.take(pa.array(rng.permutation(len(texts))))], [])
    wanted = [*texts[::3], "", "2", "1000000000000"]
    assert whole.find(pa.array(wanted)).tolist() == [
        texts.index(text) if text in texts else -1 for text in wanted
    ]


def test_an_output_as_runs_leave_it_has_no_finding(dataset: Dataset) -> None:
    write_run(dataset, [2, 2, 2])
    found = verify(dataset)
    assert (found.findings, found.notes, found.exit_code) == ((), (), 0)
    assert found.scans == {"ok": 3, "failed": 1, "excluded": 1}
    assert found.rows == {"z_mean": 4, "map": 4}
    assert "everything is in order" in found.text()


def test_verifying_writes_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a reader wrote")

    for name in ("write", "create", "delete"):
        monkeypatch.setattr(Store, name, refuse)
    root = Path(dataset.store.root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert verify(dataset).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_layer_whose_last_file_is_lost_is_not_forgotten_with_it(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    Committer(dataset, ("layer",), run_id=RUN).commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    lose_file(dataset)
    assert kinds(verify(dataset)) == {"missing_file": {"a", "b"}}
    assert verify(dataset, forget_damaged=True).exit_code == 0
    assert contents(dataset) == {FEATURES: [], SCANS: []}, "else no run would make the layer again"


def test_a_layer_that_a_run_promised_and_nobody_has_is_missing(dataset: Dataset) -> None:
    write_run(dataset, None, (*LAYERS, "third"))
    (finding,) = verify(dataset).findings
    assert (finding.kind, finding.layer, finding.scan_ids) == ("missing_patch", "third", ("a", "b", "c"))


def test_shapes_may_differ_only_where_inputs_do(dataset: Dataset) -> None:
    rewrite(dataset, FEATURES, "b", setting("shape", "b", [2, 1]), "z_mean")
    write_run(dataset, None)
    assert verify(dataset).findings == ()
    write_run(dataset, [2, 2, 2])
    found = verify(dataset)
    assert kinds(found) == {"uneven_shape": {"b"}}
    assert "(2, 1), others have (2,)" in found.findings[0].message
    assert verify(dataset, forget_damaged=True).exit_code == 0


def test_two_recipes_side_by_side_are_in_order_each_with_its_layers(dataset: Dataset) -> None:
    def one_layer(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        return {"other": batch[:, 0, 0]}

    scan = decoded("f", 1, recipe="r1", run_id=LATER)
    made = receipt(dataset, scan, run_id=LATER, recipe="r1", extractor=one_layer)
    Committer(dataset, ("layer",), ["site"], run_id=LATER).commit([made])
    assert verify(dataset).findings == ()


def test_further_partitions_are_compared_with_the_scans(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    fill(dataset, ("layer", "site"))
    assert verify(dataset).findings == (), "no value and an empty one are one partition"
    rewrite(dataset, SCANS, "b", setting("site", "b", "south"))
    assert kinds(verify(dataset)) == {"wrong_partition": {"b"}}
    assert verify(dataset, forget_damaged=True).exit_code == 0


def test_any_changed_byte_of_any_file_is_found(dataset: Dataset) -> None:
    rng = np.random.default_rng(3)
    paths = [
        Path(dataset.store.path(f"{t}/{f.path}"))
        for t in (FEATURES, SCANS)
        for f in dataset.open_snapshot().files(t)
    ]
    for path in paths:
        whole = path.read_bytes()
        for at in rng.integers(len(whole), size=4):
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            found = verify(dataset)
            assert {finding.kind for finding in found.findings} == {Kind.CHANGED_FILE}
        path.write_bytes(whole)
    assert verify(dataset).findings == ()


def test_all_that_is_wrong_is_reported_at_once(dataset: Dataset) -> None:
    rewrite(dataset, FEATURES, "c", setting("feature", "c", [float("nan"), 1.0]), "z_mean")
    rewrite(dataset, SCANS, "d", setting("reason", "d", "bad_luck"))
    lose_file(dataset)
    found = verify(dataset)
    assert kinds(found) == {"missing_file": {"a", "b"}, "not_finite": {"c"}, "unknown_code": {"d"}}
    assert [finding.kind for finding in found.findings] == ["missing_file", "unknown_code", "not_finite"]


def test_files_that_the_store_does_not_give_are_not_taken_for_lost(dataset: Dataset) -> None:
    path = path_of(dataset, FEATURES, "a", "map")
    path.unlink()
    path.mkdir()
    found = verify(dataset)
    assert kinds(found) == {"no_access": {"a", "b"}}
    assert "verify again" in found.findings[0].mend
    assert verify(dataset, forget_damaged=True).exit_code == 3
    rewrite(dataset, FEATURES, "c", setting("feature", "c", [float("nan"), 1.0]), "z_mean")
    refused = verify(dataset, forget_damaged=True)
    assert refused.exit_code == 3
    assert "nothing was taken out" in refused.mended[0]
    assert len(contents_of_scans(dataset)) == 5, "a store that refuses for a while must cost no scan"
    path.rmdir()
    assert verify(dataset, forget_damaged=True).exit_code == 0
    assert contents_of_scans(dataset) == ["d", "e"]


def contents_of_scans(dataset: Dataset) -> list[str]:
    return sorted(dataset.read_scans(("scan_id",))["scan_id"].to_pylist())


def test_a_store_that_does_not_answer_is_no_finding(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: Store, name: str) -> Any:
        raise StorageError("the store does not answer")

    monkeypatch.setattr(Store, "read", silent)
    monkeypatch.setattr(Store, "get_size", silent)
    with pytest.raises(StorageError):
        verify(dataset)


def test_orphans_are_found_and_repaired_and_foreign_files_are_left(dataset: Dataset) -> None:
    before = contents(dataset)
    lost = receipt(dataset, decoded("x", 9))
    store = dataset.store
    half = f"features/{lost.files[0].path}.{'0' * 32}.tmp"
    store.write(half, b"half a file")
    store.write("scans/_delta_log/_commit_1234.json.tmp", b"half an entry")
    store.write("features/layer=map/notes.parquet", b"mine")
    store.write("features/_SUCCESS", b"")
    found = verify(dataset)
    assert {(finding.kind, finding.table, finding.files) for finding in found.findings} == {
        ("orphan", "features", 3),
        ("orphan", "scans", 1),
        ("foreign_file", "features", 1),
    }
    assert any("features/_SUCCESS" in note for note in found.notes)
    by_kind = {finding.kind: finding for finding in found.findings}
    assert "--repair" in by_kind[Kind.ORPHAN].mend
    repaired = verify(dataset, repair=True)
    assert [finding.kind for finding in repaired.findings] == ["foreign_file"]
    assert repaired.mended[0].startswith("deleted orphans: 4 (")
    assert store.get_size("features/layer=map/notes.parquet") == 4
    store.delete(["features/layer=map/notes.parquet"])
    assert verify(dataset).exit_code == 0
    assert contents(dataset) == before


def test_files_of_kept_versions_are_no_orphans(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    committer = Committer(dataset, ("layer",), run_id=RUN, keep_versions_days=7)
    committer.commit([receipt(dataset, decoded("a", 1), decoded("b", 2))])
    committer.commit([receipt(dataset, decoded("a", 5), run_id=LATER)])
    assert len(dataset.store.list_files("features/layer=map")) > 2
    assert {finding.kind for finding in verify(dataset).findings} <= {"other_run"}


def test_a_commit_cut_between_the_tables_is_a_note_and_the_repair_finishes_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = TableLog.append

    def killed(self: TableLog, *args: Any, **more: Any) -> None:
        if self.table == SCANS:
            raise KeyboardInterrupt
        append(self, *args, **more)

    committer = Committer(dataset, ("layer",), run_id=LATER)
    made = receipt(dataset, decoded("f", 6, run_id=LATER), run_id=LATER)
    monkeypatch.setattr(TableLog, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        committer.commit([made])
    monkeypatch.undo()
    found = verify(dataset)
    assert (found.findings, found.exit_code) == ((), 0)
    assert "cut between the two tables" in found.notes[0]
    repaired = verify(dataset, repair=True)
    assert (repaired.findings, repaired.notes) == ((), ())
    assert repaired.mended == ("finished a commit that a run was killed in",)
    assert "f" in contents_of_scans(dataset)


def test_tables_of_different_moments_are_a_finding(dataset: Dataset) -> None:
    for _ in range(2):
        log = TableLog.open(dataset.store, FEATURES)
        assert log is not None
        log.append(FileChange(), log.commit_number + 1, LATER)
    for found in (verify(dataset), verify(dataset, repair=True)):
        assert ([finding.kind for finding in found.findings], found.exit_code) == (["tables_apart"], 3)


@pytest.fixture
def held(dataset: Dataset) -> Any:
    """Let another process hold the output."""
    code = (
        "import sys\nfrom featray.output.lease import Lease\nfrom featray.storage.store import Store\n"
        "with Lease(Store(sys.argv[1]), 'other-run'):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, dataset.store.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.communicate()


@pytest.mark.usefixtures("held")
def test_an_output_that_a_run_holds_can_be_verified_but_not_mended(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt(dataset, decoded("x", 9))  # what the other run has just written
    found = verify(dataset)
    assert (found.findings, found.exit_code) == ((), 0)
    assert "orphans were not looked for" in found.notes[0]
    assert "other-run" in found.notes[0]
    with pytest.raises(OutputBusyError, match="other-run"):
        verify(dataset, repair=True)
    assert main(["verify", dataset.store.uri, "--forget-damaged"]) == 4
    assert "other-run" in capsys.readouterr().err


def test_a_run_that_replaces_files_while_they_are_read_is_no_fault(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, done = Store.read, []

    def read_late(self: Store, name: str) -> bytes:
        if name.startswith("features/layer=") and not done:
            done.append(name)
            made = receipt(dataset, decoded("a", 5, run_id=LATER), run_id=LATER)
            Committer(dataset, ("layer",), run_id=LATER).commit([made])
        return read(self, name)

    monkeypatch.setattr(Store, "read", read_late)
    monkeypatch.setattr(data_file, "THREADS", 1)
    found = verify(dataset)
    assert done
    assert found.findings == (), found.text()
    assert found.version == dataset.open_snapshot().version


def test_an_output_that_changes_all_the_time_is_busy(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, values, committing = Store.read, iter(range(100)), []

    def read_late(self: Store, name: str) -> bytes:
        if name.startswith("features/layer=map") and not committing:
            committing.append(name)  # which reads as well
            made = receipt(dataset, decoded("a", next(values), run_id=LATER), run_id=LATER)
            Committer(dataset, ("layer",), run_id=LATER).commit([made])
            committing.clear()
        return read(self, name)

    monkeypatch.setattr(Store, "read", read_late)
    monkeypatch.setattr(data_file, "THREADS", 1)
    with pytest.raises(OutputBusyError, match="faster than it can be read"):
        verify(dataset)


def test_the_command_line_says_it_all(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = dataset.store.uri
    assert main(["verify", output]) == 0
    assert "everything is in order" in capsys.readouterr().out
    lose_file(dataset)
    assert main(["verify", output, "--json"]) == 3
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    (finding,) = answer["findings"]
    assert finding["kind"] == "missing_file"
    assert (finding["table"], finding["layer"]) == ("features", "map")
    assert (finding["scans"], finding["scan_ids"], finding["files"]) == (2, ["a", "b"], 1)
    assert finding["paths"][0].startswith("features/layer=map/part-")
    assert answer["exit_code"] == 3
    assert main(["verify", output]) == 3
    text = capsys.readouterr().out
    assert "missing_file (features, layer map): the log names a file that the store does not have" in text
    assert "mend: `featray verify OUTPUT --forget-damaged`" in text
    assert main(["verify", output, "--repair"]) == 3, "a repair costs no scan"
    assert main(["verify", output, "--forget-damaged"]) == 0
    assert "took what is damaged out of both tables (scans: 2, files: 1)" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "is this a featray output?" in capsys.readouterr().err


def test_it_can_be_called_from_python(dataset: Dataset, tmp_path: Path) -> None:
    assert featray.verify(dataset.store.uri).exit_code == 0
    with pytest.raises(ConfigError, match="is this a featray output"):
        featray.verify(str(tmp_path / "nothing"))
