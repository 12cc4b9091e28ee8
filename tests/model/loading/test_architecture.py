"""Weights files get their model from a description beside them, or from code for models without a call."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras as k2
import yaml

from featray.config import load_model_section
from featray.errors import ConfigError, ModelError
from featray.model import Extractor
from featray.model.loading.custom_code import import_object

Code = Callable[[str, str], Path]
X = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)

VAE = """
import {package} as keras
class VAE(keras.Model):
    def __init__(self, encoder, decoder, **keys):
        super().__init__(**keys)
        self.encoder, self.decoder = encoder, decoder
        self.loss_tracker = keras.metrics.Mean(name="loss")
def build():
    vector, code = keras.Input((6,)), keras.Input((2,))
    hidden = keras.layers.Dense(4, activation="relu", name="hidden")(vector)
    heads = [keras.layers.Dense(2, name=name)(hidden) for name in ("z_mean", "z_log_var")]
    encoder = keras.Model(vector, heads, name="encoder")
    return VAE(encoder, keras.Model(code, keras.layers.Dense(6)(code), name="decoder"))
"""


def make_encoder(package: Any) -> Any:
    vector = package.Input((6,))
    hidden = package.layers.Dense(4, activation="relu", name="hidden")(vector)
    heads = [package.layers.Dense(2, name=name)(hidden) for name in ("z_mean", "z_log_var")]
    return package.Model(vector, heads, name="encoder")


@pytest.mark.parametrize(
    ("package", "weights"), [(k2, "w.h5"), (k2, "w.weights.h5"), (keras, "w.weights.h5")]
)
def test_a_description_beside_the_weights_gives_the_same_values(
    package: Any, weights: str, tmp_path: Path
) -> None:
    model = make_encoder(package)
    model.save_weights(tmp_path / weights)
    (tmp_path / "model.json").write_text(model.to_json())
    section = {
        "uri": str(tmp_path / weights),
        "architecture": str(tmp_path / "model.json"),
        "layers": ["z_mean"],
    }
    extractor = Extractor(section)
    np.testing.assert_allclose(extractor(X)["z_mean"], np.asarray(model(X)[0]), rtol=1e-5, atol=1e-6)
    assert extractor.files.keys() == {"model", "architecture"}


def test_a_description_may_be_yaml_but_may_not_run_code(tmp_path: Path) -> None:
    model = make_encoder(k2)
    model.save_weights(tmp_path / "w.h5")
    path = tmp_path / "model.yaml"
    text = yaml.safe_dump(json.loads(model.to_json()), default_flow_style=None)
    assert "[null, 6]" in text
    path.write_text(text.replace("[null, 6]", "!!python/tuple [null, 6]"))
    section = {"uri": str(tmp_path / "w.h5"), "architecture": str(path), "layers": ["z_mean"]}
    np.testing.assert_allclose(Extractor(section)(X)["z_mean"], model(X)[0], rtol=1e-5, atol=1e-6)
    path.write_text(f"class_name: !!python/object/apply:os.system ['touch {tmp_path / 'bad'}']")
    with pytest.raises(ModelError, match=r"architecture: model.yaml is neither JSON nor YAML"):
        Extractor(section)
    assert not (tmp_path / "bad").exists()


def test_weights_without_a_description_name_both_ways(tmp_path: Path) -> None:
    make_encoder(k2).save_weights(tmp_path / "w.h5")
    with pytest.raises(ModelError, match=r"weights only.*model\.builder .*model\.architecture"):
        Extractor({"uri": str(tmp_path / "w.h5"), "layers": ["z_mean"]})
    with pytest.raises(ConfigError, match="architecture and builder both describe the model"):
        load_model_section({"uri": "w.h5", "layers": ["a"], "builder": "a.py:b", "architecture": "m.json"})


@pytest.mark.parametrize(
    ("saved", "built", "weights"),
    [
        ("tf_keras", "tf_keras", "w.h5"),
        ("tf_keras", "keras", "w.h5"),
        ("tf_keras", "tf_keras", "w.weights.h5"),
        ("keras", "keras", "w.weights.h5"),
    ],
)
def test_the_encoder_of_a_vae_without_a_call_gets_its_weights(
    saved: str, built: str, weights: str, tmp_path: Path, code: Code
) -> None:
    saving, building = (code(f"{name}_vae.py", VAE.format(package=name)) for name in (saved, built))
    build, _ = import_object(f"{saving}:build", config_key="builder", storage_options={})
    model = build()
    model.built = True  # as after training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_weights(tmp_path / weights)
    section = {"uri": str(tmp_path / weights), "builder": f"{building}:build", "layers": ["z_mean"]}
    values = Extractor({**section, "submodel": "encoder"})(X)["z_mean"]
    np.testing.assert_allclose(values, np.asarray(model.encoder(X)[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ModelError, match=r"set model.submodel to the part that takes the scan: encoder, decoder"
    ):
        Extractor(section)


def test_a_model_of_keras_2_with_branches_in_python_is_run_as_keras_2_ran_it(
    tmp_path: Path, code: Code
) -> None:
    source = code(
        "sub.py",
        """
        import tensorflow as tf
        import tf_keras as keras
        class Sub(keras.Model):
            def __init__(self, **keys):
                super().__init__(**keys)
                self.blocks = [keras.layers.Dense(3), keras.layers.Dense(2)]
            def call(self, x):
                x = self.blocks[0](x)
                if tf.reduce_sum(tf.abs(x)) < 0.0:
                    x = x * 0.0
                return self.blocks[1](x)
        """,
    )
    model_class, _ = import_object(f"{source}:Sub", config_key="builder", storage_options={})
    model = model_class()
    expected = model(X)
    model.save_weights(tmp_path / "w.h5")
    section = {"uri": str(tmp_path / "w.h5"), "builder": f"{source}:Sub", "layers": ["blocks.1"]}
    values = Extractor(section, input_zyx=(6,))(X)["blocks.1"]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_refused_with_a_way_that_works(tmp_path: Path, code: Code) -> None:
    source = code("enc.py", VAE.format(package="tf_keras"))
    build, _ = import_object(f"{source}:build", config_key="builder", storage_options={})
    model = build()
    model.save_weights(tmp_path / "ckpt")
    for name in ("ckpt", "ckpt.index", "ckpt.data-00000-of-00001"):
        with pytest.raises(ModelError, match=r"ckpt: is a TensorFlow checkpoint.*load_weights\('ckpt'\)"):
            Extractor({"uri": str(tmp_path / name), "layers": ["z_mean"]})
    copy = build()
    copy.load_weights(tmp_path / "ckpt")
    copy.save_weights(tmp_path / "w.weights.h5")
    section = {"uri": str(tmp_path / "w.weights.h5"), "builder": f"{source}:build", "submodel": "encoder"}
    values = Extractor({**section, "layers": ["z_mean"]})(X)["z_mean"]
    np.testing.assert_allclose(values, model.encoder(X)[0], rtol=1e-5, atol=1e-6)
