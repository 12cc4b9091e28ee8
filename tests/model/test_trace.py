"""Models of every kind can be truncated, and layers after the selected ones have no effect."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from featray.errors import ModelError
from featray.model import select_layers, trace
from featray.model.taps import Tap
from featray.model.trace import ModelCall

SHAPE = (4, 4, 4, 1)


def _make_volumes(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).random((3, *shape), np.float32)


def _record(model: Any, shape: tuple[int, ...] = SHAPE) -> list[Tap]:
    return trace.record_taps(ModelCall(model, shape)).taps


def _list_paths(model: Any, shape: tuple[int, ...] = SHAPE) -> list[str]:
    return [tap.path for tap in _record(model, shape)]


def _truncate(model: Any, path: str, shape: tuple[int, ...] = SHAPE) -> Any:
    """Return the traced function that computes the value of the layer at `path`."""
    (tap,) = select_layers.find_taps(path, _record(model, shape))
    assert not tap.problem, tap.problem
    return trace.trace_truncated_model(ModelCall(model, shape), [tap.key], lambda tensors: tensors[tap.key])


def _compute(model: Any, path: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(_truncate(model, path, shape)(tf.constant(_make_volumes(shape))))


def _count_convolutions(function: Any) -> int:
    return sum("Conv3D" in operation.type for operation in function.graph.get_operations())


class Block(keras.layers.Layer):
    """A layer that holds two convolutions in a list."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.convs = [keras.layers.Conv3D(2, 3, padding="same") for _ in range(2)]

    def call(self, x: Any) -> Any:
        for conv in self.convs:
            x = conv(x)
        return x


class SubclassedVae(keras.Model):
    """A VAE as in common tutorials: encoder and decoder are attributes, and `call` updates a metric."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.encoder = Block()
        self.head = keras.layers.Dense(3, name="z_mean")
        self.decoder = Block()
        self.seen = keras.metrics.Mean()

    def call(self, x: Any) -> Any:
        code = self.head(self.encoder(x))
        out = self.decoder(code)
        self.seen.update_state(keras.ops.mean(out))
        tf.print("decoder ran")
        return out


@pytest.mark.slow
def test_layers_of_a_subclassed_model_are_found_by_attribute_and_by_name() -> None:
    model = SubclassedVae()
    assert _list_paths(model) == [
        "encoder/convs.0",
        "encoder/convs.1",
        "encoder",
        "z_mean",
        "decoder/convs.0",
        "decoder/convs.1",
        "decoder",
    ]
    codes = model.head(model.encoder(_make_volumes()))
    np.testing.assert_allclose(_compute(model, "z_mean"), codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_compute(model, "head"), codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        _compute(model, "encoder/convs.0"), model.encoder.convs[0](_make_volumes()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_side_effects_after_the_last_selected_layer_do_not_happen(capfd: pytest.CaptureFixture[str]) -> None:
    model = SubclassedVae()
    function = _truncate(model, "z_mean")
    function(tf.constant(_make_volumes()))
    assert _count_convolutions(function) == 2
    assert float(model.seen.count) == 0
    assert "decoder ran" not in capfd.readouterr().err


def test_recording_the_taps_of_a_model_has_no_side_effects(capfd: pytest.CaptureFixture[str]) -> None:
    model = SubclassedVae()
    _record(model)
    assert float(model.seen.count) == 0
    assert "decoder ran" not in capfd.readouterr().err


def test_truncating_a_model_does_not_change_the_model() -> None:
    model = SubclassedVae()
    before = model(_make_volumes()).numpy()
    _truncate(model, "z_mean")
    np.testing.assert_array_equal(model(_make_volumes()).numpy(), before)


def test_each_call_of_a_shared_layer_has_its_own_path() -> None:
    shared, volume = keras.layers.Dense(1, name="shared"), keras.Input(SHAPE)
    model = keras.Model(volume, shared(shared(volume) * 2.0))
    assert _list_paths(model) == ["shared#1", "shared#2"]
    once = shared(_make_volumes())
    np.testing.assert_allclose(_compute(model, "shared#1"), once, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_compute(model, "shared#2"), shared(once * 2.0), rtol=1e-5, atol=1e-6)
    assert len(select_layers.find_taps("shared", _record(model))) == 2


def test_layers_of_a_model_called_twice_are_numbered_by_the_call_of_the_model() -> None:
    inner = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(1, name="dense")], name="inner")
    volume = keras.Input(SHAPE)
    model = keras.Model(volume, inner(inner(volume)))
    assert _list_paths(model) == ["inner#1/dense", "inner#1", "inner#2/dense", "inner#2"]
    np.testing.assert_allclose(
        _compute(model, "inner#2/dense"), inner(inner(_make_volumes())), rtol=1e-5, atol=1e-6
    )


def test_layers_of_deeply_nested_models_are_found() -> None:
    model: Any = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(2, name="dense")], name="level_0")
    innermost = model
    for level in range(1, 4):
        volume = keras.Input(SHAPE)
        model = keras.Model(
            volume, model(keras.layers.Rescaling(2.0, name="twice")(volume)), name=f"level_{level}"
        )
    path = "level_2/level_1/level_0/dense"
    np.testing.assert_allclose(_compute(model, path), innermost(8 * _make_volumes()), rtol=1e-4, atol=1e-5)
    assert path in _list_paths(model)


def test_a_sequential_model_that_was_never_built_can_be_truncated() -> None:
    model = keras.Sequential([keras.layers.Conv3D(2, 3, name="conv"), keras.layers.Flatten(name="flat")])
    assert _list_paths(model) == ["conv", "flat"]
    np.testing.assert_allclose(
        _compute(model, "conv"), model.get_layer("conv")(_make_volumes()), rtol=1e-5, atol=1e-6
    )


def test_sublayers_of_attention_are_found() -> None:
    x = keras.Input((6, 4))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x))
    assert "attention/query" in _list_paths(model, (6, 4))
    assert _compute(model, "attention/query", (6, 4)).shape == (3, 6, 2, 3)


def test_a_layer_inside_a_loop_is_refused_and_the_layer_that_contains_it_works() -> None:
    x = keras.Input((6, 4))
    model = keras.Model(x, keras.layers.RNN(keras.layers.LSTMCell(5, name="cell"), name="rnn")(x))
    problems = {tap.path: tap.problem for tap in _record(model, (6, 4))}
    inside = [problem for path, problem in problems.items() if path.startswith("rnn/cell")]
    assert inside
    assert all("inside a loop or branch" in problem for problem in inside)
    assert _compute(model, "rnn", (6, 4)).shape == (3, 5)


def test_an_error_after_the_selected_layer_does_not_matter() -> None:
    class Choosy(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x if x[0, 0, 0, 0, 0] > 0 else -x

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = keras.layers.Dense(2), Choosy()

        def call(self, x: Any) -> Any:
            return self.second(self.first(x))

    assert _compute(Model(), "first").shape == (3, 4, 4, 4, 2)


def test_a_model_without_call_is_refused_with_the_names_of_its_parts() -> None:
    class OnlyTrains(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = keras.Sequential([keras.layers.Dense(2)], name="encoder")

    with pytest.raises(ModelError, match=r"cannot be called .* set model.submodel to one of: encoder"):
        _record(OnlyTrains())


def test_a_value_without_a_batch_axis_cannot_be_extracted() -> None:
    class Summary(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.mean(x)

    volume = keras.Input(SHAPE)
    (tap,) = _record(keras.Model(volume, Summary(name="mean")(volume)))
    assert "without a batch axis" in tap.problem


def test_dropout_does_nothing_and_batch_norm_uses_its_stored_statistics() -> None:
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="drop"),
        ]
    )
    expected = _make_volumes() / np.sqrt(1 + model.get_layer("norm").epsilon)
    np.testing.assert_allclose(_compute(model, "drop"), expected, rtol=1e-5, atol=1e-6)
