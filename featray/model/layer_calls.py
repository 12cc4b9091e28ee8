"""Watch every layer call of a Keras model, and name each call by its path in the model.

This module depends on one fact that Keras does not document: every layer call passes through
`Layer.__call__`.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from featray.model import keras_versions


@dataclass
class LayerCall:
    """A layer call in progress.

    Attributes:
        layer: The Keras layer that is called.
        key: Key of the call; empty for the root model.
        parts: Accepted names of each part of the path.
        calls: Number of calls so far that this layer made, by the name of the called layer.
        was_built: Whether the layer had its variables before the call.
        is_per_step: Whether a TimeDistributed layer of Keras 2 contains the call. The rows of the batch are
            then time steps. (Keras 3 calls such layers in another way, so they are not seen.)
    """

    layer: Any
    key: str = ""
    parts: tuple[tuple[str, ...], ...] = ()
    calls: Counter[str] = field(default_factory=Counter)
    was_built: bool = True
    is_per_step: bool = False


@contextlib.contextmanager
def intercept_layer_calls(
    root: Any,
    report: Callable[[LayerCall, Any, Any], None],
    report_failure: Callable[[LayerCall], Any] = id,
) -> Iterator[None]:
    """Call `report(layer_call, arguments, result)` after each layer call inside a call of `root`.

    Calls in other threads, calls outside `root` and the call of `root` itself are not reported. A call that
    raises an error is passed to `report_failure` instead, the innermost first and that of `root` last; by
    default nothing is done with it.
    """
    owner = threading.get_ident()
    stack: list[LayerCall] = []

    def make_replacement(original: Any) -> Any:
        def call_and_report(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner or (not stack and layer is not root):
                return original(layer, *args, **kwargs)
            layer_call = _push_call(stack, layer)
            try:
                with convert_python_branches(layer):
                    result = original(layer, *args, **kwargs)
            except Exception:
                report_failure(layer_call)
                raise
            finally:
                stack.pop()
            if stack:
                report(layer_call, (args, kwargs), result)
            return result

        return _exclude_from_autograph(call_and_report)

    originals = {cls: cls.__call__ for cls in keras_versions.list_layer_classes()}
    for cls, original in originals.items():
        cls.__call__ = make_replacement(original)
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def convert_python_branches(layer: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which AutoGraph is on for a layer of Keras 2, as it was when Keras 2 ran layers."""
    if not keras_versions.is_keras2_layer(layer):
        return contextlib.nullcontext()
    from tensorflow.python.autograph.core import ag_ctx

    context: contextlib.AbstractContextManager[Any] = ag_ctx.ControlStatusCtx(ag_ctx.Status.ENABLED)
    return context


def _exclude_from_autograph(function: Callable[..., Any]) -> Any:
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def list_inner_calls(parent: LayerCall) -> list[LayerCall]:
    """Return one call for each layer inside a model, at any depth, as if the model called it once."""
    calls: list[LayerCall] = []
    for layer in getattr(parent.layer, "layers", []):
        if type(layer).__name__ != "InputLayer":
            layer_call = _make_inner_call(parent, layer, 1, _list_names(parent.layer, layer))
            calls += [layer_call, *list_inner_calls(layer_call)]
    return calls


def flatten_tensors(structure: Any) -> list[tuple[str, Any]]:
    """Return (suffix, tensor) for each tensor in the result or the arguments of a layer call.

    The suffix is empty for a single tensor, and `:0`, `:1` or `:key` for one of several.
    """
    import keras

    leaves = keras.tree.flatten_with_path(structure)
    return [(":" + ".".join(str(part) for part in path) if path else "", leaf) for path, leaf in leaves]


def _push_call(stack: list[LayerCall], layer: Any) -> LayerCall:
    """Append a call of `layer`, made by the last call on the stack, and return it."""
    if not stack:
        layer_call = LayerCall(layer)
    else:
        parent = stack[-1]
        names = _list_names(parent.layer, layer)
        parent.calls[names[0]] += 1
        layer_call = _make_inner_call(parent, layer, parent.calls[names[0]], names)
    stack.append(layer_call)
    return layer_call


def _make_inner_call(parent: LayerCall, layer: Any, number: int, names: tuple[str, ...]) -> LayerCall:
    """Return a call of `layer` inside `parent`.

    Keras 2 allows `/` in the name of a layer (`conv1/conv`). Such a name becomes several parts of the path.

    Args:
        parent: The call that makes this call.
        layer: The layer.
        number: Number of the call among those of this name in `parent`.
        names: Accepted names of the layer.
    """
    *first, last = names[0].split("/")
    key = "/".join([*(f"{name}#1" for name in first), f"{last}#{number}"])
    return LayerCall(
        layer,
        f"{parent.key}/{key}" if parent.key else key,
        (*parent.parts, *((name,) for name in first), (last,) if first else names),
        was_built=bool(getattr(layer, "built", True)),
        is_per_step=parent.is_per_step or _merges_steps(parent.layer),
    )


def _merges_steps(layer: Any) -> bool:
    """Return whether a layer calls its inner layer once, with the time steps of all inputs as one batch."""
    return keras_versions.is_keras2_layer(layer) and type(layer).__name__ == "TimeDistributed"


def _list_names(parent: Any, layer: Any) -> tuple[str, ...]:
    """Return the names of `layer` inside `parent`, first the one to show to users.

    The first is the name of the layer. If Keras generated this name (`dense_3`) and an attribute of the
    parent holds the layer, the first is the attribute name: `self.blocks[1]` is `blocks.1`.
    """
    name, attribute = str(layer.name), _find_attribute(parent, layer)
    if not attribute or attribute == name:
        return (name,)
    stem = re.sub(r"_\d+$", "", name).replace("_", "")
    is_generated = stem == type(layer).__name__.replace("_", "").lower()
    return (attribute, name) if is_generated else (name, attribute)


def _find_attribute(parent: Any, layer: Any) -> str:
    """Return the name of the public attribute of `parent` that holds `layer`; empty if none does.

    A layer in a list, tuple or dict is named `attribute.index` or `attribute.key`.
    """
    for name, value in vars(parent).items():
        if name.startswith("_"):
            continue
        if value is layer:
            return str(name)
        for key, item in _list_items(value):
            if item is layer:
                return f"{name}.{key}"
    return ""


def _list_items(value: Any) -> list[tuple[Any, Any]]:
    """Return (key or index, item) of a dict, list or tuple; empty for other values."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []
