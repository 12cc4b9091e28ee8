"""Read facts that the runs of an output recorded about its layers: pooling, path and place in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featray.output.ledger import read_newest_runs
from featray.recipe import make_recipe_ids
from featray.storage.store import Store

_VIEWS = {"avg": "mean", "max": "max", "avgmax": "mean and max", "grid": "grid"}
"""Pooling of the config → word for the view. Without pooling, the shape of the values decides."""
_MAX_RUNS = 100
"""Newest runs to read. A layer that only older runs wrote has no facts."""


@dataclass(frozen=True)
class LayerFacts:
    """Facts that a run recorded about a layer.

    Attributes:
        view: `mean`, `max`, `mean and max` or `grid`; empty without pooling, and if it is not known.
        path: Path in the model; empty if it is not known.
        position: Sorts the layers in network order. Layers of other models, and layers whose position is not
            known, follow those of the newest run.
        is_sampling: Whether the layer samples; None if it is not known.
    """

    view: str = ""
    path: str = ""
    position: tuple[int, int, int] = (_MAX_RUNS, 0, 0)
    is_sampling: bool | None = None


class LayerFactsByRecipe:
    """Facts of layers by their recipe, or by their name for rows of featray 0.1.0."""

    def __init__(self, by_recipe: Mapping[str, LayerFacts], by_name: Mapping[str, LayerFacts]) -> None:
        self._by_recipe, self._by_name = by_recipe, by_name

    def find(self, name: str, recipe: str) -> LayerFacts:
        """Return the facts of a layer; facts without content if no run recorded any."""
        return self._by_recipe.get(recipe) or self._by_name.get(name) or LayerFacts()


def read_layer_facts(store: Store) -> LayerFactsByRecipe:
    """Read run.json of the newest runs.

    Raises:
        StorageError: The store does not answer.
    """
    by_recipe: dict[str, LayerFacts] = {}
    by_name: dict[str, LayerFacts] = {}
    models: list[str] = []
    for run in read_newest_runs(store, _MAX_RUNS):
        if not isinstance(run.get("recipe"), dict):
            continue
        model = str(run["recipe"]["model"]["sha256"])
        if model not in models:
            models.append(model)
        facts = _describe_layers(run, models.index(model))
        recipes = make_recipe_ids(run["recipe"]).layers
        by_recipe = {recipes[name]: fact for name, fact in facts.items()} | by_recipe
        by_name = facts | by_name
    return LayerFactsByRecipe(by_recipe, by_name)


def _describe_layers(run: Mapping[str, Any], model: int) -> dict[str, LayerFacts]:
    """Return name → facts of the layers of a run; `model` is the number of its model, the newest first."""
    positions = run.get("layer_positions") or {}
    sampling = run.get("sampling_layers")
    order = {name: number for number, name in enumerate(run.get("layers") or [])}
    return {
        layer["name"]: LayerFacts(
            view=_VIEWS.get(layer["pool"], ""),
            path=layer["path"],
            position=(model, positions.get(layer["name"], 0), order.get(layer["name"], len(order))),
            is_sampling=None if sampling is None else layer["name"] in sampling,
        )
        for layer in run["recipe"]["model"]["layers"]
    }
