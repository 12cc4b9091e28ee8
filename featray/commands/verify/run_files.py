"""What the runs' own files say of a recipe: which layers it has, and whether its input has one size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.commands.verify.read_scans import Ledger
from featray.output.dataset import RUNS
from featray.storage.store import Store

LOOKS = 20
"""Runs to ask about one recipe; a run that was killed has left no file."""


@dataclass(frozen=True)
class RecipeFacts:
    """Of one recipe.

    Attributes:
        layers: Names of its layers; empty where no run tells.
        is_fixed_size: Whether every input has the same size, so every feature of a layer the same shape.
    """

    layers: frozenset[str] = frozenset()
    is_fixed_size: bool = False


def recipe_facts(store: Store, ledger: Ledger) -> dict[int, RecipeFacts]:
    """Return what is known of each recipe of the ledger, by its code."""
    facts = {}
    for code, recipe in enumerate(ledger.recipe.values):
        rows = (ledger.recipe.of_row == code) & ledger.is_ok
        runs = sorted((ledger.run.values[run] for run in np.unique(ledger.run.of_row[rows])), reverse=True)
        told = (_facts(store, run, recipe) for run in runs[:LOOKS])
        facts[code] = next((found for found in told if found), RecipeFacts())
    return facts


def _facts(store: Store, run_id: str, recipe: str) -> RecipeFacts | None:
    """Return what one run says of a recipe; None when it has left no file, or one about another recipe."""
    if not run_id or "/" in run_id:  # no run has such an id; it must not lead out of the folder
        return None
    try:
        run: Any = json.loads(store.read(f"{RUNS}/{run_id}/run.json"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(run, dict) or run.get("recipe_id") != recipe:
        return None
    preprocess = (run.get("config") or {}).get("preprocess") or {}
    return RecipeFacts(frozenset(run.get("layers") or ()), preprocess.get("size") is not None)
