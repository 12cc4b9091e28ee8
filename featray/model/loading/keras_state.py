"""Change global state of Keras for the time of a `with` block and restore it afterwards."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def register_objects(objects: dict[str, Any]) -> Iterator[None]:
    """Add `objects` ({registered name: class or function}) to Keras's global registry.

    For objects inside other objects, Keras looks in this registry before it looks in the `custom_objects`
    argument of `load_model` and in custom object scopes. The registry may hold another version of a class.
    """
    import keras

    registry = keras.saving.get_custom_objects()
    saved_registry = dict(registry)
    registry.update(objects)
    try:
        yield
    finally:
        registry.clear()
        registry.update(saved_registry)


@contextlib.contextmanager
def restart_layer_names() -> Iterator[None]:
    """Let Keras number automatic layer names (`conv3d_4`) from the start.

    Keras counts layers over the whole process. Without this, the name of a layer would depend on the models
    that were made before.
    """
    from keras.src.backend.common import global_state
    from keras.src.utils import naming

    saved_counters = global_state.get_global_attribute("object_name_uids")
    naming.reset_uids()
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", saved_counters)


@contextlib.contextmanager
def keep_layer_configs() -> Iterator[None]:
    """Let layers in an .h5 file keep two kinds of values that Keras changes before it makes the layer.

    Keras drops an `axis` that is a list of two or more; the layer then gets the default axis -1. It replaces
    a text that is the name of a function in `keras.layers`, such as `score_mode: dot`, with the function.
    """
    from keras.src import layers, models
    from keras.src.legacy.saving import saving_utils, serialization

    original = saving_utils.model_from_config
    model_classes = {"Functional": models.Functional, "Model": models.Model, "Sequential": models.Sequential}
    objects = {**vars(layers), "InputLayer": layers.InputLayer, **model_classes}
    classes = {name: value for name, value in objects.items() if not inspect.isfunction(value)}

    def model_from_config(config: Any, custom_objects: Any = None) -> Any:
        axis = config["config"].get("axis") if isinstance(config.get("config"), dict) else None
        if not isinstance(axis, list) or len(axis) < 2:
            return original(config, custom_objects)
        return serialization.deserialize_keras_object(
            config, module_objects=classes, custom_objects=custom_objects, printable_module_name="layer"
        )

    # Each thread has its own table of objects, which Keras fills when it loads its first model.
    table = vars(saving_utils.MODULE_OBJECTS)
    saved_table = dict(table)
    table["ALL_OBJECTS"] = classes
    saving_utils.model_from_config = model_from_config
    try:
        yield
    finally:
        saving_utils.model_from_config = original
        table.clear()
        table.update(saved_table)
