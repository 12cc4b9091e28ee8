"""Convert the description of a model of Keras 1 to that of Keras 2.

In: the description in a file of Keras 1. Out: one with the class names and settings of Keras 2. Settings that
have an effect in training only are left out. tf_keras converts the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featray.errors import ModelError

_MARKS = frozenset(["input_dtype", "border_mode", "dim_ordering", "nb_filter", "W_regularizer", "inner_init"])
"""Settings that only Keras 1 had. Each of its models has one of them."""

_CLASSES = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
}
_SETTINGS = {
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "border_mode": "padding",
    "subsample": "strides",
    "subsample_length": "strides",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
    "atrous_rate": "dilation_rate",
    "bias": "use_bias",
    "inner_activation": "recurrent_activation",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "output_dim": "units",
    "p": "rate",
    "sigma": "stddev",
}
"""Names of settings in Keras 1 and in Keras 2."""
_DATA_FORMATS = {"th": "channels_first", "tf": "channels_last"}
_TRAINING_ONLY = frozenset(
    [
        *("init", "inner_init", "forget_bias_init", "gamma_init", "beta_init", "depthwise_init"),
        *("pointwise_init", "W_regularizer", "U_regularizer", "b_regularizer", "gamma_regularizer"),
        *("beta_regularizer", "depthwise_regularizer", "pointwise_regularizer", "activity_regularizer"),
        *("W_constraint", "U_constraint", "b_constraint", "depthwise_constraint", "pointwise_constraint"),
        *("consume_less", "input_dim", "input_length", "input_dtype", "mode", "output_shape", "weights"),
    ]
)
_MERGE_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("Add", {}),
    "mul": ("Multiply", {}),
    "ave": ("Average", {}),
    "max": ("Maximum", {}),
    "concat": ("Concatenate", {"axis": "concat_axis"}),
    "dot": ("Dot", {"axes": "dot_axes"}),
    "cos": ("Dot", {"axes": "dot_axes", "normalize": True}),
}
_CONTAINERS = ("Sequential", "Model", "Functional", "TimeDistributed", "Bidirectional")
_UNCHANGED = (*_CONTAINERS, "Lambda", "Reshape", "RepeatVector", "Permute", "Masking", "Flatten")


def is_keras1_config(config: Any) -> bool:
    """Return whether Keras 1 wrote a description."""
    if isinstance(config, list):
        return any(is_keras1_config(item) for item in config)
    if not isinstance(config, dict):
        return False
    settings = config.get("config")
    is_marked = isinstance(settings, dict) and "class_name" in config and bool(_MARKS & settings.keys())
    return is_marked or any(is_keras1_config(value) for value in config.values())


def convert_config(node: Any) -> Any:
    """Return a description, or a part of it, in the form of Keras 2.

    Raises:
        ModelError: The model has a layer that Keras 2 does not have.
    """
    if isinstance(node, list):
        return [convert_config(item) for item in node]
    if not isinstance(node, dict):
        return node
    converted = {key: convert_config(value) for key, value in node.items()}
    if isinstance(converted.get("class_name"), str) and isinstance(converted.get("config"), dict):
        class_name, settings = _convert_layer(converted["class_name"], converted["config"])
        return {**converted, "class_name": class_name, "config": settings}
    return converted


def _convert_layer(class_name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if class_name in _UNCHANGED:
        return class_name, {key: value for key, value in settings.items() if key != "input_dtype"}
    special = _SPECIAL_LAYERS.get(class_name)
    if special is not None:
        return special(settings)
    return _CLASSES.get(class_name, class_name), _convert_settings(settings)


def _convert_settings(settings: dict[str, Any]) -> dict[str, Any]:
    converted = {
        _SETTINGS.get(key, key): value for key, value in settings.items() if key not in _TRAINING_ONLY
    }
    data_format = converted.pop("dim_ordering", None)
    if data_format in _DATA_FORMATS:
        converted["data_format"] = _DATA_FORMATS[data_format]
    for sizes in (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3")):
        if sizes[0] in converted:
            converted["kernel_size"] = [converted.pop(size) for size in sizes]
    if isinstance(converted.get("dropout"), str):
        del converted["dropout"]
    return converted


def _convert_input(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    kept = {key: value for key, value in settings.items() if key != "input_dtype"}
    return "InputLayer", {**kept, "dtype": settings.get("input_dtype", "float32")}


def _convert_embedding(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    names = ("name", "trainable", "batch_input_shape", "input_dim", "output_dim", "input_length", "mask_zero")
    return "Embedding", {key: settings[key] for key in names if key in settings}


def _convert_gru(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "GRU", {**_convert_settings(settings), "reset_after": False}


def _convert_batch_normalization(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if settings.get("mode", 0) == 1:
        raise ModelError(
            f"layer {settings.get('name')!r} is a BatchNormalization of mode 1, which only Keras 1 has; "
            "build the model in code and name that code in model.builder"
        )
    return "BatchNormalization", _convert_settings(settings)


def _convert_merge(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    mode = str(settings.get("mode"))
    if mode not in _MERGE_CLASSES or settings.get("layers"):
        raise ModelError(
            f"layer {settings.get('name')!r} is a Merge layer ({mode}) of a form that only Keras 1 has; "
            "build the model in code and name that code in model.builder"
        )
    class_name, names = _MERGE_CLASSES[mode]
    values = {key: settings[name] if isinstance(name, str) else name for key, name in names.items()}
    return class_name, {"name": settings["name"], **values}


_SPECIAL_LAYERS: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "InputLayer": _convert_input,
    "Embedding": _convert_embedding,
    "GRU": _convert_gru,
    "BatchNormalization": _convert_batch_normalization,
    "Merge": _convert_merge,
}
