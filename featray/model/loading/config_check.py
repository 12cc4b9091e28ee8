"""Compare a loaded model with the description in its file, because Keras drops some values without an error.

In: a model that Keras has loaded, and the description of its file. Out: every value of a layer that differs.
Only values that can change the output of a layer are compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

_IGNORED_KEYS = {
    "name", "trainable", "dtype", "seed", "module", "registered_name", "build_config", "compile_config",
    "inbound_nodes", "input_layers", "output_layers", "shared_object_id", "batch_shape", "batch_input_shape",
    "build_input_shape", "sparse", "ragged", "optional", "autocast", "initializer",
}  # fmt: skip
"""Keys that do not change how a layer computes its output, or that each version of Keras writes in its own
form."""

_IGNORED_SUFFIXES = ("_initializer", "_regularizer", "_constraint")
"""Ends of keys that matter only for training: the weights come from the file."""


def find_config_differences(model: Any, config: dict[str, Any]) -> list[str]:
    """Return one text per value that differs between a loaded model and the description in its file.

    A value that only one of the two has, or that is None in the file, is not a difference: each version of
    Keras has its own defaults. A model that does not describe itself is not compared.

    Args:
        model: The loaded model.
        config: The description in the file, `ModelFile.config`.
    """
    import keras

    try:
        own = keras.saving.serialize_keras_object(model)
    except Exception as error:  # the code of custom layers, which may raise anything
        log.info("the model does not describe itself, so its layers are not compared", exc_info=error)
        return []
    return list(_compare_nodes(config, own, ""))


def _compare_nodes(saved: Any, own: Any, layer: str) -> Iterator[str]:
    """Yield a text for each value that differs; `layer` is the name and the class of the layer around it."""
    saved, own = _unwrap(saved), _unwrap(own)
    if isinstance(saved, dict) and isinstance(own, dict):
        layer = _describe_layer(saved) or layer
        for key in saved.keys() & own.keys():
            if key not in _IGNORED_KEYS and not key.endswith(_IGNORED_SUFFIXES):
                yield from _compare_values(key, saved[key], own[key], layer)
    elif isinstance(saved, list) and isinstance(own, list):
        for saved_item, own_item in zip(saved, own, strict=False):
            yield from _compare_nodes(saved_item, own_item, layer)


def _compare_values(key: str, saved: Any, own: Any, layer: str) -> Iterator[str]:
    """Yield a text for each difference between two values of one key."""
    saved, own = _unwrap(saved), _unwrap(own)
    if _holds_objects(saved) and _holds_objects(own):
        yield from _compare_nodes(saved, own, layer)
    elif saved is not None and key != "class_name" and not _is_equal(saved, own):
        yield f"layer {layer} has {key} {_shorten(own)}, the file says {_shorten(saved)}"


def _holds_objects(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


def _unwrap(value: Any) -> Any:
    """Return a value without the forms in which Keras writes tuples, arrays, functions and plain objects."""
    if not isinstance(value, dict):
        return list(value) if isinstance(value, tuple) else value
    class_name = value.get("class_name")
    if class_name == "__tuple__":
        return list(value.get("items", []))
    if class_name in ("__numpy__", "__tensor__"):
        inner = value.get("config") or value
        return inner.get("value") if isinstance(inner, dict) else inner
    if class_name in ("function", "__lambda__"):
        return None if class_name == "__lambda__" else value.get("config")
    return value


def _describe_layer(node: dict[str, Any]) -> str:
    """Return the name and the class of the layer that a node describes; empty if it describes none."""
    config = node.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    return f"{name!r} ({str(node.get('class_name')).rpartition('>')[2]})" if name else ""


def _is_equal(saved: Any, own: Any) -> bool:
    """Return whether two values say the same; a number equals a list of this number."""
    if isinstance(saved, dict) or isinstance(own, dict):
        return bool(_get_name(saved) == _get_name(own))
    if isinstance(saved, list) != isinstance(own, list):
        values, single = (saved, own) if isinstance(saved, list) else (own, saved)
        return bool(values) and all(_is_equal(value, single) for value in values)
    if isinstance(saved, list):
        return len(saved) == len(own) and all(
            _is_equal(_unwrap(a), _unwrap(b)) for a, b in zip(saved, own, strict=True)
        )
    if isinstance(saved, int | float) and isinstance(own, int | float):
        return math.isclose(saved, own, rel_tol=1e-6, abs_tol=1e-12) or (saved != saved and own != own)
    return bool(_get_name(saved) == _get_name(own))


def _get_name(value: Any) -> Any:
    """Return the name of an object or a function without its package and in lower case; else the value."""
    name = value.get("class_name") if isinstance(value, dict) else value
    return name.rpartition(">")[2].replace("_", "").lower() if isinstance(name, str) else name


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
