"""Small outputs that are committed without a model, and what a reader sees in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from featray.errors import Reason, ScanError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.schema import Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LATER = "20260102T000000000-abcdef"
RECIPES = {"z_mean": "r0", "map": "r1"}


class Killed(BaseException):
    """Simulates SIGKILL: no code under test catches it, and no code after it runs."""


def compute_layers(
    batch: np.ndarray, seeds: Sequence[str], layers: Iterable[str] = tuple(RECIPES)
) -> dict[str, np.ndarray]:
    """Replace a model: layers whose values show from which input they are; `map` has rank 3."""
    first = batch[:, 0, 0, 0]
    vector, grid = np.stack([first, first + 1], axis=1), np.tile(first[:, None, None], (1, 2, 3))
    return {layer: grid if layer == "map" else vector for layer in layers}


def make_decoded(scan_id: str, value: float, patches: int = 1, due_layers: Sequence[str] = ()) -> Decoded:
    record = ScanRecord(scan_id, f"/data/{scan_id}", "nifti", content="c0", due_layers=list(due_layers))
    tensor = np.full((patches, 2, 2, 2), value, np.float32)
    return Decoded(record, tensor, np.zeros((patches, 3), np.int32))


def write_receipt(
    dataset: Dataset,
    *scans: Decoded,
    partition_by: tuple[str, ...] = ("layer",),
    recipes: dict[str, str] = RECIPES,
    run_id: str = RUN,
) -> Receipt:
    """Write the features of scans as a run with these layers does."""

    def extractor(batch: np.ndarray, seeds: Sequence[str], *due: tuple[str, ...]) -> dict[str, np.ndarray]:
        return compute_layers(batch, seeds, due[0] if due else recipes)

    receipt = write(extract(extractor, scans, recipe="r0"), dataset, partition_by, recipes, run_id)
    receipt.set_run("i0", recipes, run_id)
    return receipt


def make_failed_receipt(
    scan_id: str,
    reason: Reason = Reason.TRUNCATED,
    due_layers: Sequence[str] = (),
    recipes: dict[str, str] = RECIPES,
) -> Receipt:
    record = make_decoded(scan_id, 0, due_layers=due_layers).record
    record.fail("read", ScanError(reason, "gone"))
    receipt = Receipt((), (record,))
    receipt.set_run("i0", recipes, RUN)
    return receipt


def make_committer(dataset: Dataset, run_id: str = RUN, **options: Any) -> Committer:
    return Committer(dataset, ("layer",), run_id=run_id, **options)


def read_values(dataset: Dataset, layer: str = "z_mean") -> dict[str, float]:
    """Return scan_id → first value of a layer; check that each row of each layer occurs once."""
    rows = dataset.read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    keys = [(row["scan_id"], row["layer"], row["patch"]) for row in rows]
    assert len(set(keys)) == len(keys), "a row occurs twice"
    return {row["scan_id"]: row["feature"][0] for row in rows if row["layer"] == layer}


def read_cells(dataset: Dataset) -> dict[str, dict[str, str]]:
    """Return scan_id → layer → recipe as `scans` names them; check that each scan occurs once."""
    rows = dataset.read_scans(("scan_id", "layers")).to_pylist(maps_as_pydicts="strict")
    assert len({row["scan_id"] for row in rows}) == len(rows), "a scan occurs twice"
    return {row["scan_id"]: row["layers"] for row in rows}


def read_statuses(dataset: Dataset) -> dict[str, str]:
    """Return scan_id → status; check that each scan occurs once."""
    rows = dataset.read_scans(("scan_id", "status")).to_pylist()
    assert len({row["scan_id"] for row in rows}) == len(rows), "a scan occurs twice"
    return {row["scan_id"]: row["status"] for row in rows}


def read_row(dataset: Dataset, scan_id: str) -> dict[str, Any]:
    """Return the row of a scan."""
    rows = dataset.read(SCANS).to_pylist(maps_as_pydicts="strict")
    (row,) = [row for row in rows if row["scan_id"] == scan_id]
    return row


def list_stored(dataset: Dataset, table: str = FEATURES) -> set[str]:
    """Return the names of the data files that are in the folder of a table."""
    return {name for name in dataset.store.list_files(table) if "/_delta_log/" not in name}


def list_committed(dataset: Dataset, table: str = FEATURES) -> set[str]:
    """Return the names of the data files that the newest version of a table refers to."""
    return {f"{table}/{file.path}" for file in dataset.open_snapshot().files(table)}


def assert_cells_agree(dataset: Dataset) -> None:
    """Check that `features` holds exactly the cells that `scans` names, each with all of its patches."""
    snapshot = dataset.open_snapshot()
    scans = snapshot.read_scans(("scan_id", "status", "layers", "patches"))
    rows = scans.to_pylist(maps_as_pydicts="strict")
    assert all(bool(row["layers"]) == (row["patches"] > 0) for row in rows)
    expected = [
        (row["scan_id"], layer, recipe, patch)
        for row in rows
        for layer, recipe in row["layers"].items()
        for patch in range(row["patches"])
    ]
    stored = snapshot.read(FEATURES, ("scan_id", "layer", "recipe", "patch")).to_pylist()
    assert sorted(tuple(row.values()) for row in stored) == sorted(expected)


def assert_consistent(dataset: Dataset) -> None:
    """Check that both tables agree, and that their folders contain exactly the files that they refer to."""
    assert_cells_agree(dataset)
    for table in (FEATURES, SCANS):
        assert list_stored(dataset, table) == list_committed(dataset, table)


def run_until_killed(operation: Callable[[], None], monkeypatch: pytest.MonkeyPatch, kill_at: int) -> bool:
    """Run an operation and kill it at its n-th step; return whether it reached that step."""
    steps = itertools.count()

    def kill_before(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == kill_at:
                raise Killed
            return original(*args, **kwargs)

        return wrapper

    def kill_after(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if next(steps) == kill_at:
                raise Killed
            return result

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(TableLog, "append", kill_after(kill_before(TableLog.append)))
        patch.setattr(Store, "delete", kill_before(Store.delete))
        patch.setattr(Store, "write", kill_after(Store.write))
        try:
            operation()
        except Killed:
            return True
    return False
