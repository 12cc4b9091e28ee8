"""Sampled values depend only on the input and its seed; outputs for which this fails are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from featray.errors import InputShapeError, ModelError
from featray.model import Extractor
from featray.model.loading.custom_code import import_object

SHAPE = (2, 2, 2, 1)
SEEDS = ["one", "two", "three", "four", "five"]
HEAD = """
    import numpy as np, keras, tensorflow as tf
    shared = keras.random.SeedGenerator(4)
    generator = tf.random.Generator.from_seed(3)
    class Noisy(keras.layers.Layer):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.seed = keras.random.SeedGenerator(1)
        def call(self, x):
            return x + self.noise(x)
        def noise(self, x):
            return {noise}
"""
CONTROLLED = {
    "own_generator": "keras.random.normal(keras.ops.shape(x), seed=self.seed)",
    "generator_of_the_file": "keras.random.uniform(keras.ops.shape(x), seed=shared)",
    "global_generator": "keras.random.normal(keras.ops.shape(x))",
    "sampled_twice": "keras.random.normal(keras.ops.shape(x), seed=self.seed) "
    "* keras.random.normal(keras.ops.shape(x), seed=self.seed)",
    "next": "tf.random.stateless_normal(tf.shape(x), self.seed.next())",
    "tf_generator": "generator.normal(tf.shape(x))",
    "tf_normal": "tf.random.normal(tf.shape(x))",
    "tf_normal_with_seed": "tf.random.normal(tf.shape(x), seed=7)",
    "tf_truncated": "tf.random.truncated_normal(tf.shape(x))",
    "tf_uniform": "tf.random.uniform(tf.shape(x), -1, 1)",
    "tf_integers": "tf.cast(tf.random.uniform(tf.shape(x), 0, 9999, tf.int32), x.dtype)",
    "tf_gamma": "tf.random.gamma(tf.shape(x), 2.0)",
    "tf_categories": "tf.cast(tf.random.categorical(tf.zeros((1, 9999)), 1), x.dtype)",
    "tf_shuffle": "tf.cast(tf.random.shuffle(tf.range(9999))[0], x.dtype)",
    "tf_dropout": "tf.nn.dropout(x, 0.5)",
    "function": "tf.function(lambda y: tf.random.normal(tf.shape(y)))(x)",
    "loop": "tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, y * tf.random.normal(tf.shape(y))), "
    "(0, x))[1]",
    "same_for_all_rows": "tf.random.normal((2, 2, 2, 1))",
}


@pytest.fixture
def noisy(tmp_path: Path, code: Callable[[str, str], Path]) -> Callable[[str], dict[str, Any]]:
    """Return a function that makes a `model` section: layer `clean`, then `noisy` with the given code."""

    def make(noise: str) -> dict[str, Any]:
        source = code("noisy.py", HEAD.format(noise=noise))
        layer, _ = import_object(f"{source}:Noisy", config_key="custom_objects", storage_options={})
        chain = [keras.layers.Conv3D(2, 1, name="clean"), layer(name="noisy")]
        keras.Sequential([keras.Input(SHAPE), *chain]).save(tmp_path / "m.keras")
        return {
            "uri": str(tmp_path / "m.keras"),
            "custom_objects": [f"{source}:Noisy"],
            "layers": [{"layer": name, "pool": "none"} for name in ("clean", "noisy")],
            "allow_stochastic": True,
        }

    return make


@pytest.fixture
def x() -> np.ndarray:
    """Return five random inputs."""
    return np.random.default_rng(3).random((5, *SHAPE), np.float32) + 1


@pytest.mark.slow
@pytest.mark.parametrize("noise", CONTROLLED.values(), ids=CONTROLLED)
def test_a_seed_decides_the_noise_of_every_kind_of_generator(noisy: Any, x: np.ndarray, noise: str) -> None:
    section = noisy(noise)
    extractor, one_by_one = Extractor({**section, "batch_size": 4}), Extractor({**section, "batch_size": 1})
    first, other_seeds = extractor(x, SEEDS), extractor(x, SEEDS[::-1])
    extractor(x[:3])  # a call without seeds in between has no effect
    again = {name: value[::-1] for name, value in one_by_one(x[::-1], SEEDS[::-1]).items()}
    for name in first:
        np.testing.assert_allclose(again[name], first[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(extractor(x[2:3], SEEDS[2:3])[name], first[name][2:3])
    differs = np.abs(first["noisy"] - other_seeds["noisy"]).reshape(5, -1).max(1) > 1e-4
    assert list(differs) == [True, True, False, True, True]
    np.testing.assert_allclose(first["clean"], extractor(x)["clean"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_z_depends_on_the_seed_and_z_mean_does_not(spec: Callable[..., dict[str, Any]], volumes: Any) -> None:
    extractors = [
        Extractor(spec("z_mean", "z", allow_stochastic=True, batch_size=size)) for size in (1, 2, 4)
    ]
    assert all(extractor.is_stochastic for extractor in extractors)
    one, two, four = (extractor(volumes, SEEDS) for extractor in extractors)
    for name in ("z_mean", "z"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, atol=1e-6)
    plain = Extractor(spec("z_mean"))
    assert not plain.is_stochastic
    np.testing.assert_allclose(plain(volumes, SEEDS)["z_mean"], one["z_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_without_seeds_values_differ_from_call_to_call_even_after_calls_with_the_same_seeds(
    spec: Callable[..., dict[str, Any]], volumes: Any
) -> None:
    extractor = Extractor(spec("z_mean", "z", allow_stochastic=True))
    values = []
    for _ in range(2):
        extractor(volumes, SEEDS)
        values.append(extractor(volumes))
    np.testing.assert_array_equal(values[0]["z_mean"], values[1]["z_mean"])
    assert np.abs(values[0]["z"] - values[1]["z"]).max() > 1e-3


@pytest.mark.slow
def test_seeded_values_follow_the_normal_distribution(noisy: Any) -> None:
    extractor = Extractor(noisy(CONTROLLED["own_generator"]))
    got = extractor(np.zeros((500, *SHAPE), np.float32), [str(number) for number in range(500)])
    noise = got["noisy"] - got["clean"]
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.06
    assert len(np.unique(noise)) > 0.99 * noise.size


@pytest.mark.slow
def test_another_process_samples_the_same_values(noisy: Any, x: np.ndarray) -> None:
    section = noisy(CONTROLLED["own_generator"] + " + " + CONTROLLED["tf_normal"])
    here = Extractor(section)(x[:2], SEEDS[:2])["noisy"]
    program = (
        "import keras, numpy as np\nfrom featray.model import Extractor\n"
        "[keras.random.SeedGenerator() for _ in range(3)]\n"  # created before those of the model
        f"x = np.random.default_rng(3).random((5, *{SHAPE}), np.float32) + 1\n"
        f"print(Extractor({section!r})(x[:2], {SEEDS[:2]!r})['noisy'].tolist())"
    )
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    np.testing.assert_allclose(eval(process.stdout), here, rtol=1e-5, atol=1e-6)


def test_a_random_operation_that_no_seed_controls_is_refused_with_the_solution(noisy: Any) -> None:
    section = noisy("tf.raw_ops.RandomStandardNormal(shape=tf.shape(x), dtype=tf.float32)")
    expected = (
        r"noisy: draws random numbers .*cannot seed \(.*RandomStandardNormal.*keras.random.SeedGenerator"
    )
    with pytest.raises(ModelError, match=expected):
        Extractor(section)
    assert not Extractor({**section, "layers": ["clean"]}).is_stochastic


def test_noise_that_shows_rarely_is_found(noisy: Any) -> None:
    section = noisy("tf.cast(keras.random.uniform(()) < 0.2, x.dtype)")
    with pytest.raises(ModelError, match="'noisy' returns different values"):
        Extractor({**section, "allow_stochastic": False})
    assert Extractor(section).is_stochastic


def test_random_numbers_drawn_in_python_are_refused(noisy: Any) -> None:
    section = noisy("np.random.normal(size=(2, 2, 2, 1)).astype('float32')")
    with pytest.raises(ModelError, match=r"'noisy' returns different values each time the model is traced"):
        Extractor({**section, "allow_stochastic": False})


@pytest.mark.slow
def test_there_must_be_one_seed_per_row(spec: Callable[..., dict[str, Any]], volumes: Any) -> None:
    with pytest.raises(InputShapeError, match="expected one seed per row: 5, got 2"):
        Extractor(spec("z_mean"))(volumes, ["a", "b"])
