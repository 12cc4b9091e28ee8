"""From a `ModelConfig` to a Keras model in memory, with the sha256 of everything that made it.

In: where the model lies and which custom code it may use. Out: the built or loadable model.
Code stored in a file runs only when the config allows it. Knows nothing of cutting.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import runtime
from featray.model.loading import download, keras2, model_file, weights
from featray.model.loading.custom_code import import_object
from featray.model.loading.model_file import CustomEntry, Kind, Saved

_KERAS_MODULES = (
    "layers",
    "models",
    "activations",
    "initializers",
    "regularizers",
    "constraints",
    "dtype_policies",
)
_INTERNAL_NAMES = ("Functional", "Policy")  # Keras's own, written to files but not exported


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    Attributes:
        model: The Keras model, not compiled.
        files: sha256 by role: `model`, `builder FILE`, `custom FILE:NAME`.
        weights: The weights it had when loaded. What it makes later has random values.
        kind: How it was saved.
    """

    model: Any
    files: dict[str, str]
    weights: Sequence[Any]
    kind: Kind

    @property
    def sha256(self) -> str:
        """One digest over all files and what each is used for; file names do not matter."""
        lines = sorted(f"{role.split()[0]} {digest}\n" for role, digest in self.files.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_model(spec: ModelConfig, input_shapes: Sequence[tuple[int | None, ...]] = ()) -> Loaded:
    """Return the model that `spec` names, ready to be called for inference.

    Args:
        spec: What to load; `layers` is not looked at.
        input_shapes: What one input may look like, without batch axis, the likeliest first: for
            builders that return a model without known input.

    Raises:
        ModelError: The file is missing or damaged, custom code is missing or not allowed, or
            Keras cannot load it; all missing pieces are listed.
    """
    file = download.local_file(spec.uri, spec.storage_options)
    content = model_file.open_saved(file.path)
    files = {"model": file.sha256}
    objects = _custom_objects(spec, files)
    with _fresh_names():
        if content.kind is Kind.SAVED_MODEL:
            model = _from_saved_model(spec, file.path)
        elif spec.builder:
            model = _from_builder(spec, file.path, content, input_shapes, files)
        else:
            model = _from_file(spec, file.path, content, objects)
    if spec.compute:
        _compute_in(model, spec.compute)
    return Loaded(model, files, list(model.weights), content.kind)


def submodel(loaded: Loaded, name: str | None) -> Any:
    """Return the layer or attribute of the model at the path `name` (`encoder`, `vae/encoder`).

    Of a SavedModel `name` is an endpoint, and the model is that already.

    Raises:
        ModelError: There is none; lists what there is.
    """
    model = loaded.model
    if loaded.kind is Kind.SAVED_MODEL:
        return model
    for part in (name or "").split("/") if name else ():
        children = _children(model)
        if part not in children:
            known = ", ".join(children) or "none"
            raise ModelError(f"submodel: no layer or attribute {part!r} in {model.name!r}; it has: {known}")
        model = children[part]
    return model


def _compute_in(model: Any, kind: str) -> None:
    """Let every layer compute in `kind`; quantised ones keep their own arithmetic."""
    import keras

    name = kind if kind == "float32" else f"mixed_{kind}"
    for layer in model._flatten_layers():
        if not isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            layer.dtype_policy = keras.DTypePolicy(name)


@contextlib.contextmanager
def _registered(objects: dict[str, Any]) -> Iterator[None]:
    """Put `objects` into Keras's global registry for a while.

    For nested objects it outranks `custom_objects` and scopes, and may hold another version of a class.
    """
    import keras

    registry = keras.saving.get_custom_objects()
    kept = dict(registry)
    registry.update(objects)
    try:
        yield
    finally:
        registry.clear()
        registry.update(kept)


@contextlib.contextmanager
def _fresh_names() -> Iterator[None]:
    """Let Keras count automatic names (conv3d_4) from the start, then go on as before.

    It counts over a whole process; a layer's name must not depend on what was made before it.
    """
    from keras.src.backend.common import global_state
    from keras.src.utils import naming

    kept = global_state.get_global_attribute("object_name_uids")
    naming.reset_uids()
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", kept)


def _children(model: Any) -> dict[str, Any]:
    import keras

    attributes = {
        key: value
        for key, value in vars(model).items()
        if isinstance(value, keras.layers.Layer) and not key.startswith("_")
    }
    named = {layer.name: layer for layer in getattr(model, "layers", [])}
    return {**attributes, **named}


def _from_file(spec: ModelConfig, path: Path, content: Saved, objects: dict[str, Any]) -> Any:
    import keras

    if content.kind is Kind.WEIGHTS_H5:
        raise ModelError(
            f"{path.name}: holds weights only, no description of the model; name the code that makes it in "
            "model.builder (file.py:function), or save the whole model as .keras"
        )
    if content.kind is Kind.ARCHIVE and keras2.is_old(content.keras_version):
        raise ModelError(_keras_failure(path, content, "its layout is that of Keras 2"))
    needed = model_file.custom_entries(content.config, _is_keras_name)
    known = {**_stand_ins(content), **_matched(needed, objects)}
    problems = _missing(needed, known, spec.trust)
    if problems:
        raise ModelError(problems, path.name)
    try:
        with _registered(known), _readable(path, content) as readable:
            return keras.saving.load_model(readable, compile=False, safe_mode=not spec.trust)
    except Exception as error:  # Keras raises whatever the layer at fault raised
        raise ModelError(_keras_failure(path, content, _short(error, path))) from error


def _from_saved_model(spec: ModelConfig, folder: Path) -> Any:
    problems = [
        f"{key}: has no effect on a SavedModel; give a .keras or .h5 file"
        for key, value in (("builder", spec.builder), ("compute", spec.compute))
        if value
    ]
    if not spec.trust:
        problems.append(
            "a SavedModel holds only its exported endpoints, no inner layers to cut at, and is a program: "
            "its graphs may read and write files when they run; save the model with model.save('NAME.keras') "
            "and give that file, or, if outputs are enough and you trust who made it, set model.trust: true"
        )
    if problems:
        raise ModelError(problems, folder.name)
    from featray.model.loading import saved_model

    try:
        return saved_model.open_endpoint(folder, spec.submodel)
    except ModelError:
        raise
    except Exception as error:  # TensorFlow's kinds, for files that are damaged or missing
        raise ModelError(
            f"{folder.name}: cannot be loaded as SavedModel ({_short(error, folder)}); export it again"
        ) from error


@contextlib.contextmanager
def _readable(path: Path, content: Saved) -> Iterator[Path]:
    """Yield a file that this Keras reads: `path`, or for a while a copy that says the same anew."""
    import h5py

    suffix = ".h5" if content.kind is Kind.WHOLE_H5 else ".keras"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"model{suffix}"  # Keras goes by the suffix, which may be another
        if content.kind is not Kind.WHOLE_H5 or not keras2.is_old(content.keras_version):
            copy.symlink_to(path.absolute())
        else:
            shutil.copyfile(path, copy)
            with h5py.File(copy, "r+") as file:
                file.attrs["model_config"] = json.dumps(keras2.upgraded(content.config))
        yield copy


def _from_builder(
    spec: ModelConfig,
    path: Path,
    content: Saved,
    input_shapes: Sequence[tuple[int | None, ...]],
    files: dict[str, str],
) -> Any:
    assert spec.builder is not None
    build, digest = import_object(spec.builder, config_key="builder", storage_options=spec.storage_options)
    files[f"builder {Path(spec.builder).name}"] = digest
    name = spec.builder.rpartition(":")[2]
    try:
        model = _built(build, input_shapes)
    except ModelError:
        raise
    except Exception as error:  # user code
        raise ModelError(f"builder: {name} failed ({_short(error, path)})") from error
    try:
        weights.load_into(model, path, content.kind)
    except Exception as error:  # ours, and whatever Keras raises for weights that do not fit
        reason = "; ".join(error.problems) if isinstance(error, ModelError) else _short(error, path)
        raise ModelError(
            f"{path.name}: the weights do not go into the model of {name} ({reason}); "
            "the builder must make the very model that was saved"
        ) from error
    return model


def _made(build: Callable[[], Any]) -> Any:
    import keras

    model = build()
    if not isinstance(model, keras.layers.Layer):
        raise ModelError(f"builder: it returned {type(model).__name__}, no Keras model")
    return model


def _built(build: Callable[[], Any], input_shapes: Sequence[tuple[int | None, ...]]) -> Any:
    """Return a model with its variables, made by a call on the first shape that it takes.

    A model that failed on one shape may hold weights of that shape, so each try gets a new one.
    """
    failure: Exception | None = None
    for shape in input_shapes:
        with _fresh_names():
            model = _made(build)
        if model.built:
            return model
        try:
            _call(model, shape)
            return model
        except Exception as error:  # user code
            failure = failure or error
    if failure is not None:
        raise failure
    model = _made(build)
    if not model.built:
        raise ModelError(
            "builder: the model does not say what input it takes, so its weights have no place yet; give its "
            "size (z, y, x), or for arrays model.input_shape"
        )
    return model


def _call(model: Any, input_shape: tuple[int | None, ...]) -> None:
    """Create a model's variables by tracing one call into a graph that is thrown away."""
    import tensorflow as tf

    spec = tf.TensorSpec((None, *input_shape), tf.float32)
    tf.function(lambda x: model(x, training=False), autograph=False).get_concrete_function(spec)


def _custom_objects(spec: ModelConfig, files: dict[str, str]) -> dict[str, Any]:
    """Return the objects of `spec.custom_objects` by bare and registered name; note their files."""
    import keras

    objects: dict[str, Any] = {}
    problems = []
    for text in spec.custom_objects:
        try:
            found, files[f"custom {Path(text).name}"] = import_object(
                text, config_key="custom_objects", storage_options=spec.storage_options
            )
        except ModelError as error:
            problems += error.problems
            continue
        name = text.rpartition(":")[2]
        if objects.get(name, found) is not found:
            problems.append(f"custom_objects: {name} is given twice, by different files")
        objects.update({name: found, keras.saving.get_registered_name(found): found})
    if problems:
        raise ModelError(problems)
    return objects


def _matched(needed: list[CustomEntry], objects: dict[str, Any]) -> dict[str, Any]:
    """Return `objects` under every name by which this file asks for them."""
    known = dict(objects)
    for entry in needed:
        found = objects.get(entry.registered_name, objects.get(entry.class_name))
        if found is not None:
            known[entry.registered_name] = found
    return known


def _missing(needed: list[CustomEntry], known: Mapping[str, Any], trust: bool) -> list[str]:
    problems = []
    for entry in needed:
        if entry.is_lambda and not trust:
            problems.append(
                f"layer {entry.layer!r} holds Python code inside the file (Lambda), which would run on "
                "loading; set model.trust: true if you trust who made the file, or save the model with a "
                "named function and give that in model.custom_objects"
            )
        elif entry.class_name in keras2.OPERATIONS and entry.registered_name not in known:
            problems.append(
                f"layer {entry.layer!r} is how Keras 2 stores a TensorFlow operation used as a layer, which "
                "Keras 3 cannot run; make the model in code, name that in model.builder, and give its "
                "weights (or this file)"
            )
        elif not entry.is_lambda and entry.registered_name not in known:
            problems.append(
                f"layer {entry.layer!r} needs {entry.class_name}, which is not part of Keras; add its code "
                f"to model.custom_objects, e.g. 'file.py:{entry.class_name}' or "
                f"'package.module:{entry.class_name}' (model.trust does not replace it)"
            )
    return problems


def _stand_ins(content: Saved) -> dict[str, Any]:
    """Return layers for what only Keras 2 has, unless the file names functions that may do anything."""
    if not keras2.is_old(content.keras_version) or keras2.refused_functions(content.config):
        return {}
    from featray.model.loading import keras2_layers

    return keras2_layers.STAND_INS


def _is_keras_name(name: str) -> bool:
    import keras

    return name in _INTERNAL_NAMES or any(hasattr(getattr(keras, module), name) for module in _KERAS_MODULES)


def _keras_failure(path: Path, content: Saved, reason: str) -> str:
    import keras

    made = f", made by Keras {content.keras_version}," if content.keras_version else ""
    return (
        f"{path.name}: {content.kind}{made} cannot be loaded by Keras {keras.__version__} "
        f"({reason}); {_way_out(content, keras.__version__)}, or give its code in model.builder"
    )


def _way_out(content: Saved, installed: str) -> str:
    if keras2.is_old(content.keras_version) and content.kind is Kind.ARCHIVE:
        return "load it with Keras 2 (the package tf_keras) and save it again as .h5, which is read"
    if _release(content.keras_version) > _release(installed):
        return f"the file is newer than this Keras: save it again with Keras {installed} or older"
    return "load it where it was made and save it again as .keras"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _short(error: Exception, path: Path) -> str:
    """Return a brief error that names the file but not its folder."""
    return runtime.summarize_error(error).replace(str(path), path.name).replace(str(path.parent), "")
