"""Keras is imported without scikit-learn, and `keras.wrappers` works as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from featray.model import runtime
runtime.configure()
import keras
assert "sklearn" not in sys.modules

import numpy as np
wrapper = keras.wrappers.SKLearnClassifier

def make_model(X, y):
    inputs = keras.Input(X.shape[1:])
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(inputs))
    model.compile(loss="categorical_crossentropy")
    return model

class Named(wrapper):
    pass

from sklearn.base import ClassifierMixin, clone
for kind in (wrapper, Named):
    estimator = clone(kind(make_model)).fit(np.eye(4), np.array([0, 1, 0, 1]))
    assert isinstance(estimator, ClassifierMixin) and isinstance(estimator, wrapper)
    assert estimator.predict(np.eye(4)).shape == (4,)
assert not isinstance("text", wrapper)
assert keras.wrappers.SKLearnRegressor.__name__ == "SKLearnRegressor"
"""


@pytest.mark.slow
def test_scikit_learn_is_imported_when_a_wrapper_is_used() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
