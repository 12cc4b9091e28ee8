"""Build a model from a description next to its weights: `model.json` or YAML, as Keras writes it.

In: `model.architecture`, and a local weights file. Out: a Keras model with these weights. No code in the
description runs; YAML tags that make objects other than lists and texts are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model.loading import download, keras2, weights
from featray.model.loading.custom_objects import CustomCode, match_custom_objects
from featray.model.loading.keras_state import register_objects
from featray.model.loading.model_file import ModelFile, ModelFormat


def read_architecture(spec: ModelConfig) -> tuple[ModelFile, str]:
    """Return the description in `spec.architecture` and the sha256 of its file.

    Raises:
        ModelError: The file is missing, or is not a description of a Keras model.
    """
    assert spec.architecture is not None
    file = download.get_local_file(spec.architecture, spec.storage_options)
    config = _parse(file.path)
    if not isinstance(config, dict) or not {"class_name", "config"} <= config.keys():
        raise ModelError(
            f"architecture: {Path(spec.architecture).name} is not a description of a Keras model; save it "
            "with model.to_json()"
        )
    version = str(config.get("keras_version", ""))
    if not version and "module" in config:  # Keras 3 writes modules, but no version
        version = "3"
    content = ModelFile(ModelFormat.WHOLE_H5, config, version, str(config.get("backend", "")))
    return content, file.sha256


def load_with_architecture(
    content: ModelFile, weights_file: tuple[Path, ModelFormat], code: CustomCode, *, trust: bool
) -> Any:
    """Return the model of a description with the weights of a file.

    Args:
        content: The description, as `read_architecture` returns it.
        weights_file: A local .keras or .h5 file of any name, and its format.
        code: The objects of the config.
        trust: Whether Python code in the description may run.

    Raises:
        ModelError: Custom code is missing, or the weights do not fit.
    """
    import keras

    content, known, problems = match_custom_objects(content, code, trust=trust)
    if problems:
        raise ModelError(problems, "architecture")
    if keras2.is_keras2_file(content):
        model = keras2.build_model(content.config, known, trust=trust)
    else:
        with register_objects(known):
            model = keras.saving.deserialize_keras_object(content.config, safe_mode=not trust)
    weights.load_weights(model, *weights_file)
    return model


class _Loader(yaml.SafeLoader):
    """Reads plain values, and the tuples and texts that old versions of Keras marked with a Python tag."""


def _make_list(loader: Any, node: Any) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


def _make_text(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _make_list)
_Loader.add_constructor("tag:yaml.org,2002:python/unicode", _make_text)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if text.lstrip().startswith("{") else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"architecture: {path.name} is neither JSON nor YAML ({error})") from None
