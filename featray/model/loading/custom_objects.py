"""Match the custom classes and functions that a model file needs with those that the config gives.

In: `model.custom_objects` and the description of a model file. Out: {registered name: object} for Keras, or
one problem for each object that is missing or not allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model.loading import keras2, model_file
from featray.model.loading.custom_code import import_object
from featray.model.loading.model_file import CustomEntry, ModelFile

_KERAS_MODULES = (
    "layers",
    "models",
    "activations",
    "initializers",
    "regularizers",
    "constraints",
    "dtype_policies",
)
_PRIVATE_KERAS_NAMES = ("Functional", "Policy")  # Keras writes these names to files but does not export them


def import_custom_objects(spec: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Import the objects of `spec.custom_objects`.

    Returns:
        The objects, each under its own name and under its registered name (`package>Class`); and the sha256
        of their code by role (`custom FILE:NAME`).

    Raises:
        ModelError: Lists every object that cannot be imported, and every name with two definitions.
    """
    import keras

    objects: dict[str, Any] = {}
    sha256_by_role: dict[str, str] = {}
    problems: list[str] = []
    for reference in spec.custom_objects:
        try:
            custom_object, sha256 = import_object(
                reference, config_key="custom_objects", storage_options=spec.storage_options
            )
        except ModelError as error:
            problems += error.problems
            continue
        sha256_by_role[f"custom {Path(reference).name}"] = sha256
        name = reference.rpartition(":")[2]
        if objects.get(name, custom_object) is not custom_object:
            problems.append(f"custom_objects: {name} is defined by two different files; keep one of them")
        objects |= {name: custom_object, keras.saving.get_registered_name(custom_object): custom_object}
    if problems:
        raise ModelError(problems)
    return objects, sha256_by_role


def match_custom_objects(
    content: ModelFile, objects: Mapping[str, Any], *, trust: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the objects under every name by which the model file refers to them, and all problems.

    Args:
        content: The description of the model file.
        objects: The objects of the config, as `import_custom_objects` returns them.
        trust: Whether Python code that is stored in the file may run.
    """
    entries = model_file.list_custom_entries(content.config, _is_keras_name)
    known = {**_load_replacements(content), **objects}
    for entry in entries:
        custom_object = objects.get(entry.registered_name, objects.get(entry.class_name))
        if custom_object is not None:
            known[entry.registered_name] = custom_object
    problems = [_describe_problem(entry, known, trust=trust) for entry in entries]
    return known, [problem for problem in problems if problem]


def _describe_problem(entry: CustomEntry, known: Mapping[str, Any], *, trust: bool) -> str | None:
    """Return why the object cannot be loaded and what to do, or None if it can be loaded."""
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
    if entry.class_name in keras2.TENSOR_OPERATION_CLASSES:
        return (
            f"layer {entry.layer!r} is a TensorFlow operation that Keras 2 stored as a layer and Keras 3 "
            "cannot run; build the model in code, name that code in model.builder, and give the weights of "
            "the model (or this file)"
        )
    return (
        f"layer {entry.layer!r} needs {entry.class_name}, which is not part of Keras; add its code to "
        f"model.custom_objects, e.g. 'file.py:{entry.class_name}' or 'package.module:{entry.class_name}' "
        "(model.trust does not replace it)"
    )


def _load_replacements(content: ModelFile) -> dict[str, Any]:
    """Return the replacements for layers that only Keras 2 has.

    Empty for a file of Keras 3, and for a file that names a TensorFlow function that may have side effects.
    """
    if not keras2.is_older_than_keras3(content.keras_version) or keras2.list_unsafe_functions(content.config):
        return {}
    from featray.model.loading import keras2_layers

    return keras2_layers.REPLACEMENTS


def _is_keras_name(name: str) -> bool:
    import keras

    return name in _PRIVATE_KERAS_NAMES or any(
        hasattr(getattr(keras, module), name) for module in _KERAS_MODULES
    )
