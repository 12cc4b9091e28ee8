"""Fixtures: small models on disk, and the custom code that some of them need."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL = {"input_zyx": (8, 16, 16), "filters": (2, 3), "dense": 6, "latent": 4}
SAMPLING = "featray.synthetic.vae:Sampling"


@pytest.fixture(scope="session")
def small_vae() -> Any:
    """Return a nested functional VAE with inputs of (8, 16, 16) voxels."""
    from featray.synthetic import vae

    return vae.build_vae(**SMALL, seed=3)


@pytest.fixture(scope="session")
def small_vae_file(small_vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the small VAE as a `.keras` file."""
    path = tmp_path_factory.mktemp("models") / "vae.keras"
    small_vae.save(path)
    return path


@pytest.fixture(scope="session")
def volumes() -> np.ndarray:
    """Return five random volumes (5, 8, 16, 16) in [0, 1]."""
    return np.random.default_rng(7).random((5, 8, 16, 16), np.float32)


@pytest.fixture
def code(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that writes a Python file: (file name, source) -> path."""

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write


@pytest.fixture
def spec(small_vae_file: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a `model` section for the small VAE: (*layers, **other keys)."""

    def make(*layers: Any, **keys: Any) -> dict[str, Any]:
        return {"uri": str(small_vae_file), "custom_objects": [SAMPLING], "layers": list(layers), **keys}

    return make
