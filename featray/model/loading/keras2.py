"""Load models of Keras 1 and Keras 2 with Keras 2 itself, the package tf_keras.

In: a .keras or .h5 file and the description of its model. Out: a model of tf_keras, which computes as Keras 2
did. Layers of Keras 3 among the custom objects are adapted. Nothing here decides which code may run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featray.errors import ModelError
from featray.model.loading import readable_file
from featray.model.loading.model_file import ModelFile, ModelFormat


def is_keras2_file(content: ModelFile) -> bool:
    """Return whether Keras 1 or 2 wrote a file.

    Keras 3 always writes its version; a whole-model .h5 without a version is one of Keras 1.
    """
    if content.format is ModelFormat.WHOLE_H5 and not content.keras_version:
        return True
    return is_older_than_keras3(content.keras_version)


def is_older_than_keras3(keras_version: str) -> bool:
    """Return whether this is a version of Keras 1 or 2."""
    return keras_version.split(".")[0] in ("1", "2")


def load_archive(path: Path, config: dict[str, Any], objects: Mapping[str, Any], *, trust: bool) -> Any:
    """Return the model in a .keras file, not compiled.

    Args:
        path: The file; its name may have any suffix.
        config: The description of the model to load instead of the one in the file.
        objects: Custom classes and functions by the names under which the description refers to them.
        trust: Whether Python code in the description may run.
    """
    import tf_keras

    adapted = _adapt_objects(objects)
    with (
        tf_keras.saving.custom_object_scope(adapted),
        readable_file.open_with_config(path, config) as readable,
    ):
        return tf_keras.models.load_model(
            str(readable), custom_objects=adapted, compile=False, safe_mode=not trust
        )


def build_model(config: dict[str, Any], objects: Mapping[str, Any], *, trust: bool) -> Any:
    """Return the model that a description describes, with random weights.

    Args:
        config: The description of the model in the form of an .h5 file.
        objects: Custom classes and functions by the names under which the description refers to them.
        trust: Whether Python code in the description may run.
    """
    import tf_keras
    from tf_keras.src.saving import serialization_lib
    from tf_keras.src.saving.legacy.saved_model import json_utils

    adapted = _adapt_objects(objects)
    with tf_keras.saving.custom_object_scope(adapted), serialization_lib.SafeModeScope(not trust):
        return tf_keras.models.model_from_config(json_utils.decode(json.dumps(config)), adapted)


def set_compute_dtype(model: Any, dtype: str) -> None:
    """Let every layer of a loaded model of Keras 2 compute in `dtype`.

    Raises:
        ModelError: Keras 2 sets half precision only when it makes a layer.
    """
    for layer in model._flatten_layers():
        if dtype == "float32":
            layer._set_dtype_policy(dtype)
        elif layer.compute_dtype != dtype:
            raise ModelError(
                f"compute: layer {layer.name!r} of a Keras 2 model computes in {layer.compute_dtype}, and "
                f"Keras 2 cannot change this to {dtype} afterwards; leave model.compute out"
            )


def _adapt_objects(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return custom objects for Keras 2: layer classes of Keras 3 are wrapped in classes of Keras 2."""
    import keras

    from featray.model.loading import keras3_adapter

    return {
        name: keras3_adapter.adapt_layer_class(value)
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
        else value
        for name, value in objects.items()
    }
