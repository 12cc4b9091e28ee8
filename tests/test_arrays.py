"""What the sources of the task ask for, done as a user would: a config in, tables out.

A dense autoencoder on 784-vectors, a model for inputs of any length, and a 3-D VAE encoder; and what
holds for collections of arrays.
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

ConfigFor = Callable[..., dict[str, Any]]
Rows = dict[tuple[str, int], np.ndarray]


@pytest.fixture
def arrays(tmp_path: Path) -> ConfigFor:
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


def samples(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def save(tmp_path: Path, **named: np.ndarray) -> None:
    for name, array in named.items():
        np.save(tmp_path / "arrays" / f"{name}.npy", array)


def features(config: dict[str, Any], layer: str) -> Rows:
    """Return {(scan_id, patch): value in its own shape}; no row is there twice."""
    table = Dataset(Store(config["output"]["uri"])).read(FEATURES).to_pylist()
    rows = [row for row in table if row["layer"] == layer]
    found = {(row["scan_id"], row["patch"]): np.reshape(row["feature"], row["shape"]) for row in rows}
    assert len(found) == len(rows)
    return found


def ledger(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = Dataset(Store(config["output"]["uri"])).read(SCANS).to_pylist()
    return {row["scan_id"]: row for row in rows}


def inner(model: Any, layer: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(layer).output)(x, training=False))


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_one_hidden_layer_of_a_dense_autoencoder_from_weights_in_h5(
    arrays: ConfigFor, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    digits = samples(5, 784)
    save(tmp_path, **{f"digit_{n}": digit for n, digit in enumerate(digits)})
    config = arrays({**section, "layers": ["code"]})
    summary = featray.extract(config)
    assert (summary.found, summary.ok, summary.exit_code) == (5, 5, 0)
    weights, bias = model.get_layer("code").get_weights()
    for n, digit in enumerate(digits):
        found = features(config, "code")[f"digit_{n}.npy", 0]
        assert_near(found, np.maximum(digit @ weights + bias, 0))  # values went in as they were


def test_b_several_layers_in_one_pass_decoder_layers_too_with_samples_along_rows(
    arrays: ConfigFor, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    digits = samples(7, 784)
    save(tmp_path, first=digits[:4], second=digits[4:])
    config = arrays(
        {**section, "layers": ["code", "decoded", "reconstruction"], "batch_size": 3}, source={"rows": True}
    )
    assert featray.extract(config).ok == 2
    for layer in ("code", "decoded", "reconstruction"):
        expected, found = inner(model, layer, digits), features(config, layer)
        places = [("first.npy", row) for row in range(4)] + [("second.npy", row) for row in range(3)]
        assert sorted(found) == places
        assert_near(np.stack([found[place] for place in places]), expected)
    assert {row["patches"] for row in ledger(config).values()} == {3, 4}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_c_inputs_of_two_lengths_go_through_one_model_with_either_engine(
    arrays: ConfigFor, tmp_path: Path
) -> None:
    chain = [kl.Conv1D(4, 3, padding="same", name="conv"), kl.GlobalAveragePooling1D(name="pooled")]
    model = keras.Sequential([keras.Input((None, 2)), *chain, kl.Dense(3, name="code")])
    model.save(tmp_path / "m.keras")
    signals = {f"length_{length}_{n}": samples(length, 2, seed=n) for length in (50, 81) for n in range(3)}
    save(tmp_path, **signals)
    section = {
        "uri": str(tmp_path / "m.keras"),
        "layers": ["code", {"layer": "conv", "pool": "none", "as": "map"}],
    }
    of_engine = {}
    for engine in ("inline", "ray"):
        config = arrays(
            section, output={"uri": str(tmp_path / engine)}, run={"engine": engine, "decode": {"workers": 1}}
        )
        assert featray.extract(config).ok == 6
        codes, maps = features(config, "code"), features(config, "map")
        for name, signal in signals.items():
            assert_near(codes[f"{name}.npy", 0], np.asarray(model(signal[None]))[0])
            assert_near(maps[f"{name}.npy", 0], np.asarray(chain[0](signal[None]))[0])
        of_engine[engine] = codes
    for place, value in of_engine["inline"].items():
        np.testing.assert_allclose(of_engine["ray"][place], value, rtol=1e-5, atol=1e-7)


def encoder_of_the_3d_vae() -> Any:
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


def test_d_mean_log_variance_dense_and_any_convolution_of_the_3d_vae_encoder(
    config_of: Any, tmp_path: Path
) -> None:
    model = encoder_of_the_3d_vae()
    model.save(tmp_path / "encoder.keras")
    names = ["z_mean", "z_log_var", "dense", "conv_2", "side"]
    config = config_of()
    config["model"] |= {"uri": str(tmp_path / "encoder.keras"), "layers": names}
    assert featray.extract(config).ok == 12
    volume = tensor_of(config, "nifti/phantom_000.nii.gz")
    for name in names:
        expected = inner(model, name, volume[..., None])
        expected = expected.mean(axis=tuple(range(1, expected.ndim - 1)))  # feature maps are averaged
        assert_near(features(config, name)["nifti/phantom_000.nii.gz", 0], expected[0])


def tensor_of(config: dict[str, Any], scan_id: str) -> np.ndarray:
    """Return what the network saw: (1, z, y, x)."""
    from featray.config import load
    from featray.stages.decode import Decoder
    from featray.stages.list import list_scans

    checked = load(config)
    (scan,) = (scan for scan in list_scans(checked.source).scans if scan.scan_id == scan_id)
    return Decoder.from_config(checked)(scan).tensor


def test_e_z_differs_from_call_to_call_and_z_mean_does_not(tmp_path: Path) -> None:
    encoder_of_the_3d_vae().save(tmp_path / "encoder.keras")
    section = {"uri": str(tmp_path / "encoder.keras"), "custom_objects": ["featray.synthetic.vae:Sampling"]}
    with pytest.raises(UsageError, match="take the layer that feeds it, such as z_mean"):
        featray.Extractor({**section, "layers": ["z"]})
    extractor = featray.Extractor({**section, "layers": ["z", "z_mean"], "allow_stochastic": True})
    volume = samples(1, 8, 32, 32)
    first, second = extractor(volume), extractor(volume)
    assert np.abs(first["z"] - second["z"]).max() > 1e-2
    assert_near(first["z_mean"], second["z_mean"])


def test_e_a_run_that_insists_on_z_draws_the_same_for_the_same_scan_and_recipe(
    config_of: Any, tmp_path: Path
) -> None:
    found = []
    for batch_size, workers in ((1, 0), (4, 2)):
        config = config_of()
        config["model"] |= {
            "layers": ["encoder/z", "encoder/z_mean"], "allow_stochastic": True, "batch_size": batch_size
        }  # fmt: skip
        config["run"]["decode"] = {"workers": workers}
        config["output"]["uri"] = str(tmp_path / f"out-{batch_size}")
        assert featray.extract(config).ok == 12
        found.append(features(config, "encoder.z"))
    assert found[0].keys() == found[1].keys()
    for place, value in found[0].items():
        np.testing.assert_allclose(found[1][place], value, rtol=1e-4, atol=1e-5)
    noise = [found[0][place] - value for place, value in features(config, "encoder.z_mean").items()]
    assert min(np.abs(noise[0] - other).max() for other in noise[1:]) > 1e-3  # each scan has its own draw


def test_a_sample_of_another_shape_is_a_failed_row_that_names_both_shapes(
    arrays: ConfigFor, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    save(tmp_path, good=samples(784), short=samples(700))
    (tmp_path / "arrays" / "text.npy").write_text("no array")
    config = arrays({**dense[1], "layers": ["code"]}, limits={"max_failed_fraction": 1})
    summary = featray.extract(config)
    assert (summary.ok, summary.failed) == (1, 2)
    rows = ledger(config)
    assert rows["short.npy"]["reason"] == "model"
    assert "(n, 784)" in rows["short.npy"]["message"]
    assert "700" in rows["short.npy"]["message"]
    assert rows["text.npy"]["reason"] == "unreadable"
    assert rows["good.npy"]["shape"] == [784]
    assert (rows["good.npy"]["orientation"], rows["good.npy"]["hu_min"]) == (None, None)


def test_units_that_are_0_for_every_scan_are_told(
    arrays: ConfigFor, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, section = dense
    weights, bias = model.get_layer("code").get_weights()
    bias[[3, 7, 31]] = -1e6  # their ReLU never opens
    weights[:, 0], bias[0] = np.abs(weights[:, 0]), 1
    model.get_layer("code").set_weights([np.abs(weights), bias])
    model.save_weights(section["uri"])
    save(tmp_path, **{f"digit_{n}": samples(784, seed=n) for n in range(4)})
    summary = featray.extract(arrays({**section, "layers": ["code", "reconstruction"]}))
    assert summary.dead_units["code"] == 3
    assert "3 units of layer code were 0 for every scan" in summary.text()


def test_arrays_z_y_x_are_resized_and_windowed_only_when_the_config_says_so(
    arrays: ConfigFor, tmp_path: Path
) -> None:
    keras.Sequential([keras.Input((2, 2, 2, 1)), kl.Flatten(name="flat")]).save(tmp_path / "m.keras")
    save(tmp_path, cube=np.full((4, 4, 4), 500.0))
    section = {"uri": str(tmp_path / "m.keras"), "layers": ["flat"]}
    config = arrays(section, preprocess={"size": [2, 2, 2], "window": [0, 1000], "scale": [0, 1]})
    featray.extract(config)
    assert features(config, "flat")["cube.npy", 0].tolist() == [0.5] * 8


def test_a_model_that_does_not_say_what_it_takes_is_told_in_the_config(
    arrays: ConfigFor, tmp_path: Path
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
    model, images = scope["build"](), samples(4, 8, 8, 2)
    expected = np.asarray(model(images)).mean(axis=(1, 2))
    model.save_weights(tmp_path / "own.weights.h5")
    save(tmp_path, images=images)
    section = {"uri": str(tmp_path / "own.weights.h5"), "builder": f"{code}:build", "layers": ["conv"]}
    with pytest.raises(UsageError, match=r"model\.input_shape"):
        featray.extract(arrays(section, source={"rows": True}))
    config = arrays({**section, "input_shape": [8, 8, 2]}, source={"rows": True})
    assert featray.extract(config).ok == 1
    found = features(config, "conv")
    assert_near(np.stack([found["images.npy", row] for row in range(4)]), expected)


def test_a_folder_of_arrays_without_format_npy_is_told_what_to_set(tmp_path: Path, arrays: ConfigFor) -> None:
    save(tmp_path, a=samples(3))
    config = arrays({"uri": "m.keras", "layers": ["a"]}, source={"format": "auto"})
    with pytest.raises(ConfigError, match=r"set source\.format: npy"):
        featray.extract(config)


def test_a_manifest_may_list_arrays(
    arrays: ConfigFor, dense: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    save(tmp_path, a=samples(784), b=samples(784, seed=1))
    manifest = tmp_path / "arrays" / "list.csv"
    manifest.write_text("uri,version,who\na.npy,,x\nb.npy,3,y\n")
    config = arrays({**dense[1], "layers": ["code"]}, source={"uri": str(manifest)})
    assert featray.extract(config).ok == 2
    assert {name: row["who"] for name, row in ledger(config).items()} == {"a.npy": "x", "b.npy": "y"}


def test_a_large_file_of_rows_becomes_several_parquet_files_of_bounded_size(
    arrays: ConfigFor,
    dense: tuple[Any, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featray.stages.write.MAX_BYTES", 40_000)
    save(tmp_path, **{f"rows_{n}": samples(50, 784, seed=n) for n in range(6)})
    config = arrays({**dense[1], "layers": ["code"], "batch_size": 64}, source={"rows": True})
    assert featray.extract(config).ok == 6
    assert len(features(config, "code")) == 300
    assert len(Dataset(Store(config["output"]["uri"])).open_snapshot().files(FEATURES)) > 1
