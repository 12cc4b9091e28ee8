"""`featray layers` lists the layers of any model; options on the command line say how to load it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import yaml

from featray.cli.main import main

BUILDER = """
    import keras
    def build():
        encoder = keras.Sequential([keras.layers.Conv3D(2, 3, name="conv")], name="encoder")
        return keras.Sequential([encoder, keras.layers.Flatten(name="flat")])
"""
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `featray layers … --json` and returns the exit code and the JSON."""

    def run_layers(*words: str) -> tuple[int, dict[str, Any]]:
        code = main(["layers", *words, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_layers


@pytest.fixture
def small_vae_file(tmp_path: Path) -> Path:
    """Return a nested functional VAE with inputs of (8, 16, 16) voxels as a `.keras` file."""
    from featray.synthetic.vae import build_vae

    path = tmp_path / "vae.keras"
    build_vae((8, 16, 16), (2, 3), 6, 4, seed=3).save(path)
    return path


def _index_by_path(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["path"]: layer for layer in answer["layers"]}


def test_a_weights_file_is_listed_with_builder_size_and_submodel(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "build.py"
    source.write_text(textwrap.dedent(BUILDER))
    names: dict[str, Any] = {}
    exec(source.read_text(), names)
    model = names["build"]()
    model.build((None, 5, 6, 7, 1))
    model.save_weights(tmp_path / "m.weights.h5")
    words = [str(tmp_path / "m.weights.h5"), "--builder", f"{source}:build", "--size", "5,6,7"]
    status, answer = run(*words)
    assert status == 0
    shapes = {path: layer["shape"] for path, layer in _index_by_path(answer).items()}
    assert shapes == {"encoder/conv": [3, 4, 5, 2], "encoder": [3, 4, 5, 2], "flat": [120]}
    _, part = run(*words, "--submodel", "encoder")
    assert list(_index_by_path(part)) == ["conv"]


def test_a_file_that_contains_code_is_listed_only_with_trust(tmp_path: Path, run: Run) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x, name="twice")]).save(
        tmp_path / "m.keras"
    )
    status, answer = run(str(tmp_path / "m.keras"))
    assert status == 2
    assert "model.trust" in answer["error"]
    assert list(_index_by_path(run(str(tmp_path / "m.keras"), "--trust")[1])) == ["twice"]


@pytest.mark.slow
def test_a_config_marks_its_layers_with_the_values_and_gigabytes_after_its_pooling(
    small_vae_file: Path, tmp_path: Path, run: Run
) -> None:
    section = {
        "uri": str(small_vae_file),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "layers": [{"layer": "encoder/conv_1", "pool": "none"}, "z_mean"],
    }
    config = {
        "source": {"uri": "."},
        "preprocess": {"size": [8, 16, 16]},
        "model": section,
        "output": {"uri": "out"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    layers = _index_by_path(run(str(tmp_path / "c.yaml"))[1])
    conv, other = layers["encoder/conv_1"], layers["encoder/conv_2"]
    assert conv["chosen"] is True
    assert (conv["pool"], conv["values"], conv["gb_per_10000"]) == ("none", 4096, pytest.approx(0.16384))
    assert (other["chosen"], other["pool"], other["values"]) == (False, "avg", 3)
    assert {"path", "class", "shape", "values", "flags"} < set(conv)
    status, answer = run(str(tmp_path / "c.yaml"), "--submodel", "encoder")
    assert status == 2
    assert "--set model.submodel=encoder" in answer["error"]


@pytest.mark.parametrize("size", ["8,big,8", "0,1,1", "1.5"])
def test_an_invalid_size_is_wrong_usage(tmp_path: Path, run: Run, size: str) -> None:
    status, answer = run(str(tmp_path / "m.keras"), "--size", size)
    assert status == 2
    assert "such as 32,256,256" in answer["error"]
