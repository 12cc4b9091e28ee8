"""Files in the forms that Keras wrote between 2016 and 2022 load and give the values of Keras 2.

tf_keras writes the newest form only, so these tests edit its files into the old forms.
"""

from __future__ import annotations

import codecs
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tf_keras as k2

from featray.errors import ModelError
from featray.model import Extractor, list_layers

L = k2.layers
Code = Callable[[str, str], Path]
Edit = Callable[[dict[str, Any]], Any]


def drop_new_keys(node: Any) -> Any:
    """Return a description as Keras wrote it before 2.13: without modules, registered names and shapes."""
    if isinstance(node, list):
        return [drop_new_keys(item) for item in node]
    if not isinstance(node, dict):
        return node
    new = ("module", "registered_name", "build_config")
    return {key: drop_new_keys(value) for key, value in node.items() if key not in new}


def save_old(
    model: Any, path: Path, edit: Edit = drop_new_keys, version: str = "2.3.1", backend: str = ""
) -> Path:
    """Save a model with a description that `edit` returns, and with an old version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras 2 warns that this format is old
        model.save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(edit(drop_new_keys(config)))
        for group in (file, file["model_weights"]):
            group.attrs["keras_version"] = version
            group.attrs["backend"] = backend or "tensorflow"
    return path


def extract(path: Path, layer: str, x: np.ndarray, **keys: Any) -> np.ndarray:
    """Return the values of one layer, without pooling."""
    layers = [{"layer": layer, "pool": "none", "as": "values"}]
    return Extractor({"uri": str(path), "layers": layers, **keys})(x)["values"]


def read_corrections(path: Path, layer: str, **keys: Any) -> Any:
    return Extractor({"uri": str(path), "layers": [layer], **keys}).recipe_part().get("keras2")


def make_input(model: Any) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype(np.float32)


def assert_same(values: Any, expected: Any) -> None:
    np.testing.assert_allclose(values, np.asarray(expected), rtol=1e-5, atol=1e-6)


def make_cnn() -> Any:
    return k2.Sequential(
        [
            L.Conv2D(3, 3, name="conv", input_shape=(6, 6, 2)),
            L.SpatialDropout2D(0.2, name="drop"),
            L.BatchNormalization(name="norm"),
            L.Flatten(name="flat"),
            L.Dense(2, name="code"),
        ]
    )


def _remove_input_layer(config: dict[str, Any]) -> dict[str, Any]:
    layers = [layer for layer in config["config"]["layers"] if layer["class_name"] != "InputLayer"]
    layers[0]["config"]["batch_input_shape"] = [None, 6, 6, 2]
    return {**config, "config": {"name": "sequential", "layers": layers}}


def _make_list_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "config": _remove_input_layer(config)["config"]["layers"]}


def _add_dtype_to_initializers(config: dict[str, Any]) -> dict[str, Any]:
    for layer in config["config"]["layers"]:
        for key, value in layer["config"].items():
            if key.endswith("initializer"):
                value["config"]["dtype"] = "float32"
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "version"),
    [
        (_make_list_config, "2.2.2"),
        (_remove_input_layer, "2.3.1"),
        (_add_dtype_to_initializers, "2.1.6-tf"),
    ],
)
def test_old_forms_of_sequential_models_give_the_same_values(
    edit: Edit, version: str, tmp_path: Path
) -> None:
    model = make_cnn()
    path, x = save_old(model, tmp_path / "m.h5", edit, version), make_input(model)
    assert_same(extract(path, "code", x), model(x))
    assert read_corrections(path, "code") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.TimeDistributed(L.Conv2D(2, 3), name="it"), (3, 6, 6, 1)),
        (L.Bidirectional(L.LSTM(3), name="it"), (5, 3)),
        (L.RNN(L.LSTMCell(3), name="it"), (5, 3)),
        (L.ConvLSTM2D(2, 3, name="it"), (4, 6, 6, 1)),
        (L.ThresholdedReLU(0.3, name="it"), (4,)),
        (L.LocallyConnected2D(2, 3, name="it"), (6, 6, 1)),
        (L.experimental.SyncBatchNormalization(name="it"), (6, 6, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_keras_3_cannot_load_give_the_same_values(layer: Any, shape: Any, tmp_path: Path) -> None:
    volume = k2.Input(shape)
    model = k2.Model(volume, layer(volume))
    x = make_input(model)
    assert_same(extract(save_old(model, tmp_path / "m.h5"), "it", x), model(x))


@pytest.mark.slow
def test_hard_sigmoid_is_that_of_keras_2_and_changes_the_recipe(tmp_path: Path) -> None:
    series = k2.Input((5, 3))
    model = k2.Model(series, L.LSTM(4, recurrent_activation="hard_sigmoid", name="it")(series))
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert_same(extract(path, "it", x), model(x))
    assert read_corrections(path, "it") == ["hard_sigmoid"]


@pytest.mark.slow
def test_a_gru_from_before_reset_after_and_a_layer_for_gpus_give_the_same_values(tmp_path: Path) -> None:
    def drop_settings(config: dict[str, Any]) -> dict[str, Any]:
        gru, lstm = config["config"]["layers"][1:]
        del gru["config"]["reset_after"]
        names = ("name", "units", "return_sequences")
        lstm["class_name"], lstm["config"] = "CuDNNLSTM", {name: lstm["config"][name] for name in names}
        return config

    gru = L.GRU(3, reset_after=False, return_sequences=True, name="gru")
    model = k2.Sequential([k2.Input((5, 3)), gru, L.LSTM(2, name="it")])
    path, x = save_old(model, tmp_path / "m.h5", drop_settings, "2.1.5"), make_input(model)
    assert_same(extract(path, "it", x), model(x))


@pytest.mark.slow
def test_a_layer_called_with_training_true_stays_in_training(tmp_path: Path) -> None:
    vector = k2.Input((4,))
    x = L.BatchNormalization(name="norm")(L.Dense(3, name="dense")(vector), training=True)
    model = k2.Model(vector, L.Dense(2, name="code")(x))
    path, batch = save_old(model, tmp_path / "m.h5"), make_input(model)[:1]
    assert_same(extract(path, "code", batch, batch_size=1), model.predict(batch, verbose=0))
    assert read_corrections(path, "code", batch_size=1) == ["training"]
    with pytest.raises(ModelError, match=r"'code' depends on the other inputs in the batch, .*'norm'"):
        Extractor({"uri": str(path), "layers": ["code"]})


def test_dropout_called_with_training_true_is_stochastic(tmp_path: Path) -> None:
    vector = k2.Input((8,))
    dropped = L.Dropout(0.5, name="drop")(L.Dense(8, name="dense")(vector), training=True)
    path = save_old(k2.Model(vector, L.Dense(2, name="code")(dropped)), tmp_path / "m.h5")
    flags = {info.path: info.flags for info in list_layers(path)}
    assert "stochastic" in flags["code"]
    assert "stochastic" not in flags["dense"]


def test_names_with_a_slash_are_paths(tmp_path: Path) -> None:
    vector = k2.Input((4,))
    model = k2.Model(vector, L.Dense(2, name="block/b/code")(L.Dense(3, name="block/code")(vector)))
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert [info.path for info in list_layers(path)] == ["block/code", "block/b/code"]
    assert_same(extract(path, "block/b/code", x), model(x))
    assert Extractor({"uri": str(path), "layers": ["block/*"]}).layers[0].name == "block.code"


def test_kernels_written_with_theano_are_mirrored(tmp_path: Path) -> None:
    model = make_cnn()
    path, x = save_old(model, tmp_path / "m.h5", backend="theano"), make_input(model)
    kernel = model.get_layer("conv").kernel
    kernel.assign(kernel.numpy()[::-1, ::-1])
    assert_same(extract(path, "code", x), model(x))
    assert read_corrections(path, "code") == ["theano"]


def test_channels_on_axis_1_run_on_a_cpu(tmp_path: Path) -> None:
    def build(data_format: str, shape: tuple[int, ...]) -> Any:
        keys = {"data_format": data_format}
        conv, pool = (
            L.Conv3D(2, 3, strides=2, padding="same", **keys),
            L.AveragePooling3D(2, name="it", **keys),
        )
        return k2.Sequential([k2.Input(shape), conv, pool])

    first, last = build("channels_first", (1, 4, 8, 8)), build("channels_last", (4, 8, 8, 1))
    last.set_weights(first.get_weights())
    x = make_input(first)
    values = extract(save_old(first, tmp_path / "m.h5"), "it", x)
    assert_same(np.moveaxis(values, 1, -1), last(np.moveaxis(x, 1, -1)))


def test_mixed_precision_can_be_turned_off(tmp_path: Path) -> None:
    model = k2.Sequential([k2.Input((6,)), L.Dense(2, dtype="mixed_float16", name="code")])
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert_same(extract(path, "code", x), model(x))
    extractor = Extractor({"uri": str(path), "layers": ["code"], "compute": "float32"})
    assert extractor.recipe_part()["compute_dtype"] == ["float32"]
    expected = x @ model.layers[0].kernel.numpy()
    assert_same(extractor(x)["code"], expected)


def test_the_layers_inside_a_time_distributed_model_are_not_listed(tmp_path: Path) -> None:
    vector = k2.Input((4,))
    inner = k2.Model(vector, L.Dense(2, name="dense")(vector), name="inner")
    series = k2.Input((3, 4))
    model = k2.Model(series, L.TimeDistributed(inner, name="steps")(series))
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert [info.path for info in list_layers(path)] == ["steps"]
    assert_same(extract(path, "steps", x), model(x))
    with pytest.raises(ModelError, match="runs once for each time step"):
        Extractor({"uri": str(path), "layers": ["steps/inner"]})


def test_a_custom_layer_of_keras_3_gets_its_weights_from_a_file_of_keras_2(
    tmp_path: Path, code: Code
) -> None:
    class Scale(L.Layer):
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight("factor", (shape[-1],), initializer="random_normal")

        def call(self, x: Any) -> Any:
            return x * self.factor

    vector = k2.Input((4,))
    model = k2.Model(vector, Scale(name="scale")(vector))
    source = code(
        "scale.py",
        """
        import keras
        class Scale(keras.layers.Layer):
            def build(self, shape):
                self.factor = self.add_weight(shape=(shape[-1],), name="factor")
            def call(self, x):
                return x * self.factor
        """,
    )
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert_same(extract(path, "scale", x, custom_objects=[f"{source}:Scale"]), model(x))
    assert [info.path for info in list_layers(path, custom_objects=[f"{source}:Scale"])] == ["scale"]


def make_lambda_vae() -> Any:
    vector = k2.Input((6,))
    mean, log_variance = (L.Dense(2, name=name)(vector) for name in ("z_mean", "z_log_var"))
    z = L.Lambda(lambda parts: parts[0] + parts[1], name="z")([mean, log_variance])
    return k2.Model(vector, L.Dense(6, name="out")(z))


def _write_code_of_another_python(config: dict[str, Any]) -> dict[str, Any]:
    for layer in config["config"]["layers"]:
        if layer["class_name"] == "Lambda":
            layer["config"]["function"] = [codecs.encode(b"\xe3\x01\x00\x00", "base64").decode(), None, None]
    return config


@pytest.mark.slow
def test_code_of_another_python_is_needed_only_behind_it(tmp_path: Path, code: Code) -> None:
    model = make_lambda_vae()
    path, x = save_old(model, tmp_path / "m.h5", _write_code_of_another_python), make_input(model)
    assert_same(extract(path, "z_mean", x), x @ model.get_layer("z_mean").kernel.numpy())
    assert [info.path for info in list_layers(path)] == ["z_mean", "z_log_var"]
    with pytest.raises(
        ModelError, match=r"'out' cannot be computed: layer 'z' holds Python code .*model.trust"
    ):
        Extractor({"uri": str(path), "layers": ["out"]})
    with pytest.raises(ModelError, match=r"another version of Python wrote.*'z=file.py:function'"):
        Extractor({"uri": str(path), "layers": ["out"], "trust": True})
    source = code(
        "z.py", "def add(parts):\n    return parts[0] + parts[1]\ndef first(parts):\n    return parts[0]"
    )
    assert_same(extract(path, "out", x, custom_objects=[f"z={source}:add"]), model(x))
    add, first = (
        Extractor({"uri": str(path), "layers": ["out"], "custom_objects": [f"z={source}:{name}"]}).sha256
        for name in ("add", "first")
    )
    assert add != first
    with pytest.raises(ModelError, match="no Lambda layer or operation of this name; it has: z"):
        Extractor({"uri": str(path), "layers": ["out"], "custom_objects": [f"y={source}:add"]})


def test_code_of_this_python_runs_with_trust(tmp_path: Path) -> None:
    model = make_lambda_vae()
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert_same(extract(path, "out", x, trust=True), model(x))


def test_an_operation_that_may_do_harm_is_needed_only_behind_it(tmp_path: Path) -> None:
    import tensorflow as tf

    vector = k2.Input((4,))
    code_layer = L.Dense(2, name="code")(vector)
    model = k2.Model(vector, L.Dense(2, name="out")(tf.debugging.check_numerics(code_layer, "bad")))
    path, x = save_old(model, tmp_path / "m.h5"), make_input(model)
    assert_same(extract(path, "code", x), x @ model.get_layer("code").kernel.numpy())


def _write_keras1_file(
    path: Path, weights: dict[str, list[np.ndarray]], layers: list[dict[str, Any]]
) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": layers}).encode()
        file.attrs["keras_version"] = b"1.2.2"
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [layer["config"]["name"].encode() for layer in layers]
        for layer in layers:
            name = layer["config"]["name"]
            values = weights.get(name, [])
            part = group.create_group(name)
            names = [f"{name}_{at}" for at in range(len(values))]
            part.attrs["weight_names"] = [text.encode() for text in names]
            for text, value in zip(names, values, strict=True):
                part[text] = value


def _make_keras1_layers(dim_ordering: str) -> list[dict[str, Any]]:
    shape = [None, 6, 6, 1] if dim_ordering == "tf" else [None, 1, 6, 6]
    conv = {
        "nb_filter": 2,
        "nb_row": 3,
        "nb_col": 3,
        "border_mode": "same",
        "subsample": [1, 1],
        "bias": True,
    }
    training = {"init": "glorot_uniform", "W_regularizer": None, "W_constraint": None}
    lstm = {"output_dim": 2, "inner_init": "orthogonal", "inner_activation": "hard_sigmoid", "dropout_W": 0.0}
    common = {"trainable": True, "activation": "relu", "dim_ordering": dim_ordering}
    first = {"batch_input_shape": shape, "input_dtype": "float32"}
    return [
        {"class_name": "Convolution2D", "config": {"name": "conv", **conv, **training, **common, **first}},
        {"class_name": "Dropout", "config": {"name": "drop", "p": 0.5}},
        {"class_name": "Reshape", "config": {"name": "series", "target_shape": [6, 12]}},
        {"class_name": "LSTM", "config": {"name": "lstm", "activation": "tanh", **training, **lstm}},
    ]


@pytest.mark.slow
def test_a_model_of_keras_1_gives_the_same_values(tmp_path: Path) -> None:
    model = k2.Sequential(
        [
            L.Conv2D(2, 3, padding="same", activation="relu", input_shape=(6, 6, 1)),
            L.Reshape((6, 12)),
            L.LSTM(2, recurrent_activation="hard_sigmoid"),
        ]
    )
    conv, lstm = model.layers[0].get_weights(), model.layers[2].get_weights()
    gates = [np.split(value, 4, axis=-1) for value in lstm]  # i, f, c, o; Keras 1 wrote i, c, f, o
    weights = {"conv": conv, "lstm": [part[at] for at in (0, 2, 1, 3) for part in gates]}
    _write_keras1_file(tmp_path / "m.h5", weights, _make_keras1_layers("tf"))
    x = make_input(model)
    assert_same(extract(tmp_path / "m.h5", "lstm", x), model(x))
    _write_keras1_file(tmp_path / "th.h5", weights, _make_keras1_layers("th"))
    with pytest.raises(ModelError, match="did not write whether Theano or TensorFlow"):
        Extractor({"uri": str(tmp_path / "th.h5"), "layers": ["lstm"]})
