"""Typical jobs, end to end, as a user runs them: a config goes in, tables come out.

The models are a dense autoencoder for vectors of 784 values, a model for inputs of any length, and the
encoder of a 3-D VAE. Most collections are folders of NumPy arrays.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

import featray
from featray.errors import ConfigError, UsageError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.storage.store import Store

MakeConfig = Callable[..., dict[str, Any]]
Rows = dict[tuple[str, int], np.ndarray]


@pytest.fixture
def arrays(tmp_path: Path) -> MakeConfig:
    """Return a function that makes a config for the arrays in `tmp_path/arrays`."""

    def make(model: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
        source = {"uri": str(tmp_path / "arrays"), "format": "npy", **sections.pop("source", {})}
        return {
            "source": source,
            "model": model,
            "output": {"uri": str(tmp_path / "out"), **sections.pop("output", {})},
            "run": {"engine": "inline", "decode": {"workers": 0}},
            **sections,
        }

    (tmp_path / "arrays").mkdir()
    return make


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a dense autoencoder 784→32→784, and the `model` section for its weights in an .h5 file."""
    source = tmp_path / "dense.py"
    source.write_text(
        textwrap.dedent("""
            import keras
            def build():
                sizes = {"code": 32, "decoded": 128, "reconstruction": 784}
                chain = [keras.layers.Dense(n, activation="relu", name=name) for name, n in sizes.items()]
                return keras.Sequential([keras.Input((784,)), *chain])
        """)
    )
    scope: dict[str, Any] = {}
    exec(source.read_text(), scope)
    model = scope["build"]()
    model.save_weights(tmp_path / "dense.weights.h5")
    return model, {"uri": str(tmp_path / "dense.weights.h5"), "builder": f"{source}:build"}


def make_samples(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def save_arrays(tmp_path: Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        np.save(tmp_path / "arrays" / f"{name}.npy", array)


def read_features(config: dict[str, Any], layer: str) -> Rows:
    """Return (scan_id, patch) → value in its own shape; check that each pair has one row."""
    table = Dataset(Store(config["output"]["uri"])).read(FEATURES).to_pylist()
    rows = [row for row in table if row["layer"] == layer]
    values = {(row["scan_id"], row["patch"]): np.reshape(row["feature"], row["shape"]) for row in rows}
    assert len(values) == len(rows)
    return values


def read_scans(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return scan_id → row of the scans table."""
    rows = Dataset(Store(config["output"]["uri"])).read(SCANS).to_pylist()
    return {row["scan_id"]: row for row in rows}


def compute_layer(model: Any, layer: str, x: np.ndarray) -> np.ndarray:
    """Return the output of a layer by Keras itself."""
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(layer).output)(x, training=False))


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_hidden_layer_of_a_dense_autoencoder_is_extracted_with_weights_from_h5(
    arrays: MakeConfig, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    digits = make_samples(5, 784)
    save_arrays(tmp_path, **{f"digit_{n}": digit for n, digit in enumerate(digits)})
    config = arrays({**section, "layers": ["code"]})
    summary = featray.extract(config)
    assert (summary.found, summary.ok, summary.exit_code) == (5, 5, 0)
    weights, bias = model.get_layer("code").get_weights()
    for n, digit in enumerate(digits):
        actual = read_features(config, "code")[f"digit_{n}.npy", 0]
        assert_near(actual, np.maximum(digit @ weights + bias, 0))  # the model got the values unchanged


def test_several_layers_are_extracted_in_one_pass_from_files_whose_rows_are_samples(
    arrays: MakeConfig, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    digits = make_samples(7, 784)
    save_arrays(tmp_path, first=digits[:4], second=digits[4:])
    config = arrays(
        {**section, "layers": ["code", "decoded", "reconstruction"], "batch_size": 3}, source={"rows": True}
    )
    assert featray.extract(config).ok == 2
    for layer in ("code", "decoded", "reconstruction"):
        expected, actual = compute_layer(model, layer, digits), read_features(config, layer)
        keys = [("first.npy", row) for row in range(4)] + [("second.npy", row) for row in range(3)]
        assert sorted(actual) == keys
        assert_near(np.stack([actual[key] for key in keys]), expected)
    assert {row["patches"] for row in read_scans(config).values()} == {3, 4}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_one_model_takes_inputs_of_two_lengths_with_either_engine(arrays: MakeConfig, tmp_path: Path) -> None:
    chain = [kl.Conv1D(4, 3, padding="same", name="conv"), kl.GlobalAveragePooling1D(name="pooled")]
    model = keras.Sequential([keras.Input((None, 2)), *chain, kl.Dense(3, name="code")])
    model.save(tmp_path / "m.keras")
    signals = {
        f"length_{length}_{n}": make_samples(length, 2, seed=n) for length in (50, 81) for n in range(3)
    }
    save_arrays(tmp_path, **signals)
    section = {
        "uri": str(tmp_path / "m.keras"),
        "layers": ["code", {"layer": "conv", "pool": "none", "as": "map"}],
    }
    codes_by_engine = {}
    for engine in ("inline", "ray"):
        config = arrays(
            section, output={"uri": str(tmp_path / engine)}, run={"engine": engine, "decode": {"workers": 1}}
        )
        assert featray.extract(config).ok == 6
        codes, maps = read_features(config, "code"), read_features(config, "map")
        for name, signal in signals.items():
            assert_near(codes[f"{name}.npy", 0], np.asarray(model(signal[None]))[0])
            assert_near(maps[f"{name}.npy", 0], np.asarray(chain[0](signal[None]))[0])
        codes_by_engine[engine] = codes
    for key, value in codes_by_engine["inline"].items():
        np.testing.assert_allclose(codes_by_engine["ray"][key], value, rtol=1e-5, atol=1e-7)


def build_3d_encoder() -> Any:
    from featray.synthetic.vae import Sampling

    volume = keras.Input((8, 32, 32, 1))
    x = volume
    for number, filters in enumerate((4, 8, 4), 1):
        x = kl.Conv3D(filters, 3, padding="same", activation="relu", name=f"conv_{number}")(x)
        x = kl.MaxPool3D(2, name=f"pool_{number}")(x)
    side = kl.Conv2D(3, 3, padding="same", name="side")(kl.Reshape((4, 4, 4))(x))
    both = kl.Concatenate()([kl.Flatten()(x), kl.Flatten()(side)])
    hidden = kl.Dense(16, activation="relu", name="dense")(both)
    mean, log_var = (kl.Dense(6, name=name)(hidden) for name in ("z_mean", "z_log_var"))
    return keras.Model(volume, [mean, log_var, Sampling(name="z")([mean, log_var])], name="encoder")


@pytest.mark.slow
def test_latent_dense_and_convolutional_layers_of_a_3d_encoder_are_extracted(
    config_of: Any, tmp_path: Path
) -> None:
    model = build_3d_encoder()
    model.save(tmp_path / "encoder.keras")
    names = ["z_mean", "z_log_var", "dense", "conv_2", "side"]
    config = config_of()
    config["model"] |= {"uri": str(tmp_path / "encoder.keras"), "layers": names}
    assert featray.extract(config).ok == 12
    volume = decode_scan(config, "nifti/phantom_000.nii.gz")
    for name in names:
        expected = compute_layer(model, name, volume[..., None])
        expected = expected.mean(axis=tuple(range(1, expected.ndim - 1)))  # feature maps are averaged
        assert_near(read_features(config, name)["nifti/phantom_000.nii.gz", 0], expected[0])


def decode_scan(config: dict[str, Any], scan_id: str) -> np.ndarray:
    """Return the model input of a scan: (1, z, y, x)."""
    from featray.config import load
    from featray.stages.decode import Decoder
    from featray.stages.list import list_scans

    checked = load(config)
    (scan,) = (scan for scan in list_scans(checked.source).scans if scan.scan_id == scan_id)
    return Decoder.from_config(checked)(scan).tensor


@pytest.mark.slow
def test_z_differs_from_call_to_call_and_z_mean_does_not(tmp_path: Path) -> None:
    build_3d_encoder().save(tmp_path / "encoder.keras")
    section = {"uri": str(tmp_path / "encoder.keras"), "custom_objects": ["featray.synthetic.vae:Sampling"]}
    with pytest.raises(UsageError, match="take the layer that feeds it, such as z_mean"):
        featray.Extractor({**section, "layers": ["z"]})
    extractor = featray.Extractor({**section, "layers": ["z", "z_mean"], "allow_stochastic": True})
    volume = make_samples(1, 8, 32, 32)
    first, second = extractor(volume), extractor(volume)
    assert np.abs(first["z"] - second["z"]).max() > 1e-2
    assert_near(first["z_mean"], second["z_mean"])


@pytest.mark.slow
def test_with_allow_stochastic_z_is_the_same_for_the_same_scan_and_recipe(
    config_of: Any, tmp_path: Path
) -> None:
    runs = []
    for batch_size, workers in ((1, 0), (4, 2)):
        config = config_of()
        config["model"] |= {
            "layers": ["encoder/z", "encoder/z_mean"], "allow_stochastic": True, "batch_size": batch_size
        }  # fmt: skip
        config["run"]["decode"] = {"workers": workers}
        config["output"]["uri"] = str(tmp_path / f"out-{batch_size}")
        assert featray.extract(config).ok == 12
        runs.append(read_features(config, "encoder.z"))
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        np.testing.assert_allclose(runs[1][key], value, rtol=1e-4, atol=1e-5)
    noise = [runs[0][key] - value for key, value in read_features(config, "encoder.z_mean").items()]
    assert min(np.abs(noise[0] - other).max() for other in noise[1:]) > 1e-3  # each scan has its own noise


def test_a_sample_of_another_shape_fails_and_the_message_names_both_shapes(
    arrays: MakeConfig, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    save_arrays(tmp_path, good=make_samples(784), short=make_samples(700))
    (tmp_path / "arrays" / "text.npy").write_text("not an array")
    config = arrays({**dense[1], "layers": ["code"]}, limits={"max_failed_fraction": 1})
    summary = featray.extract(config)
    assert (summary.ok, summary.failed) == (1, 2)
    rows = read_scans(config)
    assert rows["short.npy"]["reason"] == "model"
    assert "(n, 784)" in rows["short.npy"]["message"]
    assert "700" in rows["short.npy"]["message"]
    assert rows["text.npy"]["reason"] == "unreadable"
    assert rows["good.npy"]["shape"] == [784]
    assert (rows["good.npy"]["orientation"], rows["good.npy"]["hu_min"]) == (None, None)


def test_the_summary_counts_units_that_are_0_for_every_scan(
    arrays: MakeConfig, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    weights, bias = model.get_layer("code").get_weights()
    bias[[3, 7, 31]] = -1e6  # so that their ReLU always gives 0
    weights[:, 0], bias[0] = np.abs(weights[:, 0]), 1
    model.get_layer("code").set_weights([np.abs(weights), bias])
    model.save_weights(section["uri"])
    save_arrays(tmp_path, **{f"digit_{n}": make_samples(784, seed=n) for n in range(4)})
    summary = featray.extract(arrays({**section, "layers": ["code", "reconstruction"]}))
    assert summary.dead_units["code"] == 3
    assert "3 units of layer code were 0 for every scan" in summary.text()


def test_arrays_are_resized_and_windowed_if_the_config_asks_for_it(
    arrays: MakeConfig, tmp_path: Path
) -> None:
    keras.Sequential([keras.Input((2, 2, 2, 1)), kl.Flatten(name="flat")]).save(tmp_path / "m.keras")
    save_arrays(tmp_path, cube=np.full((4, 4, 4), 500.0))
    section = {"uri": str(tmp_path / "m.keras"), "layers": ["flat"]}
    config = arrays(section, preprocess={"size": [2, 2, 2], "window": [0, 1000], "scale": [0, 1]})
    featray.extract(config)
    assert read_features(config, "flat")["cube.npy", 0].tolist() == [0.5] * 8


def test_the_config_gives_the_input_shape_of_a_model_that_does_not_define_it(
    arrays: MakeConfig, tmp_path: Path
) -> None:
    code = tmp_path / "own.py"
    code.write_text(
        textwrap.dedent("""
            import keras
            class Own(keras.Model):
                def __init__(self):
                    super().__init__()
                    self.conv = keras.layers.Conv2D(3, 3, padding="same")
                def call(self, x):
                    return self.conv(x)
            def build():
                return Own()
        """)
    )
    scope: dict[str, Any] = {}
    exec(code.read_text(), scope)
    model, images = scope["build"](), make_samples(4, 8, 8, 2)
    expected = np.asarray(model(images)).mean(axis=(1, 2))
    model.save_weights(tmp_path / "own.weights.h5")
    save_arrays(tmp_path, images=images)
    section = {"uri": str(tmp_path / "own.weights.h5"), "builder": f"{code}:build", "layers": ["conv"]}
    with pytest.raises(UsageError, match=r"model\.input_shape"):
        featray.extract(arrays(section, source={"rows": True}))
    config = arrays({**section, "input_shape": [8, 8, 2]}, source={"rows": True})
    assert featray.extract(config).ok == 1
    actual = read_features(config, "conv")
    assert_near(np.stack([actual["images.npy", row] for row in range(4)]), expected)


def test_for_a_folder_of_arrays_without_format_npy_the_message_names_the_key_to_set(
    tmp_path: Path, arrays: MakeConfig
) -> None:
    save_arrays(tmp_path, a=make_samples(3))
    config = arrays({"uri": "m.keras", "layers": ["a"]}, source={"format": "auto"})
    with pytest.raises(ConfigError, match=r"set source\.format: npy"):
        featray.extract(config)


def test_a_manifest_may_list_arrays(
    arrays: MakeConfig, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    save_arrays(tmp_path, a=make_samples(784), b=make_samples(784, seed=1))
    manifest = tmp_path / "arrays" / "list.csv"
    manifest.write_text("uri,version,who\na.npy,,x\nb.npy,3,y\n")
    config = arrays({**dense[1], "layers": ["code"]}, source={"uri": str(manifest)})
    assert featray.extract(config).ok == 2
    assert {name: row["who"] for name, row in read_scans(config).items()} == {"a.npy": "x", "b.npy": "y"}


def test_a_large_file_of_rows_becomes_several_parquet_files_of_bounded_size(
    arrays: MakeConfig,
    dense: tuple[Any, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featray.stages.write.MAX_BYTES", 40_000)
    save_arrays(tmp_path, **{f"rows_{n}": make_samples(50, 784, seed=n) for n in range(6)})
    config = arrays({**dense[1], "layers": ["code"], "batch_size": 64}, source={"rows": True})
    assert featray.extract(config).ok == 6
    assert len(read_features(config, "code")) == 300
    assert len(Dataset(Store(config["output"]["uri"])).open_snapshot().files(FEATURES)) > 1
