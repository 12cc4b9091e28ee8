"""Make random inputs in the range of values that a model takes.

In: the input of a model in a traced graph, and the model. Out: random inputs (probes), with which noise and
dependence on the batch are found. A model that casts its input to whole numbers gets whole numbers: random
values in [0, 1) would all become 0, and inputs that are equal show nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PASSING_OPS = {"Identity", "Reshape", "ExpandDims", "Squeeze", "Transpose", "StopGradient"}
"""Operations that pass on the values of their first input."""

_MODERATE_LIMIT = 255
"""Largest probe for whole numbers of many bits, whose range in use is not known."""

_CATEGORY_ATTRIBUTES = ("input_dim", "num_tokens")
"""Attributes of Embedding and CategoryEncoding: the number of categories, the first value out of range."""


@dataclass(frozen=True)
class ProbeRange:
    """The range of the random inputs of a model.

    Attributes:
        low: Smallest value.
        high: Largest value; for numbers that are not whole, the first value above the range.
        dtype: Name of the type of whole numbers to which the model casts its input; empty if it does not.
    """

    low: int = 0
    high: int = 1
    dtype: str = ""

    def draw(self, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return `count` different random inputs, the same ones in every process."""
        rng = np.random.default_rng(0)
        if not self.dtype:
            return rng.random((count, *shape), np.float32)
        return rng.integers(self.low, self.high, (count, *shape), endpoint=True).astype(np.float32)

    def list_attempts(self) -> list[ProbeRange]:
        """Return this range, and for whole numbers the smallest range, which suits any table of a model."""
        smallest = ProbeRange(0, 1, self.dtype)
        return [self, smallest] if self.dtype and self != smallest else [self]


UNIT_RANGE = ProbeRange()
"""Numbers in [0, 1)."""


def find_probe_range(model: Any, input_tensor: Any) -> ProbeRange:
    """Return the range of the values that a model takes.

    Args:
        model: The Keras model.
        input_tensor: The tensor of its batch in a graph into which the model was traced.
    """
    import tensorflow as tf

    dtypes = {tf.as_dtype(dtype) for dtype in _find_integer_casts(input_tensor)}
    if not dtypes:
        return UNIT_RANGE
    low = max(0 if dtype.is_bool else max(dtype.min, -_MODERATE_LIMIT) for dtype in dtypes)
    high = min(1 if dtype.is_bool else min(dtype.max, _MODERATE_LIMIT) for dtype in dtypes)
    is_byte = all(dtype.size == 1 for dtype in dtypes)
    counts = _list_category_counts(model)
    limit = min(counts, default=high + 1) - 1
    name = min(dtype.name for dtype in dtypes)
    return ProbeRange(low if is_byte and not counts else 0, min(high, limit), name)


def _find_integer_casts(tensor: Any) -> Iterator[Any]:
    """Yield each type of whole numbers or of truth values to which the values of a tensor are cast."""
    for operation in tensor.consumers():
        if operation.type == "Cast":
            dtype = operation.outputs[0].dtype
            if dtype.is_integer or dtype.is_bool:
                yield dtype
            else:
                yield from _find_integer_casts(operation.outputs[0])
        elif operation.type in _PASSING_OPS and operation.inputs[0] is tensor:
            yield from _find_integer_casts(operation.outputs[0])


def _list_category_counts(model: Any) -> list[int]:
    """Return the number of categories of each layer of the model that has one, if it is above 1."""
    counts = [
        getattr(layer, name, None) for layer in model._flatten_layers() for name in _CATEGORY_ATTRIBUTES
    ]
    return [count for count in counts if isinstance(count, int) and count > 1]
