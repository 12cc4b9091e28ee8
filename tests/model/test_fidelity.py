"""Every listed value equals the activation that Keras computes in another way, for models of all kinds.

The other way does not record layer calls: functional models are rebuilt from their symbolic tensors, level by
level, and the layers of subclassed models are called one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

from featray.model import Extractor, list_layers

Values = dict[str, np.ndarray]
Case = tuple[Any, Values, np.ndarray]


class Quantizer(kl.Layer):
    """The code book of a VQ-VAE: returns the nearest of `codes` vectors, and its number."""

    def __init__(self, codes: int = 5, **keys: Any) -> None:
        super().__init__(**keys)
        self.codes = codes

    def build(self, shape: Any) -> None:
        self.book = self.add_weight(shape=(self.codes, shape[-1]), name="book")

    def call(self, x: Any) -> Any:
        distance = keras.ops.sum((x[..., None, :] - self.book) ** 2, axis=-1)
        number = keras.ops.argmin(distance, axis=-1)
        return {"code": keras.ops.take(self.book, number, axis=0), "number": number}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "codes": self.codes}


class Scale(kl.Layer):
    """A custom layer with its own weight, for a subclassed model."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), name="factor")

    def call(self, x: Any) -> Any:
        return x * self.factor


class Tower(kl.Layer):
    """A layer that holds its blocks in a list, as in tutorials."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.blocks = [kl.Conv3D(3, 3, padding="same", activation="relu") for _ in range(2)]
        self.drop = kl.Dropout(0.5)

    def build(self, shape: Any) -> None:
        for block in self.blocks:
            block.build(shape)
            shape = block.compute_output_shape(shape)

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = self.drop(block(x))
        return x


class Subclassed(keras.Model):
    """A model in which every part is subclassed, so that there are no symbolic tensors to rebuild from."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.tower, self.scale, self.head = Tower(), Scale(), kl.Dense(2)

    def call(self, x: Any) -> Any:
        return self.head(self.scale(self.tower(x)))


class BetaVae(keras.Model):
    """A VAE with `encoder` and `decoder` as attributes and a custom training step; `call` runs both."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        volume, code = keras.Input((4, 4, 4, 1)), keras.Input((2,))
        x = kl.Flatten(name="flat")(kl.Conv3D(2, 3, name="conv")(volume))
        heads = [kl.Dense(2, name=name)(x) for name in ("z_mean", "z_log_var")]
        self.encoder = keras.Model(volume, heads, name="encoder")
        out = kl.Reshape((4, 4, 4, 1), name="shape")(kl.Dense(64, name="up")(code))
        self.decoder = keras.Model(code, out, name="decoder")
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, x: Any) -> Any:
        return self.decoder(self.encoder(x)[0])

    def train_step(self, data: Any) -> Any:
        raise NotImplementedError


def _randomize(model: Any) -> Any:
    """Set all weights to random values and return the model.

    With the initial values, biases are 0 and normalization layers do nothing.
    """
    rng = np.random.default_rng(11)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(
                rng.uniform(0.05, 0.6, weight.shape) * (1 if "norm" in weight.path else _choose_sign(rng))
            )
    return model


def _choose_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.7 else -1


def _make_batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).random((3, *shape), np.float32)


def _name_tensors(path: str, value: Any) -> Values:
    """Return the tensors of one value under featray's names: `path`, or `path:0`, `path:key` for several."""
    if isinstance(value, dict):
        return {f"{path}:{key}": np.asarray(leaf) for key, leaf in value.items()}
    if isinstance(value, list | tuple):
        return {f"{path}:{at}": np.asarray(leaf) for at, leaf in enumerate(value)}
    return {path: np.asarray(value)}


def _rebuild_values(model: Any, x: np.ndarray, prefix: str = "") -> Values:
    """Return every activation of a functional model without shared layers, rebuilt from its tensors."""
    found: Values = {}
    for layer in model.layers:
        if isinstance(layer, kl.InputLayer):
            continue
        path = prefix + layer.name
        found |= _name_tensors(path, keras.Model(model.input, layer.output)(x, training=False))
        if isinstance(layer, keras.Model):
            (node,) = (node for node in _list_nodes(model) if node.operation is layer)
            feeding = keras.Model(model.input, node.input_tensors[0])(x, training=False)
            found |= _rebuild_values(layer, np.asarray(feeding), f"{path}/")
    return found


def _list_nodes(model: Any) -> list[Any]:
    return [node for level in model._nodes_by_depth.values() for node in level]


def _make_functional_case(model: Any, *shape: int) -> Case:
    x = _make_batch(*shape)
    return model, _rebuild_values(_randomize(model), x), x


def make_resnet_3d() -> Case:
    volume = keras.Input((6, 8, 8, 1))
    x = kl.Conv3D(4, 3, padding="same", name="stem")(volume)
    for block in "ab":
        y = kl.ReLU(name=f"{block}_relu")(kl.BatchNormalization(name=f"{block}_norm_1")(x))
        y = kl.Conv3D(4, 3, padding="same", name=f"{block}_conv")(y)
        x = kl.Add(name=f"{block}_add")([x, y])
    return _make_functional_case(keras.Model(volume, kl.GlobalAveragePooling3D(name="gap")(x)), 6, 8, 8, 1)


def make_unet_3d() -> Case:
    volume = keras.Input((4, 8, 8, 1))
    one = kl.Conv3D(2, 3, padding="same", activation="relu", name="down_1")(volume)
    two = kl.Conv3D(4, 3, padding="same", name="down_2")(kl.MaxPool3D(2, name="pool_1")(one))
    low = kl.SpatialDropout3D(0.5, name="drop")(kl.MaxPool3D(2, name="pool_2")(two))
    up = kl.Conv3DTranspose(4, 2, strides=2, name="up_2")(low)
    up = kl.UpSampling3D(2, name="up_1")(kl.Concatenate(name="skip_2")([two, up]))
    out = kl.Conv3D(1, 1, activation="sigmoid", name="mask")(kl.Concatenate(name="skip_1")([one, up]))
    return _make_functional_case(keras.Model(volume, out), 4, 8, 8, 1)


def make_vq_vae() -> Case:
    volume = keras.Input((4, 4, 4, 1))
    encoder = keras.Model(volume, kl.Conv3D(2, 2, strides=2, name="conv")(volume), name="encoder")
    code = Quantizer(name="quantizer")(encoder(volume))
    out = kl.Conv3DTranspose(1, 2, strides=2, name="decoder")(code["code"])
    model, values, x = _make_functional_case(keras.Model(volume, out), 4, 4, 4, 1)
    # The layer returns a dict. Keras numbers its values; featray keeps the keys.
    named = {"quantizer:code": values.pop("quantizer:0"), "quantizer:number": values.pop("quantizer:1")}
    return model, values | named, x


def make_efficientnet_2d() -> Case:
    """Return the first blocks of EfficientNetB0 only, to save time.

    They have normalization, depthwise convolutions, squeeze and excite, and additions.
    """
    whole = keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3), classes=4)
    model = keras.Model(whole.input, whole.get_layer("block2b_add").output)
    x = _make_batch(32, 32, 3)
    chosen = [layer for layer in model.layers if not isinstance(layer, kl.InputLayer)]
    values = keras.Model(model.input, [layer.output for layer in chosen])(x, training=False)
    return model, {layer.name: np.asarray(value) for layer, value in zip(chosen, values, strict=True)}, x


def make_dense_autoencoder() -> Case:
    sizes = [64, 32, 64, 784]
    model = keras.Sequential(
        [keras.Input((784,)), *(kl.Dense(n, activation="relu", name=f"d{at}") for at, n in enumerate(sizes))]
    )
    x = _make_batch(784)
    return model, _call_in_turn(model.layers, x), x


def _call_in_turn(chain: list[Any], x: Any) -> Values:
    found: Values = {}
    for layer in chain:
        x = layer(x, training=False) if "Dropout" in type(layer).__name__ else layer(x)
        found[layer.name] = np.asarray(x)
    return found


def make_nested_and_shared() -> Case:
    """Return a model of three levels, in which the innermost model and one layer are called twice."""
    core = keras.Sequential([keras.Input((5,)), kl.Dense(5, activation="tanh", name="dense")], name="core")
    a, b = keras.Input((5,)), keras.Input((5,))
    middle = keras.Model(a, core(kl.Rescaling(3.0, name="times")(core(a))), name="middle")
    twice = kl.Dense(5, name="twice")
    outer = keras.Model(b, twice(kl.ReLU(name="relu")(twice(middle(b)))), name="outer")
    model, x = _randomize(keras.Sequential([keras.Input((5,)), outer])), _make_batch(5)
    first = core(x)
    second = core(3 * first)
    before = twice(second)
    clipped = np.maximum(before, 0)
    expected = {
        "outer/middle/core#1/dense": first,
        "outer/middle/core#1": first,
        "outer/middle/times": 3 * first,
        "outer/middle/core#2/dense": second,
        "outer/middle/core#2": second,
        "outer/middle": second,
        "outer/twice#1": before,
        "outer/relu": clipped,
        "outer/twice#2": twice(clipped),
        "outer": twice(clipped),
    }
    return model, {path: np.asarray(value) for path, value in expected.items()}, x


def make_wrapped_sequence() -> Case:
    steps = keras.Input((6, 8))
    inner = keras.Sequential([keras.Input((8,)), kl.Dense(4, name="inside")], name="inner")
    each = kl.TimeDistributed(inner, name="each")
    both = kl.Bidirectional(kl.LSTM(3, return_sequences=True, name="lstm"), name="both")
    conv = kl.Conv1D(2, 3, name="conv")
    model, x = _randomize(keras.Model(steps, conv(both(each(steps))))), _make_batch(6, 8)
    one = np.stack([np.asarray(inner(x[:, step])) for step in range(6)], axis=1)
    there, back = both.forward_layer(one), both.backward_layer(one)
    merged = np.concatenate([there, np.asarray(back)[:, ::-1]], axis=-1)
    expected = {
        **{f"each/inside#{step + 1}": one[:, step] for step in range(6)},
        "each": one,
        "both/forward_lstm": np.asarray(there),
        "both/backward_lstm": np.asarray(back),
        "both": merged,
        "conv": np.asarray(conv(merged)),
    }
    return model, expected, x


def make_channels_first_3d() -> Case:
    chain = [
        kl.Conv3D(3, 3, data_format="channels_first", name="conv"),
        kl.BatchNormalization(axis=1, name="norm"),
        kl.MaxPool3D(2, data_format="channels_first", name="pool"),
        kl.GlobalAveragePooling3D(data_format="channels_first", name="gap"),
    ]
    model, x = _randomize(keras.Sequential([keras.Input((1, 6, 6, 6)), *chain])), _make_batch(1, 6, 6, 6)
    return model, _call_in_turn(chain, x), x


def make_mixed_precision() -> Case:
    chain = [
        kl.Conv2D(3, 3, dtype="mixed_bfloat16", name="conv"),
        kl.Dropout(0.5, dtype="mixed_bfloat16", name="drop"),
        kl.Flatten(dtype="mixed_bfloat16", name="flat"),
        kl.Dense(2, dtype="float32", name="head"),
    ]
    model, x = keras.Sequential([keras.Input((6, 6, 1)), *chain]), _make_batch(6, 6, 1)
    return model, {name: value.astype(np.float32) for name, value in _call_in_turn(chain, x).items()}, x


def make_vision_transformer() -> Case:
    image = keras.Input((8, 8, 1))
    x = kl.Reshape((4, 6), name="tokens")(kl.Conv2D(6, 4, strides=4, name="patches")(image))
    norm, attention = kl.LayerNormalization(name="norm"), kl.MultiHeadAttention(2, 3, name="attention")
    y = norm(x)
    x = kl.Add(name="add_1")([x, attention(y, y)])
    out = kl.Add(name="add_2")([x, kl.Dense(6, activation="gelu", name="mlp")(x)])
    model, values, x = _make_functional_case(keras.Model(image, out), 8, 8, 1)
    y = values["norm"]
    for name in ("query", "key", "value"):
        values[f"attention/{name}"] = np.asarray(getattr(attention, f"{name}_dense")(y))
    values["attention/attention_output"] = values["attention"]
    return model, values, x


def make_subclassed() -> Case:
    model, x = Subclassed(), _make_batch(4, 4, 4, 1)
    model(x)
    _randomize(model)
    one = model.tower.blocks[0](x)
    two = model.tower.blocks[1](one)
    scaled = model.scale(two)
    expected = {
        "tower/blocks.0": one,
        "tower/drop#1": one,
        "tower/blocks.1": two,
        "tower/drop#2": two,
        "tower": two,
        "scale": scaled,
        "head": model.head(scaled),
    }
    return model, {path: np.asarray(value) for path, value in expected.items()}, x


def make_vae_with_attributes() -> Case:
    model, x = BetaVae(), _make_batch(4, 4, 4, 1)
    model(x)
    inner = _rebuild_values(_randomize(model).encoder, x, "encoder/")
    mean, log_variance = inner["encoder/z_mean"], inner["encoder/z_log_var"]
    decoded = _rebuild_values(model.decoder, mean, "decoder/")
    ends = {"encoder:0": mean, "encoder:1": log_variance, "decoder": decoded["decoder/shape"]}
    return model, inner | decoded | ends, x


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        make_resnet_3d,
        make_unet_3d,
        make_vq_vae,
        make_vision_transformer,
        make_efficientnet_2d,
        make_dense_autoencoder,
        make_nested_and_shared,
        make_wrapped_sequence,
        make_channels_first_3d,
        make_mixed_precision,
        make_subclassed,
        make_vae_with_attributes,
    ],
)
def test_every_listed_layer_equals_the_value_that_keras_computes_in_another_way(
    make: Callable[[], Case], tmp_path: Path
) -> None:
    model, expected, x = make()
    model.save(tmp_path / "m.keras")
    class_names = ("Quantizer", "Scale", "Tower", "Subclassed", "BetaVae")
    spec = {
        "uri": str(tmp_path / "m.keras"),
        "custom_objects": [f"{__file__}:{name}" for name in class_names],
    }
    paths = [info.path for info in list_layers({**spec, "layers": ["*"]}, input_zyx=x.shape[1:])]
    assert set(paths) == set(expected)

    layers = [{"layer": path, "pool": "none", "as": path.replace("/", ".")} for path in paths]
    got = Extractor({**spec, "layers": layers}, input_zyx=x.shape[1:])(x)
    for path, value in expected.items():
        scale = float(np.abs(value).max())
        np.testing.assert_allclose(
            got[path.replace("/", ".")].ravel(), value.ravel(), rtol=1e-5, atol=1e-5 * scale, err_msg=path
        )
