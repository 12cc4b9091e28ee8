"""Define the layers that replace layers of a file which featray does not run.

In: the base class of layers of Keras 2 or Keras 3. Out: the classes of the replacements. Importing this
module does not import Keras.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

PASS_THROUGH, MISSING_CODE, NAMED_FUNCTION = "PassThrough", "MissingCode", "NamedFunction"

REASON_MARK = "featray: "
"""Begin of the message in the graph operation by which a replacement fails."""


def make_replacement_classes(layer_class: Any, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return {class name: class} of the replacements.

    Args:
        layer_class: Base class of layers of the Keras that loads the file.
        functions: The functions of the config, by the name of the layer that each replaces.
    """

    class PassThrough(layer_class):  # type: ignore[misc]
        """Return the input. Replaces layers that only record a loss or a metric."""

        def call(self, inputs: Any) -> Any:
            return inputs

    class MissingCode(layer_class):  # type: ignore[misc]
        """Return a value that cannot be computed. Replaces a layer whose code does not run.

        The value has the shape that is most likely right, so that the layers behind it can be built.
        """

        def __init__(self, reason: str, value_shape: Any = None, **keys: Any) -> None:
            super().__init__(**keys)
            self.reason, self.value_shape = reason, value_shape

        def call(self, *args: Any, **kwargs: Any) -> Any:
            return _make_failing_value((args, kwargs), self.reason, self.value_shape)

    class NamedFunction(layer_class):  # type: ignore[misc]
        """Call the function that the config gives for this layer."""

        def __init__(self, arguments: Mapping[str, Any] | None = None, **keys: Any) -> None:
            super().__init__(**keys)
            self.arguments = dict(arguments or {})

        def call(self, *args: Any, **kwargs: Any) -> Any:
            function = functions[self.name]
            return function(*args, **{**self.arguments, **_select_accepted(function, kwargs)})

    return {cls.__name__: cls for cls in (PassThrough, MissingCode, NamedFunction)}


def _select_accepted(function: Callable[..., Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments without those that Keras adds and that the function does not take."""
    accepted = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {
        key: value
        for key, value in keywords.items()
        if takes_all or key in accepted or key not in ("training", "mask")
    }


def _make_failing_value(arguments: Any, reason: str, value_shape: Any) -> Any:
    """Return a tensor that fails with `reason` when it is computed.

    The operation that fails has no side effects, so TensorFlow leaves it out where nothing needs it.
    """
    import tensorflow as tf

    tensor = next(item for item in tf.nest.flatten(arguments) if tf.is_tensor(item))
    failing = tf.raw_ops.CheckNumerics(tensor=tf.constant(float("nan")), message=REASON_MARK + reason)
    if value_shape is None:
        value, shape = tf.fill(tf.shape(tensor), failing), tensor.shape
    else:
        sizes = [int(size) for size in value_shape]
        value, shape = tf.fill(tf.concat([tf.shape(tensor)[:1], sizes], 0), failing), [None, *sizes]
    value.set_shape(shape)
    return tf.cast(value, tensor.dtype) if tensor.dtype.is_floating else value


def find_missing_code(graph: Any) -> dict[str, str]:
    """Return {name of a graph operation: reason} of each that depends on the code that is missing."""
    reasons: dict[str, str] = {}
    for operation in graph.get_operations():  # in an order in which inputs come first
        reason = next((reasons[item.op.name] for item in operation.inputs if item.op.name in reasons), "")
        if operation.type == "CheckNumerics":
            message = operation.get_attr("message").decode()
            reason = message.removeprefix(REASON_MARK) if message.startswith(REASON_MARK) else reason
        if reason:
            reasons[operation.name] = reason
    return reasons
