"""The truncated model returns the activations of the full model, and later layers are not computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import ConfigError, InputShapeError, ModelError
from featray.model import Extractor, batch_buffers
from featray.model.loading.custom_code import import_object

Spec = Callable[..., dict[str, Any]]
FOUR = (
    "z_mean",
    "encoder/z_log_var",
    "pre_latent",
    {"layer": "encoder/conv_2", "pool": "avg", "as": "conv2"},
)


def _compute_activation(encoder: Any, name: str, volumes: np.ndarray) -> np.ndarray:
    """Return the activation of a layer as Keras documents it: with a new model that shares the layers."""
    part = keras.Model(encoder.input, encoder.get_layer(name).output)
    return np.asarray(part(volumes[..., None], training=False))


def _count_convolutions(extractor: Extractor) -> int:
    return sum("Conv3D" in operation.type for operation in extractor._all.call.graph.get_operations())


@pytest.mark.slow
def test_four_layers_in_one_pass_equal_the_activations_of_the_full_model(
    small_vae: Any, spec: Spec, volumes: Any
) -> None:
    got = Extractor(spec(*FOUR))(volumes)

    encoder = small_vae.get_layer("encoder")
    assert list(got) == ["z_mean", "encoder.z_log_var", "pre_latent", "conv2"]
    for name, layer in (
        ("z_mean", "z_mean"),
        ("encoder.z_log_var", "z_log_var"),
        ("pre_latent", "pre_latent"),
    ):
        np.testing.assert_allclose(
            got[name], _compute_activation(encoder, layer, volumes), rtol=1e-5, atol=1e-6
        )
    conv = _compute_activation(encoder, "conv_2", volumes)
    np.testing.assert_allclose(got["conv2"], conv.mean(axis=(1, 2, 3)), rtol=1e-5, atol=1e-6)
    assert all(value.dtype == np.float32 and len(value) == 5 for value in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 4, 64], ids=["aligned", "not aligned", "aligned to 64 bytes only"])
@pytest.mark.parametrize("writeable", [True, False], ids=["writeable", "read-only"])
def test_the_memory_of_a_batch_does_not_matter_and_is_not_changed(
    spec: Spec, volumes: np.ndarray, offset: int, writeable: bool
) -> None:
    memory = np.zeros(volumes.nbytes + 2 * batch_buffers.ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % batch_buffers.ALIGNMENT + offset
    placed = memory[first : first + volumes.nbytes].view(np.float32).reshape(volumes.shape)
    placed[:] = volumes
    placed.flags.writeable = writeable
    assert batch_buffers.is_aligned(placed) == (offset == 0)
    extractor = Extractor(spec(*FOUR))
    expected, got = extractor(volumes.copy()), extractor(placed)
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values)
    np.testing.assert_array_equal(placed, volumes)


def test_features_that_are_the_input_do_not_share_its_memory(tmp_path: Path, volumes: Any) -> None:
    same = keras.layers.Identity(name="same")
    keras.Sequential([keras.Input((8, 16, 16, 1)), same]).save(tmp_path / "m.keras")
    rows, buffer = batch_buffers.concatenate_rows([volumes[:2], volumes[2:]])
    layer = {"layer": "same", "pool": "none"}
    got = Extractor({"uri": str(tmp_path / "m.keras"), "layers": [layer], "batch_size": 8})(rows)
    buffer[:] = 0
    np.testing.assert_array_equal(got["same"][..., 0], volumes)


def test_pooling_is_over_the_spatial_axes_and_none_keeps_the_feature_map(
    small_vae: Any, spec: Spec, volumes: Any
) -> None:
    layers = [{"layer": "conv_1", "pool": pool, "as": pool} for pool in ("none", "avg", "max", "avgmax")]
    extractor = Extractor(spec(*layers))
    got = extractor(volumes)

    whole = _compute_activation(small_vae.get_layer("encoder"), "conv_1", volumes)
    average, largest = whole.mean((1, 2, 3)), whole.max((1, 2, 3))
    np.testing.assert_allclose(got["none"], whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["max"], largest, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["avgmax"], np.hstack([average, largest]), rtol=1e-5, atol=1e-6)
    assert [(layer.shape, layer.values) for layer in extractor.layers] == [
        ((8, 16, 16, 2), 4096),
        ((2,), 2),
        ((2,), 2),
        ((4,), 4),
    ]


def test_by_default_feature_maps_are_averaged_and_vectors_are_kept(spec: Spec) -> None:
    layers = Extractor(spec("conv_1", "z_mean")).layers
    assert [(layer.pool, layer.shape) for layer in layers] == [("avg", (2,)), ("none", (4,))]


@pytest.mark.slow
def test_the_traced_graph_ends_at_the_deepest_selected_layer(spec: Spec) -> None:
    assert _count_convolutions(Extractor(spec("conv_1"))) == 1
    assert _count_convolutions(Extractor(spec("z_mean", "conv_1"))) == 2


@pytest.mark.slow
def test_decoder_layers_can_be_extracted_if_stochastic_layers_are_allowed(spec: Spec, volumes: Any) -> None:
    extractor = Extractor(spec("decoder/deconv_1", allow_stochastic=True))
    assert _count_convolutions(extractor) == 3
    assert extractor(volumes)["decoder.deconv_1"].shape == (5, 3)


@pytest.mark.slow
def test_values_do_not_depend_on_the_batch_size_and_the_place_in_the_batch(spec: Spec, volumes: Any) -> None:
    one = Extractor(spec(*FOUR, batch_size=1))(volumes)
    four = Extractor(spec(*FOUR, batch_size=4))(volumes[::-1])
    for name, value in one.items():
        np.testing.assert_allclose(value, four[name][::-1], rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_empty_arrays_of_the_right_width(spec: Spec, volumes: Any) -> None:
    got = Extractor(spec("z_mean", {"layer": "conv_1", "pool": "none"}))(volumes[:0])
    assert {name: value.shape for name, value in got.items()} == {
        "z_mean": (0, 4),
        "conv_1": (0, 8, 16, 16, 2),
    }


def test_a_batch_may_include_the_channel_axis(spec: Spec, volumes: Any) -> None:
    extractor = Extractor(spec("z_mean"))
    np.testing.assert_array_equal(extractor(volumes)["z_mean"], extractor(volumes[..., None])["z_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [np.zeros((2, 8, 16, 8), "f4"), np.zeros((2, 8, 16, 16), "i2")])
def test_a_batch_of_another_shape_or_of_integers_is_refused(spec: Spec, batch: Any) -> None:
    with pytest.raises(InputShapeError, match=r"expected float32 \(n, 8, 16, 16, 1\)"):
        Extractor(spec("z_mean"))(batch)


@pytest.mark.slow
def test_z_is_refused_with_the_advice_to_take_z_mean(spec: Spec) -> None:
    with pytest.raises(ModelError, match=r"'encoder/z' returns different values .* such as z_mean"):
        Extractor(spec("z_mean", "z"))


@pytest.mark.slow
def test_z_can_be_extracted_if_stochastic_layers_are_allowed(spec: Spec, volumes: Any) -> None:
    extractor = Extractor(spec("z_mean", "z", allow_stochastic=True))
    first, second = extractor(volumes), extractor(volumes)
    np.testing.assert_array_equal(first["z_mean"], second["z_mean"])
    assert not np.allclose(first["z"], second["z"])


def test_noise_with_a_fixed_seed_is_stochastic_because_it_depends_on_the_place_in_the_batch(
    tmp_path: Path, code: Callable[[str, str], Path]
) -> None:
    source = code(
        "noisy.py",
        """
        import keras
        class Noisy(keras.layers.Layer):
            def call(self, x):
                return x + keras.random.normal(keras.ops.shape(x), seed=5)
        """,
    )
    noisy, _ = import_object(f"{source}:Noisy", config_key="custom_objects", storage_options={})
    keras.Sequential([keras.Input((2, 2, 2, 1)), noisy(name="noisy")]).save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="'noisy' returns different values"):
        Extractor(
            {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Noisy"], "layers": ["noisy"]}
        )


@pytest.mark.slow
def test_all_problems_are_listed_together(spec: Spec) -> None:
    layers = (
        "encoder/z_maen",
        "encoder/cov*",
        {"layer": "z_mean", "as": "a"},
        {"layer": "conv_1", "as": "a"},
        "z",
    )
    with pytest.raises(ModelError) as caught:
        Extractor(spec(*layers), input_zyx=(8, 16, 32))
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    assert "takes (8, 16, 16, 1), preprocess.size gives (8, 16, 32, 1)" in problems
    assert "'encoder/z_maen' is not in the model; did you mean encoder/z_mean" in problems
    assert "'encoder/cov*' is not in the model; did you mean encoder/conv_" in problems
    assert "two outputs are named 'a'" in problems
    assert "'encoder/z' returns different values" in problems


@pytest.mark.slow
def test_a_glob_matches_layers_of_one_level_in_the_order_of_the_model(spec: Spec) -> None:
    layers = Extractor(spec("encoder/conv_*", "encoder/p*_[12]")).layers
    assert [layer.name for layer in layers] == [
        "encoder.conv_1",
        "encoder.conv_2",
        "encoder.pool_1",
        "encoder.pool_2",
    ]


@pytest.mark.slow
def test_one_output_name_for_a_glob_that_matches_several_layers_is_refused(spec: Spec) -> None:
    with pytest.raises(ModelError, match=r"'convs' names one output, but 'encoder/conv_\*' matches 2 layers"):
        Extractor(spec({"layer": "encoder/conv_*", "as": "convs"}))


@pytest.mark.slow
def test_a_layer_with_several_outputs_is_refused_with_the_name_of_each_output(
    small_vae: Any, spec: Spec, volumes: Any
) -> None:
    with pytest.raises(ModelError, match="name one of: encoder:0, encoder:1, encoder:2"):
        Extractor(spec("encoder"))
    z_mean = Extractor(spec("encoder:0"))(volumes)["encoder:0"]
    np.testing.assert_allclose(
        z_mean, _compute_activation(small_vae.get_layer("encoder"), "z_mean", volumes), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_pooling_a_layer_without_spatial_axes_is_refused(spec: Spec) -> None:
    with pytest.raises(ModelError, match=r"'encoder/z_mean' needs a feature map"):
        Extractor(spec({"layer": "z_mean", "pool": "avg"}))


def test_a_layer_without_a_declared_channel_axis_is_not_pooled_in_a_channels_first_model(
    tmp_path: Path,
) -> None:
    layers = [
        keras.Input((4, 4, 4, 1)),
        keras.layers.Reshape((1, 4, 4, 4), name="turn"),
        keras.layers.MaxPool3D(2, data_format="channels_first", name="pool"),
        keras.layers.ReLU(name="relu"),
    ]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match=r"'relu' does not say which axis holds the channels"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["relu"]})


@pytest.mark.slow
def test_with_a_submodel_relative_paths_and_full_paths_are_accepted(spec: Spec, volumes: Any) -> None:
    whole = Extractor(spec("encoder/z_mean"))(volumes)["encoder.z_mean"]
    part = Extractor(spec("z_mean", "encoder/pre_latent", submodel="encoder"))
    assert [layer.path for layer in part.layers] == ["z_mean", "pre_latent"]
    np.testing.assert_array_equal(part(volumes)["z_mean"], whole)


def test_an_unknown_submodel_is_refused_with_the_names_of_the_submodels(spec: Spec) -> None:
    with pytest.raises(
        ModelError, match=r"'vae' has no layer or attribute 'enc'; it has: .*encoder, decoder"
    ):
        Extractor(spec("z_mean", submodel="enc"))


def test_features_include_the_layers_of_the_outer_model_unless_submodel_is_set(
    tmp_path: Path, volumes: Any
) -> None:
    inner = keras.Sequential(
        [keras.Input((8, 16, 16, 1)), keras.layers.Conv3D(2, 3, name="conv")], name="inner"
    )
    volume = keras.Input((8, 16, 16, 1))
    keras.Model(volume, inner(keras.layers.Rescaling(10.0)(volume))).save(tmp_path / "m.keras")
    outer = {"uri": str(tmp_path / "m.keras"), "layers": ["inner/conv"]}

    values = Extractor(outer)(volumes)["inner.conv"]
    expected = np.asarray(inner(10 * volumes[..., None])).mean((1, 2, 3))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    inner_only = Extractor({**outer, "submodel": "inner"})(volumes)["inner.conv"]
    np.testing.assert_allclose(
        inner_only, np.asarray(inner(volumes[..., None])).mean((1, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_a_model_that_accepts_any_size_is_traced_with_the_requested_size_if_there_is_one(
    tmp_path: Path,
) -> None:
    model = keras.Sequential([keras.Input((None, None, None, 1)), keras.layers.Conv3D(2, 3, name="conv")])
    model.save(tmp_path / "m.keras")
    spec = {"uri": str(tmp_path / "m.keras"), "layers": [{"layer": "conv", "pool": "none"}]}
    assert Extractor(spec, input_zyx=(5, 6, 7)).layers[0].shape == (3, 4, 5, 2)
    assert Extractor(spec).layers[0].shape == (None, None, None, 2)


def test_a_wrong_number_of_channels_is_reported_together_with_other_problems(tmp_path: Path) -> None:
    layers = [keras.Input((None, None, None, 3)), keras.layers.Conv3D(2, 3, name="conv")]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    with pytest.raises(ModelError) as caught:
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["cnov"]}, input_zyx=(5, 6, 7))
    assert "takes (any, any, any, 3), preprocess.size gives (5, 6, 7, 1)" in caught.value.problems[0]
    assert "'cnov' is not in the model; did you mean conv?" in caught.value.problems[1]


def test_a_model_that_fails_on_this_machine_is_refused_with_the_reason(tmp_path: Path, code: Any) -> None:
    source = code(
        "fails.py",
        """
        import keras, tensorflow as tf
        class Fails(keras.layers.Layer):
            def call(self, x):
                with tf.control_dependencies([tf.debugging.assert_greater(x, 9.0, message="no kernel here")]):
                    return tf.identity(x)
        """,
    )
    fails, _ = import_object(f"{source}:Fails", config_key="custom_objects", storage_options={})
    keras.Sequential([keras.Input((2, 2, 2, 1)), fails(name="fails")]).save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Fails"], "layers": ["fails"]}
    with pytest.raises(ModelError, match=r"fails on inputs of shape \(2, 2, 2, 1\) .*no kernel here"):
        Extractor(section)


@pytest.fixture
def conditional(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a model with the inputs volume and age, and its `model` section."""
    volume, age = keras.Input((2, 2, 2, 1), name="volume"), keras.Input((3,), name="age")
    both = keras.layers.Concatenate(name="both")([keras.layers.Flatten(name="flat")(volume), age])
    model = keras.Model({"age": age, "volume": volume}, keras.layers.Dense(2, name="code")(both))
    model.save(tmp_path / "m.keras")
    return model, {"uri": str(tmp_path / "m.keras"), "layers": ["code"]}


def test_a_model_with_several_inputs_is_refused_with_their_names(
    conditional: tuple[Any, dict[str, Any]],
) -> None:
    with pytest.raises(ModelError, match=r"2 inputs .*age \(3\), volume \(2, 2, 2, 1\).*model.constants"):
        Extractor(conditional[1])


def test_constants_can_fill_the_inputs_other_than_the_volume(conditional: tuple[Any, dict[str, Any]]) -> None:
    model, section = conditional
    x = np.random.default_rng(0).random((5, 2, 2, 2), np.float32)
    values = []
    for age in ([1.0, 2.0, 3.0], 0):
        extractor = Extractor({**section, "constants": {"age": age}})
        rows = np.tile(np.float32(age) * np.ones(3, np.float32), (5, 1))
        expected = np.asarray(model({"age": rows, "volume": x[..., None]}))
        values.append((extractor(x)["code"], extractor.recipe_part()))
        np.testing.assert_allclose(values[-1][0], expected, rtol=1e-5, atol=1e-6)
    assert values[0][1] != values[1][1]


@pytest.mark.parametrize(
    ("constants", "expected"),
    [
        ({"aeg": 1}, "no input 'aeg'; it has: age, volume"),
        ({"age": [1, 2]}, r"age takes \(3\), the value has \(2\)"),
        ({"age": "old"}, "age: not numbers of type float32"),
        ({"age": 0, "volume": 0}, "takes 0 inputs that no constant fills"),
    ],
)
def test_a_constant_that_does_not_fit_is_refused(
    conditional: tuple[Any, dict[str, Any]], constants: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        Extractor({**conditional[1], "constants": constants})


def test_a_model_of_images_is_refused_for_volumes_with_both_shapes(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((28, 28, 3)), keras.layers.Flatten(name="flatten")]).save(
        tmp_path / "m.keras"
    )
    with pytest.raises(ModelError, match=r"takes \(28, 28, 3\), preprocess.size gives \(8, 16, 16, 1\)"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["flatten"]}, input_zyx=(8, 16, 16))


def test_volumes_of_any_size_are_not_mistaken_for_images(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((28, 28, 3)), keras.layers.Flatten(name="flatten")]).save(
        tmp_path / "m.keras"
    )
    with pytest.raises(ModelError, match=r"takes \(28, 28, 3\), .* gives \(any, any, any, 1\)"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["flatten"]}, input_zyx=(None, None, None))


@pytest.mark.slow
def test_a_channels_first_model_takes_volumes_without_a_channel_axis(tmp_path: Path) -> None:
    conv = keras.layers.Conv3D(2, 3, data_format="channels_first", name="conv")
    keras.Sequential([keras.Input((1, 4, 5, 6)), conv]).save(tmp_path / "m.keras")
    extractor = Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["conv"]}, input_zyx=(4, 5, 6))
    x = np.random.default_rng(0).random((3, 4, 5, 6), np.float32)
    expected = np.asarray(conv(x[:, None])).mean((2, 3, 4))
    np.testing.assert_allclose(extractor(x)["conv"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_recipe_depends_on_weights_layers_and_pooling_but_not_on_order_or_batch_size(
    small_vae_file: Path, tmp_path: Path, spec: Spec
) -> None:
    from featray.synthetic import vae

    vae.build_vae((8, 16, 16), (2, 3), 6, 4, seed=4).save(tmp_path / "other.keras")
    recipe = Extractor(spec("z_mean", "conv_1")).recipe_part()
    assert recipe == Extractor(spec("conv_1", "z_mean", batch_size=1)).recipe_part()
    assert recipe != Extractor(spec("z_mean", {"layer": "conv_1", "pool": "max"})).recipe_part()
    assert recipe != Extractor(spec("z_mean", "conv_1", uri=str(tmp_path / "other.keras"))).recipe_part()


def test_an_unknown_key_in_the_model_section_is_a_config_error(spec: Spec) -> None:
    with pytest.raises(ConfigError, match="batchsize"):
        Extractor(spec("z_mean", batchsize=3))


@pytest.mark.slow
def test_the_large_vae_is_truncated_to_its_five_convolutions_and_equals_the_encoder(tmp_path: Path) -> None:
    from featray.synthetic import vae

    model = vae.build_vae()
    model.save(tmp_path / "vae.keras")
    layers = ["z_mean", "z_log_var", "pre_latent", "encoder/conv_4"]
    section = {
        "uri": str(tmp_path / "vae.keras"),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "layers": layers,
    }
    extractor = Extractor(section, input_zyx=(32, 256, 256))

    assert _count_convolutions(extractor) == 5
    volume = np.random.default_rng(0).random((1, 32, 256, 256), np.float32)
    got, encoder = extractor(volume), model.get_layer("encoder")
    for name in layers[:3]:
        np.testing.assert_allclose(
            got[name], _compute_activation(encoder, name, volume), rtol=1e-5, atol=1e-6
        )
    conv = _compute_activation(encoder, "conv_4", volume).mean((1, 2, 3))
    np.testing.assert_allclose(got["encoder.conv_4"], conv, rtol=1e-5, atol=1e-6)


@pytest.fixture
def half(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a float32 model, and the `model` section of a mixed_float16 model with the same weights."""
    models = []
    for policy in ("mixed_float16", "float32"):
        chain = [
            keras.layers.Conv3D(3, 3, dtype=policy, name="conv"),
            keras.layers.MaxPool3D(2, dtype=policy, name="pool"),
            keras.layers.Flatten(dtype=policy),
            keras.layers.Dense(2, dtype=policy, name="code"),
        ]
        models.append(keras.Sequential([keras.Input((6, 6, 6, 1)), *chain]))
    models[1].set_weights(models[0].get_weights())
    models[0].save(tmp_path / "m.keras")
    return models[1], {"uri": str(tmp_path / "m.keras"), "layers": ["code"]}


def test_a_half_precision_model_can_compute_in_float32(half: tuple[Any, dict[str, Any]]) -> None:
    model, section = half
    x = np.random.default_rng(0).random((2, 6, 6, 6), np.float32)
    extractor = Extractor({**section, "compute": "float32"})
    np.testing.assert_allclose(extractor(x)["code"], np.asarray(model(x[..., None])), rtol=1e-5, atol=1e-6)
    assert extractor.recipe_part()["compute_dtype"] == ["float32"]


def test_a_model_can_compute_in_bfloat16_which_is_part_of_the_recipe(
    half: tuple[Any, dict[str, Any]],
) -> None:
    model, section = half
    x = np.random.default_rng(0).random((2, 6, 6, 6), np.float32)
    extractor = Extractor({**section, "compute": "bfloat16"})
    expected = np.asarray(model(x[..., None]))
    got = extractor(x)["code"]
    assert got.dtype == np.float32
    assert 0 < np.abs(got - expected).max() < 0.05
    assert extractor.recipe_part()["compute_dtype"] == ["bfloat16"]


def test_a_compiled_model_has_the_same_values_and_another_recipe(half: tuple[Any, dict[str, Any]]) -> None:
    _, section = half
    x = np.random.default_rng(0).random((2, 6, 6, 6), np.float32)
    plain = Extractor({**section, "compute": "float32"})
    compiled = Extractor({**section, "compute": "float32", "jit_compile": True})
    np.testing.assert_allclose(compiled(x)["code"], plain(x)["code"], rtol=1e-5, atol=1e-6)
    assert compiled.recipe_part() == {**plain.recipe_part(), "jit_compile": True}


def test_a_data_type_that_the_machine_cannot_compute_in_is_refused_with_the_solution(
    half: tuple[Any, dict[str, Any]],
) -> None:
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this test is about machines without a GPU; a GPU can pool in float16")
    with pytest.raises(
        ModelError, match=r"fails on .*the model computes in float16: try model.compute: float32"
    ):
        Extractor(half[1])


def test_a_constant_may_be_written_as_integer_or_float_and_must_be_finite(tmp_path: Path) -> None:
    x, age = keras.Input((3,), name="x"), keras.Input((2,), name="age")
    both = keras.layers.Concatenate()([x, age])
    keras.Model([x, age], keras.layers.Dense(2, name="code")(both)).save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "layers": ["code"]}
    parts = [
        Extractor({**section, "constants": {"age": value}}).recipe_part() for value in ([1, 2], [1.0, 2.0])
    ]
    assert parts[0] == parts[1]
    with pytest.raises(ModelError, match="constants: age: NaN or infinity"):
        Extractor({**section, "constants": {"age": [float("nan"), 1]}})


def test_a_layer_inside_a_wrapper_is_refused_with_the_advice_to_take_the_wrapper(tmp_path: Path) -> None:
    wrapped = keras.layers.TimeDistributed(keras.layers.Dense(2, name="in"), name="td")
    keras.Sequential([keras.Input((4, 3)), wrapped]).save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="take 'td'"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["td/in"]})
