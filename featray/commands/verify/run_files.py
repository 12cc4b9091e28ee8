"""Read the facts about each recipe of the scans table from the run.json files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.commands.verify.read_scans import ScansTable
from featray.output.ledger import MAX_RUNS_PER_RECIPE, read_run
from featray.recipe import make_inputs_id
from featray.storage.store import Store


@dataclass(frozen=True)
class RecipeFacts:
    """Facts that a run recorded about a recipe of the scans table.

    Attributes:
        layers: Names of the layers that have this recipe; empty unless a run of featray 0.1.0 recorded them.
        is_fixed_size: Whether all inputs have the same size, so that all features of a layer have one shape.
        has_layer_recipes: Whether the run gave each layer a recipe of its own, which 0.1.0 did not.
    """

    layers: frozenset[str] = frozenset()
    is_fixed_size: bool = False
    has_layer_recipes: bool = False


def read_recipe_facts(store: Store, scans: ScansTable) -> dict[int, RecipeFacts]:
    """Return the facts about each recipe of the scans table, by the recipe's code in `scans.recipe`."""
    facts_by_code = {}
    for code, recipe in enumerate(scans.recipe.values):
        is_of_recipe = (scans.recipe.codes == code) & (scans.patches > 0)
        run_codes = np.unique(scans.run.codes[is_of_recipe])
        run_ids = sorted((scans.run.values[run_code] for run_code in run_codes), reverse=True)
        candidates = (
            _make_facts(read_run(store, run_id), recipe) for run_id in run_ids[:MAX_RUNS_PER_RECIPE]
        )
        facts_by_code[code] = next((facts for facts in candidates if facts), RecipeFacts())
    return facts_by_code


def _make_facts(run: Mapping[str, Any], recipe: str) -> RecipeFacts | None:
    """Return the facts that a run recorded about a recipe; None if the run has another recipe.

    The recorded id of a run of featray 0.1.0 is in the rows of 0.1.0. In rows that the present version has
    changed, it is the id of reading and preprocessing.
    """
    whole, has_layer_recipes = run.get("recipe"), "layer_recipes" in run
    inputs_id = make_inputs_id(whole) if isinstance(whole, dict) else None
    if recipe not in (run.get("recipe_id"), inputs_id):
        return None
    preprocess = (run.get("config") or {}).get("preprocess") or {}
    is_of_all_layers = recipe == run.get("recipe_id") and not has_layer_recipes
    return RecipeFacts(
        layers=frozenset(run.get("layers") or ()) if is_of_all_layers else frozenset(),
        is_fixed_size=preprocess.get("size") is not None,
        has_layer_recipes=has_layer_recipes,
    )
