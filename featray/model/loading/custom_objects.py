"""Match the custom classes and functions that a model file needs with those that the config gives.

In: `model.custom_objects` and the description of a model file. Out: {registered name: object} for Keras, and
a description in which layers that may not run are replaced, or one problem for each object that is missing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model.loading import keras2, keras2_config, model_file, replacement_layers
from featray.model.loading.custom_code import combine_sha256, import_object
from featray.model.loading.model_file import CustomEntry, ModelFile
from featray.model.loading.stored_code import StoredCode

_KERAS_MODULES = (
    "layers",
    "models",
    "activations",
    "initializers",
    "regularizers",
    "constraints",
    "dtype_policies",
)
_PRIVATE_KERAS_NAMES = (
    "Functional",
    "GroupedQueryAttention",
    "Policy",
)  # Keras writes these names to files but does not export them


@dataclass
class CustomCode:
    """The classes and functions that a config names.

    Attributes:
        objects: The objects, each under its own name and under its registered name (`package>Class`).
        functions: Functions that replace the code of one layer, by the name of the layer.
        files: sha256 of their code by role (`custom FILE:NAME`, `layer:NAME FILE:NAME`).
    """

    objects: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def import_custom_objects(spec: ModelConfig) -> CustomCode:
    """Import the objects of `spec.custom_objects`.

    Raises:
        ModelError: Lists every object that cannot be imported, and every name with two definitions.
    """
    code, problems = CustomCode(), list[str]()
    for entry in spec.custom_objects:
        layer, reference = split_layer(entry)
        try:
            custom_object, sha256 = import_object(
                reference, config_key="custom_objects", storage_options=spec.storage_options
            )
        except ModelError as error:
            problems += error.problems
            continue
        name = reference.rpartition(":")[2]
        if layer:
            problems += _add_function(code, layer, reference, (custom_object, sha256))
            continue
        code.files[f"custom {Path(reference).name}"] = sha256
        if code.objects.get(name, custom_object) is not custom_object:
            problems.append(f"custom_objects: {name} is defined by two different files; keep one of them")
        code.objects |= dict.fromkeys((name, *_list_registered_names(custom_object)), custom_object)
    if problems:
        raise ModelError(problems)
    return code


def match_custom_objects(
    content: ModelFile, code: CustomCode, *, trust: bool
) -> tuple[ModelFile, dict[str, Any], list[str]]:
    """Return the description to load, the objects under every name in it, and all problems.

    In the description, layers whose code may not run or cannot run are replaced by layers that fail when a
    wanted layer needs them.

    Args:
        content: The description of the model file.
        code: The objects of the config.
        trust: Whether Python code that is stored in the file may run.
    """
    is_old = keras2.is_keras2_file(content)
    stored_code = StoredCode(trust, dict(code.functions), frozenset(code.objects))
    config = keras2_config.convert_config(content.config) if is_old else content.config
    content = replace(content, config=stored_code.replace_layers(config))
    entries = model_file.list_custom_entries(content.config, _is_keras2_name if is_old else _is_keras_name)
    known = {**_make_replacements(stored_code, is_old=is_old), **code.objects}
    for entry in entries:
        custom_object = code.objects.get(entry.registered_name, code.objects.get(entry.class_name))
        if custom_object is not None:
            known[entry.registered_name] = custom_object
    problems = [_describe_problem(entry, known, trust=trust) for entry in entries]
    return content, known, [problem for problem in problems if problem]


def split_layer(entry: str) -> tuple[str, str]:
    """Return layer and reference of `LAYER=file.py:function`; the layer is empty for a plain reference.

    A `=` behind a `:` or a folder belongs to the reference.
    """
    layer, equals, reference = entry.partition("=")
    is_layer = bool(equals) and ":" in reference and not any(letter in layer for letter in ":/\\")
    return (layer.strip(), reference.strip()) if is_layer else ("", entry)


def _add_function(code: CustomCode, layer: str, reference: str, imported: tuple[Any, str]) -> list[str]:
    """Add the function that replaces the code of one layer; return problems."""
    function, sha256 = imported
    if layer in code.functions:
        return [f"custom_objects: two functions are given for layer {layer!r}; keep one of them"]
    if isinstance(function, type) or not callable(function):
        return [
            f"custom_objects: {layer}={Path(reference).name} is not a function; name one that takes the input"
        ]
    code.functions[layer] = function
    name = reference.rpartition(":")[2]
    # The layer and the function decide the values too, so they are part of the digest.
    code.files[f"layer:{layer} {Path(reference).name}"] = combine_sha256(sha256, layer, name)
    return []


def _list_registered_names(custom_object: Any) -> list[str]:
    """Return the names under which the imported versions of Keras know an object."""
    import keras

    keras2_package = sys.modules.get("tf_keras")
    packages = [keras, *([keras2_package] if keras2_package else [])]
    return [package.saving.get_registered_name(custom_object) for package in packages]


def _describe_problem(entry: CustomEntry, known: Mapping[str, Any], *, trust: bool) -> str | None:
    """Return why the object cannot be loaded, with the remedy, or None if it can be loaded."""
    if entry.is_lambda and trust:
        return None
    if entry.is_lambda:
        return (
            f"layer {entry.layer!r} holds Python code inside the file (Lambda), which would run when the "
            "model is loaded; set model.trust: true if you trust the author of the file, or save the model "
            "with a named function and name that function in model.custom_objects"
        )
    if entry.registered_name in known:
        return None
    return (
        f"layer {entry.layer!r} needs {entry.class_name}, which is not part of Keras; add its code to "
        f"model.custom_objects, e.g. 'file.py:{entry.class_name}' or 'package.module:{entry.class_name}' "
        f"(model.trust does not replace it){_describe_operation(entry)}"
    )


def _describe_operation(entry: CustomEntry) -> str:
    """Return the remedy if the object is an operation of Keras in an .h5 file; otherwise ''."""
    import keras

    function = re.sub(r"(?<!^)(?=[A-Z])", "_", entry.class_name).lower()
    if not hasattr(keras.ops, function):
        return ""
    return (
        f". If the layer is the operation keras.ops.{function}, Keras itself cannot load this .h5 file: save "
        "the model as .keras, or build it with model.builder, which then loads the weights of this file"
    )


def _make_replacements(stored_code: StoredCode, *, is_old: bool) -> dict[str, Any]:
    """Return the classes that replace layers, under every name in a description."""
    if is_old:
        import tf_keras as package
    else:
        import keras as package
    classes = replacement_layers.make_replacement_classes(package.layers.Layer, stored_code.functions)
    return {key: value for name, value in classes.items() for key in (name, f"featray>{name}")}


def _is_keras_name(name: str) -> bool:
    import keras

    return name in _PRIVATE_KERAS_NAMES or any(
        hasattr(getattr(keras, module), name) for module in _KERAS_MODULES
    )


def _is_keras2_name(name: str) -> bool:
    import tf_keras
    from tf_keras.src.layers import serialization

    modules = (module for module in _KERAS_MODULES if hasattr(tf_keras, module))
    is_exported = any(hasattr(getattr(tf_keras, module), name) for module in modules)
    is_policy = name in ("Policy", "PolicyV1")
    return is_exported or is_policy or serialization.get_builtin_layer(name) is not None
