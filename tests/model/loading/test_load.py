"""Models load from what Keras saved; what is missing or not allowed is named, with the way out."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from featray.errors import ModelError
from featray.model import Extractor
from featray.model.loading.custom_code import import_object

Spec = Callable[..., dict[str, Any]]
Code = Callable[[str, str], Path]

DOUBLE = """
    import keras
    @keras.saving.register_keras_serializable("seed")
    class Double(keras.layers.Layer):
        def call(self, x):
            return {factor} * x
"""
BUILDER = """
    import keras
    def build():
        return keras.Sequential([keras.layers.Conv3D({filters}, 3, name="conv"), keras.layers.Flatten()])
"""


@pytest.fixture
def double_file(tmp_path: Path) -> Path:
    """Return a model with a layer registered as `seed>Double`, whose class is then forgotten."""

    @keras.saving.register_keras_serializable("seed")
    class Double(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return 2 * x

    path = tmp_path / "double.keras"
    keras.Sequential([keras.Input((2, 2, 2, 1)), Double(name="twice")]).save(path)
    del keras.saving.get_custom_objects()["seed>Double"]
    return path


def _twice(path: Path, *objects: str) -> float:
    extractor = Extractor({"uri": str(path), "layers": ["twice"], "custom_objects": list(objects)})
    return float(extractor(np.ones((1, 2, 2, 2), np.float32))["twice"][0, 0])


def test_a_missing_class_is_named_with_its_layer_and_the_way_out(spec: Spec) -> None:
    with pytest.raises(
        ModelError, match=r"layer 'z' needs Sampling.* model.custom_objects, e.g. 'file.py:Sampling'"
    ):
        Extractor(spec("z_mean", custom_objects=[]))


def test_a_class_that_happens_to_be_registered_still_has_to_be_asked_for(spec: Spec) -> None:
    import featray.synthetic.vae

    assert keras.saving.get_registered_object("featray>Sampling") is featray.synthetic.vae.Sampling
    with pytest.raises(ModelError, match="needs Sampling"):
        Extractor(spec("z_mean", custom_objects=[], trust=True))


def test_a_class_from_a_file_answers_for_its_registered_name(double_file: Path, code: Code) -> None:
    assert _twice(double_file, f"{code('a.py', DOUBLE.format(factor=2))}:Double") == 2


def test_the_file_that_is_named_counts_and_not_the_one_loaded_before(double_file: Path, code: Code) -> None:
    two, three = (code(f"f{factor}.py", DOUBLE.format(factor=factor)) for factor in (2, 3))
    assert [_twice(double_file, f"{path}:Double") for path in (two, three, two)] == [2, 3, 2]


def test_custom_code_is_part_of_the_sha256_but_its_name_is_not(double_file: Path, code: Code) -> None:
    def sha256(name: str, factor: int) -> str:
        path = code(name, DOUBLE.format(factor=factor))
        section = {"uri": str(double_file), "layers": ["twice"], "custom_objects": [f"{path}:Double"]}
        return Extractor(section).sha256

    assert sha256("a.py", 2) == sha256("b.py", 2)
    assert sha256("a.py", 2) != sha256("a.py", 3)


def test_every_fault_in_custom_objects_is_listed(double_file: Path, code: Code) -> None:
    path = code("a.py", "import nothing_of_this_name")
    with pytest.raises(ModelError) as caught:
        _twice(
            double_file,
            "Double",
            f"{path}:Double",
            "no_such.module:Double",
            "keras.layers:Nothing",
            "gone.py:A",
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "'Double' is neither file.py:NAME nor package.module:NAME" in text
    assert (
        "a.py:Double cannot be imported (ModuleNotFoundError: No module named 'nothing_of_this_name')" in text
    )
    assert "no_such" in text
    assert "has no Nothing" in text
    assert "gone.py: no such file" in text
    assert str(path.parent) not in text


def test_code_inside_the_file_runs_only_when_trusted(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Lambda(lambda x: x + 1, name="plus")]).save(
        path
    )
    section = {"uri": str(path), "layers": ["plus"]}
    with pytest.raises(
        ModelError, match=r"layer 'plus' holds Python code .*model.trust: true .*custom_objects"
    ):
        Extractor(section)
    got = Extractor({**section, "trust": True})(np.zeros((1, 2, 2, 2), np.float32))
    assert got["plus"].tolist() == [[1.0]]


def test_a_custom_activation_comes_through_custom_objects(tmp_path: Path, code: Code) -> None:
    def halve(x: Any) -> Any:
        return x / 2

    path = tmp_path / "m.keras"
    layer = keras.layers.Activation(halve, name="act")
    keras.Sequential([keras.Input((2, 2, 2, 1)), layer, keras.layers.Activation("relu")]).save(path)
    source = code("act.py", "def halve(x):\n    return x / 2")
    with pytest.raises(ModelError, match="layer 'act' needs halve"):
        Extractor({"uri": str(path), "layers": ["act"]})
    section = {"uri": str(path), "layers": ["act"], "custom_objects": [f"{source}:halve"]}
    assert Extractor(section)(np.ones((1, 2, 2, 2), np.float32))["act"].tolist() == [[0.5]]


def test_a_whole_h5_gives_the_same_values_as_the_archive(
    small_vae: Any, spec: Spec, volumes: Any, tmp_path: Path
) -> None:
    small_vae.save(tmp_path / "vae.h5")
    old = Extractor(spec("z_mean", "conv_2", uri=str(tmp_path / "vae.h5")))(volumes)
    new = Extractor(spec("z_mean", "conv_2"))(volumes)
    for name in new:
        np.testing.assert_array_equal(old[name], new[name])
    with pytest.raises(ModelError, match="layer 'z' needs Sampling"):
        Extractor(spec("z_mean", uri=str(tmp_path / "vae.h5"), custom_objects=[]))


def test_a_model_compiled_with_its_own_loss_needs_no_code_for_the_loss(tmp_path: Path) -> None:
    def own_loss(y: Any, p: Any) -> Any:
        return keras.ops.mean(y - p)

    model = keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2, name="dense")])
    model.compile(loss=own_loss)
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        assert Extractor({"uri": str(tmp_path / name), "layers": ["dense"]}).layers[0].values == 2


def test_weights_go_into_the_model_that_a_builder_makes(tmp_path: Path, code: Code, volumes: Any) -> None:
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
    with pytest.raises(ModelError, match="the weights do not fit the model that build builds"):
        Extractor({**section, "builder": f"{other}:build"}, input_zyx=(8, 16, 16))
    with pytest.raises(ModelError, match="holds weights only"):
        Extractor({**section, "builder": None}, input_zyx=(8, 16, 16))


def test_layers_saved_without_weights_are_refused_and_not_filled_at_random(
    tmp_path: Path, code: Code
) -> None:
    source = code(
        "late.py",
        """
        import keras
        class Late(keras.Model):
            def __init__(self, **keys):
                super().__init__(**keys)
                self.dense = keras.layers.Dense(2)
            def call(self, x):
                return self.dense(x)
            def build(self, shape):
                self.built = True
        """,
    )
    late, _ = import_object(f"{source}:Late", config_key="custom_objects", storage_options={})
    model = late()
    model.build((None, 2, 2, 2, 1))
    model.save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Late"], "layers": ["dense"]}
    with pytest.raises(ModelError, match=r"2 came with no values from the file and would be random"):
        Extractor(section, input_zyx=(2, 2, 2))


def test_a_subclassed_model_loads_with_its_class(tmp_path: Path, code: Code, volumes: Any) -> None:
    source = code(
        "sub.py",
        """
        import keras
        class Sub(keras.Model):
            def __init__(self, **keys):
                super().__init__(**keys)
                self.conv = keras.layers.Conv3D(2, 3)
            def call(self, x):
                return self.conv(x)
        """,
    )
    sub, _ = import_object(f"{source}:Sub", config_key="custom_objects", storage_options={})
    model = sub()
    expected = np.asarray(model(volumes[..., None])).mean((1, 2, 3))
    model.save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Sub"], "layers": ["conv"]}
    np.testing.assert_allclose(Extractor(section)(volumes)["conv"], expected, rtol=1e-5, atol=1e-6)


def test_automatic_names_do_not_depend_on_what_was_made_before(tmp_path: Path, code: Code) -> None:
    source = code(
        "build.py", "import keras\ndef build():\n    return keras.Sequential([keras.layers.Dense(1)])"
    )
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(1)]).save_weights(
        tmp_path / "m.weights.h5"
    )
    section = {"uri": str(tmp_path / "m.weights.h5"), "layers": ["dense"], "builder": f"{source}:build"}
    before = keras.layers.Dense(1).name
    for _ in range(2):
        assert Extractor(section, input_zyx=(2, 2, 2)).layers[0].path == "dense"
    assert keras.layers.Dense(1).name not in (before, "dense")


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
def test_a_truncated_file_says_so(tmp_path: Path, name: str) -> None:
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2)]).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
    with pytest.raises(ModelError, match=f"{name}: truncated or damaged"):
        Extractor({"uri": str(tmp_path / name), "layers": ["dense"]})


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.keras").write_text("hello")
    with pytest.raises(ModelError, match=r"m.keras: not a model file; expected a .keras archive"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["dense"]})


def test_a_saved_model_folder_is_refused_saying_what_to_save(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2)])
    model.export(tmp_path / "exported", verbose=False)
    with pytest.raises(ModelError, match=r"only its exported endpoints.*save\('NAME.keras'\)"):
        Extractor({"uri": str(tmp_path / "exported"), "layers": ["dense"]})


def test_importing_featray_model_does_not_import_tensorflow() -> None:
    import subprocess

    program = "import sys, featray.model; sys.exit(bool({'tensorflow', 'keras', 'h5py'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def two_heads(code: Code) -> Callable[..., Any]:
    """Return a maker of a model with two equal heads after a convolution, and of its builder."""

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


def _refused(path: Path, builder: str) -> str:
    with pytest.raises(ModelError) as caught:
        Extractor({"uri": str(path), "layers": ["conv"], "builder": builder})
    (problem,) = caught.value.problems
    assert str(path.parent) not in problem
    return problem


def test_weights_that_the_file_lacks_are_named(tmp_path: Path, two_heads: Any) -> None:
    two_heads('("z_mean",)')[0].save_weights(tmp_path / "m.weights.h5")
    problem = _refused(tmp_path / "m.weights.h5", two_heads()[1])
    assert "do not fit the model that build builds (2 not in the file, e.g. layers/dense_1/vars/0)" in problem


def test_weights_that_the_model_does_not_ask_for_are_an_error(tmp_path: Path, two_heads: Any) -> None:
    two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _refused(tmp_path / "m.weights.h5", two_heads('("z_mean",)')[1])
    assert "(2 in the file but not in the model, e.g. layers/dense_1/vars/0)" in problem


def test_weights_of_another_shape_are_shown_with_both(tmp_path: Path, two_heads: Any) -> None:
    two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _refused(tmp_path / "m.weights.h5", two_heads(filters=3)[1])
    assert (
        "4 of another shape, e.g. layers/conv3d/vars/0 (file [3, 3, 3, 1, 2], model [3, 3, 3, 1, 3])"
        in problem
    )


def test_a_builder_takes_the_weights_of_a_whole_model_too(tmp_path: Path, two_heads: Any) -> None:
    model, builder = two_heads()
    x = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        spec = {"uri": str(tmp_path / name), "layers": ["z_log_var"], "builder": builder}
        expected = np.asarray(model(x[..., None])[1])
        np.testing.assert_allclose(Extractor(spec)(x)["z_log_var"], expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "m.keras")
    assert "1 problem" not in _refused(tmp_path / "m.keras", two_heads('("z_mean",)')[1])


def test_the_suffix_of_a_weights_file_does_not_matter(tmp_path: Path, two_heads: Any) -> None:
    model, builder = two_heads()
    model.save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "m.weights.h5").rename(tmp_path / "final.hdf5")
    assert Extractor({"uri": str(tmp_path / "final.hdf5"), "layers": ["conv"], "builder": builder}).layers


def test_heads_in_another_order_get_their_own_old_weights_by_name(tmp_path: Path, two_heads: Any) -> None:
    model, _ = two_heads()
    swapped = two_heads('("z_log_var", "z_mean")')[1]
    x = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
    model.save(tmp_path / "m.h5")
    got = Extractor({"uri": str(tmp_path / "m.h5"), "layers": ["z_mean"], "builder": swapped})(x)["z_mean"]
    np.testing.assert_allclose(got, np.asarray(model(x[..., None])[0]), rtol=1e-5, atol=1e-6)


def test_heads_in_another_order_do_not_get_the_weights_of_each_other(tmp_path: Path, two_heads: Any) -> None:
    two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    problem = _refused(tmp_path / "m.weights.h5", two_heads('("z_log_var", "z_mean")')[1])
    assert "2 of another layer, e.g. layers/dense/vars (file 'z_mean', model 'z_log_var')" in problem


def test_a_builder_that_fails_says_why(tmp_path: Path, two_heads: Any, code: Code) -> None:
    two_heads()[0].save_weights(tmp_path / "m.weights.h5")
    source = code("bad.py", "def build():\n    raise RuntimeError('no such size')")
    assert "builder: build failed (RuntimeError: no such size)" in _refused(
        tmp_path / "m.weights.h5", f"{source}:build"
    )


def test_a_file_of_a_newer_keras_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2, name="dense")]).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["metadata.json"] = members["metadata.json"].replace(keras.__version__.encode(), b"3.99.0")
    members["config.json"] = members["config.json"].replace(b'"units"', b'"units_of_the_future"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    expected = (
        r"a .keras archive that Keras 3.99.0 wrote .* newer than this Keras: "
        rf"save it again with Keras {keras.__version__}"
    )
    with pytest.raises(ModelError, match=expected):
        Extractor({"uri": str(path), "layers": ["dense"]})


def test_a_zip_and_an_h5_that_are_no_models_say_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("a.txt", "hello")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["data"] = [1, 2]
    for name, expected in (("m.keras", "without config.json"), ("m.h5", "neither a model nor weights")):
        with pytest.raises(ModelError, match=expected):
            Extractor({"uri": str(tmp_path / name), "layers": ["dense"]})


def test_weights_alone_are_refused_asking_for_the_builder(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(
        ModelError, match=r"holds weights only.*model.builder .*save the whole model as .keras"
    ):
        Extractor({"uri": str(tmp_path / "m.weights.h5"), "layers": ["dense"]})


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
    class Unsaid(Images):
        def get_build_config(self):
            return None
        def build_from_config(self, config):
            self(keras.ops.zeros((1, 8, 6, 3)))
"""


@pytest.mark.parametrize(
    ("name", "size", "shape"), [("Images", (8, 6, 3), (8, 6, 3)), ("Volumes", (5, 6, 3), (5, 6, 3, 1))]
)
def test_a_model_without_declared_input_takes_volumes_or_images_as_it_can(
    tmp_path: Path, code: Code, name: str, size: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    source = code("images.py", IMAGES)
    own, _ = import_object(f"{source}:{name}", config_key="builder", storage_options={})
    model, x = own(), np.random.default_rng(0).random((2, *shape), np.float32)
    expected = np.asarray(model(x))
    model.save_weights(tmp_path / "m.weights.h5")
    section = {"uri": str(tmp_path / "m.weights.h5"), "builder": f"{source}:{name}", "layers": ["flat"]}
    extractor = Extractor(section, input_zyx=size)
    assert extractor.input_shape == shape
    np.testing.assert_allclose(extractor(x)["flat"], expected, rtol=1e-5, atol=1e-6)


def test_a_loaded_model_that_does_not_say_its_input_is_tried_too(tmp_path: Path, code: Code) -> None:
    source = code("images.py", IMAGES)
    own, _ = import_object(f"{source}:Unsaid", config_key="custom_objects", storage_options={})
    model, x = own(), np.random.default_rng(0).random((2, 8, 6, 3), np.float32)
    expected = np.asarray(model(x))
    model.save_weights(tmp_path / "m.weights.h5")
    section = {"uri": str(tmp_path / "m.weights.h5"), "builder": f"{source}:Unsaid", "layers": ["flat"]}
    np.testing.assert_allclose(
        Extractor(section, input_zyx=(8, 6, 3))(x)["flat"], expected, rtol=1e-5, atol=1e-6
    )


def test_a_model_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="code")])
    for suffix, name in ((".keras", "other.h5"), (".keras", "none"), (".h5", "other.keras")):
        model.save(tmp_path / f"m{suffix}")
        (tmp_path / f"m{suffix}").rename(tmp_path / name)
        extractor = Extractor({"uri": str(tmp_path / name), "layers": ["code"]})
        x = np.ones((1, 3), np.float32)
        np.testing.assert_allclose(extractor(x)["code"], np.asarray(model(x)), rtol=1e-5)


def test_an_archive_without_its_weights_is_refused(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="code")]).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as whole, zipfile.ZipFile(tmp_path / "n.keras", "w") as part:
        for name in ("config.json", "metadata.json"):
            part.writestr(name, whole.read(name))
    with pytest.raises(ModelError, match="holds no weights"):
        Extractor({"uri": str(tmp_path / "n.keras"), "layers": ["code"]})


def test_a_builder_that_returns_no_model_is_told(tmp_path: Path) -> None:
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
