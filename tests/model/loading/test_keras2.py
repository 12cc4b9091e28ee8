"""Files that Keras 2 wrote can be loaded unchanged and give the same values as in Keras 2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featray.errors import ModelError
from featray.model import Extractor, list_layers
from featray.model.loading import operations

X = np.random.default_rng(0).random((2, 4, 4, 4, 1), np.float32)


@pytest.fixture(scope="module")
def k2() -> Any:
    """Return the package tf_keras (Keras 2), or skip the test."""
    return pytest.importorskip("tf_keras", reason="tf_keras (Keras 2) is not installed: pip install tf_keras")


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any, str], Path]:
    """Return a function that saves a Keras 2 model, or only its weights, and returns the path."""

    def save(model: Any, name: str = "m.h5", method: str = "save") -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras 2 warns that this format is old
            getattr(model, method)(tmp_path / name)
        return tmp_path / name

    return save


def _extract(path: Path, layer: str, x: np.ndarray, **keys: Any) -> np.ndarray:
    """Return the values of one layer, without pooling."""
    layers = [{"layer": layer, "pool": "none", "as": "values"}]
    return Extractor({"uri": str(path), "layers": layers, **keys}, input_zyx=x.shape[1:])(x)["values"]


def _make_vae(k2: Any) -> tuple[Any, Any]:
    """Return a VAE with a custom layer `Sampling`, and its encoder."""

    class Sampling(k2.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs[0]

    volume, code = k2.Input((4, 4, 4, 1)), k2.Input((2,))
    x = k2.layers.Conv3D(2, 3, activation="relu", name="conv")(volume)
    x = k2.layers.BatchNormalization(name="norm")(k2.layers.Flatten(name="flat")(x))
    mean, log_variance = (k2.layers.Dense(2, name=name)(x) for name in ("z_mean", "z_log_var"))
    outputs = [mean, log_variance, Sampling(name="z")([mean, log_variance])]
    encoder = k2.Model(volume, outputs, name="encoder")
    up = k2.layers.Reshape((4, 4, 4, 1), name="shape")(k2.layers.Dense(64, name="up")(code))
    decoder = k2.Model(code, up, name="decoder")
    outer = k2.Input((4, 4, 4, 1))
    return k2.Model(outer, decoder(encoder(outer)[2]), name="vae"), encoder


@pytest.mark.slow
def test_a_nested_vae_gives_the_same_latent_values(k2: Any, save: Any) -> None:
    vae, encoder = _make_vae(k2)
    vae.compile(loss="mse")
    path, keys = save(vae), {"custom_objects": ["featray.synthetic.vae:Sampling"]}
    for at, name in enumerate(("z_mean", "z_log_var")):
        expected = encoder(X)[at].numpy()
        np.testing.assert_allclose(
            _extract(path, f"encoder/{name}", X, **keys), expected, rtol=1e-5, atol=1e-6
        )


def test_a_nested_sequential_model_is_called_in_the_right_order(k2: Any, save: Any) -> None:
    inner = k2.Sequential(
        [k2.Input((4, 4, 4, 1)), k2.layers.Conv3D(1, 1, name="conv", bias_initializer="ones")], name="inner"
    )
    volume = k2.Input((4, 4, 4, 1))
    model = k2.Model(volume, inner(inner(volume)))
    path = save(model)
    assert [info.path for info in list_layers(path)] == ["inner#1/conv", "inner#1", "inner#2/conv", "inner#2"]
    np.testing.assert_allclose(_extract(path, "inner#2", X), model(X).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_layers_with_settings_that_keras_3_refuses_are_loaded(k2: Any, save: Any) -> None:
    series = k2.Input((5, 3))
    recurrent = k2.Model(series, k2.layers.LSTM(4, name="it")(series))
    image = k2.Input((6, 6, 2))
    depth = k2.layers.DepthwiseConv2D(3, depthwise_initializer="uniform", name="depth")(image)
    spread = k2.layers.Conv2DTranspose(3, 2, name="spread")(
        k2.layers.SeparableConv2D(3, 2, name="sep")(depth)
    )
    images = k2.Model(image, k2.layers.LeakyReLU(alpha=0.4, name="it")(spread))
    for name, model in (("series.h5", recurrent), ("images.h5", images)):
        x = np.random.default_rng(3).normal(size=(2, *model.input_shape[1:])).astype(np.float32)
        values = _extract(save(model, name), "it", x)
        np.testing.assert_allclose(values, model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_tensors_in_keyword_arguments_are_connected(k2: Any, save: Any) -> None:
    tokens, others = k2.Input((5, 4)), k2.layers.Dense(4, name="others")
    attention = k2.layers.MultiHeadAttention(2, 3, name="attention")
    model = k2.Model(tokens, attention(tokens, value=others(tokens)))
    x = np.random.default_rng(4).random((2, 5, 4), np.float32)
    values = _extract(save(model), "attention", x)
    np.testing.assert_allclose(values, model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_keras_2_weights_are_loaded_into_the_model_of_a_builder(k2: Any, save: Any, code: Any) -> None:
    source = code(
        "build.py",
        """
        import keras
        def build():
            heads = [keras.layers.Dense(2, name=name) for name in ("z_mean", "z_log_var")]
            volume = keras.Input((4, 4, 4, 1))
            x = keras.layers.Conv3D(2, 3, activation="relu", name="conv")(volume)
            x = keras.layers.Flatten(name="flat")(x)
            x = keras.layers.BatchNormalization(name="norm")(x)
            return keras.Model(volume, [head(x) for head in heads])
        """,
    )
    encoder = _make_vae(k2)[1]
    path = save(encoder, "weights.h5", "save_weights")
    values = _extract(path, "z_log_var", X, builder=f"{source}:build")
    np.testing.assert_allclose(values, encoder(X)[1].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_keras_2_archive_gives_the_same_latent_values(k2: Any, save: Any) -> None:
    vae, encoder = _make_vae(k2)
    keys = {"custom_objects": ["featray.synthetic.vae:Sampling"]}
    values = _extract(save(vae, "m.keras"), "encoder/z_mean", X, **keys)
    np.testing.assert_allclose(values, encoder(X)[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_tensor_operations_and_added_losses_of_the_keras_vae_example_are_loaded(k2: Any, save: Any) -> None:
    import tensorflow as tf

    vector = k2.Input((6,))
    mean = k2.layers.Dense(3, name="z_mean")(vector)
    log_variance = k2.layers.Dense(3, name="z_log_var")(vector * 2.0 + 1.0)
    both = tf.concat([mean, tf.exp(0.5 * log_variance)], axis=-1)
    out = k2.layers.Dense(6, name="out")(1.0 - tf.nn.relu(both) / 2.0)
    model = k2.Model(vector, out)
    model.add_loss(tf.reduce_mean(1 + log_variance - tf.square(mean) - tf.exp(log_variance)))
    x = np.random.default_rng(5).random((2, 6), np.float32)
    path = save(model)
    np.testing.assert_allclose(_extract(path, "out", x), model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert "z_log_var" in [info.path for info in list_layers(path)]


@pytest.mark.slow
def test_slices_of_tensors_give_the_same_values(k2: Any, save: Any) -> None:
    import tensorflow as tf

    volume = k2.Input((4, 4, 4, 1))
    parts = [
        volume[:, 1:, ::2, ..., 0:1],
        volume[:, 0],
        volume[..., tf.newaxis, 0],
        volume[:, : tf.shape(volume)[1] - 1],
        tf.strided_slice(volume, [0, 1, 0, 0, 0], [2, 3, 4, 4, 1]),
        tf.unstack(volume, axis=1)[2],
        tf.cast(volume > 0.5, tf.float32),
        tf.image.resize(volume[:, 0], (2, 2)),
    ]
    flat = [k2.layers.Flatten(name=f"part_{at}")(part) for at, part in enumerate(parts)]
    model = k2.Model(volume, flat)
    path = save(model)
    for at, expected in enumerate(model(X)):
        np.testing.assert_allclose(_extract(path, f"part_{at}", X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sampling_written_with_plain_operations_is_found_and_follows_the_seeds(k2: Any, save: Any) -> None:
    import tensorflow as tf

    vector = k2.Input((6,))
    mean, spread = (k2.layers.Dense(3, name=name)(vector) for name in ("z_mean", "z_log_var"))
    noise = tf.random.normal(shape=(tf.shape(mean)[0], 3))
    z = k2.layers.Activation("linear", name="z")(mean + tf.exp(0.5 * spread) * noise)
    path, x = save(k2.Model(vector, z)), np.random.default_rng(5).random((3, 6), np.float32)
    flags = {info.path: info.flags for info in list_layers(path)}
    assert "stochastic" in flags["z"]
    assert "stochastic" not in flags["z_mean"]
    one, other = (
        Extractor({"uri": str(path), "layers": ["z"], "allow_stochastic": True, "batch_size": size})
        for size in (1, 3)
    )
    np.testing.assert_allclose(one(x, "abc")["z"], other(x[::-1], "cba")["z"][::-1], rtol=1e-5, atol=1e-6)
    assert np.abs(one(x, "abc")["z"] - one(x, "def")["z"]).max() > 1e-3


def test_an_operation_with_side_effects_is_refused_by_name(k2: Any, save: Any) -> None:
    import tensorflow as tf

    volume = k2.Input((4, 4, 4, 1))
    checked = tf.debugging.check_numerics(volume, "bad")
    path = save(k2.Model(volume, k2.layers.Flatten(name="flat")(checked)))
    with pytest.raises(
        ModelError, match=r"check_numerics.*TensorFlow operation that Keras 2 stored.*model.builder"
    ):
        Extractor({"uri": str(path), "layers": ["flat"]})


@pytest.mark.parametrize(
    ("function", "is_safe"),
    [
        ("math.multiply", True),
        ("compat.v1.pad", True),
        ("keras.backend.binary_crossentropy", True),
        ("keras.backend.set_floatx", False),
        ("keras.activations.get", False),
        ("keras.utils.get_file", False),
        ("io.write_file", False),
        ("py_function", False),
        ("compat.v1.py_func", False),
        ("math.__class__.mro", False),
        ("linalg.LinearOperator", False),
    ],
)
def test_only_functions_without_side_effects_may_run(function: str, is_safe: bool) -> None:
    assert operations.is_safe_function(function) == is_safe
