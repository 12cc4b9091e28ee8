"""Whole models are loaded from any file that Keras saved; an unusable file is reported with what to do."""

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


@pytest.mark.slow
def test_an_h5_file_gives_the_same_values_as_a_keras_file(
    small_vae: Any, spec: Spec, volumes: Any, tmp_path: Path
) -> None:
    small_vae.save(tmp_path / "vae.h5")
    old = Extractor(spec("z_mean", "conv_2", uri=str(tmp_path / "vae.h5")))(volumes)
    new = Extractor(spec("z_mean", "conv_2"))(volumes)
    for name in new:
        np.testing.assert_array_equal(old[name], new[name])
    with pytest.raises(ModelError, match="layer 'z' needs Sampling"):
        Extractor(spec("z_mean", uri=str(tmp_path / "vae.h5"), custom_objects=[]))


def test_a_layer_saved_without_weights_is_an_error(tmp_path: Path, code: Code) -> None:
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
    late_class, _ = import_object(f"{source}:Late", config_key="custom_objects", storage_options={})
    model = late_class()
    model.build((None, 2, 2, 2, 1))
    model.save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Late"], "layers": ["dense"]}
    with pytest.raises(ModelError, match=r"weights: 2 have no values in the file and would be random"):
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
    sub_class, _ = import_object(f"{source}:Sub", config_key="custom_objects", storage_options={})
    model = sub_class()
    expected = np.asarray(model(volumes[..., None])).mean((1, 2, 3))
    model.save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:Sub"], "layers": ["conv"]}
    np.testing.assert_allclose(Extractor(section)(volumes)["conv"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_automatic_layer_names_do_not_depend_on_earlier_models(tmp_path: Path, code: Code) -> None:
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
def test_a_truncated_file_is_reported(tmp_path: Path, name: str) -> None:
    keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2)]).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
    with pytest.raises(ModelError, match=f"{name}: truncated or damaged"):
        Extractor({"uri": str(tmp_path / name), "layers": ["dense"]})


def test_a_text_file_is_reported_as_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.keras").write_text("hello")
    with pytest.raises(ModelError, match=r"m.keras: not a model file; expected a .keras archive"):
        Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["dense"]})


def test_an_untrusted_saved_model_is_refused_with_a_way_to_save_the_model(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2, 2, 2, 1)), keras.layers.Dense(2)])
    model.export(tmp_path / "exported", verbose=False)
    with pytest.raises(ModelError, match=r"only its exported endpoints.*save\('NAME.keras'\)"):
        Extractor({"uri": str(tmp_path / "exported"), "layers": ["dense"]})


@pytest.mark.slow
def test_importing_featray_model_does_not_import_tensorflow() -> None:
    import subprocess

    program = "import sys, featray.model; sys.exit(bool({'tensorflow', 'keras', 'h5py'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unreadable_file_of_a_newer_keras_is_reported_with_its_version(tmp_path: Path) -> None:
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
        r"a .keras archive that Keras 3.99.0 wrote .*missing 1 required positional "
        r"argument: 'units'\).* newer than this Keras: install Keras 3.99.0"
    )
    with pytest.raises(ModelError, match=expected):
        Extractor({"uri": str(path), "layers": ["dense"]})


def test_a_zip_file_and_an_h5_file_without_a_model_are_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("a.txt", "hello")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["data"] = [1, 2]
    for name, expected in (("m.keras", "without config.json"), ("m.h5", "neither a model nor weights")):
        with pytest.raises(ModelError, match=expected):
            Extractor({"uri": str(tmp_path / name), "layers": ["dense"]})


def test_the_name_of_a_model_file_does_not_matter(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="code")])
    for suffix, name in ((".keras", "other.h5"), (".keras", "none"), (".h5", "other.keras")):
        model.save(tmp_path / f"m{suffix}")
        (tmp_path / f"m{suffix}").rename(tmp_path / name)
        extractor = Extractor({"uri": str(tmp_path / name), "layers": ["code"]})
        x = np.ones((1, 3), np.float32)
        np.testing.assert_allclose(extractor(x)["code"], np.asarray(model(x)), rtol=1e-5)


def test_an_archive_without_weights_is_refused(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="code")]).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as whole, zipfile.ZipFile(tmp_path / "n.keras", "w") as part:
        for name in ("config.json", "metadata.json"):
            part.writestr(name, whole.read(name))
    with pytest.raises(ModelError, match="holds no weights"):
        Extractor({"uri": str(tmp_path / "n.keras"), "layers": ["code"]})
