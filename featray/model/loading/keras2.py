"""Turns the description of a model that Keras 2 wrote into one that Keras 3 understands.

In: the config of a whole-model .h5. Out: the same model for Keras 3. The weights need no change.
What differs was read in both versions' `functional.py`; anything else is left for Keras to judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

OPERATIONS = ("TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceMethod", "InstanceProperty")
"""Classes by which Keras 2 wrote operations on tensors; they exist in no later version."""

ELLIPSIS = "..."
"""How an upgraded config writes the `...` of a slice."""

# Functions of TensorFlow that only compute; a file must not be able to make us run any other.
_COMPUTES_ONLY = ("math", "nn", "linalg", "image", "__operators__")
# fmt: off
_SINGLE = frozenset([
    "cast", "clip_by_value", "concat", "convert_to_tensor", "expand_dims", "gather", "identity",
    "ones_like", "pad", "repeat", "reshape", "reverse", "shape", "split", "squeeze", "stack",
    "stop_gradient", "tile", "transpose", "unstack", "where", "zeros_like", "compat.v1.shape",
    "compat.v1.gather", "compat.v1.transpose", "compat.v1.squeeze", "compat.v1.where", "random.normal",
    "random.uniform", "strided_slice", "range", "fill", "zeros", "ones", "meshgrid", "roll", "einsum",
])
# fmt: on

_KERNEL = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")

# Keys that Keras 3 refuses, by class: without effect on a trained model, or refused unless at this value.
_ONLY_TRAINING: dict[str, tuple[str, ...]] = {
    "DepthwiseConv": _KERNEL,
    "SeparableConv": _KERNEL,
    "MultiHeadAttention": ("query_shape", "key_shape", "value_shape"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
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


def is_old(keras_version: str) -> bool:
    """Return whether a file says that Keras 1 or 2 wrote it."""
    return keras_version.split(".")[0] in ("1", "2")


def refused_functions(config: Any) -> list[str]:
    """Return the TensorFlow functions a config names that are not known only to compute."""
    if isinstance(config, list):
        return [name for item in config for name in refused_functions(item)]
    if not isinstance(config, dict):
        return []
    if config.get("class_name") == "TFOpLambda":
        name = str(config["config"].get("function", ""))
        return [] if name in _SINGLE or _is_listed(name) else [name]
    if config.get("class_name") == "SlicingOpLambda":
        name = str(config["config"].get("function", ""))
        return [] if name == "__operators__.getitem" else [name]
    return [name for value in config.values() for name in refused_functions(value)]


def _is_listed(name: str) -> bool:
    module, _, function = name.partition(".")
    return module in _COMPUTES_ONLY and function.isidentifier() and function != "getitem"


def upgraded(config: Any) -> Any:
    """Return a copy of a Keras 2 config, or a part of it, as Keras 3 wants it."""
    if isinstance(config, list):
        return [upgraded(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "__ellipsis__":  # Keras 3 would choke on it before any layer sees it
        return ELLIPSIS
    new = {key: upgraded(value) for key, value in config.items()}
    if isinstance(new.get("config"), dict) and isinstance(new.get("class_name"), str):
        new["config"] = _layer(new["class_name"], new["config"])
    return new


def _layer(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    if any("inbound_nodes" in layer for layer in _layers(config)):
        return _graph(config)
    axis = config.get("axis")
    if class_name == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        config = {**config, "axis": axis[0]}
    family = class_name.rstrip("123D") if class_name.startswith(("Depthwise", "Separable")) else class_name
    useless, defaults = _ONLY_TRAINING.get(family, ()), _DEFAULTS.get(family, {})
    return {
        key: value
        for key, value in config.items()
        if key not in useless and not (key in defaults and value == defaults[key])
    }


def _layers(config: dict[str, Any]) -> list[dict[str, Any]]:
    layers = config.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _graph(config: dict[str, Any]) -> dict[str, Any]:
    """Renumber the calls of nested models.

    Keras 2 counted the making of a nested model as its call 0, Keras 3 does not. At `output_layers`
    Keras 3 makes up for that itself, except for a nested Sequential.
    """
    late = {layer["name"] for layer in _layers(config) if _begins_with_input(layer)}
    sequential = {
        layer["name"]
        for layer in _layers(config)
        if layer["name"] in late and layer["class_name"] == "Sequential"
    }
    layers = [
        {**layer, "inbound_nodes": [_node(node, late) for node in layer["inbound_nodes"]]}
        for layer in _layers(config)
    ]
    return {**config, "layers": layers, "output_layers": _shifted(config["output_layers"], sequential)}


def _begins_with_input(layer: dict[str, Any]) -> bool:
    inner = _layers(layer["config"]) if isinstance(layer.get("config"), dict) else []
    return bool(inner) and inner[0].get("class_name") == "InputLayer"


def _node(node: Any, late: set[str]) -> Any:
    """Return one call in the form of Keras 3, which knows tensors among the keyword arguments too.

    Keras 2 wrote the first argument as a structure of [layer, call, output, keyword arguments].
    """
    leaves = list(_leaves(node))
    if not leaves:
        return node
    single = node[0] if isinstance(node, list) and len(node) == 1 and _is_leaf(node[0]) else node
    keywords = leaves[0][3] if len(leaves[0]) > 3 else {}
    kwargs = {key: _argument(value, late) for key, value in keywords.items()}
    return {"args": [_argument(single, late)], "kwargs": kwargs}


def _leaves(node: Any) -> Iterator[list[Any]]:
    if _is_leaf(node):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _leaves(item)


def _argument(value: Any, late: set[str]) -> Any:
    if _is_leaf(value):
        if value[0] == "_CONSTANT_VALUE":
            return value[2]
        history = _shifted(value[:3], late)
        return {
            "class_name": "__keras_tensor__",
            "config": {"shape": [None], "dtype": "float32", "keras_history": history},
        }
    if isinstance(value, dict):
        return {key: _argument(item, late) for key, item in value.items()}
    return [_argument(item, late) for item in value] if isinstance(value, list) else value


def _is_leaf(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (3, 4):
        return False
    is_constant = value[:2] == ["_CONSTANT_VALUE", -1]
    return is_constant or (_is_reference(value[:3]) and all(isinstance(item, dict) for item in value[3:]))


def _shifted(value: Any, late: set[str]) -> Any:
    if _is_reference(value):
        name, call, output = value
        return [name, call - (name in late), output]
    return [_shifted(item, late) for item in value] if isinstance(value, list) else value


def _is_reference(value: Any) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == [str, int, int]
