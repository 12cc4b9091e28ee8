"""Runs an exported SavedModel like a Keras model whose only layers are the outputs of its endpoint.

In: the folder and the name of an endpoint. Out: a Keras model. The graphs stored in the folder run, no
Python. Importing this imports Keras.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from featray.errors import ModelError

_DEFAULT = "serving_default"


class Endpoint(keras.Model):  # type: ignore[misc]  # Keras ships no types
    """One endpoint: inputs by name in, outputs by name out, each through a layer of that name."""

    def __init__(self, name: str, function: Any, whole: Any) -> None:
        """Keep `function`, a signature, and `whole`, which owns its variables."""
        super().__init__(name=name)
        _, specs = function.structured_input_signature
        self._run = _Held(function, whole)
        self._dtypes = {key: spec.dtype.name for key, spec in specs.items()}
        self._inputs = {
            key: keras.KerasTensor(spec.shape.as_list(), spec.dtype.name, name=key)
            for key, spec in specs.items()
            if spec.shape.rank is not None
        }
        self.named = {
            key: keras.layers.Identity(name=key.replace("/", ".")) for key in function.structured_outputs
        }

    @property
    def inputs(self) -> list[Any]:
        """What it takes, as functional models say it."""
        return list(self._inputs.values())

    @property
    def input(self) -> Any:
        """The same as `call` wants it: one tensor, or several by name."""
        return self._inputs if len(self._inputs) > 1 else next(iter(self._inputs.values()))

    def call(self, inputs: Any) -> Any:
        """Tensor, or tensors by name -> {output name: tensor}."""
        given = inputs if isinstance(inputs, dict) else dict.fromkeys(self._dtypes, inputs)
        cast = {key: tf.cast(given[key], dtype) for key, dtype in self._dtypes.items()}
        return {key: self.named[key](value) for key, value in self._run.function(**cast).items()}


class _Held:
    """Hides TensorFlow's objects from Keras, which would track them."""

    def __init__(self, function: Any, whole: Any) -> None:
        self.function, self.whole = function, whole


def open_endpoint(folder: Path, name: str | None) -> Endpoint:
    """Return the endpoint `name` of the SavedModel in `folder`; null = the one for serving, or the only one.

    Raises:
        ModelError: There is no such endpoint, or it takes what featray cannot give.
    """
    whole = tf.saved_model.load(str(folder))
    known = {key: function for key, function in whole.signatures.items() if not key.startswith("__")}
    if name is None and len(known) > 1:
        name = _DEFAULT if _DEFAULT in known else None
    elif name is None and known:
        (name,) = known
    if name is None or name not in known:
        asked = (
            f"submodel: no endpoint {name!r}" if name else "which endpoint to run must be in model.submodel"
        )
        raise ModelError(f"{asked}; {folder.name} has: {', '.join(known) or 'none for serving'}")
    _refuse_other_inputs(known[name], name)
    return Endpoint(name, known[name], whole)


def _refuse_other_inputs(function: Any, name: str) -> None:
    _, specs = function.structured_input_signature
    for key, spec in specs.items():
        if not (spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool):
            raise ModelError(f"endpoint {name}: input {key} takes {spec.dtype.name}, not numbers")
        if spec.shape.rank and spec.shape[0] is not None:
            raise ModelError(
                f"endpoint {name}: input {key} takes batches of {spec.shape[0]} only; export it with None as "
                "the batch axis"
            )
