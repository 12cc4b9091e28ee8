"""`list_layers` lists the layers that can be extracted, their sizes and their flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest

from featray.errors import ModelError
from featray.model import Extractor, LayerInfo, list_layers

SAMPLING = ("featray.synthetic.vae:Sampling",)


def _list_by_path(path: Path, **keys: Any) -> dict[str, LayerInfo]:
    return {info.path: info for info in list_layers(path, **keys)}


@pytest.mark.slow
def test_every_layer_of_the_nested_vae_is_listed_in_order_of_computation(small_vae_file: Path) -> None:
    paths = list(_list_by_path(small_vae_file, custom_objects=SAMPLING))
    assert paths[:8] == [
        *(f"encoder/{kind}_{number}" for number in (1, 2) for kind in ("conv", "pool")),
        *(f"encoder/{name}" for name in ("flatten", "pre_latent", "z_mean", "z_log_var")),
    ]
    assert {"encoder/z", "encoder:0", "decoder/deconv_1", "decoder/reconstruction", "decoder"} <= set(paths)


@pytest.mark.slow
def test_shape_is_before_pooling_and_values_are_counted_after_it(small_vae_file: Path) -> None:
    layers = _list_by_path(small_vae_file, custom_objects=SAMPLING)
    conv, mean = layers["encoder/conv_2"], layers["encoder/z_mean"]
    assert (conv.class_name, conv.shape, conv.values) == ("Conv3D", (4, 8, 8, 3), 3)
    assert (mean.class_name, mean.shape, mean.values) == ("Dense", (4,), 4)


@pytest.mark.slow
def test_z_and_all_layers_after_it_are_stochastic_and_z_mean_is_not(small_vae_file: Path) -> None:
    layers = _list_by_path(small_vae_file, custom_objects=SAMPLING)
    varying = {path for path, info in layers.items() if "stochastic" in info.flags}
    assert varying == {"encoder/z", "encoder:2", *(path for path in layers if path.startswith("decoder"))}


@pytest.mark.slow
def test_the_layers_with_the_fewest_values_are_the_bottleneck(small_vae_file: Path) -> None:
    layers = _list_by_path(small_vae_file, custom_objects=SAMPLING)
    narrow = [path for path, info in layers.items() if "bottleneck" in info.flags]
    assert narrow == [
        "encoder/z_mean",
        "encoder/z_log_var",
        "encoder/z",
        "encoder:0",
        "encoder:1",
        "encoder:2",
    ]


@pytest.mark.slow
def test_linear_latents_have_no_dead_units_flag(small_vae_file: Path) -> None:
    layers = _list_by_path(small_vae_file, custom_objects=SAMPLING)
    assert not [path for path, info in layers.items() if "dead_units_possible" in info.flags]


def test_relu_on_the_latent_is_flagged_and_relu_elsewhere_is_not(tmp_path: Path) -> None:
    volume = keras.Input((4, 4, 4, 1))
    x = keras.layers.Conv3D(3, 3, activation="relu", name="conv")(volume)
    x = keras.layers.Dense(9, activation="relu", name="hidden")(keras.layers.Flatten(name="flat")(x))
    mean, log_var = (
        keras.layers.Dense(4, activation="relu", name=name)(x) for name in ("z_mean", "z_log_var")
    )
    head = keras.layers.Dense(2, name="head")(mean)
    keras.Model(volume, [mean, log_var, head]).save(tmp_path / "m.keras")
    flagged = [
        path
        for path, info in _list_by_path(tmp_path / "m.keras").items()
        if "dead_units_possible" in info.flags
    ]
    assert flagged == ["z_mean", "z_log_var"]


def test_a_relu_layer_that_feeds_the_sampling_is_flagged_under_any_name(
    tmp_path: Path, small_vae: Any
) -> None:
    from featray.synthetic.vae import Sampling

    volume = keras.Input((4, 4, 4, 1))
    flat = keras.layers.Flatten(name="flat")(volume)
    a, b = (keras.layers.Dense(5, activation="relu", name=name)(flat) for name in "ab")
    z = Sampling(name="draw")([a, b])
    keras.Model(volume, keras.layers.Dense(3, name="out")(z)).save(tmp_path / "m.keras")
    layers = _list_by_path(tmp_path / "m.keras", custom_objects=SAMPLING)
    assert {path for path, info in layers.items() if "dead_units_possible" in info.flags} == {"a", "b"}


def test_the_second_call_of_a_layer_is_listed_as_number_two(tmp_path: Path) -> None:
    shared, volume = keras.layers.Dense(1, name="shared"), keras.Input((4, 4, 4, 1))
    keras.Model(volume, shared(shared(volume))).save(tmp_path / "m.keras")
    assert list(_list_by_path(tmp_path / "m.keras")) == ["shared#1", "shared#2"]


def test_models_of_images_can_be_listed(tmp_path: Path) -> None:
    layers = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.GlobalAveragePooling2D(name="pool")]
    keras.Sequential([keras.Input((9, 8, 3)), *layers]).save(tmp_path / "m.keras")
    listed = _list_by_path(tmp_path / "m.keras")
    assert {path: info.shape for path, info in listed.items()} == {"conv": (7, 6, 4), "pool": (4,)}


@pytest.mark.slow
def test_a_model_section_with_a_submodel_lists_the_layers_of_the_submodel(
    spec: Callable[..., dict[str, Any]],
) -> None:
    paths = [info.path for info in list_layers(spec("z_mean", submodel="encoder"))]
    assert paths[0] == "conv_1"
    assert paths[-1] == "z"


def test_a_model_that_accepts_any_size_is_listed_for_the_given_size(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((None, None, None, 1)), keras.layers.Conv3D(2, 3, name="conv")])
    model.save(tmp_path / "m.keras")
    assert _list_by_path(tmp_path / "m.keras", input_zyx=(5, 6, 7))["conv"].shape == (3, 4, 5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_list_layers_and_extractor_agree_on_the_number_of_values(
    spec: Callable[..., dict[str, Any]], number: int
) -> None:
    section = spec(f"encoder/conv_{number}")
    (layer,) = Extractor(section).layers
    assert {info.path: info.values for info in list_layers(section)}[layer.path] == layer.values


@pytest.mark.parametrize(
    ("name", "is_spread"),
    [
        ("z_log_var", True),
        ("logvar", True),
        ("z_sigma", True),
        ("latent_variance", True),
        ("log_std_head", True),
        ("z_mean", False),
        ("variational", False),
        ("stdio", False),
    ],
)
def test_heads_with_the_name_of_a_variance_are_flagged_sigma(
    tmp_path: Path, name: str, is_spread: bool
) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name=name)]).save(tmp_path / "m.keras")
    assert ("sigma" in _list_by_path(tmp_path / "m.keras")[name].flags) == is_spread


def test_a_separate_relu_layer_between_head_and_sampling_is_flagged(tmp_path: Path, small_vae: Any) -> None:
    from featray.synthetic.vae import Sampling

    vector = keras.Input((6,))
    a, b = (keras.layers.ReLU(name=f"clip_{name}")(keras.layers.Dense(4, name=name)(vector)) for name in "ab")
    keras.Model(vector, keras.layers.Dense(2)(Sampling(name="draw")([a, b]))).save(tmp_path / "m.keras")
    layers = _list_by_path(tmp_path / "m.keras", custom_objects=SAMPLING)
    flagged = [path for path, info in layers.items() if "dead_units_possible" in info.flags]
    assert flagged == ["clip_a", "clip_b"]


def test_a_shuffle_is_stochastic_although_it_keeps_mean_and_variance(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("test")
    class Shuffle(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.transpose(keras.random.shuffle(keras.ops.transpose(x)))

    keras.Sequential([keras.Input((64,)), Shuffle(name="shuffle")]).save(tmp_path / "m.keras")
    source = tmp_path / "shuffle.py"
    source.write_text(
        "import keras\n@keras.saving.register_keras_serializable('test')\n"
        "class Shuffle(keras.layers.Layer):\n    def call(self, x):\n"
        "        return keras.ops.transpose(keras.random.shuffle(keras.ops.transpose(x)))\n"
    )
    layers = _list_by_path(tmp_path / "m.keras", custom_objects=[f"{source}:Shuffle"])
    assert layers["shuffle"].flags == ("stochastic", "bottleneck")


def test_the_shape_is_none_along_axes_that_accept_any_size(tmp_path: Path) -> None:
    layers = [keras.layers.Conv1D(2, 3, name="conv"), keras.layers.GlobalMaxPooling1D(name="top")]
    keras.Sequential([keras.Input((None, 1)), *layers]).save(tmp_path / "m.keras")
    listed = _list_by_path(tmp_path / "m.keras")
    assert [(info.shape, info.values) for info in listed.values()] == [((None, 2), 2), ((2,), 2)]


@pytest.mark.slow
def test_values_of_chosen_layers_are_counted_after_the_chosen_pooling(
    spec: Callable[..., dict[str, Any]],
) -> None:
    conv = "encoder/conv_2"
    layers = [{"layer": conv, "pool": "avgmax"}, {"layer": conv, "pool": "none", "as": "map"}, "z_mean"]
    listed = {info.path: info for info in list_layers(spec(*layers, "not/there"))}
    chosen, other = listed[conv], listed["encoder/conv_1"]
    assert (chosen.chosen, chosen.pools, chosen.values) == (True, ("avgmax", "none"), 2 * 3 + 4 * 8 * 8 * 3)
    assert chosen.gb_per_10000 == pytest.approx(chosen.values * 4 * 10_000 / 1e9)
    assert (other.chosen, other.pools, other.values) == (False, ("avg",), 2)
    assert (listed["encoder/z_mean"].pools, listed["encoder/z_mean"].values) == (("none",), 4)
    assert [path for path, info in listed.items() if info.chosen] == [conv, "encoder/z_mean"]


@pytest.mark.slow
def test_no_layer_is_chosen_if_only_a_model_file_is_given(small_vae_file: Path) -> None:
    assert not any(info.chosen for info in list_layers(small_vae_file, custom_objects=SAMPLING))


def test_a_layer_that_fails_and_the_layers_behind_it_are_named_with_the_reason(tmp_path: Path) -> None:
    vector = keras.Input((6,))
    x = keras.layers.Dense(3, name="first")(vector)
    x = keras.layers.Lambda(lambda t: tf.nn.relu(t), output_shape=(3,), name="second")(x)  # type: ignore[name-defined]  # noqa: F821
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")], name="inner")
    keras.Model(vector, inner(x)).save(tmp_path / "m.keras")
    listed = list_layers(tmp_path / "m.keras", trust=True)
    assert [layer.path for layer in listed] == ["first"]
    reason = "fails (NameError: name 'tf' is not defined)"
    behind = f"cannot be reached, because 'second' {reason}"
    assert [(layer.path, layer.class_name, layer.reason) for layer in listed.unlisted] == [
        ("second", "Lambda", reason),
        ("inner", "Sequential", behind),
        ("inner/head", "Dense", behind),
    ]
    section = {"uri": str(tmp_path / "m.keras"), "trust": True}
    for layer, message in (("second", reason), ("inner/head", behind)):
        with pytest.raises(ModelError, match=re.escape(message)):
            Extractor({**section, "layers": [layer]})
    assert Extractor({**section, "layers": ["first"]}).layers[0].values == 3


def test_a_model_of_which_no_value_can_be_extracted_is_refused_with_the_reason(tmp_path: Path) -> None:
    steps = keras.Input(batch_shape=(1, 5, 2))
    keras.Model(steps, keras.layers.LSTM(2, stateful=True, name="lstm")(steps)).save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="lstm: fails"):
        list_layers(tmp_path / "m.keras")
