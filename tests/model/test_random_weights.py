"""Models with random weights: each weight as its initializer draws it; the trained model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import Extractor
from featray.model.random_weights import load_random_model

ZYX = (4, 8, 8)
Save = Callable[..., ModelConfig]


def train(model: Any) -> Any:
    """Give every floating-point weight other values, as a training would."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(np.abs(rng.normal(2.0, 0.5, weight.shape)) + 0.1)
    return model


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that saves a trained model and returns its section of the config."""

    def save_model(model: Any, *layers: str, suffix: str = ".keras", **keys: Any) -> ModelConfig:
        path = tmp_path / f"model{suffix}"
        model.save(path)
        return ModelConfig.model_validate({"uri": str(path), "layers": list(layers), **keys})

    return save_model


def make_model() -> Any:
    """Return a trained model with nested parts, whose kernels have seeds of their own."""
    import keras

    volume = keras.Input((*ZYX, 1))
    inner = keras.Input((*ZYX, 1))
    seeded = keras.initializers.HeNormal(seed=1)
    maps = keras.layers.Conv3D(3, 3, kernel_initializer=seeded, name="conv")(inner)
    maps = keras.layers.BatchNormalization(name="norm")(maps)
    part = keras.Model(inner, keras.layers.ReLU(name="relu")(maps), name="part")
    flat = keras.layers.Flatten(name="flat")(part(volume))
    dense = keras.layers.Dense(5, bias_initializer="ones", name="dense")(flat)
    return train(keras.Model(volume, dense))


@pytest.fixture
def volumes() -> np.ndarray:
    return np.random.default_rng(1).random((3, *ZYX), np.float32)


def weights_of(extractor: Extractor) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in extractor.model.weights}


def test_every_weight_is_drawn_as_its_own_initializer_does(save: Save) -> None:
    random = load_random_model(save(make_model(), "dense"), 0, input_zyx=ZYX)
    weights = weights_of(random.extractor)
    assert random.permuted == ()
    assert np.array_equal(weights["dense/bias"], np.ones(5))
    assert np.array_equal(weights["conv/bias"], np.zeros(3))
    limit = np.sqrt(6 / (2 * 6 * 6 * 3 + 5))  # Glorot
    kernel = weights["dense/kernel"]
    assert 0.9 * limit < np.abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
    assert weights["conv/kernel"].std() == pytest.approx(np.sqrt(2 / 27), rel=0.25)  # He


def test_statistics_of_batch_normalization_are_those_before_training(save: Save) -> None:
    weights = weights_of(load_random_model(save(make_model(), "dense"), 0, input_zyx=ZYX).extractor)
    assert np.array_equal(weights["norm/moving_mean"], np.zeros(3))
    assert np.array_equal(weights["norm/moving_variance"], np.ones(3))
    assert np.array_equal(weights["norm/gamma"], np.ones(3))
    assert np.array_equal(weights["norm/beta"], np.zeros(3))


@pytest.mark.slow
def test_equal_seeds_give_equal_features_and_other_seeds_give_others(save: Save, volumes: np.ndarray) -> None:
    spec = save(make_model(), "dense", "part/relu")
    trained = Extractor(spec, input_zyx=ZYX)
    before = trained(volumes)
    models = [load_random_model(spec, seed, input_zyx=ZYX).extractor for seed in (0, 0, 1)]
    first, again, other = (model(volumes) for model in models)
    for layer in ("dense", "part.relu"):
        assert np.array_equal(first[layer], again[layer])
        assert np.abs(first[layer] - other[layer]).max() > 0.1
        assert np.abs(first[layer] - before[layer]).max() > 0.1
        assert first[layer].shape == before[layer].shape
        assert first[layer].std(axis=0).max() > 0
    assert all(np.array_equal(trained(volumes)[layer], before[layer]) for layer in before)


def test_initializers_are_recorded_only_while_a_model_is_loaded() -> None:
    import keras

    from featray.model.random_weights import record_initializers

    create = keras.Variable.__init__
    with record_initializers() as recorded:
        variable = keras.Variable(np.zeros(2))
    keras.Variable(np.ones(2))
    assert [found is variable for found, _ in recorded] == [True]
    assert keras.Variable.__init__ is create


CUSTOM_LAYER = """
import keras
import numpy as np

def draw_anew(shape, dtype=None):
    return np.random.default_rng().normal(size=shape)

class Custom(keras.layers.Layer):
    def build(self, shape):
        self.own = self.add_weight(shape=(shape[-1], 64), initializer="random_normal", name="own")
        self.drawn = self.add_weight(shape=(64,), initializer=draw_anew, name="drawn")
        self.level = keras.Variable(2.5, name="level")
        self.start = keras.Variable(np.arange(64.0), name="start")
        self.table = keras.Variable(np.arange(64.0), trainable=False, name="table")

    def call(self, inputs):
        return inputs @ self.own + self.drawn + self.level + self.start + self.table
"""
HIDDEN_VARIABLE = """
import keras
import tensorflow as tf

scale = tf.Variable(3.0, name="hidden_scale")

class Hidden(keras.layers.Layer):
    def call(self, inputs):
        return inputs * scale
"""


def save_with_layer(save: Save, code: str, name: str, folder: Path) -> ModelConfig:
    """Save a trained model (8,) that ends with a layer `last` of a class that `code` defines."""
    import keras

    file = folder / f"{name.lower()}.py"
    file.write_text(code)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    volume = keras.Input((8,))
    last = namespace[name](name="last")(keras.layers.Dense(8, name="dense")(volume))
    return save(train(keras.Model(volume, last)), "last", custom_objects=[f"{file}:{name}"])


def test_weights_of_custom_layers_get_their_first_values_or_are_permuted(save: Save, tmp_path: Path) -> None:
    spec = save_with_layer(save, CUSTOM_LAYER, "Custom", tmp_path)
    trained = weights_of(Extractor(spec, input_zyx=(8,)))
    random = load_random_model(spec, 3, input_zyx=(8,))
    weights = weights_of(random.extractor)
    assert weights["last/own"].std() == pytest.approx(0.05, rel=0.2)
    assert weights["last/level"] == 2.5
    assert np.array_equal(weights["last/table"], np.arange(64.0))
    assert sorted(random.permuted) == ["last/drawn", "last/start"]
    for name in random.permuted:
        assert not np.array_equal(weights[name], trained[name])
        assert np.array_equal(np.sort(weights[name]), np.sort(trained[name]))


def test_variables_that_keras_does_not_list_are_refused(save: Save, tmp_path: Path) -> None:
    spec = save_with_layer(save, HIDDEN_VARIABLE, "Hidden", tmp_path)
    with pytest.raises(ModelError, match=r"trained values: 1, e\.g\. hidden_scale"):
        load_random_model(spec, 0, input_zyx=(8,))


def test_statistics_of_a_normalization_of_the_input_stay(save: Save) -> None:
    import keras

    volume = keras.Input((8,))
    normalization = keras.layers.Normalization(name="normalization")
    normalization.adapt(np.random.default_rng(0).normal(5, 3, (50, 8)))
    model = keras.Model(volume, keras.layers.Dense(3, name="dense")(normalization(volume)))
    statistics = np.array(normalization.mean)
    random = load_random_model(save(model, "dense"), 0, input_zyx=(8,))
    assert np.allclose(random.extractor.model.get_layer("normalization").mean, statistics)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_a_model_of_keras_2_gets_the_values_of_its_initializers(save: Save) -> None:
    import tf_keras

    volume = tf_keras.Input((8,))
    maps = tf_keras.layers.Dense(64, kernel_initializer="he_normal", name="dense")(volume)
    model = tf_keras.Model(volume, tf_keras.layers.BatchNormalization(name="norm")(maps))
    for weight in model.weights:
        weight.assign(np.abs(np.random.default_rng(0).normal(2, 0.5, weight.shape)))
    spec = save(model, "norm", suffix=".h5")
    first, again, other = (load_random_model(spec, seed, input_zyx=(8,)) for seed in (0, 0, 1))
    kernel, bias, gamma, beta, mean, variance = (weight.numpy() for weight in first.extractor.model.weights)
    assert first.permuted == ()
    assert kernel.std() == pytest.approx(np.sqrt(2 / 8), rel=0.15)
    assert not bias.any()
    assert not beta.any()
    assert not mean.any()
    assert np.array_equal(gamma, np.ones(64))
    assert np.array_equal(variance, np.ones(64))
    assert np.array_equal(kernel, again.extractor.model.weights[0].numpy())
    assert not np.array_equal(kernel, other.extractor.model.weights[0].numpy())


@pytest.mark.slow
def test_a_saved_model_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.export(tmp_path / "exported", verbose=False)
    spec = ModelConfig(uri=str(tmp_path / "exported"), layers=("*",), trust=True)
    with pytest.raises(ModelError, match="random weights"):
        load_random_model(spec, 0, input_zyx=ZYX)


def test_a_quantized_model_is_refused(save: Save) -> None:
    import keras

    volume = keras.Input((8,))
    model = keras.Model(volume, keras.layers.Dense(3, name="dense")(volume))
    model.quantize("int8")
    with pytest.raises(ModelError, match="'dense' is quantized"):
        load_random_model(save(model, "dense"), 0, input_zyx=(8,))
