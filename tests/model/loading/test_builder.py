"""Weights are loaded into the model that a builder makes, or the difference between the two is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import ModelError
from featray.model import Extractor
from featray.model.loading.custom_code import import_object

Code = Callable[[str, str], Path]

BUILDER = """
    import keras
    def build():
        return keras.Sequential([keras.layers.Conv3D({filters}, 3, name="conv"), keras.layers.Flatten()])
"""
IMAGES = """
    import keras
    class Images(keras.Model):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.conv, self.flat = keras.layers.Conv2D(2, 3), keras.layers.Flatten()
        def call(self, x):
            return self.flat(self.conv(x))
    class Volumes(Images):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.conv = keras.layers.Conv3D(2, 3)
    class WithoutBuildConfig(Images):
        def get_build_config(self):
            return None
        def build_from_config(self, config):
            self(keras.ops.zeros((1, 8, 6, 3)))
"""


def test_weights_are_loaded_into_the_model_of_a_builder(tmp_path: Path, code: Code, volumes: Any) -> None:
    source = code("build.py", BUILDER.format(filters=2))
    layers = [keras.layers.Conv3D(2, 3, name="conv"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 16, 16, 1)), *layers])
    model.save_weights(tmp_path / "m.weights.h5")
    section = {"uri": str(tmp_path / "m.weights.h5"), "layers": ["conv"], "builder": f"{source}:build"}
    extractor = Extractor(section, input_zyx=(8, 16, 16))
    expected = np.asarray(layers[0](volumes[..., None])).mean((1, 2, 3))
    np.testing.assert_allclose(extractor(volumes)["conv"], expected, rtol=1e-5, atol=1e-6)
    assert set(extractor.files) == {"model", "builder build.py:build"}

    other = code("other.py", BUILDER.format(filters=3))
    with pytest.raises(ModelError, match=r"the weights do not fit the model that build\(\) returns"):
        Extractor({**section, "builder": f"{other}:build"}, input_zyx=(8, 16, 16))
    with pytest.raises(ModelError, match="holds weights only"):
        Extractor({**section, "builder": None}, input_zyx=(8, 16, 16))


@pytest.fixture
def make_two_heads(code: Code) -> Callable[..., Any]:
    """Return a function that makes a model with two equal dense layers after a convolution.

    It returns the model, and the reference to a builder for the same model.
    """

    def make(heads: str = '("z_mean", "z_log_var")', filters: int = 2) -> tuple[Any, str]:
        source = code(
            f"two_{len(heads)}_{filters}_{heads.find('mean')}.py",
            f"""
            import keras
            def build():
                volume = keras.Input((3, 3, 3, 1))
                conv = keras.layers.Conv3D({filters}, 3, name="conv")
                x = keras.layers.Flatten()(conv(volume))
                return keras.Model(volume, [keras.layers.Dense(2, name=name)(x) for name in {heads}])
            """,
        )
        build, _ = import_object(f"{source}:build", config_key="builder", storage_options={})
        return build(), f"{source}:build"

    return make


def _catch_problem(path: Path, builder: str) -> str:
    """Return the only problem that is reported when the builder's model gets the weights of `path`."""
    with pytest.raises(ModelError) as caught:
        Extractor({"uri": str(path), "layers": ["conv"], "builder": builder})
    (problem,) = caught.value.problems
    assert str(path.parent) not in problem
    return problem


def test_weights_missing_in_the_file_are_reported(tmp_path: Path, make_two_heads: Any) -> None:
    make_two_heads('("z_mean",)')[0].save_weights(tmp_path / "m.weights.h5")
    problem = _catch_problem(tmp_path / "m.weights.h5", make_two_heads()[1])
    assert (
        "do not fit the model that build() returns (2 not in the file, e.g. layers/dense_1/vars/0)" in problem
    )


def test_weights_missing_in_the_model_are_reported(tmp_path: Path, make_two_heads: Any) -> None:
    make_two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _catch_problem(tmp_path / "m.weights.h5", make_two_heads('("z_mean",)')[1])
    assert "(2 in the file but not in the model, e.g. layers/dense_1/vars/0)" in problem


def test_weights_of_another_shape_are_reported_with_both_shapes(tmp_path: Path, make_two_heads: Any) -> None:
    make_two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _catch_problem(tmp_path / "m.weights.h5", make_two_heads(filters=3)[1])
    assert (
        "4 of another shape, e.g. layers/conv3d/vars/0 (file [3, 3, 3, 1, 2], model [3, 3, 3, 1, 3])"
        in problem
    )


def test_a_builder_can_use_the_weights_of_a_whole_model_file(tmp_path: Path, make_two_heads: Any) -> None:
    model, builder = make_two_heads()
    x = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        spec = {"uri": str(tmp_path / name), "layers": ["z_log_var"], "builder": builder}
        expected = np.asarray(model(x[..., None])[1])
        np.testing.assert_allclose(Extractor(spec)(x)["z_log_var"], expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "m.keras")
    assert "1 problem" not in _catch_problem(tmp_path / "m.keras", make_two_heads('("z_mean",)')[1])


def test_the_suffix_of_a_weights_file_does_not_matter(tmp_path: Path, make_two_heads: Any) -> None:
    model, builder = make_two_heads()
    model.save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "m.weights.h5").rename(tmp_path / "final.hdf5")
    assert Extractor({"uri": str(tmp_path / "final.hdf5"), "layers": ["conv"], "builder": builder}).layers


def test_layers_in_another_order_get_the_weights_of_an_h5_file_by_name(
    tmp_path: Path, make_two_heads: Any
) -> None:
    model, _ = make_two_heads()
    swapped = make_two_heads('("z_log_var", "z_mean")')[1]
    x = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
    model.save(tmp_path / "m.h5")
    values = Extractor({"uri": str(tmp_path / "m.h5"), "layers": ["z_mean"], "builder": swapped})(x)["z_mean"]
    np.testing.assert_allclose(values, np.asarray(model(x[..., None])[0]), rtol=1e-5, atol=1e-6)


def test_layers_in_another_order_do_not_get_swapped_weights(tmp_path: Path, make_two_heads: Any) -> None:
    make_two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _catch_problem(tmp_path / "m.weights.h5", make_two_heads('("z_log_var", "z_mean")')[1])
    assert "2 of another layer, e.g. layers/dense/vars (file 'z_mean', model 'z_log_var')" in problem


def test_the_error_of_a_builder_is_reported(tmp_path: Path, make_two_heads: Any, code: Code) -> None:
    make_two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    source = code("bad.py", "def build():\n    raise RuntimeError('no such size')")
    assert "builder: build failed (RuntimeError: no such size)" in _catch_problem(
        tmp_path / "m.weights.h5", f"{source}:build"
    )


def test_a_weights_only_file_without_a_builder_is_refused(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(
        ModelError, match=r"holds weights only.*model.builder .*save the whole model as .keras"
    ):
        Extractor({"uri": str(tmp_path / "m.weights.h5"), "layers": ["dense"]})


@pytest.mark.parametrize(
    ("name", "size", "shape"), [("Images", (8, 6, 3), (8, 6, 3)), ("Volumes", (5, 6, 3), (5, 6, 3, 1))]
)
def test_a_built_model_without_declared_input_gets_the_shape_that_it_accepts(
    tmp_path: Path, code: Code, name: str, size: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    source = code("images.py", IMAGES)
    model_class, _ = import_object(f"{source}:{name}", config_key="builder", storage_options={})
    model, x = model_class(), np.random.default_rng(0).random((2, *shape), np.float32)
    expected = np.asarray(model(x))
    model.save_weights(tmp_path / "m.weights.h5")
    section = {"uri": str(tmp_path / "m.weights.h5"), "builder": f"{source}:{name}", "layers": ["flat"]}
    extractor = Extractor(section, input_zyx=size)
    assert extractor.input_shape == shape
    np.testing.assert_allclose(extractor(x)["flat"], expected, rtol=1e-5, atol=1e-6)


def test_a_built_model_without_build_config_gets_the_shape_that_it_accepts(
    tmp_path: Path, code: Code
) -> None:
    source = code("images.py", IMAGES)
    model_class, _ = import_object(
        f"{source}:WithoutBuildConfig", config_key="custom_objects", storage_options={}
    )
    model, x = model_class(), np.random.default_rng(0).random((2, 8, 6, 3), np.float32)
    expected = np.asarray(model(x))
    model.save_weights(tmp_path / "m.weights.h5")
    section = {
        "uri": str(tmp_path / "m.weights.h5"),
        "builder": f"{source}:WithoutBuildConfig",
        "layers": ["flat"],
    }
    np.testing.assert_allclose(
        Extractor(section, input_zyx=(8, 6, 3))(x)["flat"], expected, rtol=1e-5, atol=1e-6
    )


def test_a_builder_that_returns_no_model_is_reported(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "b.py").write_text("def build():\n    pass\n")
    with pytest.raises(ModelError, match="it returned NoneType, which is not a Keras model"):
        Extractor(
            {
                "uri": str(tmp_path / "m.weights.h5"),
                "builder": f"{tmp_path / 'b.py'}:build",
                "layers": ["dense"],
            }
        )
