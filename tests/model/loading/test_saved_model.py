"""The layers of a SavedModel are the outputs of its endpoint; a request for an inner layer is an error."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import fsspec
import keras
import numpy as np
import pytest
import tensorflow as tf

from featray.errors import ModelError
from featray.model import Extractor, list_layers
from featray.synthetic.vae import Sampling

SHAPE = (4, 6, 6, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which the test uses as its cache."""
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def encoder() -> Any:
    kl, volume = keras.layers, keras.Input(SHAPE, name="volume")
    map_ = kl.Conv3D(2, 3, padding="same", name="conv")(volume)
    flat = kl.Flatten()(map_)
    mean, spread = (kl.Dense(3, name=name)(flat) for name in ("z_mean", "z_log_var"))
    return keras.Model(volume, {"z_mean": mean, "map": map_, "z": Sampling()([mean, spread])}, name="encoder")


@pytest.fixture(scope="module")
def exported(encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder to which `model.export` of Keras 3 wrote the encoder."""
    path = tmp_path_factory.mktemp("exported") / "encoder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder.export(path, verbose=False)
    return path


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(8).random((5, *SHAPE[:3]), np.float32)


def _make_section(path: Path | str, *layers: Any, **keys: Any) -> dict[str, Any]:
    return {"uri": str(path), "trust": True, "layers": list(layers), **keys}


@pytest.mark.slow
def test_the_outputs_of_a_keras_3_export_are_extracted_by_name(
    encoder: Any, exported: Path, x: np.ndarray
) -> None:
    extractor = Extractor(_make_section(exported, "z_mean", "map"), input_zyx=SHAPE[:3])
    values, expected = extractor(x), encoder(x[..., None])
    assert extractor.input_shape == SHAPE
    np.testing.assert_allclose(values["z_mean"], expected["z_mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        values["map"], np.asarray(expected["map"]).mean((1, 2, 3)), rtol=1e-5, atol=1e-6
    )


def test_the_outputs_are_listed_and_sampling_is_found(exported: Path) -> None:
    listed = {info.path: info for info in list_layers(exported, trust=True)}
    assert {path: info.shape for path, info in listed.items()} == {
        "map": (4, 6, 6, 2),
        "z": (3,),
        "z_mean": (3,),
    }
    assert [path for path, info in listed.items() if "stochastic" in info.flags] == ["z"]


@pytest.mark.slow
def test_the_noise_of_an_export_is_refused_or_follows_the_seeds(exported: Path, x: np.ndarray) -> None:
    with pytest.raises(ModelError, match="'z' returns different values"):
        Extractor(_make_section(exported, "z"))
    one, other = (
        Extractor(_make_section(exported, "z", "z_mean", allow_stochastic=True, batch_size=size))
        for size in (2, 3)
    )
    seeds = list("abcde")
    np.testing.assert_allclose(
        one(x, seeds)["z"], other(x[::-1], seeds[::-1])["z"][::-1], rtol=1e-5, atol=1e-6
    )
    assert np.abs(one(x, seeds)["z"] - one(x, list("fghij"))["z"]).max() > 1e-3


def test_an_inner_layer_is_refused_with_the_outputs_and_a_way_to_save_the_model(exported: Path) -> None:
    with pytest.raises(ModelError, match=r"'conv' is not in the model; it has: .*z_mean") as caught:
        Extractor(_make_section(exported, "conv"))
    assert "only its exported endpoints" in str(caught.value)
    assert "model.save('NAME.keras')" in str(caught.value)


def test_a_saved_model_is_not_run_unless_the_config_trusts_it(exported: Path) -> None:
    with pytest.raises(ModelError, match=r"model.save\('NAME.keras'\).* model.trust: true"):
        Extractor(_make_section(exported, "z_mean", trust=False))


def test_a_wrong_input_size_is_reported_as_for_other_models(exported: Path) -> None:
    with pytest.raises(ModelError, match=r"takes \(4, 6, 6, 1\), preprocess.size gives \(4, 6, 7, 1\)"):
        Extractor(_make_section(exported, "z_mean"), input_zyx=(4, 6, 7))


def test_compute_is_refused_because_it_has_no_effect(exported: Path) -> None:
    with pytest.raises(ModelError, match=r"compute: has no effect on a SavedModel"):
        Extractor(_make_section(exported, "z_mean", compute="bfloat16"))


@pytest.mark.slow
def test_one_of_several_endpoints_is_chosen_by_submodel(tmp_path: Path, x: np.ndarray) -> None:
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Conv3D(2, 3, name="conv")])
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, *SHAPE), tf.float32, name="volume")]
    for name, factor in (("once", 1.0), ("twice", 2.0)):
        archive.add_endpoint(name, lambda volume, by=factor: {"code": by * model(volume)}, signature)
    archive.write_out(tmp_path / "m", verbose=False)
    once, twice = (
        Extractor(_make_section(tmp_path / "m", "code", submodel=name))(x)["code"]
        for name in ("once", "twice")
    )
    np.testing.assert_allclose(once, np.asarray(model(x[..., None])).mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    with pytest.raises(ModelError, match=r"no endpoint 'thrice'; m has: .*once, twice"):
        Extractor(_make_section(tmp_path / "m", "code", submodel="thrice"))


@pytest.mark.slow
def test_a_folder_that_keras_2_saved_is_loaded(tmp_path: Path, x: np.ndarray) -> None:
    k2 = pytest.importorskip("tf_keras", reason="tf_keras (Keras 2) is not installed: pip install tf_keras")
    volume = k2.Input(SHAPE)
    code = k2.layers.Dense(3, name="z_mean")(k2.layers.Flatten()(volume))
    noise = k2.layers.Lambda(lambda m: m + tf.random.normal(tf.shape(m)), name="z")
    model = k2.Model(volume, [code, noise(code)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "m", save_format="tf")
    values = Extractor(_make_section(tmp_path / "m", "z_mean"), input_zyx=SHAPE[:3])(x)["z_mean"]
    np.testing.assert_allclose(values, model(x[..., None])[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"z: draws random numbers .*RandomStandardNormal"):
        Extractor(_make_section(tmp_path / "m", "z", allow_stochastic=True))


def test_constants_fill_the_other_inputs_of_an_endpoint(tmp_path: Path, x: np.ndarray) -> None:
    volume, age = keras.Input(SHAPE, name="volume"), keras.Input((1,), name="age")
    both = keras.layers.Concatenate()([keras.layers.Flatten()(volume), age])
    model = keras.Model({"volume": volume, "age": age}, keras.layers.Dense(2)(both))
    model.export(tmp_path / "m", verbose=False)
    with pytest.raises(ModelError, match=r"takes 2 inputs that no constant fills"):
        Extractor(_make_section(tmp_path / "m", "output_0"))
    values = Extractor(_make_section(tmp_path / "m", "output_0", constants={"age": [7]}))(x)["output_0"]
    expected = model({"volume": x[..., None], "age": np.full((5, 1), 7, np.float32)})
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_sha256_depends_on_every_file_of_the_folder(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another name"
    shutil.copytree(exported, copy)
    first, same = (Extractor(_make_section(path, "z_mean")).sha256 for path in (exported, copy))
    (copy / "assets").mkdir(exist_ok=True)
    (copy / "assets" / "words.txt").write_text("one")
    assert first == same != Extractor(_make_section(copy, "z_mean")).sha256


@pytest.mark.slow
def test_a_remote_folder_is_downloaded_completely_and_once(
    exported: Path, cache: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(exported), "/models/encoder", recursive=True)
    section = _make_section("memory://models/encoder", "z_mean")
    first = Extractor(section)
    monkeypatch.setattr(type(store), "get_file", lambda *_: pytest.fail("downloaded again"))
    again = Extractor(section)
    np.testing.assert_array_equal(again(x)["z_mean"], first(x)["z_mean"])
    assert first.sha256 == Extractor(_make_section(exported, "z_mean")).sha256
    assert len(list(cache.rglob("saved_model.pb"))) == 1
    store.rm("/models", recursive=True)


def test_a_folder_without_variables_is_reported(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "variables")
    with pytest.raises(ModelError, match="m: cannot be loaded as SavedModel"):
        Extractor(_make_section(tmp_path / "m", "z_mean"))


def test_a_folder_that_is_not_a_saved_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder, not a model; .* SavedModel contains saved_model.pb"):
        Extractor(_make_section(tmp_path, "z_mean"))


def test_an_endpoint_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    module = tf.Module()
    module.run = tf.function(lambda volume: {"out": volume}, [tf.TensorSpec((2, *SHAPE), tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.run)
    with pytest.raises(ModelError, match="input volume takes only batches of 2; export the model with None"):
        Extractor(_make_section(tmp_path / "m", "out"))
