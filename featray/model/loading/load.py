"""Load the model that a config names, with the sha256 of every file that the model is made from.

In: the `model` section of a config. Out: a Keras model that can be called for inference. Python code that is
stored in a model file runs only if the config trusts the file. Must not know which layers are extracted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import keras_versions
from featray.model.loading import (
    architecture,
    builder,
    config_check,
    download,
    keras2,
    keras2_config,
    model_file,
    readable_file,
    theano,
    weights,
)
from featray.model.loading.custom_objects import CustomCode, import_custom_objects, match_custom_objects
from featray.model.loading.failure_messages import describe_load_failure, summarize_file_error
from featray.model.loading.keras_state import keep_layer_configs, register_objects, restart_layer_names
from featray.model.loading.model_file import ModelFile, ModelFormat


@dataclass(frozen=True)
class LoadedModel:
    """A model and the files that it was made from.

    Attributes:
        model: The Keras model, not compiled.
        files: sha256 by role: `model`, `architecture`, `builder FILE:NAME`, `custom FILE:NAME`,
            `layer:NAME FILE:NAME`.
        weights: The weights that the model had when it was loaded. Weights that the model creates later have
            random values.
        format: The format of the model file.
        corrections: Parts of this file of Keras 2 that featray 0.1.0 computed differently.
    """

    model: Any
    files: dict[str, str]
    weights: Sequence[Any]
    format: ModelFormat
    corrections: Sequence[str] = ()

    @property
    def sha256(self) -> str:
        """One sha256 over the first word of each role and the sha256 of its file.

        The names of files and objects do not affect it.
        """
        lines = sorted(f"{role.split()[0]} {digest}\n" for role, digest in self.files.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_model(spec: ModelConfig, input_shapes: Sequence[tuple[int | None, ...]] = ()) -> LoadedModel:
    """Return the model that `spec` names.

    Args:
        spec: The `model` section; `layers` is not used.
        input_shapes: Shapes to try for one input, without batch axis, the most likely one first. They are
            used only if a builder returns a model that does not declare its input.

    Raises:
        ModelError: The file is missing or damaged, custom code is missing or not allowed, or Keras cannot
            load the file. Lists all missing custom code.
    """
    _refuse_checkpoint(spec.uri)
    file = download.get_local_file(spec.uri, spec.storage_options)
    content = model_file.read_model_file(file.path)
    code = import_custom_objects(spec)
    files, corrections = {"model": file.sha256, **code.files}, list[str]()
    with restart_layer_names():
        if content.format is ModelFormat.SAVED_MODEL:
            model = _load_saved_model(spec, file.path)
        elif spec.builder:
            model, files[f"builder {Path(spec.builder).name}"] = builder.load_with_builder(
                spec, file.path, content.format, input_shapes
            )
        elif spec.architecture:
            description, files["architecture"] = architecture.read_architecture(spec)
            model = _load_with_architecture(description, (file.path, content.format), code, trust=spec.trust)
            content = replace(content, backend=content.backend or description.backend)
        else:
            model = _load_keras_file(file.path, content, code, trust=spec.trust)
            corrections = _list_corrections(content)
    if theano.is_written_with_theano(content):
        theano.flip_kernels(model)
        corrections = sorted({*corrections, "theano"})
    if spec.compute:
        _set_compute_dtype(model, spec.compute)
    return LoadedModel(model, files, list(model.weights), content.format, corrections)


def _refuse_checkpoint(uri: str) -> None:
    """Raise ModelError if `uri` is a file or the prefix of a TensorFlow checkpoint."""
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", uri)
    if prefix == uri and not Path(f"{uri}.index").is_file():
        return
    name = Path(prefix).name
    raise ModelError(
        f"{name}: is a TensorFlow checkpoint, which only code that builds the model can load; run once "
        f"with Keras 2 (import tf_keras as keras): model.load_weights('{name}') and "
        "model.save_weights('NAME.weights.h5'), give that file in model.uri, and name the code that builds "
        "the model in model.builder"
    )


def get_submodel(loaded: LoadedModel, path: str | None) -> Any:
    """Return the layer or attribute of the model at `path` (`encoder`, `vae/encoder`); the model if None.

    For a SavedModel, `path` is the name of an endpoint. `load_model` has loaded only this endpoint.

    Raises:
        ModelError: No layer or attribute has this name. Lists those that the model has.
    """
    model = loaded.model
    if loaded.format is ModelFormat.SAVED_MODEL or not path:
        return model
    for name in path.split("/"):
        children = _find_children(model)
        if name not in children:
            known = ", ".join(children) or "none"
            raise ModelError(f"submodel: {model.name!r} has no layer or attribute {name!r}; it has: {known}")
        model = children[name]
    return model


def _find_children(model: Any) -> dict[str, Any]:
    """Return the layers of a model by attribute name and by layer name; layer names take precedence."""
    attributes = {
        key: value
        for key, value in vars(model).items()
        if keras_versions.is_layer(value) and not key.startswith("_")
    }
    layers = {layer.name: layer for layer in getattr(model, "layers", [])}
    return {**attributes, **layers}


def _set_compute_dtype(model: Any, dtype: str) -> None:
    """Let every layer compute in `dtype` (variables stay float32), except quantized layers."""
    import keras

    if keras_versions.is_keras2_layer(model):
        keras2.set_compute_dtype(model, dtype)
        return
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    for layer in model._flatten_layers():
        if not isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            layer.dtype_policy = keras.DTypePolicy(policy)


def _load_keras_file(path: Path, content: ModelFile, code: CustomCode, *, trust: bool) -> Any:
    """Load a whole model from a .keras or .h5 file."""
    if content.format is ModelFormat.WEIGHTS_H5:
        raise ModelError(
            f"{path.name}: holds weights only, no description of the model; name the code that builds the "
            "model in model.builder (file.py:function), or give its description in model.architecture "
            "(model.json), or save the whole model as .keras"
        )
    try:
        content, known, problems = match_custom_objects(content, code, trust=trust)
        if problems:
            raise ModelError(problems, path.name)
        if keras2.is_keras2_file(content):
            return _load_keras2_file(path, content, known, trust=trust)
        return _load_keras3_file(path, content, known, trust=trust)
    except ModelError:
        raise
    except Exception as error:  # Keras passes on any error that a layer raises
        raise ModelError(describe_load_failure(path, content, summarize_file_error(error, path))) from error


def _check_config(model: Any, path: Path, content: ModelFile) -> None:
    """Raise ModelError if a layer was loaded with another value than its file says."""
    differences = config_check.find_config_differences(model, content.config)
    if differences:
        raise ModelError(
            [
                *differences,
                "Keras loads these values wrongly, so the features would be wrong; name code that builds the "
                "model in model.builder, or for a class of model.custom_objects let from_config and "
                "get_config agree",
            ],
            path.name,
        )


def _load_keras3_file(path: Path, content: ModelFile, objects: dict[str, Any], *, trust: bool) -> Any:
    import keras

    is_h5 = content.format is ModelFormat.WHOLE_H5
    open_file = readable_file.open_h5_with_config if is_h5 else readable_file.open_with_config
    with register_objects(objects), keep_layer_configs(), open_file(path, content.config) as readable:
        model = keras.saving.load_model(readable, compile=False, safe_mode=not trust)
    _check_config(model, path, content)
    return model


def _load_keras2_file(path: Path, content: ModelFile, objects: Mapping[str, Any], *, trust: bool) -> Any:
    if content.format is ModelFormat.ARCHIVE:
        return keras2.load_archive(path, content.config, objects, trust=trust)
    model = keras2.build_model(content.config, objects, trust=trust)
    weights.load_weights(model, path, content.format)
    return model


def _load_with_architecture(
    description: ModelFile, weights_file: tuple[Path, ModelFormat], code: CustomCode, *, trust: bool
) -> Any:
    """Load the weights of a file into the model of a description."""
    try:
        return architecture.load_with_architecture(description, weights_file, code, trust=trust)
    except ModelError:
        raise
    except Exception as error:  # Keras passes on any error that a layer raises
        path, _ = weights_file
        reason = summarize_file_error(error, path)
        raise ModelError(
            f"{path.name}: the weights do not fit the model that model.architecture describes ({reason})"
        ) from error


def _list_corrections(content: ModelFile) -> list[str]:
    if not keras2.is_keras2_file(content):
        return []
    return keras2_config.list_corrections(content.config)


def _load_saved_model(spec: ModelConfig, folder: Path) -> Any:
    """Load one endpoint of a SavedModel folder, if the config trusts it."""
    problems = [
        f"{key}: has no effect on a SavedModel; give a .keras or .h5 file"
        for key, value in (("builder", spec.builder), ("compute", spec.compute))
        if value
    ]
    if not spec.trust:
        problems.append(
            "a SavedModel holds only its exported endpoints and no inner layers to extract, and it is a "
            "program: its graphs may read and write files when they run; save the model with "
            "model.save('NAME.keras') and give that file; or, if the outputs of an endpoint are enough and "
            "you trust the author of the model, set model.trust: true"
        )
    if problems:
        raise ModelError(problems, folder.name)
    from featray.model.loading import saved_model

    try:
        return saved_model.load_endpoint(folder, spec.submodel)
    except ModelError:
        raise
    except Exception as error:  # TensorFlow has several error types for damaged and missing files
        reason = summarize_file_error(error, folder)
        raise ModelError(
            f"{folder.name}: cannot be loaded as SavedModel ({reason}); export it again"
        ) from error
