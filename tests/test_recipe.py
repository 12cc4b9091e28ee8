"""Recipes: what changes the ids of reading and preprocessing, and of each layer, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from featray.config import load
from featray.recipe import RecipeIds, make_recipe, make_recipe_ids

CONV: dict[str, Any] = {"name": "conv", "path": "encoder/conv", "pool": "avg"}
MEAN: dict[str, Any] = {"name": "z_mean", "path": "encoder/z_mean", "pool": "none"}


def make_ids(
    layers: list[dict[str, Any]], sha256: str = "a", numerics: int = 1, **preprocess: Any
) -> RecipeIds:
    sections: dict[str, Any] = {"source": {"uri": "ct"}, "output": {"uri": "out"}, "preprocess": preprocess}
    config = load({**sections, "model": {"uri": "m.keras", "layers": ["conv"]}})
    model = {"sha256": sha256, "submodel": None, "layers": layers, "compute_dtype": ["float32"]}
    return make_recipe_ids({**make_recipe(config, model), "numerics": numerics})


def test_the_id_of_a_layer_does_not_depend_on_the_layers_beside_it_or_on_its_name() -> None:
    alone, both = make_ids([CONV]), make_ids([MEAN, CONV])
    assert both.layers["conv"] == alone.layers["conv"] != both.layers["z_mean"]
    renamed = make_ids([{**CONV, "name": "features"}])
    assert renamed.layers == {"features": alone.layers["conv"]}
    assert both.inputs == alone.inputs
    assert both.seed == alone.seed


@pytest.mark.parametrize(
    "changed",
    [{"path": "encoder/conv_2"}, {"pool": "max"}, {"pool": "grid", "grid": [2, 2, 2]}],
)
def test_the_cut_and_the_pooling_change_the_id_of_the_layer_alone(changed: dict[str, Any]) -> None:
    before, after = make_ids([CONV, MEAN]), make_ids([{**CONV, **changed}, MEAN])
    assert after.layers["conv"] != before.layers["conv"]
    assert after.layers["z_mean"] == before.layers["z_mean"]
    assert after.inputs == before.inputs


def test_the_model_changes_the_ids_of_all_layers_but_not_that_of_the_inputs() -> None:
    before, after = make_ids([CONV, MEAN]), make_ids([CONV, MEAN], sha256="b")
    assert not set(before.layers.values()) & set(after.layers.values())
    assert after.inputs == before.inputs
    assert after.seed != before.seed


@pytest.mark.parametrize("changed", [{"window": (-160, 240)}, {"size": (8, 8, 8)}, {"numerics": 2}])
def test_reading_preprocessing_and_numerics_change_all_ids(changed: dict[str, Any]) -> None:
    before, after = make_ids([CONV]), make_ids([CONV], **changed)
    assert after.inputs != before.inputs
    assert after.layers != before.layers
    assert after.seed != before.seed


def test_the_ids_are_those_that_outputs_hold() -> None:
    """Never change these ids to make the test pass: the outputs of users would become stale."""
    ids = make_ids([CONV, MEAN], sha256="0" * 64)
    assert ids == RecipeIds(
        inputs="1d4a86fc77f42dad",
        layers={"conv": "47c40780ce36a49a", "z_mean": "baf421b854d9f894"},
        seed="a448a99ce335b552",
    )
