"""Replace layers whose code is stored in a model file, or that are TensorFlow operations which may do harm.

In: the description of a model, and the trust and functions of the config. Out: the description with
replacements for these layers. A replacement fails only if a wanted layer needs it.
"""

from __future__ import annotations

import codecs
import dis
import marshal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from featray.errors import ModelError
from featray.model.loading import operations
from featray.model.loading.operation_names import BACKEND_FUNCTIONS
from featray.model.loading.replacement_layers import MISSING_CODE, NAMED_FUNCTION, PASS_THROUGH

_TRAINING_CLASSES = ("AddLoss", "AddMetric")
_CODE_KEYS = ("function", "output_shape", "mask")
_HOW_TO_NAME = "name a function for the layer in model.custom_objects ('{layer}=file.py:function')"


@dataclass
class StoredCode:
    """Rules for replacing layers that hold code, and the layers replaced.

    Attributes:
        trust: Whether code from the file may run.
        functions: Functions of the config by the name of the layer that they replace. Functions of Keras's
            backend that the file names are added.
        known_names: Names of the custom objects of the config.
        replaced_names: Names of the layers that could be replaced by a function.
    """

    trust: bool
    functions: dict[str, Callable[..., Any]]
    known_names: frozenset[str] = frozenset()
    replaced_names: list[str] = field(default_factory=list)

    def replace_layers(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a description in which no layer holds code that may not run or cannot run.

        Raises:
            ModelError: The config names a function for a layer that holds no code.
        """
        given = list(self.functions)
        description = {key: value for key, value in config.items() if key != "compile_config"}
        replaced = self._replace(description)
        unknown = [name for name in given if name not in self.replaced_names]
        if unknown:
            known = ", ".join(self.replaced_names) or "none"
            raise ModelError(
                f"custom_objects: {unknown[0]}=…: the file has no Lambda layer or operation of this name; it "
                f"has: {known}"
            )
        kept = {"compile_config": config["compile_config"]} if "compile_config" in config else {}
        return {**replaced, **kept}

    def _replace(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._replace(item) for item in node]
        if not isinstance(node, dict):
            return node
        class_name, config = node.get("class_name"), node.get("config")
        if isinstance(class_name, str) and isinstance(config, dict):
            replacement = self._find_replacement(
                class_name, config, str(node.get("name") or config.get("name"))
            )
            if replacement is not None:
                return {**_make_layer(*replacement, config), **_get_call(node)}
        return {key: self._replace(value) for key, value in node.items()}

    def _find_replacement(
        self, class_name: str, config: dict[str, Any], name: str
    ) -> tuple[str, dict[str, Any]] | None:
        """Return class and settings of the layer that replaces a layer; None if the layer stays."""
        if class_name in _TRAINING_CLASSES:
            return PASS_THROUGH, {}
        is_operation = class_name in (*operations.FUNCTION_CLASSES, operations.NODE_CLASS)
        if class_name != "Lambda" and not is_operation:
            return None
        self.replaced_names.append(name)
        if name in self.functions:
            return NAMED_FUNCTION, {"arguments": config.get("arguments") or {}}
        if is_operation:
            operation = operations.find_unsafe_operation(class_name, config)
            return (MISSING_CODE, {"reason": _explain_operation(name, operation)}) if operation else None
        return self._find_lambda_replacement(config, name)

    def _find_lambda_replacement(
        self, config: dict[str, Any], name: str
    ) -> tuple[str, dict[str, Any]] | None:
        codes = [code for key in _CODE_KEYS if (code := _find_code(config, key)) is not None]
        reason = ""
        if codes and not self.trust:
            reason = (
                f"layer {name!r} holds Python code inside the file (Lambda), which would run when the model "
                "is loaded; set model.trust: true if you trust the author of the file, or "
                + _HOW_TO_NAME.format(layer=name)
            )
        elif not all(_can_run(code) for code in codes):
            reason = (
                f"layer {name!r} holds Python code inside the file (Lambda) that another version of Python "
                f"wrote, so it cannot run; " + _HOW_TO_NAME.format(layer=name)
            )
        elif function := self._find_missing_function(config, name):
            if name in self.functions:
                return NAMED_FUNCTION, {"arguments": config.get("arguments") or {}}
            reason = f"layer {name!r} needs the function {function}; " + _HOW_TO_NAME.format(layer=name)
        if not reason:
            return None
        return MISSING_CODE, {"reason": reason, "value_shape": _find_shape(config)}

    def _find_missing_function(self, config: dict[str, Any], name: str) -> str:
        """Return the name of the function that a layer needs but lacks; empty if it lacks none.

        A missing function of Keras's backend is given to the layer.
        """
        function = config.get("function")
        if config.get("function_type") != "function" or not isinstance(function, str):
            return ""
        if function in self.known_names:
            return ""
        if function in BACKEND_FUNCTIONS and str(config.get("module", "")).endswith("backend"):
            import tf_keras

            self.functions[name] = getattr(tf_keras.backend, function)
        return function


def _make_layer(class_name: str, settings: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in ("name", "trainable", "dtype", "batch_input_shape") if key in config}
    registered_name = f"featray>{class_name}"
    return {
        "module": None,
        "class_name": class_name,
        "config": {**kept, **settings},
        "registered_name": registered_name,
    }


def _get_call(node: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a layer's description that say how it is called."""
    return {key: node[key] for key in ("name", "inbound_nodes", "build_config") if key in node}


def _explain_operation(name: str, operation: str) -> str:
    return (
        f"layer {name!r} is a TensorFlow operation that Keras 2 stored as a layer ({operation}) and that is "
        f"not known to be free of side effects; {_HOW_TO_NAME.format(layer=name)}, or build the model in "
        "code, name that code in model.builder, and give the weights of the model (or this file)"
    )


def _find_code(config: dict[str, Any], key: str) -> Any:
    """Return the Python code that a Lambda layer holds under a key; None if it holds none there."""
    value = config.get(key)
    if isinstance(value, dict) and value.get("class_name") == "__lambda__":
        return (value.get("config") or {}).get("code", "")
    return value if config.get(f"{key}_type") == "lambda" else None


def _can_run(stored: Any) -> bool:
    """Return whether this version of Python can run code that is stored in a file."""
    text = stored[0] if isinstance(stored, list | tuple) and stored else stored
    try:
        data = codecs.decode(str(text).encode("ascii"), "base64")
        code = marshal.loads(data)
        return isinstance(code, CodeType) and _has_known_instructions(code)
    except Exception:  # marshal raises several errors on data of another version
        return False


def _has_known_instructions(code: CodeType) -> bool:
    names = [instruction.opname for instruction in dis.get_instructions(code)]
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return not any(name.startswith("<") for name in names) and all(map(_has_known_instructions, inner))


def _find_shape(config: dict[str, Any]) -> list[int] | None:
    """Return the shape, without batch axis, that a Lambda layer gives for its result; None if unknown."""
    shape = config.get("output_shape")
    if isinstance(shape, dict):
        shape = (shape.get("config") or {}).get("items") if "config" in shape else shape.get("items")
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        return None
    return list(shape)
