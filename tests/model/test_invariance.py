"""A model that mixes the inputs of a batch is told, with the layer that does so; noise is told apart."""

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
Make = Callable[[str], dict[str, Any]]


@pytest.fixture
def mixing(tmp_path: Path, code: Callable[[str, str], Path]) -> Make:
    """Return a maker of `model` sections for a model with the class named."""

    def make(name: str) -> dict[str, Any]:
        source = code("mixing.py", CODE)
        own, _ = import_object(f"{source}:{name}", config_key="custom_objects", storage_options={})
        model = own() if issubclass(own, keras.Model) else _chain(own(name="whiten"))
        model(np.zeros((1, *SHAPE), np.float32))
        model.save(tmp_path / "m.keras")
        return {
            "uri": str(tmp_path / "m.keras"),
            "custom_objects": [f"{source}:{name}"],
            "layers": ["conv", "head"],
        }

    return make


def _chain(layer: Any) -> Any:
    kl = keras.layers
    return keras.Sequential(
        [keras.Input(SHAPE), kl.Conv3D(2, 3, name="conv"), layer, kl.Flatten(), kl.Dense(2, name="head")]
    )


@pytest.mark.parametrize(("name", "layer"), [("Whiten", "whiten"), ("TrainingNorm", "norm")])
def test_the_first_layer_that_looks_at_the_batch_is_named(mixing: Make, name: str, layer: str) -> None:
    report = check_invariance(mixing(name))
    assert report.layer == layer
    assert report.differences["conv"] < 1e-5
    assert report.differences["head"] > 1e-3
    (problem,) = report.problems
    assert problem.startswith("head differs by")
    assert f"first seen at layer {layer} ({report.class_name})" in report.to_text()


def test_it_is_refused_at_extraction_with_the_layer_and_the_ways_out_even_when_noise_is_allowed(
    mixing: Make,
) -> None:
    with pytest.raises(ModelError, match=r"'head' looks at the rest of the batch.* a layer before 'whi"):
        Extractor({**mixing("Whiten"), "allow_stochastic": True})
    assert set(Extractor({**mixing("Whiten"), "layers": ["conv"]})(np.ones((2, 4, 4, 4), "f4"))) == {"conv"}


def test_one_by_one_such_a_model_has_definite_values(mixing: Make) -> None:
    section = {**mixing("TrainingNorm"), "batch_size": 1}
    x = np.random.default_rng(0).random((3, 4, 4, 4), np.float32)
    one, other = Extractor(section)(x)["head"], Extractor(section)(x[::-1])["head"]
    np.testing.assert_allclose(one, other[::-1], rtol=1e-5)
    report = check_invariance(section)
    assert not report.problems
    assert "alone" in report.to_text()


def test_the_flag_of_such_layers_is_not_that_of_noise(mixing: Make) -> None:
    flags = {info.path: info.flags for info in list_layers(mixing("TrainingNorm"))}
    assert "batch_dependent" in flags["norm"]
    assert "batch_dependent" in flags["head"]
    assert not any("stochastic" in one for one in flags.values())
    assert "batch_dependent" not in flags["conv"]


def test_a_sound_model_passes_on_given_samples_and_sampling_is_told_apart(
    spec: Callable[..., dict[str, Any]], volumes: Any
) -> None:
    report = check_invariance(spec("z_mean", "conv_1", "z"), (8, 16, 16), volumes)
    assert report.samples == ("z",)
    assert set(report.differences) == {"z_mean", "conv_1"}
    assert not report.problems
    assert "batches of 1, 2 and 4" in report.to_text()


def test_one_sample_is_enough_to_see_it(mixing: Make) -> None:
    one = np.random.default_rng(0).random((1, 4, 4, 4), np.float32)
    assert check_invariance(mixing("Whiten"), (4, 4, 4), one).problems


def test_faults_of_the_section_and_of_the_samples_are_raised(
    spec: Callable[..., dict[str, Any]], volumes: Any
) -> None:
    with pytest.raises(ModelError, match="did you mean"):
        check_invariance(spec("z_maen"))
    with pytest.raises(InputShapeError, match=r"expected float32 \(n, 8, 16, 16, 1\)"):
        check_invariance(spec("z_mean"), None, volumes[:, 1:])
