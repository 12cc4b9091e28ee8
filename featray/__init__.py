"""Extract the activations of chosen Keras layers for every CT scan of a collection, as Parquet.

This module exports the functions and classes for use from Python. Each is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featray.commands.export import export
    from featray.commands.export_vectors import export_vectors
    from featray.commands.plan import plan
    from featray.commands.report import report
    from featray.commands.vacuum import vacuum
    from featray.commands.verify import verify
    from featray.errors import FeatrayError
    from featray.model import Extractor
    from featray.model import list_layers as layers
    from featray.output.features import Features
    from featray.output.read import read
    from featray.output.read_ray import read_ray
    from featray.pipeline import extract, refresh
    from featray.stages.report import Summary

__all__ = [
    "Extractor",
    "FeatrayError",
    "Features",
    "Summary",
    "export",
    "export_vectors",
    "extract",
    "layers",
    "plan",
    "read",
    "read_ray",
    "refresh",
    "report",
    "vacuum",
    "verify",
]

_LAZY_EXPORTS = {
    "Extractor": ("featray.model", "Extractor"),
    "FeatrayError": ("featray.errors", "FeatrayError"),
    "Features": ("featray.output.features", "Features"),
    "Summary": ("featray.stages.report", "Summary"),
    "export": ("featray.commands.export", "export"),
    "export_vectors": ("featray.commands.export_vectors", "export_vectors"),
    "extract": ("featray.pipeline", "extract"),
    "layers": ("featray.model", "list_layers"),
    "refresh": ("featray.pipeline", "refresh"),
    "report": ("featray.commands.report", "report"),
    "vacuum": ("featray.commands.vacuum", "vacuum"),
    "plan": ("featray.commands.plan", "plan"),
    "read": ("featray.output.read", "read"),
    "read_ray": ("featray.output.read_ray", "read_ray"),
    "verify": ("featray.commands.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'featray' has no attribute {name!r}")
    module, attribute = _LAZY_EXPORTS[name]
    return getattr(import_module(module), attribute)
