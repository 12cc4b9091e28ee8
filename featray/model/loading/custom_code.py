"""Import the Python objects that a config names: custom layers, custom functions and model builders.

In: `file.py:NAME` or `package.module:NAME`. Out: the object and a sha256 of the code that defines it.
Must not know about Keras.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from featray.errors import ModelError
from featray.model import runtime
from featray.model.loading import download

VAE_SHA256 = "af69a146b65168de7078ba2517cb2f4e614597666f596f1d178207a8786edf28"
"""The sha256 that a recipe contains for the code of `featray.synthetic.vae`.

It is the sha256 of this module's file in featray 0.1.0, where it was `featray/vae.py`. It is a constant
because values do not change when only the text of the module changes or the module moves. With the sha256 of
the installed file, every output that was extracted with the `Sampling` layer would become stale. Change the
constant to the sha256 of the new file when the values change, that is, when `Sampling` computes something
else or a function of the module builds another model.
"""

MOVED_MODULES = {"featray.vae": "featray.synthetic.vae"}
"""Modules of featray that had another name in an earlier version, as {old name: present name}.

Configs of users name `featray.vae:Sampling` in `model.custom_objects`. These configs must still load.
"""

_FIXED_SHA256 = {"featray.synthetic.vae": VAE_SHA256}
"""Modules of featray that have a constant sha256 in a recipe instead of the sha256 of the installed file."""


def import_object(reference: str, *, config_key: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the object that `reference` names, and the sha256 of the code that defines it.

    Args:
        reference: `file.py:NAME`, where the file is a path or an fsspec URL, or `package.module:NAME`.
        config_key: The key of the `model` section that holds the reference, for messages.
        storage_options: fsspec options for a remote file.

    Raises:
        ModelError: The reference has neither form, the code cannot be imported, or it has no such name.
    """
    location, colon, name = reference.rpartition(":")
    if not colon or not location or not name:
        raise ModelError(f"{config_key}: {reference!r} is neither file.py:NAME nor package.module:NAME")
    short_reference = f"{Path(location).name}:{name}"
    try:
        if location.endswith(".py"):
            module, sha256 = _import_file(location, storage_options)
        else:
            module, sha256 = _import_module(location)
    except ModelError as error:
        raise ModelError([f"{config_key}: {line}" for line in error.problems]) from error
    except Exception as error:  # an import runs user code, which may raise anything
        raise ModelError(
            f"{config_key}: {short_reference} cannot be imported ({runtime.summarize_error(error)})"
        ) from error
    if not hasattr(module, name):
        kind = "the file" if location.endswith(".py") else "the module"
        raise ModelError(f"{config_key}: {short_reference}: {kind} has no {name}")
    return getattr(module, name), sha256


def combine_sha256(*texts: str) -> str:
    """Return one sha256 over several texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _import_file(location: str, storage_options: Mapping[str, Any]) -> tuple[ModuleType, str]:
    """Import a Python file. The module name contains its sha256, so a changed file is imported again."""
    file = download.get_local_file(location, storage_options)
    module_name = f"featray_custom_{file.path.stem}_{file.sha256[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name], file.sha256
    module_spec = importlib.util.spec_from_file_location(module_name, file.path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module, file.sha256


def _import_module(name: str) -> tuple[ModuleType, str]:
    """Import an installed module; the sha256 is that of its file, or empty for a module without source."""
    name = MOVED_MODULES.get(name, name)
    module = importlib.import_module(name)
    if name in _FIXED_SHA256:
        return module, _FIXED_SHA256[name]
    source = inspect.getsourcefile(module)
    return module, download.compute_sha256(Path(source)) if source else ""
