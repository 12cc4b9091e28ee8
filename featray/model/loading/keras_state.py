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
