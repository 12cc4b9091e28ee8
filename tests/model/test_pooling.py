"""Test pooling against numpy, and grids through configs and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from featray.config import load_model_section
from featray.errors import ConfigError, ModelError
from featray.model.extractor import Extractor
from featray.model.list_layers import list_layers
from featray.model.pooling import pool_tensor

Array = NDArray[np.float32]


def make_map(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def average_blocks(values: Array, cells: tuple[int, int, int]) -> Array:
    """Return the mean over equal blocks of (n, z, y, x, channels), whose sizes are multiples of `cells`."""
    n, *sizes, channels = values.shape
    blocks = [number for size, count in zip(sizes, cells, strict=True) for number in (count, size // count)]
    mean: Array = values.reshape(n, *blocks, channels).mean((2, 4, 6))
    return mean


def pool_grid(values: Array, *cells: int, **options: bool) -> Array:
    return np.asarray(pool_tensor(values, "grid", cells, **options))


def test_a_grid_gives_the_mean_of_each_cell_in_the_order_of_the_axes() -> None:
    values = make_map(2, 8, 6, 4, 3)
    got = pool_grid(values, 4, 3, 2)
    assert got.shape == (2, 4, 3, 2, 3)
    np.testing.assert_allclose(got, average_blocks(values, (4, 3, 2)), rtol=1e-5, atol=1e-6)


def test_a_grid_of_one_cell_is_the_average() -> None:
    values = make_map(2, 5, 7, 3, 4)
    average = np.asarray(pool_tensor(values, "avg"))
    np.testing.assert_allclose(pool_grid(values, 1, 1, 1)[:, 0, 0, 0], average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 9, 13, 97])
def test_a_voxel_in_two_cells_counts_in_each_with_its_share(size: int) -> None:
    values = make_map(1, size, 2, 1)
    repeated = np.repeat(values, 4, axis=1)  # the borders of four cells lie between these voxels
    expected = repeated.reshape(1, 4, size, 2, 1).mean(2)
    np.testing.assert_allclose(pool_grid(values, 4, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 4, 7, 10])
def test_the_mean_over_all_cells_is_the_mean_over_the_map(size: int) -> None:
    values = make_map(2, size, size + 1, 3)
    np.testing.assert_allclose(
        pool_grid(values, 4, 4).mean((1, 2)), values.mean((1, 2)), rtol=1e-4, atol=1e-5
    )


def test_channels_first_stay_first() -> None:
    values = make_map(2, 3, 8, 4)
    got = pool_grid(values, 4, 2, channels_first=True)
    expected = pool_grid(values.transpose(0, 2, 3, 1), 4, 2).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a 2-D model that takes images of any size."""
    path = tmp_path_factory.mktemp("model") / "m.keras"
    keras.Sequential(
        [keras.Input((None, None, 1)), keras.layers.Conv2D(3, 3, padding="same", name="conv")]
    ).save(path)
    return path


def make_spec(model_file: Path, *layers: dict[str, Any]) -> dict[str, Any]:
    return {"uri": str(model_file), "layers": list(layers)}


def test_views_of_one_layer_come_from_one_pass_for_inputs_of_any_size(model_file: Path) -> None:
    views = [
        {"layer": "conv", "pool": "none", "as": "map"},
        {"layer": "conv", "pool": "grid", "grid": [4, 2], "as": "grid"},
        {"layer": "conv", "pool": "avg", "as": "avg"},
    ]
    extractor = Extractor(make_spec(model_file, *views))
    for height, width in ((8, 8), (13, 9)):
        got = extractor(make_map(2, height, width, 1))
        np.testing.assert_allclose(got["grid"], pool_grid(got["map"], 4, 2), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["avg"], got["map"].mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert [(layer.shape, layer.values) for layer in extractor.layers[1:]] == [((4, 2, 3), 24), ((3,), 3)]


def test_another_grid_is_another_recipe_and_no_grid_leaves_the_recipe_as_it_was(model_file: Path) -> None:
    def get_layers(**view: Any) -> Any:
        return Extractor(make_spec(model_file, {"layer": "conv", **view})).recipe_part()["layers"]

    assert get_layers(pool="grid", grid=[4, 2]) != get_layers(pool="grid", grid=[2, 4])
    assert get_layers(pool="avg") == [{"name": "conv", "path": "conv", "pool": "avg"}]


def test_the_list_of_layers_counts_the_values_of_a_grid(model_file: Path) -> None:
    layers = list_layers(make_spec(model_file, {"layer": "conv", "pool": "grid", "grid": [4, 2]}))
    assert [layer.values for layer in layers if layer.path == "conv"] == [4 * 2 * 3]


def test_a_grid_with_another_number_of_axes_is_refused_with_the_shape(model_file: Path) -> None:
    layer = {"layer": "conv", "pool": "grid", "grid": [4, 4, 4]}
    with pytest.raises(ModelError, match=r"grid: \[4, 4, 4\] has 3 numbers, but 'conv' has 2 spatial axes"):
        Extractor(make_spec(model_file, layer))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"pool": "grid"}, "pool: grid needs grid"),
        ({"pool": "avg", "grid": [2, 2]}, "grid: only used with pool: grid"),
        ({"pool": "grid", "grid": [4, 0]}, "must be at least 1"),
    ],
)
def test_a_grid_without_its_pooling_or_without_cells_is_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_section({"uri": "m.keras", "layers": [{"layer": "conv", **layer}]})
