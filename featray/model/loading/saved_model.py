"""Run one endpoint of an exported SavedModel as a Keras model that has one layer per output.

In: a folder and the name of an endpoint. Out: a Keras model. The TensorFlow graphs in the folder run; no
Python code does. Importing this module imports Keras and TensorFlow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from featray.errors import ModelError

_DEFAULT_ENDPOINT = "serving_default"


class Endpoint(keras.Model):  # type: ignore[misc]  # Keras ships no types
    """One endpoint: takes inputs by name, returns outputs by name, each through a layer of that name."""

    def __init__(self, name: str, function: Any, saved_model: Any) -> None:
        """Store `function`, a signature of `saved_model`, which owns the variables."""
        super().__init__(name=name)
        _, specs = function.structured_input_signature
        self._untracked = _UntrackedObjects(function, saved_model)
        self._dtypes = {key: spec.dtype.name for key, spec in specs.items()}
        self._inputs = {
            key: keras.KerasTensor(spec.shape.as_list(), spec.dtype.name, name=key)
            for key, spec in specs.items()
            if spec.shape.rank is not None
        }
        self.output_layers_by_name = {
            key: keras.layers.Identity(name=key.replace("/", ".")) for key in function.structured_outputs
        }

    @property
    def inputs(self) -> list[Any]:
        """All inputs as a list, as a functional model gives them."""
        return list(self._inputs.values())

    @property
    def input(self) -> Any:
        """The inputs as `call` takes them: one tensor, or {name: tensor} for several."""
        return self._inputs if len(self._inputs) > 1 else next(iter(self._inputs.values()))

    def call(self, inputs: Any) -> Any:
        """Run the endpoint: one tensor, or {input name: tensor} -> {output name: tensor}."""
        given = inputs if isinstance(inputs, dict) else dict.fromkeys(self._dtypes, inputs)
        cast_inputs = {key: tf.cast(given[key], dtype) for key, dtype in self._dtypes.items()}
        outputs = self._untracked.function(**cast_inputs)
        return {key: self.output_layers_by_name[key](value) for key, value in outputs.items()}


class _UntrackedObjects:
    """Hides TensorFlow objects from Keras, which tracks every attribute of a model that it recognizes."""

    def __init__(self, function: Any, saved_model: Any) -> None:
        self.function, self.saved_model = function, saved_model


def load_endpoint(folder: Path, name: str | None) -> Endpoint:
    """Return the endpoint `name` of the SavedModel in `folder`.

    Args:
        folder: The folder of the SavedModel.
        name: Name of the endpoint; None for the only endpoint, or for `serving_default` if there are several.

    Raises:
        ModelError: The endpoint does not exist, several exist and none is named, or its inputs cannot take
            numeric batches of any size.
    """
    saved_model = tf.saved_model.load(str(folder))
    endpoints = {
        key: function for key, function in saved_model.signatures.items() if not key.startswith("__")
    }
    if name is None and len(endpoints) > 1:
        name = _DEFAULT_ENDPOINT if _DEFAULT_ENDPOINT in endpoints else None
    elif name is None and endpoints:
        (name,) = endpoints
    if name is None or name not in endpoints:
        problem = f"submodel: no endpoint {name!r}" if name else "model.submodel must name an endpoint"
        raise ModelError(f"{problem}; {folder.name} has: {', '.join(endpoints) or 'no endpoint'}")
    _check_inputs(endpoints[name], name)
    return Endpoint(name, endpoints[name], saved_model)


def _check_inputs(function: Any, name: str) -> None:
    """Raise ModelError if an input is not numeric or has a fixed batch size."""
    _, specs = function.structured_input_signature
    for key, spec in specs.items():
        if not (spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool):
            raise ModelError(f"endpoint {name}: input {key} takes {spec.dtype.name}, not numbers")
        if spec.shape.rank and spec.shape[0] is not None:
            raise ModelError(
                f"endpoint {name}: input {key} takes only batches of {spec.shape[0]}; export the model with "
                "None as the batch axis"
            )
