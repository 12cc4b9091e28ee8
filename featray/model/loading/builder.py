"""Build a model with the function of a user and load weights from a file into it.

In: a `model` section with `builder`, and a local model or weights file. Out: a Keras model with the file's
weights, and the sha256 of the builder's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import keras_versions, layer_calls
from featray.model.loading import weights
from featray.model.loading.custom_code import import_object
from featray.model.loading.failure_messages import summarize_file_error
from featray.model.loading.keras_state import restart_layer_names
from featray.model.loading.model_file import ModelFormat

_InputShapes = Sequence[tuple[int | None, ...]]


def load_with_builder(
    spec: ModelConfig, path: Path, file_format: ModelFormat, input_shapes: _InputShapes
) -> tuple[Any, str]:
    """Return the model that `spec.builder` makes, with the weights of `path`, and the builder's sha256.

    Args:
        spec: The `model` section; `builder` must be set.
        path: A local .keras or .h5 file.
        file_format: The format of `path`.
        input_shapes: Shapes to try for one input, without batch axis, the most likely one first. They are
            used only for a model that does not declare its input.

    Raises:
        ModelError: The builder cannot be imported, fails, or makes a model that the weights do not fit.
    """
    assert spec.builder is not None
    build, sha256 = import_object(spec.builder, config_key="builder", storage_options=spec.storage_options)
    name = spec.builder.rpartition(":")[2]
    try:
        model = _build_model_with_variables(build, input_shapes)
    except ModelError:
        raise
    except Exception as error:  # user code may raise anything
        raise ModelError(f"builder: {name} failed ({summarize_file_error(error, path)})") from error
    try:
        weights.load_weights(model, path, file_format)
    except Exception as error:  # a ModelError, or any error of Keras for weights that do not fit
        reason = (
            "; ".join(error.problems) if isinstance(error, ModelError) else summarize_file_error(error, path)
        )
        raise ModelError(
            f"{path.name}: the weights do not fit the model that {name}() returns ({reason}); "
            "the builder must build exactly the model that was saved"
        ) from error
    return model, sha256


def _build_model_with_variables(build: Callable[[], Any], input_shapes: _InputShapes) -> Any:
    """Build a model and create its variables by a call on the first shape that the model accepts.

    Each shape gets a new model, because a model that failed on one shape may already have weights for it.
    """
    first_error: Exception | None = None
    for shape in input_shapes:
        with restart_layer_names():
            model = _call_builder(build)
        if model.built or _mark_built_parts(model):
            return model
        try:
            _trace_call(model, shape)
            return model
        except Exception as error:  # user code may raise anything
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    model = _call_builder(build)
    if not model.built and not _mark_built_parts(model):
        raise ModelError(
            "builder: the model does not declare its input, so its weights cannot be created; set "
            "preprocess.size (z, y, x), or for arrays model.input_shape"
        )
    return model


def _mark_built_parts(model: Any) -> bool:
    """Return whether a model has no `call` of its own, and all of its parts have their variables.

    Such a model is marked as built, so that Keras loads its weights. The VAE of Keras's tutorial is one: it
    is trained by `train_step`, and only its encoder and its decoder can be called.
    """
    is_default = any(
        type(model).call is getattr(cls, "call", None) for cls in keras_versions.list_model_classes()
    )
    parts = list(getattr(model, "layers", []))
    if not (is_default and parts and all(part.built for part in parts)):
        return False
    model.built = True
    return True


def _call_builder(build: Callable[[], Any]) -> Any:
    model = build()
    if not keras_versions.is_layer(model):
        raise ModelError(f"builder: it returned {type(model).__name__}, which is not a Keras model")
    return model


def _trace_call(model: Any, input_shape: tuple[int | None, ...]) -> None:
    """Create the variables of a model by tracing one call into a graph that is discarded."""
    import tensorflow as tf

    spec = tf.TensorSpec((None, *input_shape), tf.float32)

    def call(inputs: Any) -> Any:
        with layer_calls.convert_python_branches(model):
            return model(inputs, training=False)

    tf.function(call, autograph=False).get_concrete_function(spec)
