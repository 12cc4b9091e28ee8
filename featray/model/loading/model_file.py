"""Read the format and the description of a saved Keras model file, without importing Keras or TensorFlow.

In: a local path. Out: the file's format, its description of the model, and the custom code that it needs.
Must not run anything that is stored in the file.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from featray.errors import ModelError

_CODE_TYPE_KEYS = ("function_type", "output_shape_type", "mask_type")
_KERAS_PACKAGES = ("keras", "tf_keras")


class ModelFormat(StrEnum):
    """The format in which a model was saved; the value is its name in messages."""

    ARCHIVE = "a .keras archive"
    WHOLE_H5 = "a whole-model .h5"
    WEIGHTS_H5 = "a weights-only .h5"
    SAVED_MODEL = "a SavedModel folder"


@dataclass(frozen=True)
class ModelFile:
    """The format and the description of a model file.

    Attributes:
        format: The format of the file.
        config: Keras's description of the model; empty for a weights-only file and a SavedModel.
        keras_version: The Keras version that wrote the file; empty if the file does not contain it.
        backend: The backend of the Keras that wrote the file; empty if the file does not contain it.
    """

    format: ModelFormat
    config: dict[str, Any]
    keras_version: str = ""
    backend: str = ""


@dataclass(frozen=True)
class CustomEntry:
    """One class or function in the description of a model that is not part of Keras.

    Attributes:
        layer: Name of the layer that uses it.
        class_name: Name of the class or function, without a package prefix.
        registered_name: The name by which Keras looks it up, e.g. `seed>Sampling`.
        is_lambda: Whether it is Python bytecode that is stored in the file.
    """

    layer: str
    class_name: str
    registered_name: str
    is_lambda: bool = False


def read_model_file(path: Path) -> ModelFile:
    """Return the format and the description of a model file.

    The content of the file decides its format, not the file name. A folder is taken to be a SavedModel.

    Raises:
        ModelError: The file was not saved by Keras, or is truncated.
    """
    if path.is_dir():
        return ModelFile(ModelFormat.SAVED_MODEL, {})
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:2] == b"PK":
        return _read_archive(path)
    if magic == b"\x89HDF\r\n\x1a\n":
        return _read_h5(path)
    raise ModelError(
        f"{path.name}: not a model file; expected a .keras archive or an .h5 file saved by Keras"
    )


def list_custom_entries(config: dict[str, Any], is_keras_name: Callable[[str], bool]) -> list[CustomEntry]:
    """Return each class, function and lambda in the description of a model that is not part of Keras.

    The compile settings (losses, metrics, optimizer) are left out, because featray never compiles a model.

    Args:
        config: `ModelFile.config`.
        is_keras_name: Whether Keras has a class or function of this name. It decides for the entries that do
            not give their module.
    """
    description = {key: value for key, value in config.items() if key != "compile_config"}
    entries = _find_custom_entries(description, str(config.get("class_name", "model")), is_keras_name)
    return list(dict.fromkeys(entries))


def _read_archive(path: Path) -> ModelFile:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "config.json" not in names:
                raise ModelError(f"{path.name}: a zip file without config.json; it was not saved by Keras")
            if not any(name.startswith("model.weights.") for name in names):
                raise ModelError(
                    f"{path.name}: holds no weights, so they would be random; save the model again"
                )
            config = json.loads(archive.read("config.json"))
            metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, EOFError) as error:
        raise ModelError(f"{path.name}: truncated or damaged ({error}); copy or save it again") from None
    return ModelFile(ModelFormat.ARCHIVE, config, str(metadata.get("keras_version", "")))


def _read_h5(path: Path) -> ModelFile:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
            version, backend = (_read_attribute(file, name) for name in ("keras_version", "backend"))
            has_weights = _has_weights(file)
    except OSError:
        raise ModelError(f"{path.name}: truncated or damaged HDF5; copy or save it again") from None
    if text is None and not has_weights:
        raise ModelError(
            f"{path.name}: an HDF5 file that contains neither a model nor weights; Keras did not save it"
        )
    if text is None:
        return ModelFile(ModelFormat.WEIGHTS_H5, {}, version, backend)
    return ModelFile(ModelFormat.WHOLE_H5, json.loads(_decode(text)), version, backend)


def _read_attribute(file: Any, name: str) -> str:
    """Return an attribute of an .h5 file, or of its group of weights; empty if neither has it."""
    weights = file.get("model_weights", file)
    return _decode(file.attrs.get(name) or weights.attrs.get(name, ""))


def _has_weights(file: Any) -> bool:
    """Return whether a file has weights in the layout of Keras 2 or of Keras 3 (groups named `vars`)."""
    names: list[str] = []
    file.visit(names.append)
    has_keras2_weights = any(key.startswith("layer_names") for key in file.attrs)
    return has_keras2_weights or any("vars" in name.split("/") for name in names)


def _decode(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _find_custom_entries(
    node: Any, layer: str, is_keras_name: Callable[[str], bool]
) -> Iterator[CustomEntry]:
    """Yield the custom entries of one node of a description; `layer` is the name of the layer around it."""
    if isinstance(node, list):
        for item in node:
            yield from _find_custom_entries(item, layer, is_keras_name)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("class_name"), str) and "config" in node:
        layer = _get_layer_name(node) or layer
        entry = _make_custom_entry(node, layer, is_keras_name)
        if entry is not None:
            yield entry
    for value in node.values():
        yield from _find_custom_entries(value, layer, is_keras_name)


def _get_layer_name(node: dict[str, Any]) -> str:
    """Return the name of the layer that a node describes; empty if it describes no layer."""
    config = node["config"] if isinstance(node["config"], dict) else {}
    is_layer = "name" in node or "trainable" in config or "layers" in config
    return str(node.get("name") or config.get("name") or "") if is_layer else ""


def _make_custom_entry(
    node: dict[str, Any], layer: str, is_keras_name: Callable[[str], bool]
) -> CustomEntry | None:
    """Return the entry of a node that describes an object; None for plain data and for objects of Keras."""
    class_name, config = node["class_name"], node["config"]
    # Older files store a lambda as a marshalled list, next to a key such as function_type.
    is_marshalled = isinstance(config, dict) and any(config.get(key) == "lambda" for key in _CODE_TYPE_KEYS)
    if class_name == "__lambda__" or is_marshalled:
        return CustomEntry(layer, "Lambda", "", is_lambda=True)
    if class_name.startswith("__"):  # __keras_tensor__, __tuple__, __numpy__ and similar: plain data
        return None
    is_function = class_name == "function"
    registered_name, module = node.get("registered_name"), node.get("module")
    name = str(config) if is_function else str(registered_name or class_name)
    package = str(module or "").split(".")[0]
    is_from_keras = not is_function and package in _KERAS_PACKAGES
    has_only_name = (
        package in ("", "builtins", *_KERAS_PACKAGES) if is_function else not (registered_name or module)
    )
    if is_from_keras or (has_only_name and is_keras_name(name)):
        return None
    return CustomEntry(layer, name.rpartition(">")[2], name)
