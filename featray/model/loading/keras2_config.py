"""Bring the description of a model of Keras 1 or 2 into the form of the latest Keras 2.

In: the description in a file. Out: one that tf_keras reads. The weights need no change, except those that
tf_keras converts itself. Forms that tf_keras reads are left as they are.
"""

from __future__ import annotations

from typing import Any

from featray.model.loading import keras1_config

_CUDNN_LAYERS: dict[str, dict[str, Any]] = {
    "CuDNNLSTM": {"class_name": "LSTM", "activation": "tanh", "recurrent_activation": "sigmoid"},
    "CuDNNGRU": {
        "class_name": "GRU",
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "reset_after": True,
    },
}
"""Layers that run on GPUs only, as the layers and settings that compute the same anywhere."""


def convert_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a description that tf_keras reads."""
    if keras1_config.is_keras1_config(config):
        config = keras1_config.convert_config(config)
    converted = _convert(config)
    assert isinstance(converted, dict)
    return converted


def list_corrections(config: Any) -> list[str]:
    """Return the parts of a model that featray 0.1.0 computed differently from Keras 2, for the recipe.

    featray 0.1.0 loaded files of Keras 2 with Keras 3. Outputs of models without such a difference keep their
    recipe.
    """
    found: set[str] = set()
    is_masked = uses_attention = False
    for node in _walk(config):
        values = node.values()
        class_name = str(node.get("class_name"))
        found |= (
            {"hard_sigmoid"} if "hard_sigmoid" in [value for value in values if _is_text(value)] else set()
        )
        found |= {"training"} if node.get("training") in (True, 1) else set()
        axis = node.get("axis")
        found |= {"axis"} if isinstance(axis, list) and len(axis) > 1 else set()
        is_masked = is_masked or node.get("mask_zero") is True or class_name == "Masking"
        uses_attention = uses_attention or "Attention" in class_name
    return sorted(found | ({"mask"} if is_masked and uses_attention else set()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _walk(node: Any) -> Any:
    """Yield every dict in a description."""
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _walk(item)


def _convert(node: Any) -> Any:
    if isinstance(node, list):
        return [_convert(item) for item in node]
    if not isinstance(node, dict):
        return node
    converted = {key: _convert(value) for key, value in node.items()}
    class_name, config = converted.get("class_name"), converted.get("config")
    if class_name == "Sequential" and isinstance(config, list):  # as Keras wrote it up to 2.2.2
        name = converted.get("name", "sequential")
        return {**converted, "config": {"name": name, "layers": config}}
    if class_name in _CUDNN_LAYERS and isinstance(config, dict):
        changes = dict(_CUDNN_LAYERS[class_name])
        return {
            "class_name": changes.pop("class_name"),
            "config": {**config, **changes},
            **_get_call(converted),
        }
    if class_name == "GRU" and isinstance(config, dict) and "reset_after" not in config:  # up to Keras 2.1
        return {**converted, "config": {**config, "reset_after": False}}
    return converted


def _get_call(node: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a layer's description that say how it is called."""
    return {key: node[key] for key in ("name", "inbound_nodes") if key in node}
