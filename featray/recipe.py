"""The recipe: everything that decides the values of a feature, and its short id.

Two features may be compared only if their recipe ids are equal. Settings that change values by less than 1e-5
(batch size, engine, number of workers) are not part of the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from featray.config import Config

NUMERICS = 1
"""Version of featray's numeric behavior; raise it when the same input gives other values."""


def make_recipe(config: Config, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as a dict that can be written as JSON.

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
        "preprocess": config.preprocess.model_dump(mode="json"),
        "model": dict(model),
    }


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change if any part of the recipe changes."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
