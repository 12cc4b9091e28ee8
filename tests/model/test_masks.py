"""Masks reach every layer of a truncated model: attention and recurrent layers ignore masked steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.model import Extractor, check_invariance

kl = keras.layers
TOKENS = np.array([[1, 2, 3, 0, 0, 0], [4, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)
BUILDERS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda x: kl.MultiHeadAttention(2, 3)(x, x),
    "causal attention": lambda x: kl.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True),
    "attention behind attention": lambda x: kl.AdditiveAttention()([x, kl.MultiHeadAttention(2, 4)(x, x)]),
    "attention behind a dense layer": lambda x: kl.Attention()([x, kl.Dense(4)(x)]),
    "recurrent": lambda x: kl.Bidirectional(kl.LSTM(2))(x),
    "average": lambda x: kl.GlobalAveragePooling1D()(kl.TimeDistributed(kl.Dense(2))(x)),
}
FRONTS: dict[str, Callable[[Any], Any]] = {
    "embedding": lambda x: kl.Embedding(5, 4, mask_zero=True)(x),
    "masking": lambda x: kl.Masking()(_repeat(x)),
}


def _repeat(tokens: Any) -> Any:
    return kl.Concatenate()([kl.Reshape((6, 1))(tokens)] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((name, "keras") for name in BUILDERS),
        *((name, "h5") for name in BUILDERS if "attention" in name),  # Keras cannot load the others from .h5
    ],
)
def test_values_under_a_mask_are_those_of_the_whole_model(
    tmp_path: Path, name: str, front: str, suffix: str
) -> None:
    keras.utils.set_random_seed(1)
    tokens = keras.Input((6,))
    value = kl.Identity(name="last")(BUILDERS[name](FRONTS[front](tokens)))
    model = keras.Model(tokens, kl.Dense(2, name="behind")(value))
    inner = keras.Model(tokens, value)
    model.save(tmp_path / f"m.{suffix}")
    layer = {"layer": "last", "pool": "none"}
    section = {"uri": str(tmp_path / f"m.{suffix}"), "layers": [layer]}
    values = Extractor(section)(TOKENS)["last"]
    np.testing.assert_allclose(values, inner.predict(TOKENS, verbose=0), rtol=1e-5, atol=1e-6)
    assert not check_invariance(section).problems
