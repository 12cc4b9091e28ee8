"""Planning works on whole columns: compare it with rules that look at one scan after the other."""

from __future__ import annotations

import random

import pytest
from ledgers import INPUTS, Row, get_due, get_states, make_scan, plan_scans

from featray.schema import Scan

LAYERS = {"x": "x1", "y": "y1", "z": "z1"}
RETRIED = ("storage", "truncated")


def make_random_row(rng: random.Random, scan_id: str) -> Row:
    """Return a row with cells of the layers `w` to `z` by one of two recipes each."""
    names = rng.sample("wxyz", rng.randint(0, 4))
    cells = {name: f"{name}{rng.choice('001111')}" for name in names}
    kept = rng.randint(0, len(names))
    reason = rng.choice([None, None, "storage", "truncated", "model"])
    layers = {name: cells[name] for name in names[:kept]} if reason else cells
    failed = {name: cells[name] for name in names[kept:]} if reason else {}
    is_ok = reason is None and bool(layers)
    return Row(
        scan_id,
        layers,
        failed,
        status="ok" if is_ok else "failed",
        reason=reason,
        stage=None if is_ok else rng.choice([None, "read", "extract"]),
        content=rng.choice("aab"),
        recipe=rng.choice([INPUTS, INPUTS, INPUTS, "old"]),
    )


def was_tried(row: Row, layer: str) -> bool:
    """Return whether a layer that the scan lacks was tried, or the scan cannot be decoded for any layer."""
    is_undecodable = row.status == "failed" and row.stage == "read" and not row.layers
    is_attempt_of_config = row.failed.items() <= LAYERS.items()
    return is_undecodable or (is_attempt_of_config and row.failed.get(layer) == LAYERS[layer])


def expect_state(scan: Scan, row: Row | None) -> str:
    """Return the state of a listed scan."""
    if row is None:
        return "new"
    if row.content != scan.content:
        return "changed"
    if row.layers and (row.recipe != INPUTS or any(row.layers.get(n, r) != r for n, r in LAYERS.items())):
        return "stale"
    lacking = {name: recipe for name, recipe in LAYERS.items() if name not in row.layers}
    if not lacking:
        return "up_to_date"
    if row.status == "ok":
        return "incomplete"
    return "failed" if row.recipe == INPUTS and any(was_tried(row, name) for name in lacking) else "stale"


def expect_due(state: str, row: Row | None, *, refresh: bool) -> tuple[str, ...] | None:
    """Return the due layers of a listed scan; None if it is not due."""
    if row is None:
        return ()
    if state == "changed":
        return () if refresh or not row.layers else None
    if state == "up_to_date":
        return None
    lacking = [name for name in LAYERS if name not in row.layers]
    if state == "failed":
        is_tried = all(was_tried(row, name) for name in lacking)
        return tuple(lacking) if row.reason in RETRIED or not is_tried else None
    is_replaced = any(LAYERS.get(name, recipe) != recipe for name, recipe in row.layers.items())
    if row.recipe != INPUTS:
        return () if refresh or not row.layers else None
    if is_replaced and not refresh:
        return None
    return tuple(name for name, recipe in LAYERS.items() if row.layers.get(name) != recipe)


def count_with_other_recipe(rows: list[Row]) -> int:
    """Return the number of rows with cells that a layer of the config must not be mixed with."""
    return sum(
        bool(row.layers)
        and (row.recipe != INPUTS or any(LAYERS.get(n, r) != r for n, r in row.layers.items()))
        for row in rows
    )


@pytest.mark.slow
def test_a_plan_equals_the_result_of_comparing_scan_by_scan() -> None:
    rng = random.Random(0)
    for number in range(120):
        listed = {str(n): make_scan(str(n), rng.choice("ab")) for n in range(30) if rng.random() < 0.7}
        stored = {str(n): make_random_row(rng, str(n)) for n in range(30) if rng.random() < 0.7}
        refresh = bool(number % 2)
        plan = plan_scans(
            listed.values(), *stored.values(), layers=LAYERS, refresh=refresh, retry=["truncated"]
        )
        expected = {name: expect_state(scan, stored.get(name)) for name, scan in listed.items()}
        assert get_states(plan) == expected | dict.fromkeys(stored.keys() - listed.keys(), "removed")
        due = {name: expect_due(expected[name], stored.get(name), refresh=refresh) for name in listed}
        assert get_due(plan) == {name: layers for name, layers in due.items() if layers is not None}
        assert plan.other_recipe == count_with_other_recipe(list(stored.values()))
        assert not plan.renames
