"""Import Keras without scikit-learn, which costs 2 of 6 CPU seconds and is needed by `keras.wrappers` only.

Keras imports scikit-learn, with SciPy's statistics, whenever it is installed. A stand-in for one module of
Keras postpones this until a class of `keras.wrappers` is used; then the real module takes its place. If
another version of Keras has no such module, the stand-in is never used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_MODULE = "keras.src.wrappers.sklearn_wrapper"


def defer_wrappers() -> None:
    """Postpone the import of scikit-learn, unless Keras or scikit-learn is imported already."""
    if not {"keras", "sklearn"} & sys.modules.keys():
        sys.modules.setdefault(_MODULE, _DeferredModule(_MODULE))


class _DeferredModule(ModuleType):
    """The module until a class in it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such names
            raise AttributeError(name)
        return _DeferredClass(name) if name.startswith("SKLearn") else getattr(_load_module(), name)


class _DeferredClass:
    """A class of the module until it is used: called, subclassed, or compared with an object."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._load())

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type]:
        return (self._load(),)

    def _load(self) -> Any:
        return getattr(_load_module(), self._name)


def _load_module() -> ModuleType:
    """Return the real module, which takes the place of its stand-in."""
    if isinstance(sys.modules.get(_MODULE), _DeferredModule):
        del sys.modules[_MODULE]
    return importlib.import_module(_MODULE)
