"""Layers that only Keras 2 has: TensorFlow operations used on tensors of a model, and added losses.

In: what a Keras 2 file says of them. Out: Keras 3 layers that compute the same. Only functions that
compute and do nothing else are run. Importing this imports Keras.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import keras
import tensorflow as tf

from featray.model.loading.keras2 import ELLIPSIS


class TFOpLambda(keras.Operation):  # type: ignore[misc]  # Keras ships no types
    """One TensorFlow function, `x * 2` or `tf.reduce_sum(x)`, by the name that Keras 2 wrote.

    An operation and no layer, as such calls are in Keras 3: layers refuse arguments that are no tensors.
    """

    def __init__(self, function: str, name: str | None = None, **_keys: Any) -> None:
        """Keep the function called `function` below `tf`, such as `math.multiply`."""
        super().__init__(name=name)
        self._function = reduce(getattr, function.split("."), tf)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the function takes -> what it returns."""
        if args and isinstance(args[0], int | float) and tf.is_tensor(kwargs.get("y")):
            # `1 - tensor`: Python's operators take the number in the tensor's type.
            args = (tf.constant(args[0], kwargs["y"].dtype), *args[1:])
        return self._function(*args, **kwargs)


class SlicingOpLambda(keras.Operation):  # type: ignore[misc]
    """A slice of a tensor, `x[:, 1:, ..., 0]`, by what Keras 2 wrote of it."""

    def __init__(self, name: str | None = None, **_keys: Any) -> None:
        """Keep the name; the function is always `tf.__operators__.getitem`."""
        super().__init__(name=name)

    def call(self, x: Any, slice_spec: Any) -> Any:
        """Tensor -> the part of it; numbers in the slice may be tensors too."""
        spec = slice_spec if isinstance(slice_spec, list | tuple) else [slice_spec]
        return x[tuple(_index(part) for part in spec)]


class PassThrough(keras.layers.Layer):  # type: ignore[misc]
    """Stands for layers that only note a loss or a metric: their output is their input."""

    def __init__(self, name: str | None = None, dtype: Any = None, **_keys: Any) -> None:
        """Keep name and type; what else the file says is about training."""
        super().__init__(name=name, dtype=dtype)

    def call(self, inputs: Any) -> Any:
        """Return the input."""
        return inputs


STAND_INS: dict[str, Any] = {
    "TFOpLambda": TFOpLambda,
    "SlicingOpLambda": SlicingOpLambda,
    "AddLoss": PassThrough,
    "AddMetric": PassThrough,
}
"""By the class name in the file."""


def _index(part: Any) -> Any:
    if isinstance(part, dict) and "start" in part:
        return slice(part["start"], part["stop"], part["step"])
    return Ellipsis if isinstance(part, str) and part == ELLIPSIS else part
