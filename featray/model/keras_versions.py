"""Tell models of Keras 3 (package `keras`) from models of Keras 2 (package `tf_keras`).

In: a layer or a model. Out: which Keras it belongs to. The extractor treats both in the same way, because the
layers of both run in the same TensorFlow graph. `tf_keras` is imported only to load a file of Keras 2, or by
code of the user; nothing here imports it.
"""

from __future__ import annotations

import sys
from typing import Any

KERAS_PACKAGES = ("keras", "tf_keras")
"""The packages whose layers are part of Keras 3 or Keras 2."""


def list_layer_classes() -> list[Any]:
    """Return the base class of all layers, for each Keras that this process has imported."""
    import keras

    keras2 = sys.modules.get("tf_keras")
    return [keras.layers.Layer, *([keras2.layers.Layer] if keras2 is not None else [])]


def list_model_classes() -> list[Any]:
    """Return the base class of all models, for each Keras that this process has imported."""
    import keras

    keras2 = sys.modules.get("tf_keras")
    return [keras.Model, *([keras2.Model] if keras2 is not None else [])]


def is_layer(value: Any) -> bool:
    """Return whether a value is a layer or a model of any Keras."""
    return isinstance(value, tuple(list_layer_classes()))


def is_keras2_layer(value: Any) -> bool:
    """Return whether a value is a layer or a model of Keras 2."""
    keras2 = sys.modules.get("tf_keras")
    return keras2 is not None and isinstance(value, keras2.layers.Layer)


def is_keras2_class(value: Any) -> bool:
    """Return whether a value is a class of layers of Keras 2."""
    keras2 = sys.modules.get("tf_keras")
    return keras2 is not None and isinstance(value, type) and issubclass(value, keras2.layers.Layer)


def get_weight_name(weight: Any) -> str:
    """Return the name of a weight for messages, such as `conv/kernel`."""
    return str(getattr(weight, "path", None) or weight.name)
