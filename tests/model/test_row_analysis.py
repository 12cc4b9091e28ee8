"""The graph of a model shows the same shapes and variations as running the model, or it shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest

from featray.model import list_layers, row_analysis, trace, variation
from featray.model.trace import ModelCall
from featray.model.variation import TapEvaluation, Variation

kl, ops = keras.layers, keras.ops
VECTOR, IMAGE, VOLUME = (6,), (8, 6, 3), (6, 8, 8, 1)


def _make_call(function: Callable[[Any], Any], shape: tuple[int | None, ...]) -> ModelCall:
    class Probed(kl.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return function(x)

    value = keras.Input(shape)
    return ModelCall(keras.Model(value, Probed(name="probed")(value)), shape)


def _evaluate(call: ModelCall) -> tuple[TapEvaluation | None, TapEvaluation]:
    """Return what the graph shows, and what running the model shows."""
    recording = trace.record_taps(call)
    taps = [tap for tap in recording.taps if not tap.problem]
    return row_analysis.evaluate_taps_by_graph(call, recording, taps), variation.evaluate_taps(call, taps)


SHOWN: dict[str, tuple[Callable[[Any], Any], tuple[int | None, ...]]] = {
    "scale": (lambda x: 2 * x + 1, VECTOR),
    "mean over an inner axis": (lambda x: ops.mean(x, axis=(1, 2)), IMAGE),
    "flatten": (lambda x: ops.reshape(x, (-1, 144)), IMAGE),
    "flatten by the number of rows": (lambda x: ops.reshape(x, (ops.shape(x)[0], 144)), IMAGE),
    "transpose inner axes": (lambda x: ops.transpose(x, (0, 3, 1, 2)), IMAGE),
    "slices": (lambda x: x[:, 1:4, ::2, 0] + x[..., 1:4, ::2, 1], IMAGE),
    "concatenate channels": (lambda x: ops.concatenate([x, x], axis=-1), IMAGE),
    "stack and split": (lambda x: ops.split(ops.stack([x, x], axis=1), 2, axis=2)[1], IMAGE),
    "pad": (lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0))), IMAGE),
    "softmax": (lambda x: ops.softmax(x, axis=-1), IMAGE),
    "product inside rows": (lambda x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))), IMAGE),
    "einsum inside rows": (lambda x: ops.einsum("bijc,bikc->bijk", x, x), IMAGE),
    "squeeze": (lambda x: ops.squeeze(ops.expand_dims(x, 1), 1), VECTOR),
    "noise": (lambda x: x + keras.random.normal(ops.shape(x)), VECTOR),
    "any size": (lambda x: ops.mean(x, axis=1), (None, 3)),
}
NOT_SHOWN: dict[str, Callable[[Any], Any]] = {
    "mean of the batch": lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "mean of everything": lambda x: x - ops.mean(x),
    "largest value of the batch": lambda x: x / (1 + ops.max(x, axis=0)),
    "reversed batch": lambda x: ops.flip(x, axis=0),
    "first row": lambda x: x - x[:1],
    "first row as a vector": lambda x: x - x[0],
    "number of rows": lambda x: x / ops.cast(ops.shape(x)[0], "float32"),
    "place in the batch": lambda x: x + ops.cast(ops.arange(ops.shape(x)[0]), "float32")[:, None],
    "batch to channels": lambda x: x + ops.sum(ops.reshape(x, (1, -1))),
    "transposed batch": lambda x: ops.transpose(ops.cumsum(ops.transpose(x), axis=1)),
    "product over the batch": lambda x: ops.matmul(x, ops.matmul(ops.transpose(x), x)),
    "einsum over the batch": lambda x: ops.einsum("bi,bj->ij", x, x) + x[:, :1],
    "sorted batch": lambda x: ops.sort(x, axis=0),
    "taken by another row": lambda x: ops.take(x, ops.cast(ops.argsort(x[:, 0]), "int32"), axis=0),
    "loop": lambda x: ops.fori_loop(0, 3, lambda _, value: value - ops.mean(value, axis=0), x),
    "tiled batch": lambda x: ops.tile(x, (2, 1))[: ops.shape(x)[0]],
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_graph_shows_the_same_as_running_the_model(name: str) -> None:
    shown, run = _evaluate(_make_call(*SHOWN[name]))
    assert shown == run
    expected = Variation.SAMPLES if name == "noise" else Variation.NONE
    assert set(run.variations.values()) == {expected}


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_the_graph_never_shows_independence_of_a_value_that_may_depend_on_the_batch(name: str) -> None:
    call = _make_call(NOT_SHOWN[name], VECTOR)
    recording = trace.record_taps(call)
    assert row_analysis.evaluate_taps_by_graph(call, recording, recording.taps) is None


def test_a_layer_that_counts_its_calls_is_not_taken_for_one_without_state() -> None:
    class Counting(kl.Layer):  # type: ignore[misc]
        def build(self, _shape: Any) -> None:
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.count.assign(self.count + 1)
            return x * self.count

    value = keras.Input(VECTOR)
    shown, run = _evaluate(ModelCall(keras.Model(value, Counting()(value)), VECTOR))
    assert shown is None
    assert set(run.variations.values()) == {Variation.SAMPLES}


def _build_convolutions() -> Any:
    value = keras.Input(VOLUME)
    x = kl.Conv3D(4, 3, padding="same", activation="relu")(value)
    x = kl.LeakyReLU()(kl.BatchNormalization()(x))
    x = kl.Concatenate()([kl.MaxPooling3D()(x), kl.AveragePooling3D(2)(x)])
    x = kl.Conv3DTranspose(2, 2, strides=2)(kl.SpatialDropout3D(0.2)(x))
    x = kl.UpSampling3D()(kl.ZeroPadding3D()(kl.Cropping3D()(x)))
    x = kl.LayerNormalization()(kl.GroupNormalization(2)(kl.PReLU()(x)))
    x = kl.Multiply()([x, kl.Conv3D(2, 1, activation="sigmoid")(kl.GlobalAveragePooling3D(keepdims=True)(x))])
    return keras.Model(value, kl.Dropout(0.5)(kl.Dense(3, activation="swish")(kl.Flatten()(x)))), VOLUME


def _build_images() -> Any:
    value = keras.Input(IMAGE)
    x = kl.SeparableConv2D(4, 3, padding="same")(kl.Rescaling(2.0)(value))
    x = kl.DepthwiseConv2D(3, padding="same")(kl.Conv2DTranspose(4, 2, strides=2)(x))
    x = kl.Resizing(4, 6)(kl.UnitNormalization()(kl.Softmax()(x)))
    x = kl.Reshape((24, 4))(kl.Permute((2, 1, 3))(x))
    x = kl.Conv1D(4, 3, padding="causal")(kl.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(value, kl.GlobalMaxPooling1D()(x)), IMAGE


def _build_tokens() -> Any:
    value = keras.Input((7,), dtype="int32")
    x = kl.Embedding(9, 4, mask_zero=True)(value)
    x = kl.Attention()([x, kl.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)])
    return keras.Model(value, kl.GlobalAveragePooling1D()(x)), (7,)


def _build_vae() -> Any:
    from featray.synthetic.vae import build_vae

    return build_vae((8, 16, 16), (2, 3), 6, 4, seed=3), (8, 16, 16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("build", [_build_convolutions, _build_images, _build_tokens, _build_vae])
def test_the_layers_of_usual_models_are_listed_without_running_them(build: Callable[[], Any]) -> None:
    shown, run = _evaluate(ModelCall(*build()))
    assert shown == run


@pytest.mark.slow
def test_a_model_whose_graph_shows_nothing_is_run_and_listed(tmp_path: Path) -> None:
    steps = keras.Input((5, 3))
    keras.Model(steps, kl.GRU(2, name="gru")(steps)).save(tmp_path / "m.keras")
    (layer,) = list_layers(tmp_path / "m.keras")
    assert (layer.path, layer.shape, layer.flags) == ("gru", (2,), ("bottleneck",))
