"""Each use case of the requirements, on `Extractor` alone. The letters a to e number the use cases."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

from featray.errors import ModelError
from featray.model import Extractor
from featray.model.loading.custom_code import import_object

DENSE = """
    import keras
    def build():
        sizes = {"code": 32, "decoded": 128, "reconstruction": 784}
        layers = [keras.layers.Dense(size, activation="relu", name=name) for name, size in sizes.items()]
        return keras.Sequential([keras.Input((784,)), *layers])
"""
SEED = """
    import keras
    from featray.synthetic.vae import Sampling
    def build():
        volume = keras.Input((8, 32, 32, 1))
        x = volume
        for number, filters in enumerate((4, 8, 4), 1):
            x = keras.layers.Conv3D(filters, 3, padding="same", activation="relu", name=f"conv_{number}")(x)
            x = keras.layers.MaxPool3D(2, name=f"pool_{number}")(x)
        side = keras.layers.Reshape((4, 4, 4), name="slice")(x)
        side = keras.layers.Conv2D(3, 3, padding="same", name="side")(side)
        both = keras.layers.Concatenate(name="both")(
            [keras.layers.Flatten(name="flat_3d")(x), keras.layers.Flatten(name="flat_2d")(side)]
        )
        hidden = keras.layers.Dense(16, activation="relu", name="dense")(both)
        mean, log_var = (keras.layers.Dense(6, name=name)(hidden) for name in ("z_mean", "z_log_var"))
        z = Sampling(name="z")([mean, log_var])
        return keras.Model(volume, [mean, log_var, z], name="encoder")
"""
SLOW = """
    import time, keras, tensorflow as tf
    class Slow(keras.layers.Layer):
        def call(self, x):
            def wait(value):
                time.sleep(0.3)
                return value
            return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape)
"""
Spec = dict[str, Any]


@pytest.fixture
def dense(tmp_path: Path, code: Callable[[str, str], Path]) -> tuple[Any, Spec]:
    """Return a dense autoencoder 784→32→784, and the `model` section for its weights in an .h5 file."""
    source = code("dense.py", DENSE)
    model = _load_object(source, "build")()
    model.save_weights(tmp_path / "dense.weights.h5")
    return model, {"uri": str(tmp_path / "dense.weights.h5"), "builder": f"{source}:build"}


@pytest.fixture
def encoder(tmp_path: Path, code: Callable[[str, str], Path]) -> tuple[Any, Spec]:
    """Return a 3-D VAE encoder with a Conv2D side branch and the outputs [z_mean, z_log_var, z]."""
    model = _load_object(code("seed.py", SEED), "build")()
    model.save(tmp_path / "encoder.keras")
    return model, {
        "uri": str(tmp_path / "encoder.keras"),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
    }


def _load_object(source: Path, name: str) -> Any:
    loaded, _ = import_object(f"{source}:{name}", config_key="builder", storage_options={})
    return loaded


def _make_batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).random(shape, np.float32)


def _compute_activation(model: Any, name: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(name).output)(x, training=False))


def test_a_one_hidden_layer_of_a_dense_autoencoder_from_weights_in_h5(dense: tuple[Any, Spec]) -> None:
    model, spec = dense
    x = _make_batch(5, 784)
    code = Extractor({**spec, "layers": ["code"]})(x)["code"]
    assert code.shape == (5, 32)
    weights, bias = model.get_layer("code").get_weights()
    np.testing.assert_allclose(code, np.maximum(x @ weights + bias, 0), rtol=1e-4, atol=1e-5)


def test_b_several_layers_including_decoder_layers_in_one_pass(dense: tuple[Any, Spec]) -> None:
    model, spec = dense
    x, names = _make_batch(5, 784), ["code", "decoded", "reconstruction"]
    extractor = Extractor({**spec, "layers": names})
    for name, value in extractor(x).items():
        np.testing.assert_allclose(value, _compute_activation(model, name, x), rtol=1e-4, atol=1e-5)
    assert _count_operations(extractor, "MatMul") == 3  # one per layer: no layer is computed twice


def test_c_inputs_of_two_lengths_go_through_one_model_in_one_trace(tmp_path: Path) -> None:
    chain = [kl.Conv1D(4, 3, padding="same", name="conv"), kl.GlobalAveragePooling1D(name="pooled")]
    model = keras.Sequential([keras.Input((None, 2)), *chain, kl.Dense(3, name="code")])
    model.save(tmp_path / "m.keras")
    extractor = Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["conv", "code"]})
    for length in (50, 81):
        x = _make_batch(3, length, 2)
        got = extractor(x)
        np.testing.assert_allclose(got["code"], np.asarray(model(x)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["conv"], np.asarray(chain[0](x)).mean(1), rtol=1e-5, atol=1e-6)
    assert extractor.input_shape == (None, 2)
    with pytest.raises(ValueError, match=r"expected float32 \(n, any, 2\), got float32 \(3, 50, 5\)"):
        extractor(_make_batch(3, 50, 5))


@pytest.mark.slow
def test_c_volumes_of_two_sizes_go_through_one_model_and_keep_their_feature_maps(tmp_path: Path) -> None:
    deep = [layer for _ in range(5) for layer in (kl.Conv3D(2, 3, padding="same"), kl.MaxPool3D(2))]
    chain = [*deep, kl.Conv3D(2, 1, name="last")]
    model = keras.Sequential([keras.Input((None, None, None, 1)), *chain])
    model.save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "layers": [{"layer": "last", "pool": "none"}]}
    extractor = Extractor(section, input_zyx=(None, None, None))
    assert extractor.layers[0].shape == (None, None, None, 2)
    for size in ((32, 64, 32), (64, 32, 96)):
        x = _make_batch(1, *size)
        got = extractor(x)["last"]
        assert got.shape == (1, *(extent // 32 for extent in size), 2)
        np.testing.assert_allclose(got, np.asarray(model(x[..., None])), rtol=1e-4, atol=1e-6)


def test_c_a_model_that_flattens_its_feature_map_is_refused_for_another_size(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((40, 1)), kl.Flatten(), kl.Dense(2, name="code")]).save(
        tmp_path / "m.keras"
    )
    with pytest.raises(ModelError, match=r"takes \(40, 1\), .* gives \(50, 1\)"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["code"]}, input_zyx=(50, 1))


@pytest.mark.slow
def test_d_mean_log_variance_dense_and_any_convolution_of_the_3d_vae_encoder(
    encoder: tuple[Any, Spec],
) -> None:
    model, spec = encoder
    x = _make_batch(3, 8, 32, 32)
    names = ["z_mean", "z_log_var", "dense", "conv_2", "side"]
    layers = [{"layer": name, "pool": "none"} for name in names]
    got = Extractor({**spec, "layers": layers}, input_zyx=(8, 32, 32))(x)
    for name in names:
        np.testing.assert_allclose(
            got[name], _compute_activation(model, name, x[..., None]), rtol=1e-4, atol=1e-5
        )
    mean, log_variance, _ = model(x[..., None])
    np.testing.assert_allclose(got["z_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["z_log_var"], log_variance, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_e_z_differs_from_call_to_call_and_z_mean_does_not(encoder: tuple[Any, Spec]) -> None:
    _, spec = encoder
    x = _make_batch(3, 8, 32, 32)
    with pytest.raises(ModelError, match=r"'z' returns different values .* such as z_mean"):
        Extractor({**spec, "layers": ["z", "z_mean"]})
    extractor = Extractor({**spec, "layers": ["z", "z_mean"], "allow_stochastic": True})
    first, second = extractor(x), extractor(x)
    np.testing.assert_array_equal(first["z_mean"], second["z_mean"])
    assert np.abs(first["z"] - second["z"]).max() > 1e-3


@pytest.mark.slow
def test_one_pass_costs_as_many_operations_as_the_deepest_layer_alone(
    small_vae_file: Path,
) -> None:
    def count_for(*layers: str) -> int:
        spec = {
            "uri": str(small_vae_file),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": list(layers),
        }
        return _count_flops(Extractor({**spec, "allow_stochastic": True}))

    voxels, code = 8 * 16 * 16, 4 * 8 * 8
    first = voxels * 2 * (2 * 27)  # 2 filters of 27 weights, a product and a sum for each weight
    second = code * 2 * 3 * (2 * 27)
    assert count_for("conv_1") == first
    dense = 2 * (2 * 4 * 4 * 3) * 6
    heads = 2 * 6 * 4
    assert count_for("z_mean") == first + second + dense + heads
    four = count_for("conv_1", "conv_2", "pre_latent", "z_mean", "z_log_var")
    assert four == first + second + dense + 2 * heads
    assert count_for("decoder/reconstruction") > 2 * four


@pytest.mark.slow
def test_layers_after_the_deepest_selected_layer_take_no_time(
    tmp_path: Path, code: Callable[[str, str], Path]
) -> None:
    source = code("slow.py", SLOW)
    layers = [kl.Dense(3, name="code"), _load_object(source, "Slow")(name="slow"), kl.Dense(3, name="after")]
    keras.Sequential([keras.Input((4,)), *layers]).save(tmp_path / "m.keras")
    spec = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Slow"]}
    seconds = {}
    for name in ("code", "after"):
        extractor = Extractor({**spec, "layers": [name]})
        start = time.perf_counter()
        extractor(_make_batch(2, 4))
        seconds[name] = time.perf_counter() - start
    assert seconds["after"] > 0.3 > seconds["code"]


def _count_operations(extractor: Extractor, kind: str) -> int:
    return sum(operation.type == kind for operation in extractor._all.call.graph.get_operations())


def _count_flops(extractor: Extractor) -> int:
    """Return the number of products and sums in all convolutions and matrix products, for one input."""
    total = 0
    for operation in extractor._all.call.graph.get_operations():
        if operation.type in ("Conv3D", "MatMul"):
            (*extents, filters), kernel = operation.outputs[0].shape[1:], operation.inputs[1].shape
            total += 2 * int(np.prod(extents, dtype=int)) * int(tf.TensorShape(kernel).num_elements())
            assert filters == kernel[-1]
    return total
