"""Every shape of model is cut by one mechanism, and what lies behind the cut has no effect."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from featray.errors import ModelError
from featray.model import select_layers, trace

SHAPE = (4, 4, 4, 1)


def _volumes(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).random((3, *shape), np.float32)


def _paths(model: Any, shape: tuple[int, ...] = SHAPE) -> list[str]:
    return [tap.path for tap in trace.survey(model, shape)]


def _cut(model: Any, path: str, shape: tuple[int, ...] = SHAPE) -> Any:
    """Return the traced function that gives the value at `path`."""
    (tap,) = select_layers.find(path, trace.survey(model, shape))
    assert not tap.problem, tap.problem
    return trace.capture(model, [tap.key], shape, lambda found: found[tap.key])


def _value(model: Any, path: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(_cut(model, path, shape)(tf.constant(_volumes(shape))))


def _convolutions(function: Any) -> int:
    return sum("Conv3D" in operation.type for operation in function.graph.get_operations())


class Block(keras.layers.Layer):
    """Two convolutions held in a list."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.convs = [keras.layers.Conv3D(2, 3, padding="same") for _ in range(2)]

    def call(self, x: Any) -> Any:
        for conv in self.convs:
            x = conv(x)
        return x


class SubclassedVae(keras.Model):
    """The common tutorial's shape: encoder and decoder as attributes, a metric updated in `call`."""

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


def test_layers_of_a_subclassed_model_are_found_by_attribute_and_by_name() -> None:
    model = SubclassedVae()
    assert _paths(model) == [
        "encoder/convs.0",
        "encoder/convs.1",
        "encoder",
        "z_mean",
        "decoder/convs.0",
        "decoder/convs.1",
        "decoder",
    ]
    codes = model.head(model.encoder(_volumes()))
    np.testing.assert_allclose(_value(model, "z_mean"), codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_value(model, "head"), codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        _value(model, "encoder/convs.0"), model.encoder.convs[0](_volumes()), rtol=1e-5, atol=1e-6
    )


def test_side_effects_behind_the_cut_never_happen(capfd: pytest.CaptureFixture[str]) -> None:
    model = SubclassedVae()
    function = _cut(model, "z_mean")
    function(tf.constant(_volumes()))
    assert _convolutions(function) == 2
    assert float(model.seen.count) == 0
    assert "decoder ran" not in capfd.readouterr().err


def test_surveying_a_model_runs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = SubclassedVae()
    trace.survey(model, SHAPE)
    assert float(model.seen.count) == 0
    assert "decoder ran" not in capfd.readouterr().err


def test_the_model_still_runs_as_before_after_it_was_cut() -> None:
    model = SubclassedVae()
    before = model(_volumes()).numpy()
    _cut(model, "z_mean")
    np.testing.assert_array_equal(model(_volumes()).numpy(), before)


def test_a_shared_layer_is_taken_call_by_call() -> None:
    shared, volume = keras.layers.Dense(1, name="shared"), keras.Input(SHAPE)
    model = keras.Model(volume, shared(shared(volume) * 2.0))
    assert _paths(model) == ["shared#1", "shared#2"]
    once = shared(_volumes())
    np.testing.assert_allclose(_value(model, "shared#1"), once, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_value(model, "shared#2"), shared(once * 2.0), rtol=1e-5, atol=1e-6)
    assert len(select_layers.find("shared", trace.survey(model, SHAPE))) == 2


def test_layers_of_a_model_called_twice_are_numbered_by_the_call_of_the_model() -> None:
    inner = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(1, name="dense")], name="inner")
    volume = keras.Input(SHAPE)
    model = keras.Model(volume, inner(inner(volume)))
    assert _paths(model) == ["inner#1/dense", "inner#1", "inner#2/dense", "inner#2"]
    np.testing.assert_allclose(_value(model, "inner#2/dense"), inner(inner(_volumes())), rtol=1e-5, atol=1e-6)


def test_models_nest_to_any_depth() -> None:
    model: Any = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(2, name="dense")], name="level_0")
    innermost = model
    for level in range(1, 4):
        volume = keras.Input(SHAPE)
        model = keras.Model(
            volume, model(keras.layers.Rescaling(2.0, name="twice")(volume)), name=f"level_{level}"
        )
    path = "level_2/level_1/level_0/dense"
    np.testing.assert_allclose(_value(model, path), innermost(8 * _volumes()), rtol=1e-4, atol=1e-5)
    assert path in _paths(model)


def test_a_sequential_model_that_was_never_built_is_cut() -> None:
    model = keras.Sequential([keras.layers.Conv3D(2, 3, name="conv"), keras.layers.Flatten(name="flat")])
    assert _paths(model) == ["conv", "flat"]
    np.testing.assert_allclose(
        _value(model, "conv"), model.get_layer("conv")(_volumes()), rtol=1e-5, atol=1e-6
    )


def test_sublayers_of_attention_are_found() -> None:
    x = keras.Input((6, 4))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x))
    assert "attention/query" in _paths(model, (6, 4))
    assert _value(model, "attention/query", (6, 4)).shape == (3, 6, 2, 3)


def test_a_layer_inside_a_loop_is_refused_and_the_layer_around_it_works() -> None:
    x = keras.Input((6, 4))
    model = keras.Model(x, keras.layers.RNN(keras.layers.LSTMCell(5, name="cell"), name="rnn")(x))
    problems = {tap.path: tap.problem for tap in trace.survey(model, (6, 4))}
    inside = [problem for path, problem in problems.items() if path.startswith("rnn/cell")]
    assert inside
    assert all("inside a loop or branch" in problem for problem in inside)
    assert _value(model, "rnn", (6, 4)).shape == (3, 5)


def test_a_fault_behind_the_wanted_layer_does_no_harm() -> None:
    class Choosy(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x if x[0, 0, 0, 0, 0] > 0 else -x

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = keras.layers.Dense(2), Choosy()

        def call(self, x: Any) -> Any:
            return self.second(self.first(x))

    assert _value(Model(), "first").shape == (3, 4, 4, 4, 2)


def test_a_model_without_call_is_refused_naming_its_parts() -> None:
    class OnlyTrains(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = keras.Sequential([keras.layers.Dense(2)], name="encoder")

    with pytest.raises(ModelError, match=r"cannot be called .* set model.submodel to one of: encoder"):
        trace.survey(OnlyTrains(), SHAPE)


def test_a_value_without_batch_axis_is_marked() -> None:
    class Summary(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.mean(x)

    volume = keras.Input(SHAPE)
    (tap,) = trace.survey(keras.Model(volume, Summary(name="mean")(volume)), SHAPE)
    assert "without a batch axis" in tap.problem


def test_dropout_is_silent_and_batch_norm_uses_its_stored_statistics() -> None:
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="drop"),
        ]
    )
    expected = _volumes() / np.sqrt(1 + model.get_layer("norm").epsilon)
    np.testing.assert_allclose(_value(model, "drop"), expected, rtol=1e-5, atol=1e-6)
