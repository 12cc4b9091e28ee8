"""Test `featray verify`: damage an output in many ways, and check the findings and the repair."""

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
from featray.commands.verify import FindingKind, Verification, data_file, verify
from featray.commands.verify.read_scans import ScansFile, can_be_in_files, join_files
from featray.errors import ConfigError, OutputBusyError, Reason, ScanError, StorageError
from featray.output.cells import CellColumn
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.output.file_change import FileChange
from featray.schema import DataFile, Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LATER = "20260102T000000000-abcdef"
LAYERS = ("z_mean", "map")
CELLS = {"map": "r0 of map", "z_mean": "r0 of z_mean"}
Change = Callable[[pa.Table], pa.Table]


def make_record(scan_id: str, recipe: str = "r0", run_id: str = RUN) -> ScanRecord:
    site = "north" if scan_id < "c" else ""
    return ScanRecord(
        scan_id,
        f"/data/{scan_id}",
        "nifti",
        content="c0",
        recipe=recipe,
        run_id=run_id,
        columns={"site": site},
    )


def make_decoded(scan_id: str, value: float, patches: int = 1, **more: str) -> Decoded:
    tensor = np.full((patches, 2, 2, 2), value, np.float32)
    return Decoded(make_record(scan_id, **more), tensor, np.zeros((patches, 3), np.int32))


def compute_layers(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute two layers in place of a model; the values identify the input."""
    first = batch[:, 0, 0, 0]
    return {"z_mean": np.stack([first, first + 1], axis=1), "map": np.tile(first[:, None, None], (1, 2, 3))}


def make_receipt(
    dataset: Dataset,
    *scans: Decoded,
    run_id: str = RUN,
    recipe: str = "r0",
    extractor: Any = compute_layers,
    partition_by: Sequence[str] = ("layer",),
) -> Receipt:
    extracted = extract(extractor, scans, recipe=recipe)
    layers = pc.unique(pc.list_flatten(extracted["features"]).combine_chunks().field("layer")).to_pylist()
    recipes = {layer: f"{recipe} of {layer}" for layer in layers}
    receipt = write(extracted, dataset, partition_by, recipes, run_id)
    receipt.set_run(recipe, recipes, run_id)
    return receipt


def make_failed_record(scan_id: str, status: str = "failed") -> ScanRecord:
    row = make_record(scan_id)
    row.fail("read", ScanError(Reason.EMPTY, "the file is empty"))
    row.status = status  # type: ignore[assignment]
    return row


def fill_output(dataset: Dataset, partition_by: Sequence[str] = ("layer",)) -> None:
    """Commit five scans: a and b in one file per layer, c with two patches, d as failed, e as excluded."""
    committer = Committer(dataset, partition_by, ["site"], run_id=RUN)
    for scans in ((make_decoded("b", 2), make_decoded("a", 1)), (make_decoded("c", 3, patches=2),)):
        committer.commit([make_receipt(dataset, *scans, partition_by=partition_by)])
    committer.commit([Receipt((), (make_failed_record("d"), make_failed_record("e", "excluded")))])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(Store(str(tmp_path / "out")))
    fill_output(dataset)
    return dataset


def write_run(dataset: Dataset, size: list[int] | None, layers: Sequence[str] = LAYERS, **more: Any) -> None:
    """Write the run.json that a run writes at its end; `more` are further values."""
    run = {"recipe_id": "r0", "layers": layers, "config": {"preprocess": {"size": size}}, **more}
    dataset.store.write(f"runs/{RUN}/run.json", json.dumps(run).encode())


def find_file(dataset: Dataset, table: str, scan_id: str, layer: str | None = None) -> DataFile:
    """Return the file that contains a scan, in `features` of the given layer."""
    snapshot = dataset.open_snapshot()
    (result,) = (
        file
        for file in snapshot.files(table)
        if file.partition_values.get("layer") == layer
        and scan_id in snapshot.read(table, ["scan_id"], files=[file])["scan_id"].to_pylist()
    )
    return result


def write_log_entry(
    dataset: Dataset, table: str, add: Sequence[DataFile], remove: Sequence[DataFile]
) -> None:
    """Add and remove files of one table in a commit, as a run does."""
    for name in (FEATURES, SCANS):
        log = TableLog.open(dataset.store, name)
        assert log is not None
        change = FileChange(tuple(add), tuple(remove)) if name == table else FileChange()
        log.append(change, log.commit_number + 1, LATER)
    dataset.store.delete([f"{table}/{file.path}" for file in remove])


def rewrite_file(
    dataset: Dataset, table: str, scan_id: str, change: Change, layer: str | None = None, **stats: Any
) -> None:
    """Replace the file of a scan by one with changed rows; `stats` override its entry in the log."""
    file = find_file(dataset, table, scan_id, layer)
    rows = pq.read_table(dataset.store.path(f"{table}/{file.path}"), partitioning=None)
    new = dataset.write_file(table, file.partition_values, change(rows), LATER)
    write_log_entry(dataset, table, [replace(new, **stats)], [file])


def select_rows(rows: pa.Table, scan_id: str, patch: int | None) -> pa.ChunkedArray:
    """Return which rows belong to a scan, or to one patch of it."""
    is_scan = pc.equal(rows["scan_id"], scan_id)
    return is_scan if patch is None else pc.and_(is_scan, pc.equal(rows["patch"], patch))


def set_value(column: str, scan_id: str, value: Any, patch: int | None = None) -> Change:
    """Return a change that sets the value of a column in the rows of a scan."""

    def change(rows: pa.Table) -> pa.Table:
        pairs = zip(rows[column].to_pylist(), select_rows(rows, scan_id, patch).to_pylist(), strict=True)
        values = pa.array(
            [value if is_selected else old for old, is_selected in pairs], rows.schema.field(column).type
        )
        return rows.set_column(rows.column_names.index(column), rows.schema.field(column), values)

    return change


def set_values(scan_id: str, **values: Any) -> Change:
    """Return a change that sets the values of several columns in the rows of a scan."""

    def change(rows: pa.Table) -> pa.Table:
        for column, value in values.items():
            rows = set_value(column, scan_id, value)(rows)
        return rows

    return change


def set_cells(scan_id: str, **recipes: str | None) -> Change:
    """Return a change that sets the recipes of some layers in the column `layers` of a scan."""
    return set_values(scan_id, layers=list({**CELLS, **recipes}.items()))


def remove_rows(scan_id: str, patch: int | None = None) -> Change:
    """Return a change that removes the rows of a scan, or of one patch of it."""

    def change(rows: pa.Table) -> pa.Table:
        return rows.filter(pc.invert(select_rows(rows, scan_id, patch)))

    return change


def add_copy(scan_id: str, **changed: Any) -> Change:
    """Return a change that adds a copy of the first row of a scan, with some other values."""

    def change(rows: pa.Table) -> pa.Table:
        (row,) = rows.filter(pc.equal(rows["scan_id"], scan_id)).slice(0, 1).to_pylist()
        return pa.concat_tables([rows, pa.Table.from_pylist([{**row, **changed}], rows.schema)])

    return change


def cast_column(column: str, kind: pa.DataType) -> Change:
    """Return a change that casts a column to another type."""
    return lambda rows: rows.set_column(
        rows.column_names.index(column), column, rows[column].combine_chunks().cast(kind)
    )


def find_path(dataset: Dataset, table: str, scan_id: str, layer: str | None = None) -> Path:
    return Path(dataset.store.path(f"{table}/{find_file(dataset, table, scan_id, layer).path}"))


def read_contents(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of both tables."""
    snapshot = dataset.open_snapshot()
    keys = {FEATURES: ("scan_id", "layer", "patch"), SCANS: ("scan_id",)}
    return {
        table: sorted(snapshot.read(table).to_pylist(), key=lambda row: [row[k] for k in keys[table]])
        for table in keys
    }


def group_ids_by_kind(verification: Verification) -> dict[str, set[str]]:
    """Return the ids of affected scans by kind of finding, over all layers."""
    ids: dict[str, set[str]] = {}
    for finding in verification.findings:
        ids.setdefault(str(finding.kind), set()).update(finding.scan_ids)
    return ids


# Functions that damage an output


def delete_file(dataset: Dataset) -> None:
    find_path(dataset, FEATURES, "a", "map").unlink()


def truncate_file(dataset: Dataset) -> None:
    path = find_path(dataset, FEATURES, "a", "map")
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(dataset: Dataset) -> None:
    path = find_path(dataset, FEATURES, "a", "map")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def write_invalid_parquet(dataset: Dataset) -> None:
    old, data = find_file(dataset, FEATURES, "a", "map"), b"PAR1 this is not Parquet PAR1"
    path = f"layer=map/part-{LATER}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    dataset.store.write(f"{FEATURES}/{path}", data)
    write_log_entry(dataset, FEATURES, [DataFile(path, len(data), {"layer": "map"}, 2, "a", "b")], [old])


def delete_scans_file(dataset: Dataset) -> None:
    find_path(dataset, SCANS, "a").unlink()


def truncate_scans_file(dataset: Dataset) -> None:
    path = find_path(dataset, SCANS, "a")
    path.write_bytes(path.read_bytes()[:200])


def copy_rows_to_another_file(dataset: Dataset) -> None:
    file = find_file(dataset, FEATURES, "a", "map")
    rows = pq.read_table(dataset.store.path(f"{FEATURES}/{file.path}"), partitioning=None)
    write_log_entry(dataset, FEATURES, [dataset.write_file(FEATURES, file.partition_values, rows, LATER)], [])


def delete_scan_from_all_layers(dataset: Dataset) -> None:
    for layer in LAYERS:
        rewrite_file(dataset, FEATURES, "a", remove_rows("a"), layer)


def remove_layer(dataset: Dataset) -> None:
    files = [
        file for file in dataset.open_snapshot().files(FEATURES) if file.partition_values["layer"] == "map"
    ]
    write_log_entry(dataset, FEATURES, [], files)


def copy_to_another_layer(dataset: Dataset) -> None:
    file = find_file(dataset, FEATURES, "a", "map")
    rows = pq.read_table(dataset.store.path(f"{FEATURES}/{file.path}"), partitioning=None)
    write_log_entry(dataset, FEATURES, [dataset.write_file(FEATURES, {"layer": "other"}, rows, LATER)], [])


def move_to_another_folder(dataset: Dataset) -> None:
    old = find_file(dataset, FEATURES, "a", "map")
    moved = old.path.replace("layer=map", "layer=z_mean")
    data = dataset.store.read(f"{FEATURES}/{old.path}")
    dataset.store.write(f"{FEATURES}/{moved}", data)
    file = DataFile(moved, old.size, old.partition_values, old.rows, old.min_id, old.max_id)
    write_log_entry(dataset, FEATURES, [file], [old])


@dataclass(frozen=True)
class Case:
    """One way to damage an output.

    Attributes:
        id: Name of the test case.
        damage: Damages the output.
        expected: Kind of finding → ids of the scans that it must name.
        lost: Scans that the findings cannot name, because they have no features and their rows of the scans
            table are in a broken file.
    """

    id: str
    damage: Callable[[Dataset], None]
    expected: dict[str, set[str]]
    lost: frozenset[str] = frozenset()


def change_features(
    change: Change, scan_id: str = "b", layer: str = "z_mean", **stats: Any
) -> Callable[[Dataset], None]:
    return lambda dataset: rewrite_file(dataset, FEATURES, scan_id, change, layer, **stats)


def change_scans(change: Change, scan_id: str = "a", **stats: Any) -> Callable[[Dataset], None]:
    return lambda dataset: rewrite_file(dataset, SCANS, scan_id, change, **stats)


WITHOUT_FEATURES = frozenset({"d", "e"})
CASES = [
    Case("a file is missing", delete_file, {"missing_file": {"a", "b"}}),
    Case("a file is truncated", truncate_file, {"truncated_file": {"a", "b"}}),
    Case("a bit of a file is flipped", flip_a_bit, {"changed_file": {"a", "b"}}),
    Case("a file is not Parquet", write_invalid_parquet, {"unreadable_file": {"a", "b"}}),
    Case(
        "a file of the scans table is missing",
        delete_scans_file,
        {"missing_file": {"a", "b", "c"}},
        WITHOUT_FEATURES,
    ),
    Case(
        "a file of the scans table is truncated",
        truncate_scans_file,
        {"truncated_file": {"a", "b", "c"}},
        WITHOUT_FEATURES,
    ),
    Case(
        "the log has another number of rows",
        change_features(add_copy("b", patch=0), rows=9),
        {"wrong_row_count": {"a", "b"}, "doubled_row": {"b"}},
    ),
    Case(
        "the log has other ids",
        change_features(set_value("feature", "b", [7.0, 8.0]), max_id="aa"),
        {"wrong_id_range": {"a", "b"}},
    ),
    Case(
        "the log has no statistics of a file",
        change_features(add_copy("b", patch=0), rows=None, min_id=None, max_id=None),
        {"wrong_row_count": {"a", "b"}, "wrong_id_range": {"a", "b"}, "doubled_row": {"b"}},
    ),
    Case("a row is in a file twice", change_features(add_copy("b")), {"doubled_row": {"b"}}),
    Case("rows are in two files", copy_rows_to_another_file, {"doubled_row": {"a", "b"}}),
    Case("a row of the scans table is doubled", change_scans(add_copy("b")), {"doubled_row": {"b"}}),
    Case("a patch is missing", change_features(remove_rows("c", patch=1), "c"), {"missing_patch": {"c"}}),
    Case("a layer is missing for one scan", change_features(remove_rows("a"), "a"), {"missing_patch": {"a"}}),
    Case(
        "a patch more than the scans table lists",
        change_features(add_copy("c", patch=2), "c"),
        {"surplus_patch": {"c"}},
    ),
    Case(
        "a patch number is negative",
        change_features(set_value("patch", "a", -1), "a"),
        {"surplus_patch": {"a"}, "missing_patch": {"a"}},
    ),
    Case(
        "a feature has too few values",
        change_features(set_value("feature", "b", [1.0])),
        {"wrong_width": {"b"}},
    ),
    Case(
        "a value is NaN",
        change_features(set_value("feature", "b", [1.0, float("nan")])),
        {"not_finite": {"b"}},
    ),
    Case(
        "a value is infinite",
        change_features(set_value("feature", "c", [float("inf"), 1.0], patch=1), "c"),
        {"not_finite": {"c"}},
    ),
    Case(
        "a value is null",
        change_features(set_value("feature", "b", [1.0, None])),
        {"null_value": {"b"}, "missing_patch": {"b"}},
    ),
    Case(
        "a shape is null",
        change_features(set_value("shape", "b", None)),
        {"null_value": {"b"}, "missing_patch": {"b"}},
    ),
    Case(
        "a row has no scan_id",
        change_features(set_value("scan_id", "b", None), max_id="a"),
        {"null_value": {"a"}, "missing_patch": {"b"}},
    ),
    Case("an ok scan has no features", delete_scan_from_all_layers, {"ledger_without_features": {"a"}}),
    Case(
        "features without a row of the scans table",
        change_scans(remove_rows("a")),
        {"features_without_ledger": {"a"}},
    ),
    Case(
        "a failed scan has features that it does not list",
        change_scans(set_values("b", status="failed", layers=[], patches=0)),
        {"features_without_ledger": {"b"}, "wrong_state": {"b"}},
    ),
    Case(
        "a failed scan lists layers but no patches",
        change_scans(set_values("b", status="failed", patches=0)),
        {"surplus_patch": {"b"}, "wrong_state": {"b"}},
    ),
    Case(
        "a scan lists a layer with another recipe",
        change_scans(set_cells("b", z_mean="r9")),
        {"other_recipe": {"b"}},
    ),
    Case(
        "a scan does not list one of its layers",
        change_scans(set_values("b", layers=[("map", CELLS["map"])])),
        {"features_without_ledger": {"b"}},
    ),
    Case(
        "a scan lists a layer that has no file",
        change_scans(set_cells("b", third="r0 of third")),
        {"missing_patch": {"b"}},
    ),
    Case("all files of a layer are gone", remove_layer, {"missing_patch": {"a", "b", "c"}}),
    Case("no scan lists a layer", copy_to_another_layer, {"features_without_ledger": {"a", "b"}}),
    Case(
        "a row has a copy of another recipe",
        change_features(add_copy("b", recipe="r9")),
        {"other_recipe": {"b"}},
    ),
    Case(
        "an ok scan has patches but lists no layers",
        change_scans(set_values("b", layers=[])),
        {"features_without_ledger": {"b"}, "wrong_state": {"b"}},
    ),
    Case(
        "an ok scan lists failed layers",
        change_scans(set_values("b", failed_layers=[("third", "r0 of third")])),
        {"wrong_state": {"b"}},
    ),
    Case(
        "a layer is both stored and failed",
        change_scans(
            set_values(
                "b",
                status="failed",
                reason="model",
                stage="infer",
                message="-",
                failed_layers=[*CELLS.items()],
            )
        ),
        {"wrong_state": {"b"}},
    ),
    Case(
        "a scan lists a layer twice",
        change_scans(set_values("b", layers=[*CELLS.items(), ("map", CELLS["map"])])),
        {"wrong_state": {"b"}},
    ),
    Case(
        "an excluded scan lists layers",
        change_scans(set_values("e", layers=[*CELLS.items()], patches=1), "e"),
        {"ledger_without_features": {"e"}, "wrong_state": {"e"}},
    ),
    Case(
        "an excluded scan lists failed layers",
        change_scans(set_values("e", failed_layers=[*CELLS.items()]), "e"),
        {"wrong_state": {"e"}},
    ),
    Case(
        "the layers of a scan are null",
        change_scans(set_values("b", layers=None)),
        {"null_value": {"b"}, "features_without_ledger": {"b"}},
    ),
    Case(
        "both columns of cells of a scan are null",
        change_scans(set_values("b", layers=None, failed_layers=None)),
        {"null_value": {"b"}, "features_without_ledger": {"b"}},
    ),
    Case(
        "the failed layers of a scan are null",
        change_scans(set_values("d", failed_layers=None), "d"),
        {"null_value": {"d"}},
    ),
    Case(
        "the recipe of a listed layer is null",
        change_scans(set_cells("b", map=None)),
        {"null_value": {"b"}, "other_recipe": {"b"}},
    ),
    Case(
        "features have another recipe",
        change_features(set_value("recipe", "b", "r9")),
        {"other_recipe": {"b"}},
    ),
    Case(
        "features have the recipe of another layer",
        change_features(set_value("recipe", "b", CELLS["map"])),
        {"other_recipe": {"b"}},
    ),
    Case(
        "the scans table lists more patches",
        change_scans(set_value("patches", "b", 2)),
        {"missing_patch": {"b"}},
    ),
    Case(
        "the scans table lists an absurd number of patches",
        change_scans(set_value("patches", "b", 2**31 - 1)),
        {"missing_patch": {"b"}},
    ),
    Case(
        "an ok scan has 0 patches",
        change_scans(set_value("patches", "b", 0)),
        {"wrong_state": {"b"}, "surplus_patch": {"b"}},
    ),
    Case("an ok scan has a reason", change_scans(set_value("reason", "b", "empty")), {"wrong_state": {"b"}}),
    Case(
        "a failed scan has no reason",
        change_scans(set_value("reason", "d", None), "d"),
        {"wrong_state": {"d"}},
    ),
    Case(
        "a failed scan has patches", change_scans(set_value("patches", "d", 1), "d"), {"wrong_state": {"d"}}
    ),
    Case(
        "a reason is unknown",
        change_scans(set_value("reason", "d", "bad_luck"), "d"),
        {"unknown_code": {"d"}},
    ),
    Case(
        "a warning is unknown",
        change_scans(set_value("warnings", "b", ["oblique", "hm"])),
        {"unknown_code": {"b"}},
    ),
    Case(
        "a status is unknown",
        change_scans(set_value("status", "d", "done"), "d"),
        {"unknown_code": {"d"}, "books": {"d"}},
    ),
    Case(
        "a column of the scans table is null",
        change_scans(set_value("content", "b", None)),
        {"null_value": {"b"}},
    ),
    Case(
        "a column has another type",
        change_features(cast_column("patch", pa.int64())),
        {"wrong_schema": {"a", "b"}},
    ),
    Case(
        "a column has fixed-size lists",
        change_features(cast_column("feature", pa.list_(pa.float32(), 2))),
        {"wrong_schema": {"a", "b"}},
    ),
    Case(
        "a column of features is missing",
        change_features(lambda rows: rows.drop_columns("origin")),
        {"wrong_schema": {"a", "b"}},
    ),
    Case(
        "a file has a further column",
        change_features(lambda rows: rows.append_column("more", rows["patch"])),
        {"wrong_schema": {"a", "b"}},
    ),
    Case(
        "the scans table lacks a column",
        change_scans(lambda rows: rows.drop_columns("uri")),
        {"wrong_schema": {"a", "b", "c"}},
        WITHOUT_FEATURES,
    ),
    Case("a file is in the folder of another layer", move_to_another_folder, {"wrong_partition": {"a", "b"}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_damage_is_found_and_its_remedy_changes_nothing_else(case: Case, dataset: Dataset) -> None:
    before = read_contents(dataset)
    case.damage(dataset)
    verification = verify(dataset)
    assert group_ids_by_kind(verification) == case.expected
    assert verification.exit_code == 3
    assert all("--forget-damaged" in finding.mend for finding in verification.findings)
    repaired = verify(dataset, forget_damaged=True)
    assert (repaired.findings, repaired.exit_code) == ((), 0), repaired.text()
    assert verify(dataset).findings == ()
    assert read_contents(dataset) == leave_out_damage(before, verification, case.lost)


def leave_out_damage(
    contents: dict[str, list[dict[str, Any]]], verification: Verification, lost: frozenset[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that remain without the cells, or without the whole scans, that findings name."""
    cells = {(scan_id, finding.layer) for finding in verification.findings for scan_id in finding.scan_ids}
    scans = {scan_id for scan_id, layer in cells if layer is None} | lost
    remaining: dict[str, list[dict[str, Any]]] = {FEATURES: [], SCANS: []}
    for row in contents[FEATURES]:
        if row["scan_id"] not in scans and (row["scan_id"], row["layer"]) not in cells:
            remaining[FEATURES].append(row)
    for row in contents[SCANS]:
        layers = [(layer, recipe) for layer, recipe in row["layers"] if (row["scan_id"], layer) not in cells]
        if row["scan_id"] not in scans and (layers or not row["layers"]):
            remaining[SCANS].append({**row, "layers": layers})
    return remaining


def test_ids_and_ranges_of_files_are_found_as_by_a_linear_search() -> None:
    rng = np.random.default_rng(5)
    texts = sorted({f"{number:b}" for number in rng.integers(1, 400, 150)})
    ids, files = pa.array(texts, pa.large_string()), []
    for _ in range(6):
        first, last = sorted(f"{number:b}" for number in rng.integers(1, 400, 2))
        files.append(DataFile("", 0, {}, 0, first, last))
    expected = [any(f.min_id <= text <= f.max_id for f in files[:3]) for text in texts]
    assert can_be_in_files(ids, files[:3]).tolist() == expected
    assert not can_be_in_files(ids, []).any()
    assert can_be_in_files(ids[:0], files).tolist() == []
    rows = pa.table({"scan_id": texts, "status": ["ok"] * len(texts), "recipe": texts, "run_id": texts})
    rows = rows.append_column("patches", pa.array([1] * len(texts), pa.int32()))
    cells = CellColumn(np.zeros(len(texts), np.int32), [CELLS])
    whole, _ = join_files([ScansFile(rows.take(pa.array(rng.permutation(len(texts)))), cells, [])], [])
    wanted = [*texts[::3], "", "2", "1000000000000"]
    assert whole.find_rows(pa.array(wanted)).tolist() == [
        texts.index(text) if text in texts else -1 for text in wanted
    ]


def test_an_undamaged_output_has_no_findings(dataset: Dataset) -> None:
    write_run(dataset, [2, 2, 2])
    verification = verify(dataset)
    assert (verification.findings, verification.notes, verification.exit_code) == ((), (), 0)
    assert verification.scans == {"ok": 3, "failed": 1, "excluded": 1}
    assert verification.rows == {"z_mean": 4, "map": 4}
    assert "everything is in order" in verification.text()


def test_verification_writes_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the verification wrote to the store")

    for name in ("write", "create", "delete"):
        monkeypatch.setattr(Store, name, refuse)
    root = Path(dataset.store.root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert verify(dataset).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_scans_of_a_layer_that_lost_its_only_file_are_extracted_again(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    Committer(dataset, ("layer",), run_id=RUN).commit(
        [make_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))]
    )
    delete_file(dataset)
    assert group_ids_by_kind(verify(dataset)) == {"missing_file": {"a", "b"}}
    assert verify(dataset, forget_damaged=True).exit_code == 0
    contents = read_contents(dataset)
    assert [row["layer"] for row in contents[FEATURES]] == ["z_mean"] * 2
    assert [row["layers"] for row in contents[SCANS]] == [[("z_mean", "r0 of z_mean")]] * 2, (
        "otherwise no run would extract the layer again"
    )


def use_one_recipe(rows: pa.Table) -> pa.Table:
    return rows.set_column(rows.column_names.index("recipe"), "recipe", pa.repeat("r0", len(rows)))


def make_earlier_output(dataset: Dataset) -> None:
    """Change all rows to those of featray 0.1.0: one recipe for all layers, and no columns of cells."""
    for layer in LAYERS:
        for scan_id in ("a", "c"):
            rewrite_file(dataset, FEATURES, scan_id, use_one_recipe, layer)
    rewrite_file(dataset, SCANS, "a", lambda rows: rows.drop_columns(["layers", "failed_layers"]))


@pytest.mark.slow
@pytest.mark.parametrize("is_recorded", [False, True], ids=["without run.json", "with run.json"])
def test_rows_of_an_earlier_version_have_one_recipe_and_all_layers(
    dataset: Dataset, is_recorded: bool
) -> None:
    make_earlier_output(dataset)
    if is_recorded:
        write_run(dataset, [2, 2, 2])
    assert verify(dataset).findings == ()
    rewrite_file(dataset, FEATURES, "c", remove_rows("c", patch=1), "map")
    rewrite_file(dataset, FEATURES, "b", set_value("recipe", "b", "r9"), "map")
    assert group_ids_by_kind(verify(dataset)) == {"missing_patch": {"c"}, "other_recipe": {"b"}}
    assert verify(dataset, forget_damaged=True).findings == ()
    assert list_scan_ids(dataset) == ["a", "d", "e"]


def test_a_layer_that_a_run_of_an_earlier_version_recorded_is_missing_without_files(dataset: Dataset) -> None:
    make_earlier_output(dataset)
    write_run(dataset, None, (*LAYERS, "third"))
    (finding,) = verify(dataset).findings
    assert (finding.kind, finding.layer, finding.scan_ids) == ("missing_patch", "third", ("a", "b", "c"))


@pytest.mark.slow
def test_rows_of_an_earlier_version_may_be_next_to_rows_that_list_their_layers(dataset: Dataset) -> None:
    for scan_id in ("b", "c"):
        for layer in LAYERS:
            rewrite_file(dataset, FEATURES, scan_id, set_value("recipe", scan_id, "r1"), layer)
        change = set_values(scan_id, recipe="r1", layers=None, failed_layers=None)
        rewrite_file(dataset, SCANS, scan_id, change)
    assert verify(dataset).findings == ()
    rewrite_file(dataset, FEATURES, "b", remove_rows("b"), "map")
    assert group_ids_by_kind(verify(dataset)) == {"missing_patch": {"b"}}


def test_a_row_without_layers_is_wrong_if_its_run_gave_each_layer_a_recipe(dataset: Dataset) -> None:
    make_earlier_output(dataset)
    write_run(dataset, None, layer_recipes=CELLS)
    assert group_ids_by_kind(verify(dataset)) == {
        "null_value": {"a", "b", "c", "d", "e"},
        "features_without_ledger": {"a", "b", "c"},
    }


def fail_to_add_a_layer(dataset: Dataset, scan_id: str) -> None:
    """Commit what a run commits if a scan fails when a layer is added to it."""
    record = make_failed_record(scan_id)
    record.due_layers, record.run_id, record.failed_layers = ["third"], LATER, {"third": "r0 of third"}
    Committer(dataset, ("layer",), ["site"], run_id=LATER).commit([Receipt((), (record,))])


@pytest.mark.slow
def test_a_scan_that_failed_when_a_layer_was_added_keeps_its_other_cells(dataset: Dataset) -> None:
    fail_to_add_a_layer(dataset, "c")
    verification = verify(dataset)
    assert (verification.findings, verification.scans["failed"]) == ((), 2)
    rewrite_file(dataset, FEATURES, "c", remove_rows("c", patch=1), "map")
    assert group_ids_by_kind(verify(dataset)) == {"missing_patch": {"c"}}
    write_log_entry(dataset, FEATURES, [], [find_file(dataset, FEATURES, "c", layer) for layer in LAYERS])
    assert group_ids_by_kind(verify(dataset)) == {"ledger_without_features": {"c"}}
    assert verify(dataset, forget_damaged=True).exit_code == 0
    assert list_scan_ids(dataset) == ["a", "b", "d", "e"]


def test_scans_that_lost_all_layers_because_they_were_dropped_are_in_order(dataset: Dataset) -> None:
    fail_to_add_a_layer(dataset, "c")
    Committer(dataset, ("layer",), ["site"], run_id=LATER).drop_layers(LAYERS)
    verification = verify(dataset)
    assert (verification.findings, verification.rows) == ((), {})
    assert verification.scans == {"ok": 2, "failed": 2, "excluded": 1}
    rewrite_file(dataset, SCANS, "a", set_value("patches", "a", 1))
    assert group_ids_by_kind(verify(dataset)) == {"wrong_state": {"a"}}


def test_the_cells_of_a_scan_may_come_from_several_runs(dataset: Dataset) -> None:
    def compute_third(
        batch: np.ndarray, seeds: Sequence[str], layers: Sequence[str]
    ) -> dict[str, np.ndarray]:
        return dict.fromkeys(layers, batch[:, 0, 0])

    scan = make_decoded("c", 3, patches=2)
    scan.record.due_layers = ["third"]
    new_receipt = make_receipt(dataset, scan, run_id=LATER, extractor=compute_third)
    Committer(dataset, ("layer",), ["site"], run_id=LATER).commit([new_receipt])
    verification = verify(dataset)
    assert (verification.findings, verification.rows) == ((), {"map": 4, "third": 2, "z_mean": 4})


def test_shapes_may_differ_only_if_input_sizes_differ(dataset: Dataset) -> None:
    rewrite_file(dataset, FEATURES, "b", set_value("shape", "b", [2, 1]), "z_mean")
    write_run(dataset, None)
    assert verify(dataset).findings == ()
    write_run(dataset, [2, 2, 2])
    verification = verify(dataset)
    assert group_ids_by_kind(verification) == {"uneven_shape": {"b"}}
    assert "(2, 1), others have (2,)" in verification.findings[0].message
    assert verify(dataset, forget_damaged=True).exit_code == 0


def test_shapes_are_compared_within_one_recipe(dataset: Dataset) -> None:
    write_run(dataset, [2, 2, 2])
    rewrite_file(dataset, FEATURES, "b", set_values("b", shape=[2, 1], recipe="r1 of z_mean"), "z_mean")
    assert group_ids_by_kind(verify(dataset)) == {"other_recipe": {"b"}}
    rewrite_file(dataset, SCANS, "b", set_cells("b", z_mean="r1 of z_mean"))
    assert verify(dataset).findings == ()


def test_two_recipes_with_different_layers_are_in_order(dataset: Dataset) -> None:
    def one_layer(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        return {"other": batch[:, 0, 0]}

    scan = make_decoded("f", 1, recipe="r1", run_id=LATER)
    new_receipt = make_receipt(dataset, scan, run_id=LATER, recipe="r1", extractor=one_layer)
    Committer(dataset, ("layer",), ["site"], run_id=LATER).commit([new_receipt])
    assert verify(dataset).findings == ()


@pytest.mark.slow
def test_further_partition_columns_are_compared_with_the_scans_table(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    fill_output(dataset, ("layer", "site"))
    assert verify(dataset).findings == (), "a null and an empty value are the same partition"
    rewrite_file(dataset, SCANS, "b", set_value("site", "b", "south"))
    assert group_ids_by_kind(verify(dataset)) == {"wrong_partition": {"b"}}
    assert verify(dataset, forget_damaged=True).exit_code == 0


@pytest.mark.slow
def test_a_changed_bit_at_any_place_of_any_file_is_found(dataset: Dataset) -> None:
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
            verification = verify(dataset)
            assert {finding.kind for finding in verification.findings} == {FindingKind.CHANGED_FILE}
        path.write_bytes(whole)
    assert verify(dataset).findings == ()


def test_several_problems_are_reported_together(dataset: Dataset) -> None:
    rewrite_file(dataset, FEATURES, "c", set_value("feature", "c", [float("nan"), 1.0]), "z_mean")
    rewrite_file(dataset, SCANS, "d", set_value("reason", "d", "bad_luck"))
    delete_file(dataset)
    verification = verify(dataset)
    assert group_ids_by_kind(verification) == {
        "missing_file": {"a", "b"},
        "not_finite": {"c"},
        "unknown_code": {"d"},
    }
    assert [finding.kind for finding in verification.findings] == [
        "missing_file",
        "unknown_code",
        "not_finite",
    ]


@pytest.mark.slow
def test_files_that_the_store_refuses_to_return_are_not_treated_as_lost(dataset: Dataset) -> None:
    path = find_path(dataset, FEATURES, "a", "map")
    path.unlink()
    path.mkdir()
    verification = verify(dataset)
    assert group_ids_by_kind(verification) == {"no_access": {"a", "b"}}
    assert "verify again" in verification.findings[0].mend
    assert verify(dataset, forget_damaged=True).exit_code == 3
    rewrite_file(dataset, FEATURES, "c", set_value("feature", "c", [float("nan"), 1.0]), "z_mean")
    refused = verify(dataset, forget_damaged=True)
    assert refused.exit_code == 3
    assert "nothing was removed, because the store refuses" in refused.mended[0]
    assert len(list_scan_ids(dataset)) == 5, "a temporary refusal of the store must not remove a scan"
    path.rmdir()
    verification = verify(dataset, forget_damaged=True)
    assert (verification.exit_code, verification.rows) == (0, {"map": 2, "z_mean": 2})


def list_scan_ids(dataset: Dataset) -> list[str]:
    return sorted(dataset.read_scans(("scan_id",))["scan_id"].to_pylist())


def test_a_store_that_does_not_answer_is_an_error_and_not_a_finding(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_storage_error(self: Store, name: str) -> Any:
        raise StorageError("the store does not answer")

    monkeypatch.setattr(Store, "read", raise_storage_error)
    monkeypatch.setattr(Store, "get_size", raise_storage_error)
    with pytest.raises(StorageError):
        verify(dataset)


def test_the_repair_deletes_orphans_and_keeps_foreign_files(dataset: Dataset) -> None:
    before = read_contents(dataset)
    orphaned = make_receipt(dataset, make_decoded("x", 9))
    store = dataset.store
    half = f"features/{orphaned.files[0].path}.{'0' * 32}.tmp"
    store.write(half, b"half a file")
    store.write("scans/_delta_log/_commit_1234.json.tmp", b"half an entry")
    store.write("features/layer=map/notes.parquet", b"mine")
    store.write("features/_SUCCESS", b"")
    verification = verify(dataset)
    assert {(finding.kind, finding.table, finding.files) for finding in verification.findings} == {
        ("orphan", "features", 3),
        ("orphan", "scans", 1),
        ("foreign_file", "features", 1),
    }
    assert any("features/_SUCCESS" in note for note in verification.notes)
    by_kind = {finding.kind: finding for finding in verification.findings}
    assert "--repair" in by_kind[FindingKind.ORPHAN].mend
    repaired = verify(dataset, repair=True)
    assert [finding.kind for finding in repaired.findings] == ["foreign_file"]
    assert repaired.mended[0].startswith("deleted orphan files: 4 (")
    assert store.get_size("features/layer=map/notes.parquet") == 4
    store.delete(["features/layer=map/notes.parquet"])
    assert verify(dataset).exit_code == 0
    assert read_contents(dataset) == before


def test_files_of_retained_versions_are_not_orphans(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    committer = Committer(dataset, ("layer",), run_id=RUN, keep_versions_days=7)
    committer.commit([make_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.commit([make_receipt(dataset, make_decoded("a", 5), run_id=LATER)])
    assert len(dataset.store.list_files("features/layer=map")) > 2
    assert verify(dataset).findings == ()


def test_a_commit_interrupted_between_the_tables_is_a_note_and_the_repair_finishes_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = TableLog.append

    def raise_for_scans(self: TableLog, *args: Any, **more: Any) -> None:
        if self.table == SCANS:
            raise KeyboardInterrupt
        append(self, *args, **more)

    committer = Committer(dataset, ("layer",), run_id=LATER)
    new_receipt = make_receipt(dataset, make_decoded("f", 6, run_id=LATER), run_id=LATER)
    monkeypatch.setattr(TableLog, "append", raise_for_scans)
    with pytest.raises(KeyboardInterrupt):
        committer.commit([new_receipt])
    monkeypatch.undo()
    verification = verify(dataset)
    assert (verification.findings, verification.exit_code) == ((), 0)
    assert "interrupted between the two tables" in verification.notes[0]
    repaired = verify(dataset, repair=True)
    assert (repaired.findings, repaired.notes) == ((), ())
    assert repaired.mended == ("finished an interrupted commit",)
    assert "f" in list_scan_ids(dataset)


@pytest.mark.slow
def test_tables_more_than_one_commit_apart_are_a_finding(dataset: Dataset) -> None:
    for _ in range(2):
        log = TableLog.open(dataset.store, FEATURES)
        assert log is not None
        log.append(FileChange(), log.commit_number + 1, LATER)
    for verification in (verify(dataset), verify(dataset, repair=True)):
        assert ([finding.kind for finding in verification.findings], verification.exit_code) == (
            ["tables_apart"],
            3,
        )


@pytest.fixture
def held(dataset: Dataset) -> Any:
    """Let another process hold the lease of the output."""
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
def test_an_output_that_a_run_holds_can_be_verified_but_not_repaired(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    make_receipt(dataset, make_decoded("x", 9))  # the other run has just written this
    verification = verify(dataset)
    assert (verification.findings, verification.exit_code) == ((), 0)
    assert "did not look for orphan files" in verification.notes[0]
    assert "other-run" in verification.notes[0]
    with pytest.raises(OutputBusyError, match="other-run"):
        verify(dataset, repair=True)
    assert main(["verify", dataset.store.uri, "--forget-damaged"]) == 4
    assert "other-run" in capsys.readouterr().err


def test_files_that_a_run_replaces_during_verification_are_not_a_finding(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, replaced_files = Store.read, []

    def read_late(self: Store, name: str) -> bytes:
        if name.startswith("features/layer=") and not replaced_files:
            replaced_files.append(name)
            new_receipt = make_receipt(dataset, make_decoded("a", 5, run_id=LATER), run_id=LATER)
            Committer(dataset, ("layer",), run_id=LATER).commit([new_receipt])
        return read(self, name)

    monkeypatch.setattr(Store, "read", read_late)
    monkeypatch.setattr(data_file, "THREADS", 1)
    verification = verify(dataset)
    assert replaced_files
    assert verification.findings == (), verification.text()
    assert verification.version == dataset.open_snapshot().version


@pytest.mark.slow
def test_an_output_that_changes_all_the_time_raises_output_busy(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, values, committing = Store.read, iter(range(100)), []

    def read_late(self: Store, name: str) -> bytes:
        if name.startswith("features/layer=map") and not committing:
            committing.append(name)  # the commit itself reads, too
            new_receipt = make_receipt(dataset, make_decoded("a", next(values), run_id=LATER), run_id=LATER)
            Committer(dataset, ("layer",), run_id=LATER).commit([new_receipt])
            committing.clear()
        return read(self, name)

    monkeypatch.setattr(Store, "read", read_late)
    monkeypatch.setattr(data_file, "THREADS", 1)
    with pytest.raises(OutputBusyError, match="faster than it can be read"):
        verify(dataset)


@pytest.mark.slow
def test_the_command_prints_findings_and_remedies_as_text_and_json(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = dataset.store.uri
    assert main(["verify", output]) == 0
    assert "everything is in order" in capsys.readouterr().out
    delete_file(dataset)
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
    assert "remedy: `featray verify OUTPUT --forget-damaged` removes these scans" in text
    assert main(["verify", output, "--repair"]) == 3, "--repair alone removes no scan"
    assert main(["verify", output, "--forget-damaged"]) == 0
    change = "removed damaged data from both tables (scans: 0, cells of other scans: 2, files: 1)"
    assert change in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "is this a featray output?" in capsys.readouterr().err


def test_verify_can_be_called_from_python(dataset: Dataset, tmp_path: Path) -> None:
    assert featray.verify(dataset.store.uri).exit_code == 0
    with pytest.raises(ConfigError, match="is this a featray output"):
        featray.verify(str(tmp_path / "nothing"))
