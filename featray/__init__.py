"""featray: the activations of chosen Keras layers for every CT scan you own, as Parquet.

The functions of the command line, from Python. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featray.errors import FeatrayError
    from featray.estimate import plan
    from featray.model import Extractor
    from featray.model import list_layers as layers
    from featray.pipeline import extract
    from featray.stages.report import Summary

__all__ = ["Extractor", "FeatrayError", "Summary", "extract", "layers", "plan"]

_HOMES = {
    "Extractor": ("featray.model", "Extractor"),
    "FeatrayError": ("featray.errors", "FeatrayError"),
    "Summary": ("featray.stages.report", "Summary"),
    "extract": ("featray.pipeline", "extract"),
    "layers": ("featray.model", "list_layers"),
    "plan": ("featray.estimate", "plan"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featray' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
