"""Find the config with which the scans of an output can be decoded again.

A run records its config in its folder. The recorded config lacks storage options and other secrets, and its
relative paths are relative to the working directory of that run. So it often works, but not always; then the
report needs the config file itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featray.config import Config, load
from featray.errors import ConfigError
from featray.output.dataset import Dataset
from featray.output.ledger import read_newest_runs
from featray.recipe import make_inputs_id
from featray.storage.expand import escape_path

WAY_OUT = "Pass the config file instead of the folder: `featray report CONFIG`."
_MAX_RUNS = 100
"""Newest runs to look at."""
_MASKED = "***"


@dataclass(frozen=True)
class FoundConfig:
    """A config, or the reason why it is missing.

    Attributes:
        config: The config; None if it is missing.
        is_recorded: Whether the config is the one that a run recorded, and not the user's file.
        problem: Why the config is missing, as a sentence; empty if it is there.
    """

    config: Config | None
    is_recorded: bool = False
    problem: str = ""

    @property
    def way_out(self) -> str:
        """A sentence with the remedy if the source or the model cannot be opened."""
        if self.is_recorded or self.config is None:
            return WAY_OUT
        return "Check the sections source and model of the config; `featray doctor CONFIG` does this."

    def explain_source(self) -> str:
        """Return why the scans cannot be read with this config, as a sentence; empty if nothing is known."""
        if self.config is None:
            return self.problem
        if self.is_recorded and _MASKED in self.config.source.storage_options.values():
            return "The scans were not read again, because the output does not hold their storage options."
        return ""

    def explain_model(self) -> str:
        """Return why the model cannot be loaded with this config, as a sentence; empty if nothing is known.

        Code that the folder of a run names is not run, because who may write to an output could then run code
        as any user who reports on it.
        """
        if self.config is None:
            return self.problem
        model = self.config.model
        if not self.is_recorded:
            return ""
        if _MASKED in model.storage_options.values():
            return "The model was not loaded, because the output does not hold its storage options."
        if model.trust or any(_is_file(code) for code in (model.builder or "", *model.custom_objects)):
            return "The model was not loaded, because it needs code that only the config file may name."
        return ""


def find_recorded_config(dataset: Dataset, recipe: str) -> FoundConfig:
    """Return the config of the newest run that read and preprocessed scans by a recipe.

    Args:
        dataset: The output. The section `output` of the result names it as the caller did.
        recipe: Recipe id of reading and preprocessing, as in the column `recipe` of `scans`.

    Raises:
        StorageError: The store does not answer.
    """
    config = next(_list_configs(dataset, recipe), None)
    if config is None:
        return FoundConfig(None, problem="No run of this output recorded the config of its scans.")
    try:
        return FoundConfig(load(_point_to(config, dataset)), is_recorded=True)
    except ConfigError:
        return FoundConfig(None, problem="The config that the newest run recorded cannot be used here.")


def _list_configs(dataset: Dataset, recipe: str) -> Iterator[dict[str, Any]]:
    """Yield the configs of the runs with this recipe, the newest first."""
    for run in read_newest_runs(dataset.store, _MAX_RUNS):
        if isinstance(run.get("config"), dict) and recipe in _list_recipe_ids(run):
            yield run["config"]


def _list_recipe_ids(run: dict[str, Any]) -> list[str]:
    """Return the ids that the rows of a run have: before and after an update from featray 0.1.0."""
    recipe = run.get("recipe")
    return [str(run.get("recipe_id")), *([make_inputs_id(recipe)] if isinstance(recipe, dict) else [])]


def _point_to(config: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Return a recorded config with the given output, without a cache that has secret options."""
    store, cache = dataset.store, config.get("cache") or {}
    output = {"uri": escape_path(store.uri), "storage_options": store.options}
    is_open = _MASKED not in (cache.get("storage_options") or {}).values()
    return {
        **config,
        "output": {**(config.get("output") or {}), **output},
        "cache": cache if is_open else {},
    }


def _is_file(code: str) -> bool:
    """Return whether a reference to code names a file instead of an installed package."""
    return ".py:" in code
