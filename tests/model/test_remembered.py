"""What was found out about a model is used again only for the same model, code, config and versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import Extractor, LayerList, ModelFacts, list_layers, remembered, runtime, trace

CODE = "import keras\n\n\nclass Twice(keras.layers.Layer):\n    def call(self, x):\n        return x * 2\n"
ZYX = (4, 4, 4)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.keras"
    volume = keras.Input((*ZYX, 1))
    keras.Model(volume, keras.layers.Dense(2, name="code")(keras.layers.Flatten()(volume))).save(path)
    return path


@pytest.fixture
def model(model_file: Path, tmp_path: Path) -> Path:
    """Return the file of a small model, which a test may change."""
    path = tmp_path / "m.keras"
    path.write_bytes(model_file.read_bytes())
    return path


def make_spec(model: Path, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"uri": str(model), "layers": ["code"], **keys})


def key_of(model: Path, **keys: Any) -> str | None:
    return remembered.make_key(make_spec(model, **keys), ZYX, "extractor")


def write_code(folder: Path, text: str) -> list[str]:
    (folder / "own.py").write_text(text)
    return [f"{folder / 'own.py'}:Twice"]


def test_the_key_does_not_depend_on_the_place_of_the_model(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.keras"
    copy.write_bytes(model.read_bytes())
    assert key_of(copy) == key_of(model) is not None


@pytest.mark.parametrize(
    "keys",
    [{"layers": ["code", "flatten"]}, {"submodel": "code"}, {"compute": "float16"}, {"batch_size": 1}],
    ids=str,
)
def test_another_config_has_another_key(model: Path, keys: dict[str, Any]) -> None:
    assert key_of(model, **keys) not in (None, key_of(model))


def test_another_size_question_model_or_version_has_another_key(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(model)
    keys = [
        remembered.make_key(spec, ZYX, "extractor"),
        remembered.make_key(spec, (8, 8, 8), "extractor"),
        remembered.make_key(spec, ZYX, "layers"),
    ]
    monkeypatch.setattr(remembered, "_find_version", lambda name: "1")
    keys.append(remembered.make_key(spec, ZYX, "extractor"))
    monkeypatch.setattr(remembered, "_hash_own_code", lambda: "other")
    keys.append(remembered.make_key(spec, ZYX, "extractor"))
    model.write_bytes(model.read_bytes() + b"0")
    keys.append(remembered.make_key(spec, ZYX, "extractor"))
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_other_code_has_another_key(model: Path, tmp_path: Path) -> None:
    first = key_of(model, custom_objects=write_code(tmp_path, CODE))
    other = key_of(model, custom_objects=write_code(tmp_path, CODE.replace("* 2", "* 3")))
    assert None not in (first, other)
    assert first != other
    assert key_of(model, builder=f"{tmp_path / 'own.py'}:Twice") not in (None, first, other)


@pytest.mark.parametrize(
    "line",
    [
        "import helpers",
        "from . import helpers",
        "from helpers.layers import x",
        "import importlib",
        "__import__('helpers')",
        "import numpy\nw = numpy.load('w.npy')",
        "w = open('w').read()",
        "import os\nx = os.environ['X']",
        "import torch",
        "def",
    ],
)
def test_code_that_may_depend_on_more_than_its_text_has_no_key(
    model: Path, tmp_path: Path, line: str
) -> None:
    assert key_of(model, custom_objects=write_code(tmp_path, f"{CODE}\n{line}\n")) is None


@pytest.mark.parametrize(
    "keys",
    [
        {"uri": "missing.keras"},
        {"trust": True},
        {"custom_objects": ["missing.py:X"]},
        {"custom_objects": ["keras.layers:Dense"]},
        {"custom_objects": ["nosuchmodule:X"]},
        {"builder": "broken"},
    ],
    ids=str,
)
def test_what_cannot_be_read_whole_has_no_key(model: Path, keys: dict[str, Any]) -> None:
    assert key_of(model, **keys) is None


def test_on_a_machine_with_a_gpu_nothing_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_GPU_FILES", (str(tmp_path),))
    assert key_of(model) is None


def test_a_folder_that_cannot_be_used_only_means_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "file"))
    remembered.save("a", {"b": 1})
    assert remembered.read("a") is None
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path))
    remembered.save("a", {"b": 1})
    assert remembered.read("a") == {"b": 1}
    next(tmp_path.rglob("a.json")).write_text("{")
    assert remembered.read("a") is None
    assert remembered.read(None) is None


def test_the_oldest_entries_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "MAX_ENTRIES", 2)
    for key in "abc":
        remembered.save(key, {})
    assert len(list(tmp_path.rglob("*.json"))) == 2
    assert remembered.read("c") == {}


def test_the_layers_of_a_known_model_are_listed_without_tensorflow(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path))
    found = list_layers(model)

    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runtime, "configure", refuse)
    known = list_layers(model)
    assert known == found
    assert known.unlisted == found.unlisted
    with pytest.raises(AssertionError):
        list_layers(make_spec(model, layers=["flatten"]))


@pytest.mark.parametrize("values", [{}, {"layers": [{}]}, {"layers": 1, "unlisted": []}])
def test_an_entry_of_another_form_is_not_used(values: dict[str, Any]) -> None:
    assert ModelFacts.parse(values) is None
    assert LayerList.parse(values) is None


@pytest.mark.slow
@pytest.mark.parametrize("pool", [{}, {"pool": "grid", "grid": [2, 2, 2]}], ids=["avg", "grid"])
def test_a_known_model_gives_the_same_values_and_the_same_recipe(
    spec: Callable[..., dict[str, Any]], pool: dict[str, Any]
) -> None:
    section = spec("encoder/z_mean", {"layer": "encoder/conv_1", "as": "conv", **pool})
    checked = Extractor(section)
    assert checked.facts is not None
    facts = ModelFacts.parse(json.loads(json.dumps(checked.facts.to_dict())))
    assert facts == checked.facts
    known = Extractor(section, facts=facts)
    assert known.recipe_part() == checked.recipe_part()
    assert (known.layers, known.input_shape) == (checked.layers, checked.input_shape)
    batch = np.random.default_rng(1).random((3, *checked.input_shape), np.float32)
    for layers in ((), ("conv",)):
        expected, values = checked(batch, layers=layers), known(batch, layers=layers)
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(values[name], value)


def test_a_model_that_changed_after_it_was_checked_is_refused(model: Path) -> None:
    facts = Extractor(make_spec(model)).facts
    volume = keras.Input((*ZYX, 1))
    keras.Model(volume, keras.layers.Dense(2, name="code")(keras.layers.Flatten()(volume))).save(model)
    with pytest.raises(ModelError, match="the model or its code changed"):
        Extractor(make_spec(model), facts=facts).load()


def test_a_known_model_that_this_machine_cannot_compute_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Extractor(make_spec(model)).facts

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Extractor, "_run", fail)
    with pytest.raises(ModelError, match="fails on inputs of shape"):
        Extractor(make_spec(model), facts=facts).load()


def test_a_model_whose_layers_had_no_variables_when_it_was_loaded_has_no_facts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_taps = trace.record_taps
    monkeypatch.setattr(
        trace, "record_taps", lambda call: replace(record_taps(call), were_layers_built=False)
    )
    assert Extractor(make_spec(model), input_zyx=ZYX).facts is None
