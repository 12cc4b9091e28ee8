"""Custom classes and functions come from `model.custom_objects`; a missing one is reported with its layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import ModelError
from featray.model import Extractor

Spec = Callable[..., dict[str, Any]]
Code = Callable[[str, str], Path]

DOUBLE = """
    import keras
    @keras.saving.register_keras_serializable("seed")
    class Double(keras.layers.Layer):
        def call(self, x):
            return {factor} * x
"""


@pytest.fixture
def double_file(tmp_path: Path) -> Path:
    """Return a model file with a layer `seed>Double`, whose class is no longer registered with Keras."""

    @keras.saving.register_keras_serializable("seed")
    class Double(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return 2 * x

    path = tmp_path / "double.keras"
    keras.Sequential([keras.Input((2, 2, 2, 1)), Double(name="twice")]).save(path)
    del keras.saving.get_custom_objects()["seed>Double"]
    return path


def _extract_twice(path: Path, *custom_objects: str) -> float:
    """Return the value of the layer `twice` for an input of ones."""
    extractor = Extractor({"uri": str(path), "layers": ["twice"], "custom_objects": list(custom_objects)})
    return float(extractor(np.ones((1, 2, 2, 2), np.float32))["twice"][0, 0])


def test_a_missing_class_is_reported_with_its_layer_and_the_key_to_set(spec: Spec) -> None:
    with pytest.raises(
        ModelError, match=r"layer 'z' needs Sampling.* model.custom_objects, e.g. 'file.py:Sampling'"
    ):
        Extractor(spec("z_mean", custom_objects=[]))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_for_an_operation_in_an_h5_file_the_message_says_how_to_load_the_model(tmp_path: Path) -> None:
    inputs = keras.Input((2, 2, 2, 1))
    path = tmp_path / "operation.h5"
    keras.Model(inputs, keras.ops.leaky_relu(inputs)).save(path)
    with pytest.raises(ModelError, match=r"operation keras\.ops\.leaky_relu.* save the model as \.keras"):
        Extractor({"uri": str(path), "layers": ["leaky_relu"]})


def test_a_registered_class_is_not_used_unless_the_config_names_it(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featray.synthetic.vae

    registered = keras.saving.get_custom_objects()
    monkeypatch.setitem(registered, "featray>Sampling", featray.synthetic.vae.Sampling)
    with pytest.raises(ModelError, match="needs Sampling"):
        Extractor(spec("z_mean", custom_objects=[], trust=True))


@pytest.mark.slow
def test_a_class_from_a_file_is_found_by_its_registered_name(double_file: Path, code: Code) -> None:
    assert _extract_twice(double_file, f"{code('a.py', DOUBLE.format(factor=2))}:Double") == 2


def test_the_file_in_the_config_is_used_and_not_one_imported_before(double_file: Path, code: Code) -> None:
    two, three = (code(f"f{factor}.py", DOUBLE.format(factor=factor)) for factor in (2, 3))
    assert [_extract_twice(double_file, f"{path}:Double") for path in (two, three, two)] == [2, 3, 2]


def test_the_sha256_depends_on_custom_code_but_not_on_its_file_name(double_file: Path, code: Code) -> None:
    def compute_sha256(name: str, factor: int) -> str:
        path = code(name, DOUBLE.format(factor=factor))
        section = {"uri": str(double_file), "layers": ["twice"], "custom_objects": [f"{path}:Double"]}
        return Extractor(section).sha256

    assert compute_sha256("a.py", 2) == compute_sha256("b.py", 2)
    assert compute_sha256("a.py", 2) != compute_sha256("a.py", 3)


def test_all_problems_in_custom_objects_are_listed(double_file: Path, code: Code) -> None:
    path = code("a.py", "import nothing_of_this_name")
    with pytest.raises(ModelError) as caught:
        _extract_twice(
            double_file,
            "Double",
            f"{path}:Double",
            "no_such.module:Double",
            "keras.layers:Nothing",
            "gone.py:A",
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "'Double' is neither file.py:NAME nor package.module:NAME" in text
    assert (
        "a.py:Double cannot be imported (ModuleNotFoundError: No module named 'nothing_of_this_name')" in text
    )
    assert "no_such" in text
    assert "has no Nothing" in text
    assert "gone.py: no such file" in text
    assert str(path.parent) not in text


def test_code_stored_in_the_file_runs_only_with_model_trust(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Lambda(lambda x: x + 1, name="plus")]).save(
        path
    )
    section = {"uri": str(path), "layers": ["plus"]}
    with pytest.raises(
        ModelError, match=r"layer 'plus' holds Python code .*model.trust: true .*custom_objects"
    ):
        Extractor(section)
    features = Extractor({**section, "trust": True})(np.zeros((1, 2, 2, 2), np.float32))
    assert features["plus"].tolist() == [[1.0]]


def test_a_custom_activation_function_is_loaded_from_custom_objects(tmp_path: Path, code: Code) -> None:
    def halve(x: Any) -> Any:
        return x / 2

    path = tmp_path / "m.keras"
    layer = keras.layers.Activation(halve, name="act")
    keras.Sequential([keras.Input((2, 2, 2, 1)), layer, keras.layers.Activation("relu")]).save(path)
    source = code("act.py", "def halve(x):\n    return x / 2")
    with pytest.raises(ModelError, match="layer 'act' needs halve"):
        Extractor({"uri": str(path), "layers": ["act"]})
    section = {"uri": str(path), "layers": ["act"], "custom_objects": [f"{source}:halve"]}
    assert Extractor(section)(np.ones((1, 2, 2, 2), np.float32))["act"].tolist() == [[0.5]]


def test_a_custom_loss_needs_no_code(tmp_path: Path) -> None:
    def custom_loss(y: Any, p: Any) -> Any:
        return keras.ops.mean(y - p)

    model = keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2, name="dense")])
    model.compile(loss=custom_loss)
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        assert Extractor({"uri": str(tmp_path / name), "layers": ["dense"]}).layers[0].values == 2
