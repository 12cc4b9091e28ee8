"""Change global state of Keras for the time of a `with` block and restore it afterwards."""

from __future__ import annotations

import contextlib
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
def keep_list_axes() -> Iterator[None]:
    """Let layers in an .h5 file keep an `axis` that is a list of two or more.

    Keras drops it before it makes the layer, which then gets the default axis -1.
    """
    from keras.src.legacy.saving import saving_utils, serialization

    original = saving_utils.model_from_config

    def model_from_config(config: Any, custom_objects: Any = None) -> Any:
        axis = config["config"].get("axis") if isinstance(config.get("config"), dict) else None
        if not isinstance(axis, list) or len(axis) < 2:
            return original(config, custom_objects)
        return serialization.deserialize_keras_object(
            config,
            module_objects=saving_utils.MODULE_OBJECTS.ALL_OBJECTS,  # exists: the model is made before
            custom_objects=custom_objects,
            printable_module_name="layer",
        )

    saving_utils.model_from_config = model_from_config
    try:
        yield
    finally:
        saving_utils.model_from_config = original
