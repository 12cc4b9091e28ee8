"""Decide which TensorFlow operations of a model file may run.

In: the description of a layer of Keras 2 that is a TensorFlow operation. Out: whether the operation is known
to have no side effects. All others are refused, because some of them write files or run code.
"""

from __future__ import annotations

from typing import Any

from featray.model.loading.operation_names import BACKEND_FUNCTIONS, FUNCTIONS, IMAGE_FUNCTIONS

FUNCTION_CLASSES = ("TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceMethod")
"""Classes by which Keras 2.4 and later stored a call of a function of TensorFlow as a layer."""
NODE_CLASS = "TensorFlowOpLayer"
"""Class by which Keras 2.2.4-tf to 2.3 stored one operation of a graph as a layer."""

_MODULES = ("math", "nn", "linalg", "signal", "bitwise", "__operators__")
_KERAS_MODULES = ("activations", "losses", "metrics")
_OTHER_OPERATIONS = ("Py", "File", "Save", "Restore", "Print", "Dataset", "Iterator", "Summary", "Checkpoint")


def find_unsafe_operation(class_name: str, config: dict[str, Any]) -> str:
    """Return the name of the operation of a layer that is not known to be safe; empty if it is safe."""
    if class_name == NODE_CLASS:
        operation = _read_operation(config.get("node_def"))
        return "" if _is_safe_operation(operation) else operation or "an unknown operation"
    if class_name not in FUNCTION_CLASSES:
        return ""
    if class_name in ("ClassMethod", "InstanceMethod"):
        return ".".join(str(config.get(key, "")) for key in ("cls_ref", "method_name")).strip(".")
    name = str(config.get("function", ""))
    is_safe = name == "__operators__.getitem" if class_name == "SlicingOpLambda" else is_safe_function(name)
    return "" if is_safe else name


def is_safe_function(name: str) -> bool:
    """Return whether a function of TensorFlow, named as in `math.multiply`, has no side effects."""
    module, _, function = name.removeprefix("compat.v1.").rpartition(".")
    if not function.isidentifier() or not function[0].islower():
        return False
    if module.startswith("keras."):
        allowed = module.removeprefix("keras.") in _KERAS_MODULES and not function.endswith("serialize")
        return (allowed and function != "get") or (
            module == "keras.backend" and function in BACKEND_FUNCTIONS
        )
    if module == "image":
        return function in IMAGE_FUNCTIONS
    return module in _MODULES or f"{module}.{function}".strip(".") in FUNCTIONS


def _read_operation(node: Any) -> str:
    """Return the type of a graph operation that is stored as text or as a serialized protocol buffer."""
    if isinstance(node, dict):
        return str(node.get("op", ""))
    import tensorflow as tf

    data = node if isinstance(node, bytes) else str(node).encode()
    try:
        return str(tf.compat.v1.NodeDef.FromString(data).op)
    except Exception:  # protobuf has several error types
        return ""


def _is_safe_operation(operation: str) -> bool:
    """Return whether an operation is stateless; the operations that read files are refused too."""
    from tensorflow.python.framework import op_def_registry

    definition = op_def_registry.get(operation)
    is_other = any(part in operation for part in _OTHER_OPERATIONS)
    is_random = operation.startswith(("Random", "TruncatedNormal", "Multinomial"))
    return definition is not None and not is_other and (not definition.is_stateful or is_random)
