"""What a saved Keras model file says about itself, read without Keras or TensorFlow.

In: the path of a local file. Out: its kind, its config, the custom code it needs. Runs nothing that
is stored in the file.
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


class Kind(StrEnum):
    """How a model was saved."""

    ARCHIVE = "a .keras archive"
    WHOLE_H5 = "a whole-model .h5"
    WEIGHTS_H5 = "a weights-only .h5"
    SAVED_MODEL = "a SavedModel folder"


@dataclass(frozen=True)
class Saved:
    """One model file, opened but not loaded.

    Attributes:
        kind: How it was saved.
        config: Keras's description of the model; empty for weights-only files.
        keras_version: The version that wrote it; empty when the file does not say.
    """

    kind: Kind
    config: dict[str, Any]
    keras_version: str = ""


@dataclass(frozen=True)
class CustomEntry:
    """One object of a saved config that is not Keras's own.

    Attributes:
        layer: Name of the layer it belongs to.
        class_name: Class or function name, without a package prefix.
        registered_name: The name Keras will look up, e.g. `seed>Sampling`.
        is_lambda: Python bytecode stored in the file itself.
    """

    layer: str
    class_name: str
    registered_name: str
    is_lambda: bool = False


def open_saved(path: Path) -> Saved:
    """Return what the file is, by its content and not by its name.

    Raises:
        ModelError: It is no Keras file, or is truncated. Folders are taken for SavedModels.
    """
    if path.is_dir():
        return Saved(Kind.SAVED_MODEL, {})
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:2] == b"PK":
        return _open_archive(path)
    if magic == b"\x89HDF\r\n\x1a\n":
        return _open_h5(path)
    raise ModelError(
        f"{path.name}: not a model file; expected a .keras archive or an .h5 file saved by Keras"
    )


def custom_entries(config: dict[str, Any], is_own: Callable[[str], bool]) -> list[CustomEntry]:
    """Return each class, function and lambda in a saved config that is not part of Keras.

    Args:
        config: `Saved.config`.
        is_own: Whether Keras has something of that name; asked where the config names no module.

    The compile settings (losses, metrics, optimizer) are left out: featray never compiles.
    """
    body = {key: value for key, value in config.items() if key != "compile_config"}
    found = _custom_in(body, str(config.get("class_name", "model")), is_own)
    return list(dict.fromkeys(found))


def _open_archive(path: Path) -> Saved:
    try:
        with zipfile.ZipFile(path) as archive:
            if "config.json" not in archive.namelist():
                raise ModelError(f"{path.name}: a zip file without config.json; it was not saved by Keras")
            if not any(name.startswith("model.weights.") for name in archive.namelist()):
                raise ModelError(
                    f"{path.name}: holds no weights, which would be random; save the model again"
                )
            config = json.loads(archive.read("config.json"))
            metadata = (
                json.loads(archive.read("metadata.json")) if "metadata.json" in archive.namelist() else {}
            )
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, EOFError) as error:
        raise ModelError(f"{path.name}: truncated or damaged ({error}); copy or save it again") from None
    return Saved(Kind.ARCHIVE, config, str(metadata.get("keras_version", "")))


def _open_h5(path: Path) -> Saved:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            text, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "")
            holds_weights = _holds_weights(file)
    except OSError:
        raise ModelError(f"{path.name}: truncated or damaged HDF5; copy or save it again") from None
    if text is None and not holds_weights:
        raise ModelError(
            f"{path.name}: an HDF5 file with neither a model nor weights in it; Keras did not save it"
        )
    if text is None:
        return Saved(Kind.WEIGHTS_H5, {}, _text(version))
    return Saved(Kind.WHOLE_H5, json.loads(_text(text)), _text(version))


def _holds_weights(file: Any) -> bool:
    """Return whether there are weights in the older layout or the newer one (groups named `vars`)."""
    groups: list[str] = []
    file.visit(groups.append)
    older = any(key.startswith("layer_names") for key in file.attrs)
    return older or any("vars" in group.split("/") for group in groups)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _custom_in(node: Any, layer: str, is_own: Callable[[str], bool]) -> Iterator[CustomEntry]:
    if isinstance(node, list):
        for item in node:
            yield from _custom_in(item, layer, is_own)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("class_name"), str) and "config" in node:
        layer = _layer_name(node) or layer
        entry = _as_custom(node, layer, is_own)
        if entry is not None:
            yield entry
    for value in node.values():
        yield from _custom_in(value, layer, is_own)


def _layer_name(node: dict[str, Any]) -> str:
    config = node["config"] if isinstance(node["config"], dict) else {}
    is_layer = "name" in node or "trainable" in config or "layers" in config
    return str(node.get("name") or config.get("name") or "") if is_layer else ""


def _as_custom(node: dict[str, Any], layer: str, is_own: Callable[[str], bool]) -> CustomEntry | None:
    class_name, config = node["class_name"], node["config"]
    # Older files keep a lambda as a marshalled list beside a function_type.
    if class_name == "__lambda__" or (isinstance(config, dict) and config.get("function_type") == "lambda"):
        return CustomEntry(layer, "Lambda", "", is_lambda=True)
    if class_name.startswith("__"):  # __keras_tensor__, __tuple__, __numpy__ and the like: plain data
        return None
    is_function, registered, module = (
        class_name == "function",
        node.get("registered_name"),
        node.get("module"),
    )
    name = str(config) if is_function else str(registered or class_name)
    from_keras = not is_function and str(module or "").split(".")[0] == "keras"
    says_only_name = is_function or not (registered or module)
    if from_keras or (says_only_name and is_own(name)):
        return None
    return CustomEntry(layer, name.rpartition(">")[2], name)
