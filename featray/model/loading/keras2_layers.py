"""Replace layers that only Keras 2 has: TensorFlow operations used as layers, and added losses and metrics.

In: the configs of such layers in a Keras 2 file. Out: Keras 3 objects that compute the same. They run only
TensorFlow functions without side effects. Importing this module imports Keras and TensorFlow.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import keras
import tensorflow as tf

from featray.model.loading.keras2 import ELLIPSIS


class TFOpLambda(keras.Operation):  # type: ignore[misc]  # Keras ships no types
    """One TensorFlow function, such as `x * 2` or `tf.reduce_sum(x)`, given by its name in the file.

    It is a Keras operation and not a layer, because a layer refuses arguments that are not tensors.
    """

    def __init__(self, function: str, name: str | None = None, **_config: Any) -> None:
        """Look up `function` below `tf`, e.g. `math.multiply`."""
        super().__init__(name=name)
        self._function = reduce(getattr, function.split("."), tf)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with its own arguments and return its result."""
        if args and isinstance(args[0], int | float) and tf.is_tensor(kwargs.get("y")):
            # In `1 - tensor`, Python's operators convert the number to the type of the tensor.
            args = (tf.constant(args[0], kwargs["y"].dtype), *args[1:])
        return self._function(*args, **kwargs)


class SlicingOpLambda(keras.Operation):  # type: ignore[misc]
    """One slice of a tensor, such as `x[:, 1:, ..., 0]`, given by its description in the file."""

    def __init__(self, name: str | None = None, **_config: Any) -> None:
        """Store the name. The function in the config is always `tf.__operators__.getitem`."""
        super().__init__(name=name)

    def call(self, x: Any, slice_spec: Any) -> Any:
        """Return the slice of `x`; the numbers in `slice_spec` may be tensors."""
        spec = slice_spec if isinstance(slice_spec, list | tuple) else [slice_spec]
        return x[tuple(_decode_index(part) for part in spec)]


class PassThrough(keras.layers.Layer):  # type: ignore[misc]
    """Return the input. Replaces layers that only record a loss or a metric."""

    def __init__(self, name: str | None = None, dtype: Any = None, **_config: Any) -> None:
        """Store name and type. The rest of the config is about training."""
        super().__init__(name=name, dtype=dtype)

    def call(self, inputs: Any) -> Any:
        """Return the input."""
        return inputs


REPLACEMENTS: dict[str, Any] = {
    "TFOpLambda": TFOpLambda,
    "SlicingOpLambda": SlicingOpLambda,
    "AddLoss": PassThrough,
    "AddMetric": PassThrough,
}
"""The replacement of each class that only Keras 2 has, by the class name in the file."""


def _decode_index(part: Any) -> Any:
    """Return one part of a slice: a slice, an ellipsis, a number or a tensor."""
    if isinstance(part, dict) and "start" in part:
        return slice(part["start"], part["stop"], part["step"])
    return Ellipsis if isinstance(part, str) and part == ELLIPSIS else part
