"""The recipe: everything that decides the values of a layer, and its short id.

A run has one recipe of all that it does. From it follow the ids that the tables hold: one of reading and
preprocessing (`scans.recipe`), and one per layer (`features.recipe`, `scans.layers`). The recipe of a layer
contains neither its name nor the other layers of the run. Two features may be compared only if their recipe
ids are equal. Settings that change values by less than 1e-5 (batch size, engine, number of workers) are not
part of the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from featray.config import Config, PreprocessConfig

NUMERICS = 1
"""Version of featray's numeric behavior; raise it when the same input gives other values."""


@dataclass(frozen=True)
class RecipeIds:
    """The ids that follow from the recipe of a run.

    Attributes:
        inputs: Id of reading and preprocessing, which decide the input of the model.
        layers: Name of each layer → id of its recipe.
        seed: Id of reading, preprocessing and model without its layers, from which the seeds of random layers
            are made. So the values of a random layer do not depend on the other layers.
    """

    inputs: str
    layers: dict[str, str]
    seed: str


def make_recipe(config: Config, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run as a dict that can be written as JSON.

    Args:
        config: Config of the run, from which the reading and preprocessing keys are taken.
        model: The model's part of the recipe: hashes, layers, pooling and compute type, as
            `Extractor.recipe_part` returns it.
    """
    return {
        "numerics": NUMERICS,
        "reading": {
            **config.source.model_dump(include={"rows", "volume"}),
            **config.policy.model_dump(include={"gantry_tilt", "irregular_spacing", "oblique"}),
        },
        "preprocess": _describe_preprocessing(config.preprocess),
        "model": dict(model),
    }


def _describe_preprocessing(preprocess: PreprocessConfig) -> dict[str, Any]:
    """Return the keys of the section, and their effects that featray 0.1.0 computed differently."""
    # It placed the centers of a manifest as if `area` kept the corners.
    is_corrected = preprocess.fit == "crop_pad" and preprocess.interpolation == "area"
    corrections = {"corrections": ["area_centers"]} if is_corrected and preprocess.align_corners else {}
    return {**preprocess.model_dump(mode="json"), **corrections}


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change if any part of the recipe changes."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_inputs_id(recipe: Mapping[str, Any]) -> str:
    """Return the id of reading and preprocessing in the recipe of a run."""
    return recipe_id(_select_inputs(recipe))


def make_recipe_ids(recipe: Mapping[str, Any]) -> RecipeIds:
    """Return the ids that follow from the recipe of a run, also from one that featray 0.1.0 has made."""
    inputs = _select_inputs(recipe)
    model = {name: part for name, part in recipe["model"].items() if name != "layers"}
    layers = {}
    for layer in recipe["model"]["layers"]:
        cut = {name: part for name, part in layer.items() if name != "name"}
        layers[layer["name"]] = recipe_id({**inputs, "model": {**model, "layer": cut}})
    return RecipeIds(recipe_id(inputs), layers, recipe_id({**inputs, "model": model}))


def _select_inputs(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in recipe.items() if name != "model"}


def select_recipe_layers(recipe: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the recipe of a run that would extract only some of the layers."""
    model = dict(recipe["model"])
    model["layers"] = [layer for layer in model["layers"] if layer["name"] in names]
    return {**recipe, "model": model}
