"""Modules that the code of a model needs, and what differs on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from featray.config import ModelConfig
from featray.engines.ray import model_files
from featray.errors import ExitCode, ModelError
from featray.model.loading.download import compute_sha256
from featray.model.loading.required_modules import (
    compute_module_digests,
    describe_differences,
    find_required_modules,
)

CODE = """
import os
import keras
import cl_helper
from pydantic import BaseModel
try:
    import not_installed
except ImportError:
    pass
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Return a model whose code imports a module beside it, and that names a class of another module."""
    (tmp_path / "build.py").write_text(CODE)
    for name in ("cl_helper", "cl_layers"):
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name} must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return ModelConfig.model_validate(
        {
            "uri": "m.h5",
            "builder": f"{tmp_path / 'build.py'}:build",
            "custom_objects": ["cl_layers:Layer", "featray.synthetic.vae:Sampling"],
            "layers": ["a"],
        }
    )


def test_modules_are_found_without_importing_them(model: ModelConfig, tmp_path: Path) -> None:
    required = find_required_modules(model)
    digests = {name: compute_sha256(tmp_path / f"{name}.py") for name in ("cl_helper", "cl_layers")}
    assert required == {**digests, "pydantic": ""}
    assert compute_module_digests([*required, "no.such.module"]).keys() == required.keys()


def test_missing_modules_and_other_files_differ_and_other_versions_of_packages_do_not() -> None:
    required = {"a": "1", "b": "2", "pydantic": ""}
    assert describe_differences(required, {"a": "1", "b": "2", "pydantic": "3"}) == []
    assert describe_differences(required, {"b": "4"}) == [
        "a is missing",
        "pydantic is missing",
        "b is another file",
    ]


def test_nodes_that_lack_a_module_are_refused_before_the_run(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = find_required_modules(model)
    monkeypatch.setattr(model_files, "_look_up_modules", lambda _: [required, {"pydantic": "1"}])
    with pytest.raises(
        ModelError, match=r"\(cl_helper is missing, cl_layers is missing\)\. Files that"
    ) as error:
        model_files._refuse_missing_modules(model)
    assert error.value.exit_code == ExitCode.USAGE
    monkeypatch.setattr(model_files, "_look_up_modules", lambda _: [required])
    model_files._refuse_missing_modules(model)
