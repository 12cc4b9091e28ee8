"""Write the messages for model files that Keras cannot load: the cause, and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

from featray.model import runtime
from featray.model.loading import keras2
from featray.model.loading.model_file import ModelFile


def summarize_file_error(error: Exception, path: Path) -> str:
    """Return the type and the cause of an error; `path` appears in it without its folder."""
    return runtime.summarize_error(error).replace(str(path), path.name).replace(str(path.parent), "")


def describe_load_failure(path: Path, content: ModelFile, reason: str) -> str:
    """Return the message for a model file that the installed Keras cannot load for `reason`."""
    import keras

    reader = f"Keras {keras.__version__}"
    if keras2.is_keras2_file(content):
        import tf_keras

        reader = f"Keras 2 (tf_keras {tf_keras.__version__})"
    origin = f" that Keras {content.keras_version} wrote" if content.keras_version else ""
    return (
        f"{path.name}: {content.format}{origin} cannot be loaded by {reader} ({reason}); "
        f"{_suggest_fix(content, keras.__version__)}"
    )


def _suggest_fix(content: ModelFile, installed_version: str) -> str:
    """Return the remedies; only those that need nothing except the file, or code that the user may have."""
    builder = "name code that builds the model in model.builder; its weights are then read from this file"
    if keras2.is_keras2_file(content):
        return (
            "if the cause is in a class of model.custom_objects, write it for Keras 2 (import tf_keras as "
            f"keras), or {builder}"
        )
    if _parse_version(content.keras_version) > _parse_version(installed_version):
        return f"the file is newer than this Keras: install Keras {content.keras_version}, or {builder}"
    return f"if the cause is in a class of model.custom_objects, correct it there, or {builder}"


def _parse_version(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, `3.15.1` -> (3, 15)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
