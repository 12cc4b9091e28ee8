"""Random inputs are in the range that a model takes, so that noise and dependence on the batch are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import ModelError
from featray.model import Extractor, list_layers, trace
from featray.model.probes import ProbeRange
from featray.model.trace import ModelCall

kl = keras.layers
CODE = """
    import keras
    @keras.saving.register_keras_serializable("tests_probes")
    class Centre(keras.layers.Layer):
        def call(self, x): return x - keras.ops.mean(x, axis=0, keepdims=True)
    @keras.saving.register_keras_serializable("tests_probes")
    class Noisy(keras.layers.Layer):
        def call(self, x): return x * keras.random.normal(keras.ops.shape(x))
"""


def _find_range(*layers: Any, dtype: str = "float32") -> ProbeRange:
    model = keras.Sequential([keras.Input((6,), dtype=dtype), *layers])
    return trace.record_taps(ModelCall(model, (6,))).probe


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", ProbeRange()),
        ("uint8", ProbeRange(0, 255, "uint8")),
        ("int8", ProbeRange(-128, 127, "int8")),
        ("int32", ProbeRange(0, 255, "int32")),
        ("bool", ProbeRange(0, 1, "bool")),
    ],
)
def test_the_range_is_that_of_the_type_of_the_input(dtype: str, expected: ProbeRange) -> None:
    assert _find_range(kl.Reshape((6, 1)), dtype=dtype) == expected


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_the_range_ends_at_the_vocabulary_of_an_embedding(dtype: str) -> None:
    assert _find_range(kl.Embedding(7, 2), dtype=dtype) == ProbeRange(0, 6, "int32")


def test_an_embedding_behind_the_first_layers_does_not_change_the_range() -> None:
    assert _find_range(kl.Dense(3), kl.Embedding(7, 2)) == ProbeRange()


def test_probes_of_whole_numbers_fill_their_range() -> None:
    probes = ProbeRange(0, 6, "int32").draw(2, (50,))
    assert set(probes.ravel()) == set(range(7))
    assert probes.dtype == np.float32
    assert not np.array_equal(*probes)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("Centre", "batch_dependent", "depends on the other inputs"),
        ("Noisy", "stochastic", "because it samples"),
    ],
)
def test_noise_and_batch_dependence_of_whole_numbers_are_found(
    tmp_path: Path, code: Callable[[str, str], Path], dtype: str, name: str, flag: str, message: str
) -> None:
    source = code("layers.py", CODE)
    scope: dict[str, Any] = {}
    exec(source.read_text(), scope)
    chain = [kl.Rescaling(1.0), scope[name](name="z")]
    keras.Sequential([keras.Input((6,), dtype=dtype), *chain]).save(tmp_path / "m.keras")
    section = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{source}:{name}"], "layers": ["z"]}
    flags = {layer.path: layer.flags for layer in list_layers(section)}
    assert flag in flags["z"]
    with pytest.raises(ModelError, match=message):
        Extractor(section)


def test_a_table_that_is_smaller_than_the_range_is_tried_with_zeros_and_ones(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("tests_probes")
    class Table(kl.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return keras.ops.take(keras.ops.arange(3, dtype="float32"), x, axis=0)

    model = keras.Sequential([keras.Input((6,), dtype="int32"), Table(name="table")])
    call = ModelCall(model, (6,), probe=ProbeRange(0, 255, "int32"))
    from featray.model import inputs

    function = trace.trace_truncated_model(call, ["table#1"], lambda tensors: tensors["table#1"])
    trials = inputs.run_trials(lambda batch: function(inputs.make_tensor(batch)).numpy(), call)
    assert set(trials.batch.ravel()) == {0, 1}
