"""The recipe: everything that decides a feature's value, and its short id.

Two features may be compared only when their recipe ids are equal. What does not change a value beyond
1e-5 (batch size, engine, number of workers) is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from featray.config import Config

NUMERICS = 1
"""Version of featray's numeric behaviour; raise it when the same input would give other values."""


def make_recipe(config: Config, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as a JSON-ready dict.

    Args:
        config: The run's; what decides how a scan is read and preprocessed goes in.
        model: The model's part: hashes, layers, pooling, compute type (`Extractor.recipe_part`).
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
    """Return 16 hexadecimal digits that change whenever any part of the recipe does."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
