"""A model that mixes the inputs of a batch is reported with the layer that does so, noise separately."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import InputShapeError, ModelError
from featray.model import Extractor, check_invariance, list_layers
from featray.model.loading.custom_code import import_object

SHAPE = (4, 4, 4, 1)
CODE = """
    import keras
    class Whiten(keras.layers.Layer):
        def call(self, x):
            return x / (1e-3 + keras.ops.std(x, axis=0, keepdims=True))
    class TrainingNorm(keras.Model):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.conv = keras.layers.Conv3D(2, 3)
            self.norm = keras.layers.BatchNormalization()
            self.flat = keras.layers.Flatten()
            self.head = keras.layers.Dense(2)
        def call(self, x):
            return self.head(self.flat(self.norm(self.conv(x), training=True)))
"""
MakeSection = Callable[[str], dict[str, Any]]


@pytest.fixture
def mixing(tmp_path: Path, code: Callable[[str, str], Path]) -> MakeSection:
    """Return a function that saves a model with the named class of `CODE` and makes its `model` section."""

    def make(name: str) -> dict[str, Any]:
        source = code("mixing.py", CODE)
        cls, _ = import_object(f"{source}:{name}", config_key="custom_objects", storage_options={})
        model = cls() if issubclass(cls, keras.Model) else _build_chain(cls(name="whiten"))
        model(np.zeros((1, *SHAPE), np.float32))
        model.save(tmp_path / "m.keras")
        return {
            "uri": str(tmp_path / "m.keras"),
            "custom_objects": [f"{source}:{name}"],
            "layers": ["conv", "head"],
        }

    return make


def _build_chain(layer: Any) -> Any:
    kl = keras.layers
    return keras.Sequential(
        [keras.Input(SHAPE), kl.Conv3D(2, 3, name="conv"), layer, kl.Flatten(), kl.Dense(2, name="head")]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("Whiten", "whiten"), ("TrainingNorm", "norm")])
def test_the_first_layer_that_depends_on_the_batch_is_named(
    mixing: MakeSection, name: str, layer: str
) -> None:
    report = check_invariance(mixing(name))
    assert report.layer == layer
    assert report.differences["conv"] < 1e-5
    assert report.differences["head"] > 1e-3
    (problem,) = report.problems
    assert problem.startswith("head depends on the other inputs in the batch: it differs by")
    assert f"first seen at layer {layer} ({report.class_name})" in report.to_text()


@pytest.mark.slow
def test_a_batch_dependent_output_is_refused_with_its_cause_even_if_stochastic_outputs_are_allowed(
    mixing: MakeSection,
) -> None:
    with pytest.raises(
        ModelError, match=r"'head' depends on the other inputs in the batch.* a layer before 'whi"
    ):
        Extractor({**mixing("Whiten"), "allow_stochastic": True})
    assert set(Extractor({**mixing("Whiten"), "layers": ["conv"]})(np.ones((2, 4, 4, 4), "f4"))) == {"conv"}


@pytest.mark.slow
def test_a_batch_dependent_model_has_definite_values_with_batch_size_1(mixing: MakeSection) -> None:
    section = {**mixing("TrainingNorm"), "batch_size": 1}
    x = np.random.default_rng(0).random((3, 4, 4, 4), np.float32)
    forward, backward = Extractor(section)(x)["head"], Extractor(section)(x[::-1])["head"]
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-5)
    report = check_invariance(section)
    assert not report.problems
    assert "alone" in report.to_text()


def test_batch_dependent_layers_are_not_flagged_as_stochastic(mixing: MakeSection) -> None:
    flags = {info.path: info.flags for info in list_layers(mixing("TrainingNorm"))}
    assert "batch_dependent" in flags["norm"]
    assert "batch_dependent" in flags["head"]
    assert not any("stochastic" in layer_flags for layer_flags in flags.values())
    assert "batch_dependent" not in flags["conv"]


@pytest.mark.slow
def test_a_sound_model_passes_with_given_samples_and_its_stochastic_outputs_are_listed(
    spec: Callable[..., dict[str, Any]], volumes: Any
) -> None:
    report = check_invariance(spec("z_mean", "conv_1", "z"), (8, 16, 16), volumes)
    assert report.stochastic_outputs == ("z",)
    assert set(report.differences) == {"z_mean", "conv_1"}
    assert not report.problems
    assert "batches of 1, 2 and 4" in report.to_text()


def test_one_sample_is_enough_to_find_batch_dependence(mixing: MakeSection) -> None:
    sample = np.random.default_rng(0).random((1, 4, 4, 4), np.float32)
    assert check_invariance(mixing("Whiten"), (4, 4, 4), sample).problems


@pytest.mark.slow
def test_errors_in_the_model_section_and_in_the_samples_are_raised(
    spec: Callable[..., dict[str, Any]], volumes: Any
) -> None:
    with pytest.raises(ModelError, match="did you mean"):
        check_invariance(spec("z_maen"))
    with pytest.raises(InputShapeError, match=r"expected float32 \(n, 8, 16, 16, 1\)"):
        check_invariance(spec("z_mean"), None, volumes[:, 1:])
