"""scikit-learn's digits through a small autoencoder: its layer of 32 units beats its two latents."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from featray.commands.report.labeled.answer import Candidate, Collection, answer_label
from featray.commands.report.labeled.labels import Label

SCANS = 200

pytestmark = pytest.mark.slow


def encode_digits(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the values of the layers with 32 and with 2 units of an autoencoder trained on the images."""
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(32, activation="relu")(inputs)
    latents = keras.layers.Dense(2)(hidden)
    decoded = keras.layers.Dense(32, activation="relu")(latents)
    autoencoder = keras.Model(inputs, keras.layers.Dense(64, activation="sigmoid")(decoded))
    autoencoder.compile(keras.optimizers.Adam(0.01), "mse")
    autoencoder.fit(images, images, batch_size=64, epochs=20, verbose=0)
    wide, narrow = keras.Model(inputs, [hidden, latents]).predict(images[:SCANS], verbose=0)
    return wide, narrow


def test_32_units_beat_2_latents_and_are_recommended() -> None:
    images, digits = load_digits(return_X_y=True)
    wide, narrow = encode_digits((images / 16).astype(np.float32))
    label = Label("even", "classes", (digits[:SCANS] % 2 == 0).astype(float), ("no", "yes"))
    layers = [Candidate.from_arrays("hidden", wide), Candidate.from_arrays("latents", narrow)]
    answer = answer_label(label, layers, [], Collection(np.arange(SCANS), has_patients=False))
    assert answer.rule is not None
    assert answer.rule.beaten.tolist() == [[False, True], [False, False]]
    assert answer.verdict.candidate == "hidden"
    assert answer.verdict.refusal is None
