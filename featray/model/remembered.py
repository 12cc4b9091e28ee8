"""Keep the facts from the checks of a model for later runs of the same user on the same machine.

In: the `model` section of a config, the size of one input, and the facts. Out: the same facts in a later run.
A key stands for everything that decides the facts: the bytes of the model and of its code, the config, the
input size, and the versions and settings of Keras, TensorFlow and featray. If a key cannot stand for all of
it, or if a folder for the files is missing or read-only, nothing is kept, and the model is checked again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import FeatrayError, StorageError
from featray.model import runtime
from featray.model.inputs import Shape
from featray.model.loading import custom_code, custom_objects, download
from featray.storage.store import Store
from featray.storage.user_cache import get_user_cache

log = logging.getLogger(__name__)

MAX_ENTRIES = 500
"""Number of files above which the oldest ones are deleted."""
_FOLDER = "checked-models"
_PACKAGES = ("featray", "tensorflow", "keras", "tf_keras", "numpy", "h5py", "ml_dtypes")
_KNOWN_IMPORTS = {"featray", "keras", "numpy", "tensorflow", "tf_keras"}
"""Packages that the code of a model may import besides the standard library. The key names their versions."""
_UNKNOWN_IMPORTS = {"importlib", "imp", "pkgutil", "runpy"}
"""Modules of the standard library that import others, or run files."""
_READING_NAMES = {
    "__import__",
    "environ",
    "eval",
    "exec",
    "fromfile",
    "genfromtxt",
    "getenv",
    "load",
    "load_model",
    "load_weights",
    "loadtxt",
    "memmap",
    "open",
    "read_bytes",
    "read_text",
}
"""Names of functions with which code reads data that its own text does not contain."""
_VARIABLES = {"KERAS_BACKEND": "tensorflow", runtime.ONEDNN_VARIABLE: "1"} | dict.fromkeys(
    ("TF_USE_LEGACY_KERAS", "TF_DETERMINISTIC_OPS", "TF_XLA_FLAGS", "XLA_FLAGS"), ""
)
"""Environment variables that change how models are computed, and their defaults."""
_GPU_FILES = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""A GPU is checked in each run, because it is another machine each time for a job on a cluster."""


def make_key(spec: ModelConfig, input_zyx: Shape | None, kind: str) -> str | None:
    """Return the key of the facts about a model; None if no key can stand for everything that decides them.

    Args:
        spec: The `model` section of a config.
        input_zyx: Requested size of one input.
        kind: What was asked.
    """
    try:
        files = [("model", download.get_local_file(spec.uri, spec.storage_options).sha256)]
        if spec.architecture:
            files.append(("architecture", download.get_local_file(spec.architecture).sha256))
        code = [_hash_code(reference, spec) for reference in _list_code(spec)]
    except (FeatrayError, OSError, ValueError, ImportError, SyntaxError):  # loading it gives the message
        return None
    if None in code or spec.trust or not _find_version("tensorflow") or any(map(os.path.exists, _GPU_FILES)):
        return None
    excluded = {"uri", "storage_options", "architecture", "builder", "custom_objects"}
    facts = {
        "kind": kind,
        "spec": spec.model_dump(mode="json", by_alias=True, exclude=excluded),
        "input": input_zyx,
        "files": files,
        "code": code,
        "versions": {name: _find_version(name) for name in _PACKAGES},
        "featray": _hash_own_code(),
        "python": [sys.version, platform.machine()],
        "settings": [_read_keras_settings(), *(os.environ.get(*variable) for variable in _VARIABLES.items())],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read(key: str | None) -> Mapping[str, Any] | None:
    """Return the facts that were kept under a key; None if none were kept, or if they cannot be read."""
    if key is None:
        return None
    try:
        found = json.loads(_get_path(key).read_bytes())
    except (OSError, RuntimeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def save(key: str | None, found: Mapping[str, Any]) -> None:
    """Keep facts under a key, if the folder can be written."""
    if key is None:
        return
    try:
        path = _get_path(key)
        Store(str(path.parent)).write(path.name, json.dumps(found).encode())
        _delete_oldest(path.parent)
    except (OSError, RuntimeError, StorageError) as error:
        log.debug("what was found out about the model is not kept (%s)", type(error).__name__)


def _get_path(key: str) -> Path:
    """Return the path of the file of a key.

    Raises:
        RuntimeError: The user has no folder.
    """
    return get_user_cache(_FOLDER) / f"{key}.json"


def _delete_oldest(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[MAX_ENTRIES:]:
        path.unlink(missing_ok=True)


def _list_code(spec: ModelConfig) -> list[str]:
    return [*([f"builder={spec.builder}"] if spec.builder else []), *spec.custom_objects]


def _hash_code(entry: str, spec: ModelConfig) -> list[str] | None:
    """Return the layer, the name and the sha256 of one piece of code; None if it may read or run other code.

    Raises:
        ModelError, ImportError: It is not found.
    """
    layer, reference = custom_objects.split_layer(entry)
    location = reference.rpartition(":")[0]
    if location.endswith(".py"):
        path = download.get_local_file(location, spec.storage_options).path
    else:
        module_name = custom_code.MOVED_MODULES.get(location, location)
        if "." in module_name and not module_name.startswith("featray."):  # its packages run code too
            return None
        module = importlib.util.find_spec(module_name)
        if module is None or not module.origin:
            return None
        path = Path(module.origin)
    content = path.read_bytes()
    if not _is_whole(content):
        return None
    return [layer, Path(reference).name, hashlib.sha256(content).hexdigest()]


def _is_whole(source: bytes) -> bool:
    """Return whether the text of a Python file says all that it does, except for known packages.

    Raises:
        SyntaxError, ValueError: It is no Python.
    """
    allowed = (set(sys.stdlib_module_names) | _KNOWN_IMPORTS) - _UNKNOWN_IMPORTS
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module or "."]
        elif {getattr(node, "id", ""), getattr(node, "attr", "")} & _READING_NAMES:
            return False
        else:
            continue
        if any(name.split(".")[0] not in allowed for name in names):
            return False
    return True


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _hash_own_code() -> str:
    """Return one sha256 of the code of featray that loads, checks and traces models."""
    package = Path(__file__).parents[1]
    files = [*(package / "model").rglob("*.py"), *(package / "synthetic").glob("*.py")]
    digests = [f"{path.relative_to(package)} {download.compute_sha256(path)}" for path in sorted(files)]
    return custom_code.combine_sha256(*digests)


def _read_keras_settings() -> str:
    """Return the settings of Keras of this user, such as the axis of the channels."""
    folder = os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser()
    try:
        return (Path(folder) / "keras.json").read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeError):
        return ""
