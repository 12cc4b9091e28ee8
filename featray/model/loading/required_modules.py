"""Find the modules that the code of a model imports, and compare them between machines.

In: the `model` section of a config. Out: the modules that must be importable wherever the model runs. Nothing
is imported here: modules are looked up by name.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from featray.config import ModelConfig
from featray.model.loading import download
from featray.model.loading.sent_files import list_code_references

_ALWAYS_THERE = {"featray", "h5py", "keras", "numpy", "scipy", "tensorflow", "tf_keras"}
"""Packages that featray itself needs, so that each worker has them."""


def find_required_modules(spec: ModelConfig) -> dict[str, str]:
    """Return the modules that the code of a model needs besides its own files, each with its sha256.

    These are the modules that `spec` names, and those that its files import at their top level. An imported
    module that is installed has no sha256, because its version may differ.
    """
    named: set[str] = set()
    imported: set[str] = set()
    for location in {reference.rpartition(":")[0] for reference in list_code_references(spec)}:
        if location.endswith(".py"):
            imported |= _list_imports(download.get_local_file(location, spec.storage_options).path)
        else:
            named.add(location)
    known = sys.stdlib_module_names | _ALWAYS_THERE
    names = sorted(name for name in named | imported if name.partition(".")[0] not in known)
    return {
        name: "" if name not in named and "site-packages" in path.parts else _compute_digest(path)
        for name, path in _find_files(names).items()
    }


def compute_module_digests(names: Collection[str]) -> dict[str, str]:
    """Return the sha256 of each module that this process can import; of a package, that of its `__init__.py`.

    It is empty for a module without a file.
    """
    return {name: _compute_digest(path) for name, path in _find_files(names).items()}


def describe_differences(required: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return the faults of the modules of another machine, as clauses."""
    missing = [name for name in required if name not in found]
    other = [
        name for name in required if required[name] and found.get(name, required[name]) != required[name]
    ]
    return [f"{name} is missing" for name in missing] + [f"{name} is another file" for name in other]


def _list_imports(path: Path) -> set[str]:
    """Return the modules that the top level of a file imports, not those in functions or `try`."""
    modules: set[str] = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    return modules


def _find_files(names: Collection[str]) -> dict[str, Path]:
    """Return the file of each module that can be imported, without importing it, only its parents."""
    files = {}
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None:
            files[name] = Path(spec.origin or "")
    return files


def _compute_digest(path: Path) -> str:
    return download.compute_sha256(path) if path.is_file() else ""
