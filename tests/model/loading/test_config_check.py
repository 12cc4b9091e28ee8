"""A loaded layer has the config of its file; otherwise the file is refused with the values that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.config import load_model_section
from featray.errors import ModelError
from featray.model.loading import config_check
from featray.model.loading.load import load_model

LINE, IMAGE, VOLUME = (6, 4), (6, 6, 3), (6, 6, 6, 2)
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Activation": (LINE, {"activation": "gelu"}),
    "AdaptiveAveragePooling2D": (IMAGE, {"output_size": 2}),
    "AdaptiveMaxPooling3D": (VOLUME, {"output_size": (2, 1, 3)}),
    "AlphaDropout": (LINE, {"rate": 0.3}),
    "AutoContrast": (IMAGE, {}),
    "AveragePooling1D": (LINE, {"pool_size": 3, "padding": "same"}),
    "AveragePooling3D": (VOLUME, {"pool_size": (1, 2, 3), "strides": (1, 1, 2)}),
    "BatchNormalization": (IMAGE, {"axis": 1, "epsilon": 0.1}),
    "CategoryEncoding": ((3,), {"num_tokens": 9, "output_mode": "count"}),
    "CenterCrop": (IMAGE, {"height": 3, "width": 2}),
    "Conv1D": (LINE, {"filters": 2, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
    "Conv1DTranspose": (LINE, {"filters": 2, "kernel_size": 3, "strides": 2}),
    "Conv2D": (IMAGE, {"filters": 6, "kernel_size": (3, 2), "groups": 3, "activation": "elu"}),
    "Conv2DTranspose": (IMAGE, {"filters": 2, "kernel_size": 3, "strides": 2, "output_padding": 1}),
    "Conv3D": (VOLUME, {"filters": 2, "kernel_size": 3, "strides": (1, 2, 3), "use_bias": False}),
    "Conv3DTranspose": (VOLUME, {"filters": 2, "kernel_size": 2, "strides": 2}),
    "ConvLSTM1D": ((3, *LINE), {"filters": 2, "kernel_size": 3, "go_backwards": True}),
    "ConvLSTM2D": ((3, *IMAGE), {"filters": 2, "kernel_size": 3, "return_sequences": True}),
    "Cropping2D": (IMAGE, {"cropping": ((1, 2), (0, 1))}),
    "Cropping3D": (VOLUME, {"cropping": (1, 2, 1)}),
    "Dense": (LINE, {"units": 3, "activation": "relu6", "use_bias": False}),
    "DepthwiseConv1D": (LINE, {"kernel_size": 3, "depth_multiplier": 2}),
    "DepthwiseConv2D": (IMAGE, {"kernel_size": 3, "depth_multiplier": 2, "dilation_rate": 2}),
    "Discretization": (LINE, {"bin_boundaries": [0.2, 0.5], "output_mode": "int"}),
    "Dropout": (LINE, {"rate": 0.2, "noise_shape": (None, 1, 4)}),
    "ELU": (LINE, {"alpha": 0.3}),
    "EinsumDense": (LINE, {"equation": "abc,cd->abd", "output_shape": (None, 5), "bias_axes": "d"}),
    "Embedding": ((5,), {"input_dim": 9, "output_dim": 3, "mask_zero": True}),
    "Flatten": (IMAGE, {"data_format": "channels_first"}),
    "GRU": (LINE, {"units": 3, "reset_after": False, "recurrent_activation": "hard_sigmoid"}),
    "GaussianDropout": (LINE, {"rate": 0.2}),
    "GaussianNoise": (LINE, {"stddev": 0.2}),
    "GlobalAveragePooling3D": (VOLUME, {"keepdims": True, "data_format": "channels_first"}),
    "GlobalMaxPooling1D": (LINE, {"keepdims": True}),
    "GroupNormalization": (LINE, {"groups": 2, "axis": -1, "epsilon": 0.2}),
    "Identity": (LINE, {}),
    "IntegerLookup": ((3,), {"vocabulary": [3, 5, 7], "output_mode": "multi_hot"}),
    "LSTM": (LINE, {"units": 3, "unit_forget_bias": False, "return_sequences": True}),
    "LayerNormalization": (IMAGE, {"axis": [1, 2], "epsilon": 0.1, "center": False}),
    "LeakyReLU": (LINE, {"negative_slope": 0.4}),
    "Masking": (LINE, {"mask_value": 0.5}),
    "MaxPooling2D": (IMAGE, {"pool_size": (2, 3), "strides": 1, "padding": "same"}),
    "MaxPooling3D": (VOLUME, {"pool_size": (1, 2, 2)}),
    "MelSpectrogram": ((64,), {"fft_length": 16, "sequence_stride": 8, "num_mel_bins": 4}),
    "Normalization": (LINE, {"axis": [1, 2], "mean": np.full(LINE, 0.2), "variance": np.full(LINE, 3.0)}),
    "PReLU": (IMAGE, {"shared_axes": [1, 2]}),
    "Permute": (IMAGE, {"dims": (3, 1, 2)}),
    "RMSNormalization": (LINE, {"epsilon": 0.3}),
    "RandomContrast": (IMAGE, {"factor": 0.3}),
    "RandomCrop": (IMAGE, {"height": 4, "width": 4}),
    "RandomFlip": (IMAGE, {"mode": "horizontal"}),
    "RandomRotation": (IMAGE, {"factor": 0.2, "fill_mode": "nearest"}),
    "RandomTranslation": (IMAGE, {"height_factor": 0.2, "width_factor": (0.1, 0.2)}),
    "RandomZoom": (IMAGE, {"height_factor": 0.2}),
    "ReLU": (LINE, {"max_value": 0.6, "negative_slope": 0.1, "threshold": 0.2}),
    "RepeatVector": ((4,), {"n": 3}),
    "Rescaling": (LINE, {"scale": [1.0, 2.0, 3.0, 4.0], "offset": 0.5}),
    "Reshape": (IMAGE, {"target_shape": (3, -1)}),
    "Resizing": (IMAGE, {"height": 3, "width": 9, "interpolation": "nearest"}),
    "STFTSpectrogram": ((64, 1), {"frame_length": 16, "frame_step": 8, "fft_length": 16}),
    "SeparableConv1D": (LINE, {"filters": 2, "kernel_size": 3}),
    "SeparableConv2D": (IMAGE, {"filters": 2, "kernel_size": 3, "depth_multiplier": 2}),
    "SimpleRNN": (LINE, {"units": 3, "activation": "relu", "go_backwards": True}),
    "Softmax": (IMAGE, {"axis": (1, 2)}),
    "SpatialDropout2D": (IMAGE, {"rate": 0.2}),
    "UnitNormalization": (IMAGE, {"axis": (1, 2, 3)}),
    "UpSampling1D": (LINE, {"size": 3}),
    "UpSampling2D": (IMAGE, {"size": (1, 2), "interpolation": "bilinear"}),
    "UpSampling3D": (VOLUME, {"size": (1, 2, 1)}),
    "ZeroPadding1D": (LINE, {"padding": (1, 2)}),
    "ZeroPadding3D": (VOLUME, {"padding": ((1, 0), (0, 2), (1, 1))}),
}  # fmt: skip
"""Layers of Keras with one input: class -> shape of the input, arguments that are not the defaults."""
PAIRS: dict[str, dict[str, Any]] = {
    "Add": {}, "Average": {}, "Concatenate": {"axis": 1}, "Dot": {"axes": (2, 2), "normalize": True},
    "Maximum": {}, "Minimum": {}, "Multiply": {}, "Subtract": {}, "Attention": {"score_mode": "concat"},
    "AdditiveAttention": {"use_scale": False}, "MultiHeadAttention": {"num_heads": 2, "key_dim": 3},
    "GroupQueryAttention": {"head_dim": 3, "num_query_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
"""Layers of Keras with two inputs of shape `LINE`."""
kl = keras.layers


def _make_wrappers() -> dict[str, Any]:
    return {
        "TimeDistributed": kl.TimeDistributed(kl.LayerNormalization(axis=[1, 2])),
        "Bidirectional": kl.Bidirectional(kl.LSTM(2, recurrent_activation="hard_sigmoid"), merge_mode="mul"),
        "RNN": kl.RNN(kl.StackedRNNCells([kl.GRUCell(3, reset_after=False), kl.SimpleRNNCell(2)])),
        "SpectralNormalization": kl.SpectralNormalization(kl.Dense(3), power_iterations=2),
        "Sequential": keras.Sequential([kl.Softmax(axis=[1, 2]), kl.Dense(2)]),
    }


WRAPPERS = {"TimeDistributed": IMAGE, "Bidirectional": LINE, "RNN": LINE, "SpectralNormalization": LINE}
WRAPPERS["Sequential"] = IMAGE


def _make_model(name: str) -> keras.Model:
    keras.utils.set_random_seed(1)
    if name in PAIRS:
        value = keras.Input(LINE)
        inputs = [value, kl.Rescaling(2.0)(value)]
        layer = getattr(kl, name)(**PAIRS[name], name="layer")
        output = layer(*inputs) if name in ("MultiHeadAttention", "GroupQueryAttention") else layer(inputs)
        return keras.Model(value, output)
    if name in WRAPPERS:
        value = keras.Input(WRAPPERS[name])
        return keras.Model(value, _make_wrappers()[name](value))
    shape, arguments = LAYERS[name]
    value = keras.Input(shape)
    return keras.Model(value, getattr(kl, name)(**arguments, name="layer")(value))


def _load(path: Path, **keys: Any) -> Any:
    return load_model(load_model_section({"uri": str(path), "layers": ["layer"], **keys})).model


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", [*LAYERS, *PAIRS, *WRAPPERS])
def test_each_layer_of_keras_is_loaded_with_its_values_and_without_a_false_alarm(
    tmp_path: Path, name: str, suffix: str
) -> None:
    model = _make_model(name)
    model.save(tmp_path / f"m.{suffix}")
    loaded = _load(tmp_path / f"m.{suffix}")
    x = np.random.default_rng(0).random((2, *model.input_shape[1:]), np.float32)
    if name in ("Embedding", "CategoryEncoding", "IntegerLookup"):
        x = np.floor(9 * x)
    np.testing.assert_allclose(loaded(x, training=False), model(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("negative_slope", 0.7, "has negative_slope 0.4, the file says 0.7"), ("name", "other", "")],
)
def test_a_value_that_differs_is_named_with_its_layer(key: str, value: Any, text: str) -> None:
    model = _make_model("LeakyReLU")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    assert config_check.find_config_differences(model, config) == []
    config["config"]["layers"][1]["config"][key] = value
    differences = config_check.find_config_differences(model, config)
    assert differences == ([f"layer 'layer' (LeakyReLU) {text}"] if text else [])


def test_a_custom_class_that_drops_a_value_of_its_file_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "layers.py"
    text = """
import keras
class Scale(keras.layers.Layer):
    def __init__(self, factor=1.0, **keys):
        super().__init__(**keys)
        self.factor = {value}
    def call(self, x): return x * self.factor
    def get_config(self): return {{**super().get_config(), "factor": self.factor}}
"""
    scope: dict[str, Any] = {}
    exec(text.format(value="factor"), scope)
    value = keras.Input(LINE)
    keras.Model(value, scope["Scale"](3.0, name="scale")(value)).save(tmp_path / "m.keras")
    source.write_text(text.format(value="1.0"))
    with pytest.raises(ModelError, match=r"'scale' \(Scale\) has factor 1.0, the file says 3.0"):
        _load(tmp_path / "m.keras", custom_objects=[f"{source}:Scale"])
    source.write_text(text.format(value="factor"))
    _load(tmp_path / "m.keras", custom_objects=[f"{source}:Scale"])
