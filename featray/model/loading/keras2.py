"""Upgrade the description of a model that Keras 2 wrote to one that Keras 3 can read.

In: the config of a whole-model .h5 file. Out: the config of the same model for Keras 3. The weights need no
change. The differences come from `functional.py` of both Keras versions. A config that differs in another way
is passed on unchanged, and Keras reports the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TENSOR_OPERATION_CLASSES = (
    "TFOpLambda",
    "SlicingOpLambda",
    "ClassMethod",
    "InstanceMethod",
    "InstanceProperty",
)
"""Classes by which Keras 2 stored TensorFlow operations used as layers. Keras 3 does not have them."""

ELLIPSIS = "..."
"""The text by which an upgraded config represents the `...` of a slice."""

# The TensorFlow functions that a file may name: those without side effects, by module or by full name. All
# other functions are refused, because some of them write files or run code.
_SAFE_MODULES = ("math", "nn", "linalg", "image", "__operators__")
# fmt: off
_SAFE_FUNCTIONS = frozenset([
    "cast", "clip_by_value", "concat", "convert_to_tensor", "expand_dims", "gather", "identity",
    "ones_like", "pad", "repeat", "reshape", "reverse", "shape", "split", "squeeze", "stack",
    "stop_gradient", "tile", "transpose", "unstack", "where", "zeros_like", "compat.v1.shape",
    "compat.v1.gather", "compat.v1.transpose", "compat.v1.squeeze", "compat.v1.where", "random.normal",
    "random.uniform", "strided_slice", "range", "fill", "zeros", "ones", "meshgrid", "roll", "einsum",
])
# fmt: on

_KERNEL = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")

# Config keys that Keras 3 refuses, by class. Keys in _TRAINING_ONLY_KEYS have no effect on a trained model.
# Keys in _REMOVABLE_DEFAULTS have no effect if they have the value given there.
_TRAINING_ONLY_KEYS: dict[str, tuple[str, ...]] = {
    "DepthwiseConv": _KERNEL,
    "SeparableConv": _KERNEL,
    "MultiHeadAttention": ("query_shape", "key_shape", "value_shape"),
}
_REMOVABLE_DEFAULTS: dict[str, dict[str, Any]] = {
    "LSTM": {"time_major": False},
    "GRU": {"time_major": False},
    "SimpleRNN": {"time_major": False},
    "RNN": {"time_major": False},
    "DepthwiseConv": {"groups": 1},
    "SeparableConv": {"groups": 1},
    "Conv2DTranspose": {"groups": 1},
    "Conv3DTranspose": {"groups": 1},
    "Conv1DTranspose": {"groups": 1},
    "MultiHeadAttention": {"softmax_robust_masking": False},
}


def is_older_than_keras3(keras_version: str) -> bool:
    """Return whether this is a version of Keras 1 or 2."""
    return keras_version.split(".")[0] in ("1", "2")


def list_unsafe_functions(config: Any) -> list[str]:
    """Return the TensorFlow functions in a config that may have side effects."""
    if isinstance(config, list):
        return [name for item in config for name in list_unsafe_functions(item)]
    if not isinstance(config, dict):
        return []
    if config.get("class_name") == "TFOpLambda":
        name = str(config["config"].get("function", ""))
        return [] if name in _SAFE_FUNCTIONS or _is_in_safe_module(name) else [name]
    if config.get("class_name") == "SlicingOpLambda":
        name = str(config["config"].get("function", ""))
        return [] if name == "__operators__.getitem" else [name]
    return [name for value in config.values() for name in list_unsafe_functions(value)]


def _is_in_safe_module(name: str) -> bool:
    module, _, function = name.partition(".")
    return module in _SAFE_MODULES and function.isidentifier() and function != "getitem"


def upgrade_config(config: Any) -> Any:
    """Return a copy of a Keras 2 config, or of a part of it, in the form of Keras 3."""
    if isinstance(config, list):
        return [upgrade_config(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "__ellipsis__":  # Keras 3 fails on this class before any layer gets it
        return ELLIPSIS
    upgraded = {key: upgrade_config(value) for key, value in config.items()}
    if isinstance(upgraded.get("config"), dict) and isinstance(upgraded.get("class_name"), str):
        upgraded["config"] = _upgrade_layer_config(upgraded["class_name"], upgraded["config"])
    return upgraded


def _upgrade_layer_config(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    if any("inbound_nodes" in layer for layer in _get_layers(config)):
        return _upgrade_functional_config(config)
    axis = config.get("axis")
    if class_name == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        config = {**config, "axis": axis[0]}
    family = class_name.rstrip("123D") if class_name.startswith(("Depthwise", "Separable")) else class_name
    training_only, defaults = _TRAINING_ONLY_KEYS.get(family, ()), _REMOVABLE_DEFAULTS.get(family, {})
    return {
        key: value
        for key, value in config.items()
        if key not in training_only and not (key in defaults and value == defaults[key])
    }


def _get_layers(config: dict[str, Any]) -> list[dict[str, Any]]:
    layers = config.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _upgrade_functional_config(config: dict[str, Any]) -> dict[str, Any]:
    """Upgrade the config of a functional model: renumber the calls of nested models.

    Keras 2 counts the construction of a nested model as its call 0, and Keras 3 does not. In `output_layers`
    Keras 3 corrects this itself, except for a nested Sequential model.
    """
    nested_models = {layer["name"] for layer in _get_layers(config) if _is_nested_model(layer)}
    nested_sequentials = {
        layer["name"]
        for layer in _get_layers(config)
        if layer["name"] in nested_models and layer["class_name"] == "Sequential"
    }
    layers = [
        {**layer, "inbound_nodes": [_upgrade_node(node, nested_models) for node in layer["inbound_nodes"]]}
        for layer in _get_layers(config)
    ]
    output_layers = _renumber_calls(config["output_layers"], nested_sequentials)
    return {**config, "layers": layers, "output_layers": output_layers}


def _is_nested_model(layer: dict[str, Any]) -> bool:
    inner_layers = _get_layers(layer["config"]) if isinstance(layer.get("config"), dict) else []
    return bool(inner_layers) and inner_layers[0].get("class_name") == "InputLayer"


def _upgrade_node(node: Any, nested_models: set[str]) -> Any:
    """Return one call of a layer in the form of Keras 3: {args: [...], kwargs: {...}}.

    In Keras 2 a call is the structure of its first argument, in which each tensor is written as
    [layer, call, output, keyword arguments]. The keyword arguments may contain tensors too.
    """
    references = list(_find_references(node))
    if not references:
        return node
    is_single = isinstance(node, list) and len(node) == 1 and _is_tensor_reference(node[0])
    first_argument = node[0] if is_single else node
    keyword_arguments = references[0][3] if len(references[0]) > 3 else {}
    kwargs = {key: _upgrade_argument(value, nested_models) for key, value in keyword_arguments.items()}
    return {"args": [_upgrade_argument(first_argument, nested_models)], "kwargs": kwargs}


def _find_references(node: Any) -> Iterator[list[Any]]:
    if _is_tensor_reference(node):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _find_references(item)


def _upgrade_argument(value: Any, nested_models: set[str]) -> Any:
    if _is_tensor_reference(value):
        if value[0] == "_CONSTANT_VALUE":
            return value[2]
        history = _renumber_calls(value[:3], nested_models)
        return {
            "class_name": "__keras_tensor__",
            "config": {"shape": [None], "dtype": "float32", "keras_history": history},
        }
    if isinstance(value, dict):
        return {key: _upgrade_argument(item, nested_models) for key, item in value.items()}
    return [_upgrade_argument(item, nested_models) for item in value] if isinstance(value, list) else value


def _is_tensor_reference(value: Any) -> bool:
    """Return whether `value` is [layer, call, output] or a constant, with keyword arguments or without."""
    if not isinstance(value, list) or len(value) not in (3, 4):
        return False
    is_constant = value[:2] == ["_CONSTANT_VALUE", -1]
    return is_constant or (_is_call_output(value[:3]) and all(isinstance(item, dict) for item in value[3:]))


def _renumber_calls(value: Any, nested_models: set[str]) -> Any:
    """Return [layer, call, output], or a structure of these, with the call numbers of Keras 3."""
    if _is_call_output(value):
        name, call, output = value
        return [name, call - (name in nested_models), output]
    return [_renumber_calls(item, nested_models) for item in value] if isinstance(value, list) else value


def _is_call_output(value: Any) -> bool:
    """Return whether `value` is [layer name, call number, output number]."""
    return isinstance(value, list) and [type(item) for item in value] == [str, int, int]
