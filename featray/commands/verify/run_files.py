"""Read the layers and the input size of each recipe from the run.json files of its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.commands.verify.read_scans import ScansTable
from featray.output.dataset import RUNS
from featray.storage.store import Store

MAX_RUNS_PER_RECIPE = 20
"""Number of runs to try for one recipe; a run that was killed has no run.json."""


@dataclass(frozen=True)
class RecipeFacts:
    """What the runs of one recipe recorded about it.

    Attributes:
        layers: Names of its layers; empty if no run recorded them.
        is_fixed_size: Whether all inputs have the same size, so that all features of a layer have one shape.
    """

    layers: frozenset[str] = frozenset()
    is_fixed_size: bool = False


def read_recipe_facts(store: Store, scans: ScansTable) -> dict[int, RecipeFacts]:
    """Return the facts about each recipe of the scans table, by the recipe's code in `scans.recipe`."""
    facts_by_code = {}
    for code, recipe in enumerate(scans.recipe.values):
        is_of_recipe = (scans.recipe.codes == code) & scans.is_ok
        run_codes = np.unique(scans.run.codes[is_of_recipe])
        run_ids = sorted((scans.run.values[run_code] for run_code in run_codes), reverse=True)
        candidates = (_read_facts(store, run_id, recipe) for run_id in run_ids[:MAX_RUNS_PER_RECIPE])
        facts_by_code[code] = next((facts for facts in candidates if facts), RecipeFacts())
    return facts_by_code


def _read_facts(store: Store, run_id: str, recipe: str) -> RecipeFacts | None:
    """Return what a run recorded about a recipe; None without run.json, or if it is about another recipe."""
    if not run_id or "/" in run_id:  # not the id of a run; the path must not lead out of the folder
        return None
    try:
        run: Any = json.loads(store.read(f"{RUNS}/{run_id}/run.json"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(run, dict) or run.get("recipe_id") != recipe:
        return None
    preprocess = (run.get("config") or {}).get("preprocess") or {}
    return RecipeFacts(frozenset(run.get("layers") or ()), preprocess.get("size") is not None)
