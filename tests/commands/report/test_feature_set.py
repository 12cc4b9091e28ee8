"""The candidates of a report: the same scans of every layer of an output, read from its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commits import RECIPES, RUN, make_committer, make_decoded, make_failed_receipt, write_receipt

from featray.commands.report import feature_set
from featray.commands.report.feature_set import FeatureSet, read_feature_set
from featray.errors import UsageError
from featray.output.dataset import Dataset
from featray.storage.store import Store

WITH_LATE = {**RECIPES, "late": "r2"}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "values").mkdir()
    return tmp_path / "values"


def read(dataset: Dataset, folder: Path, layers: Sequence[str] = ()) -> FeatureSet:
    return read_feature_set(dataset.open_snapshot(), folder, layers, lambda size: None)


def read_values(features: FeatureSet, name: str) -> Any:
    (number,) = [place for place, view in enumerate(features.views) if view.layer == name]
    return features.files[number].read(slice(None))


def write_run(dataset: Dataset, **more: Any) -> None:
    layers = [{"name": "z_mean", "path": "encoder/z_mean", "pool": "none"}]
    layers.append({"name": "map", "path": "encoder/conv_3", "pool": "grid", "grid": [2, 3]})
    run = {"recipe": {"model": {"sha256": "m0", "layers": layers}}, "layers": ["z_mean", "map"], **more}
    dataset.store.write(f"runs/{RUN}/run.json", json.dumps(run).encode())


def test_the_rows_of_all_candidates_are_the_same_scans_in_the_order_of_their_ids(
    dataset: Dataset, folder: Path
) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("c", 3), make_decoded("a", 1))])
    committer.commit([write_receipt(dataset, make_decoded("b", 2)), make_failed_receipt("x")])
    features = read(dataset, folder)
    assert features.scan_ids == ("a", "b", "c")
    assert features.scans["scan_id"].to_pylist() == ["a", "b", "c"]
    np.testing.assert_array_equal(read_values(features, "z_mean"), [[1, 2], [2, 3], [3, 4]])
    np.testing.assert_array_equal(read_values(features, "map"), np.repeat([[1], [2], [3]], 6, axis=1))
    assert features.left_out == ()
    assert features.cautions == ()


def test_blocks_hold_the_same_scans_of_all_candidates(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = [make_decoded(f"s{number}", number) for number in range(5)]
    make_committer(dataset).commit([write_receipt(dataset, *scans)])
    monkeypatch.setattr(feature_set, "_BLOCK_BYTES", 2 * 8 * 4)  # two scans of 8 values
    blocks = list(read(dataset, folder).read_blocks())
    assert [[len(part) for part in block] for block in blocks] == [[2, 2], [2, 2], [1, 1]]
    assert [block[0][0, 0] for block in blocks] == [block[1][0, 0] for block in blocks] == [0, 2, 4]


def test_the_features_of_a_scan_are_the_mean_over_its_patches(dataset: Dataset, folder: Path) -> None:
    patches = make_decoded("a", 0, patches=3)
    patches.tensor[:] = np.array([1, 2, 6], np.float32)[:, None, None, None]
    make_committer(dataset).commit([write_receipt(dataset, patches, make_decoded("b", 5))])
    features = read(dataset, folder)
    np.testing.assert_array_equal(read_values(features, "z_mean"), [[3, 4], [5, 6]])
    assert features.patches == 3


def test_a_scan_without_all_layers_is_left_out_and_counted(dataset: Dataset, folder: Path) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    late = make_decoded("a", 7, due_layers=["late"])
    committer.commit([write_receipt(dataset, late, recipes=WITH_LATE)])
    features = read(dataset, folder)
    assert features.scan_ids == ("a",)
    assert features.cautions == ("1 scans are left out, because they do not have all layers or are not ok.",)
    assert read(dataset, folder, ["z_mean"]).scan_ids == ("a", "b")


def test_a_layer_that_few_scans_have_is_no_candidate(dataset: Dataset, folder: Path) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, *(make_decoded(f"s{n}", n) for n in range(4)))])
    late = make_decoded("s1", 7, due_layers=["late"])
    committer.commit([write_receipt(dataset, late, recipes=WITH_LATE)])
    features = read(dataset, folder)
    assert len(features.scan_ids) == 4
    ((layer, reason),) = features.left_out
    assert layer == "late"
    assert "only 1 of 4 scans have it" in reason


def test_rows_of_a_rare_recipe_are_left_out_with_a_caution(dataset: Dataset, folder: Path) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, *(make_decoded(f"s{n}", n) for n in range(4)))])
    other = make_decoded("s1", 70, due_layers=["map"])
    committer.commit([write_receipt(dataset, other, recipes={**RECIPES, "map": "r9"})])
    features = read(dataset, folder)
    assert features.scan_ids == ("s0", "s2", "s3")
    assert read_values(features, "map").max() == 3
    assert any("another recipe for 1 scans" in caution for caution in features.cautions)


def test_a_layer_with_too_many_values_is_no_candidate(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    monkeypatch.setattr(feature_set, "MAX_UNITS", 5)
    features = read(dataset, folder)
    assert [view.layer for view in features.views] == ["z_mean"]
    assert "6 values per scan are more than 5; add the layer with pool avg or grid" in features.left_out[0][1]


def test_an_output_without_a_usable_layer_is_refused(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_committer(dataset).commit([make_failed_receipt("x")])
    with pytest.raises(UsageError, match="run `featray extract` first"):
        read(dataset, folder)
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    with pytest.raises(UsageError, match="no layer 'z_men'; did you mean 'z_mean'"):
        read(dataset, folder, ["z_men"])
    monkeypatch.setattr(feature_set, "MAX_UNITS", 1)
    with pytest.raises(UsageError, match="no layer can be compared: map: 6 values"):
        read(dataset, folder)


def test_views_are_named_by_pooling_and_ordered_by_their_place_in_the_model(
    dataset: Dataset, folder: Path
) -> None:
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    assert [view.name for view in read(dataset, folder).views] == ["map (map)", "z_mean (vector)"]
    write_run(dataset)
    assert [view.name for view in read(dataset, folder).views] == ["z_mean (vector)", "map (grid)"]
    write_run(dataset, layer_positions={"z_mean": 9, "map": 4}, sampling_layers=["z_mean"])
    views = read(dataset, folder).views
    assert [view.name for view in views] == ["map (grid)", "z_mean (vector)"]
    assert [view.path for view in views] == ["encoder/conv_3", "encoder/z_mean"]
    assert [view.is_sampling for view in views] == [False, True]
