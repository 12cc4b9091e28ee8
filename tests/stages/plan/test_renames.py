"""Layers whose name alone has changed are renamed, and nothing is computed for them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from ledgers import Cells, Row, get_due, get_states, make_failed_row, plan_scans

from featray.output.cells import CellColumn
from featray.stages.plan.renames import find_renames


@pytest.mark.parametrize(
    ("stored", "layers", "renames"),
    [
        pytest.param({"z": "r1"}, {"zz": "r1"}, {"z": "zz"}, id="another name"),
        pytest.param({"z": "r1"}, {"z": "r1"}, {}, id="the same name"),
        pytest.param({"z": "r1", "y": "r2"}, {"z": "r2", "y": "r1"}, {"z": "y", "y": "z"}, id="swap"),
        pytest.param(
            {"a": "r1", "b": "r2", "c": "r3"},
            {"a": "r3", "b": "r1", "c": "r2"},
            {"a": "b", "b": "c", "c": "a"},
            id="three names in a circle",
        ),
        pytest.param({"z": "r1", "y": "r2"}, {"z": "r1", "new": "r2"}, {"y": "new"}, id="one of two"),
        pytest.param({"z": "r1", "y": "r2"}, {"y": "r1", "x": "r2"}, {"z": "y", "y": "x"}, id="chain"),
        pytest.param({"z": "r1"}, {"z": "r1", "zz": "r1"}, {}, id="the old name stays with its recipe"),
        pytest.param({"z": "r1"}, {"z": "r2", "zz": "r1"}, {"z": "zz"}, id="the old name gets a new recipe"),
        pytest.param({"z": "r1", "y": "r2"}, {"y": "r1"}, {}, id="another stored layer keeps the name"),
        pytest.param(
            {"a": "r1", "b": "r2", "c": "r3"},
            {"b": "r1", "c": "r2"},
            {},
            id="a chain that ends at a stored name",
        ),
        pytest.param({"z": "r1"}, {"a": "r1", "b": "r1"}, {"z": "a"}, id="two views with one recipe"),
        pytest.param({"a": "r1", "b": "r1"}, {"c": "r1"}, {"a": "c"}, id="one view of two with one recipe"),
        pytest.param({"a": "r1", "b": "r1"}, {"b": "r1", "c": "r1"}, {"a": "c"}, id="one of two views"),
        pytest.param({"z": "r1"}, {"zz": "r2"}, {}, id="another recipe under another name"),
    ],
)
def test_a_layer_is_renamed_if_only_its_name_has_changed(
    stored: Cells, layers: Cells, renames: dict[str, str]
) -> None:
    assert plan_scans("ab", Row("a", stored), Row("b", stored), layers=layers).renames == renames


def test_nothing_is_computed_for_a_renamed_layer() -> None:
    plan = plan_scans("a", Row("a", {"z": "r1", "y": "r2"}), layers={"y": "r1", "z": "r2"})
    assert (get_states(plan), get_due(plan), plan.refresh_todo) == ({"a": "up_to_date"}, {}, 0)
    assert (plan.other_layers, plan.other_recipe) == ({}, 0)


def test_scans_without_a_renamed_layer_get_it_under_its_new_name() -> None:
    rows = (Row("a", {"z": "r1", "y": "r2"}), Row("b", {"y": "r2"}))
    plan = plan_scans("abc", *rows, layers={"new": "r1", "y": "r2"})
    assert (plan.renames, get_due(plan)) == ({"z": "new"}, {"b": ("new",), "c": ()})


def test_a_layer_that_failed_counts_as_tried_under_its_new_name() -> None:
    rows = (Row("a", {"z": "r1"}), make_failed_row("b", {"z": "r1"}))
    plan = plan_scans("ab", *rows, layers={"new": "r1"})
    assert (plan.renames, get_states(plan)["b"], get_due(plan)) == ({"z": "new"}, "failed", {})


def test_two_views_with_one_recipe_are_one_renamed_and_one_new_layer() -> None:
    plan = plan_scans("a", Row("a", {"z": "r1"}), layers={"one": "r1", "two": "r1"})
    assert (plan.renames, get_due(plan)) == ({"z": "one"}, {"a": ("two",)})


def test_after_a_killed_refresh_a_layer_is_renamed_if_most_of_its_cells_have_the_recipe() -> None:
    rows = (Row("a", {"z": "r1"}), Row("b", {"z": "r2"}), Row("c", {"z": "r2"}))
    plan = plan_scans("abc", *rows, layers={"new": "r2"}, refresh=True)
    assert (plan.renames, plan.other_recipe) == ({"z": "new"}, 1)
    assert get_states(plan) == {"a": "stale", "b": "up_to_date", "c": "up_to_date"}
    assert get_due(plan) == {"a": ("new",)}


def test_after_a_killed_refresh_a_layer_stays_if_few_of_its_cells_have_the_recipe() -> None:
    rows = (Row("a", {"z": "r1"}), Row("b", {"z": "r2"}), Row("c", {"z": "r1"}))
    plan = plan_scans("abc", *rows, layers={"new": "r2"})
    assert (plan.renames, plan.other_recipe, plan.other_layers) == ({}, 0, {"z": 3})
    assert get_due(plan) == dict.fromkeys("abc", ("new",))


@pytest.mark.parametrize(("z", "new", "due"), [("r1", "r2", "b"), ("r2", "r1", "a")])
def test_a_layer_with_as_many_cells_of_either_recipe_keeps_its_name(z: str, new: str, due: str) -> None:
    rows = (Row("a", {"z": "r1"}), Row("b", {"z": "r2"}))
    plan = plan_scans("ab", *rows, layers={"z": z, "new": new}, refresh=True)
    assert plan.renames == {}
    assert get_due(plan) == {name: ("z", "new") if name == due else ("new",) for name in "ab"}


def test_of_two_recipes_after_a_killed_refresh_the_more_frequent_one_decides_the_name() -> None:
    rows = (Row("a", {"z": "r1"}), Row("b", {"z": "r2"}), Row("c", {"z": "r1"}))
    plan = plan_scans("abc", *rows, layers={"z": "r2", "new": "r1"}, refresh=True)
    assert plan.renames == {"z": "new"}
    assert get_due(plan) == {"a": ("z",), "b": ("z", "new"), "c": ("z",)}


def test_renames_never_merge_two_layers_or_move_one_that_has_its_place() -> None:
    rng = random.Random(0)
    for _ in range(500):
        stored = {name: rng.choice("123") for name in rng.sample("abcde", rng.randint(1, 5))}
        layers = {name: rng.choice("123") for name in rng.sample("abcde", rng.randint(1, 5))}
        renames = find_renames(CellColumn(np.zeros(1, np.int32), [stored]), layers)
        assert all(layers[new] == stored[old] for old, new in renames.items())
        assert all(layers.get(old) != stored[old] for old in renames)
        assert len({renames.get(name, name) for name in stored}) == len(stored)
