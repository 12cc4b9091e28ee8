"""Change the layers of a config and run again: only missing cells are computed, and other cells stay.

A cell is one scan x one layer. Each test extracts a small collection, changes `model.layers`, the model or
the scans, and runs again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml
from kill.harness import read_values
from small_model import save_small_model

import featray
from featray import checks, job, pipeline
from featray.cli.main import main
from featray.collection.listing import Listing
from featray.commands.plan import explain_scan
from featray.commands.status import status
from featray.commands.verify import verify
from featray.errors import ConfigError, Reason
from featray.job import RunOptions, RunScope
from featray.model import Extractor
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_phantom, write_nifti

Config = dict[str, Any]
Layer = str | dict[str, Any]
SCAN_NAMES = ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz"]
Z_MEAN, CONV_1, CONV_2 = "z_mean", "conv_1", "conv_2"
CONV_2_GRID = {"layer": CONV_2, "pool": "grid", "grid": [2, 2, 2], "as": "conv_2_grid"}

pytestmark = pytest.mark.slow


@pytest.fixture
def collection(phantoms: Path, tmp_path: Path) -> Path:
    """Return a copy of four phantoms that a test may change."""
    folder = tmp_path / "ct"
    folder.mkdir()
    for number, name in enumerate(SCAN_NAMES):
        shutil.copy(phantoms / "nifti" / f"phantom_{number:03}.nii.gz", folder / name)
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "model.keras", seed=1)


@pytest.fixture(scope="module")
def other_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with the same layers and other weights."""
    return save_small_model(tmp_path_factory.mktemp("model") / "model.keras", seed=2)


@pytest.fixture
def config(config_of: Any, collection: Path, model_file: Path) -> Config:
    """Return a config with the layer z_mean."""
    made: Config = config_of()
    made["source"] = {"uri": str(collection)}
    return with_layers(made, Z_MEAN, uri=str(model_file), custom_objects=[])


def with_layers(config: Config, *layers: Layer, **model: Any) -> Config:
    """Return the config with other layers, and other keys of the section `model`."""
    return {**config, "model": {**config["model"], "layers": list(layers), **model}}


def read_output(config: Config) -> dict[tuple[str, str, int], np.ndarray]:
    """Return (scan_id, layer, patch) → value; check that both tables name the same cells."""
    assert verify(open_output(config)).exit_code == 0
    return {key: np.array(value) for key, value in read_values(open_output(config)).items()}


def open_output(config: Config) -> Dataset:
    return Dataset(Store(config["output"]["uri"]))


def read_scans(config: Config) -> dict[str, dict[str, Any]]:
    """Return scan_id → row of the scans table."""
    rows = open_output(config).read(SCANS).to_pylist(maps_as_pydicts="strict")
    return {row["scan_id"]: row for row in rows}


def list_cells(config: Config) -> set[tuple[str, str]]:
    """Return (scan_id, layer) of all cells."""
    return {(scan_id, layer) for scan_id, layer, _ in read_output(config)}


def make_cells(scan_ids: Sequence[str], *layers: str) -> set[tuple[str, str]]:
    return {(scan_id, layer) for scan_id in scan_ids for layer in layers}


def read_layer_files(config: Config, *layers: str) -> dict[str, bytes]:
    """Return path → content of each file of the layers."""
    files = open_output(config).open_snapshot().files(FEATURES)
    folder = Path(config["output"]["uri"]) / FEATURES
    paths = [file.path for file in files if file.partition_values["layer"] in layers]
    return {path: (folder / path).read_bytes() for path in paths}


def assert_equals_fresh_extraction(config: Config, compared: Config | None = None) -> None:
    """Assert that an output has exactly the values that one run with all its layers stores.

    Args:
        config: Config that names all layers of the output.
        compared: Config of the output; None for the same.
    """
    fresh = {**config, "output": {"uri": config["output"]["uri"] + "-fresh"}}
    shutil.rmtree(fresh["output"]["uri"], ignore_errors=True)
    featray.extract(fresh)
    expected, actual = read_output(fresh), read_output(compared or config)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))
    assert {name: row["layers"] for name, row in read_scans(fresh).items()} == {
        name: row["layers"] for name, row in read_scans(compared or config).items()
    }


class CallRecord(list[tuple[int, frozenset[str]]]):
    """The calls of the model: number of inputs and names of the layers of each call.

    Attributes:
        operations: Names of the operations of all functions that were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def count_cells(self) -> Counter[str]:
        """Return layer → number of values."""
        return Counter({name: sum(n for n, names in self if name in names) for name in self.list_layers()})

    def list_layers(self) -> set[str]:
        return set().union(*(names for _, names in self))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> CallRecord:
    """Return the record of the calls of the model by runs in this process."""
    record, original = CallRecord(), Extractor.__call__

    def call(self: Extractor, batch: Any, seeds: Any = None, layers: Sequence[str] = ()) -> Any:
        values = original(self, batch, seeds, layers)
        record.append((len(batch), frozenset(values)))
        graph = self._get_function(layers).call.graph
        record.operations.update(operation.name for operation in graph.get_operations())
        return values

    monkeypatch.setattr(Extractor, "__call__", call)
    return record


@pytest.mark.parametrize("order", [[Z_MEAN, CONV_2], [CONV_2, Z_MEAN]])
def test_an_added_layer_and_another_pooling_are_computed_without_the_layers_that_are_there(
    config: Config, calls: CallRecord, order: list[str]
) -> None:
    featray.extract(with_layers(config, *order))
    stored = read_layer_files(config, "z_mean", "conv_2")
    calls.clear()
    calls.operations.clear()
    more = with_layers(config, *order, CONV_1, CONV_2_GRID)
    summary = featray.extract(more)
    assert calls.count_cells() == {"conv_1": 4, "conv_2_grid": 4}
    assert any("conv_2" in name for name in calls.operations)
    assert not [name for name in calls.operations if "mean" in name]
    assert read_layer_files(config, "z_mean", "conv_2") == stored
    assert (summary.done, summary.ok, summary.exit_code) == (4, 4, 0)
    work = "2 new layers for 4 scans; 2 layers are up to date and stay as they are"
    assert summary.work == work
    assert f"work: {work}" in summary.text()
    assert_equals_fresh_extraction(more)
    assert featray.extract(with_layers(config, CONV_2_GRID, CONV_1, *reversed(order))).done == 0


def test_a_plan_counts_missing_cells_and_says_which_layers_stay(config: Config) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    plan = featray.plan(with_layers(config, Z_MEAN, CONV_1, CONV_2_GRID))
    assert (plan.incomplete, plan.todo, plan.refresh_todo, plan.up_to_date) == (4, 4, 4, 0)
    assert plan.work == "2 new layers for 4 scans; 1 layer is up to date and stays as it is"
    assert plan.cells == {"new": 0, "changed": 0, "missing": 8, "stale": 0, "failed": 0, "up_to_date": 4}
    assert plan.other_layers == {"conv_2": 4}
    assert f"to compute: {plan.work}" in plan.text()
    assert "this config does not name these layers, so they stay: conv_2 (4 scans)" in plan.text()
    why = explain_scan(with_layers(config, Z_MEAN, CONV_1, CONV_2_GRID), "a.nii.gz")
    assert why == "incomplete: content is unchanged; it lacks layers conv_1, conv_2_grid"


def test_the_json_of_plan_extract_and_run_says_what_is_computed_and_what_stays(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(with_layers(config, Z_MEAN, CONV_1)))
    answers = {}
    for command in ("plan", "extract"):
        assert main([command, str(path), "--json"]) == 0
        answers[command] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answers["plan"]["cells"]["missing"] == answers["plan"]["cells"]["up_to_date"] == 4
    folder = Path(config["output"]["uri"]) / "runs" / answers["extract"]["run_id"]
    run = json.loads((folder / "run.json").read_text())
    for answer in (*answers.values(), run["summary"]):
        assert answer["work"] == "1 new layer for 4 scans; 1 layer is up to date and stays as it is"
        assert answer["other_layers"] == {"conv_2": 4}
    assert run["layer_recipes"] == answers["plan"]["layer_recipes"]
    assert "work: 1 new layer for 4 scans" in (folder / "summary.md").read_text()


def test_new_scans_and_a_new_layer_are_computed_in_one_run(
    config: Config, collection: Path, phantoms: Path, calls: CallRecord
) -> None:
    featray.extract(config)
    for number in (8, 9):
        shutil.copy(phantoms / "nifti" / f"phantom_{number:03}.nii.gz", collection / f"new_{number}.nii.gz")
    calls.clear()
    more = with_layers(config, Z_MEAN, CONV_2, CONV_2_GRID)
    summary = featray.extract(more)
    assert calls.count_cells() == {"z_mean": 2, "conv_2": 6, "conv_2_grid": 6}
    assert summary.work == "2 new scans; 2 new layers for 4 scans; 1 layer is up to date and stays as it is"
    assert (summary.done, summary.ok) == (6, 6)
    assert_equals_fresh_extraction(more)


def test_all_patches_of_a_scan_get_an_added_layer(config: Config) -> None:
    config = {**config, "preprocess": {"size": [8, 32, 32], "fit": "patches", "stride": [8, 8, 16]}}
    featray.extract(config)
    more = with_layers(config, CONV_2, Z_MEAN)
    assert featray.extract(more).done == 4
    assert {patch for _, _, patch in read_output(config)} == set(range(8))
    assert_equals_fresh_extraction(more)


def test_all_rows_of_an_array_get_an_added_layer(tmp_path: Path) -> None:
    vector = keras.Input((12,))
    hidden = keras.layers.Dense(5, name="hidden")(vector)
    keras.Model(vector, keras.layers.Dense(3, name="code")(hidden)).save(tmp_path / "dense.keras")
    (tmp_path / "arrays").mkdir()
    rng = np.random.default_rng(0)
    for rows in (7, 2, 11):
        np.save(tmp_path / "arrays" / f"{rows}.npy", rng.random((rows, 12), np.float32))
    config: Config = {
        "source": {"uri": str(tmp_path / "arrays"), "format": "npy", "rows": True},
        "model": {"uri": str(tmp_path / "dense.keras"), "layers": ["code"], "batch_size": 4},
        "output": {"uri": str(tmp_path / "out")},
        "run": {"engine": "inline", "decode": {"workers": 0}},
    }
    featray.extract(config)
    np.save(tmp_path / "arrays" / "new.npy", rng.random((3, 12), np.float32))
    more = with_layers(config, "hidden", "code")
    assert featray.extract(more).done == 4
    assert len(read_output(config)) == 2 * (7 + 2 + 11 + 3)
    assert_equals_fresh_extraction(more)


def test_scans_of_several_shapes_get_an_added_layer(config: Config, collection: Path, tmp_path: Path) -> None:
    volume = keras.Input((None, None, None, 1))
    maps = keras.layers.Conv3D(3, 3, padding="same", name="maps")(volume)
    more_maps = keras.layers.Conv3D(2, 3, padding="same", name="more_maps")(maps)
    keras.Model(volume, keras.layers.GlobalAveragePooling3D(name="mean")(more_maps)).save(
        tmp_path / "convolutional.keras"
    )
    shapes = [(6, 20, 24), (7, 16, 16), (6, 20, 24), (9, 20, 20)]
    for seed, name in enumerate(SCAN_NAMES):
        write_nifti(make_phantom(seed, shapes[seed]), collection / name)
    model = {"uri": str(tmp_path / "convolutional.keras"), "custom_objects": []}
    config = {**with_layers(config, "mean", **model), "preprocess": {"size": None}}
    featray.extract(config)
    write_nifti(make_phantom(5, (6, 20, 24)), collection / "new.nii.gz")
    maps_layer = {"layer": "maps", "pool": "none"}
    more = with_layers(config, "mean", maps_layer, "more_maps")
    assert featray.extract(more).done == 5
    assert_equals_fresh_extraction(more)


def interrupt_after(calls_before_stop: int, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return a stop event that is set after some calls of the model; each scan is a call and a file."""
    monkeypatch.setattr(job, "_scans_per_file", lambda scans, values: 1)
    stop, original, count = threading.Event(), Extractor.__call__, [0]

    def call(self: Extractor, *args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] >= calls_before_stop:
            stop.set()
        return original(self, *args, **options)

    monkeypatch.setattr(Extractor, "__call__", call)
    return stop


def test_an_interrupted_run_that_adds_layers_is_resumed_without_computing_a_cell_twice(
    config: Config, collection: Path, phantoms: Path, calls: CallRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4, 10):
        shutil.copy(phantoms / "nifti" / f"phantom_{number:03}.nii.gz", collection / f"{number}.nii.gz")
    config["model"]["batch_size"] = 1
    featray.extract(config)
    calls.clear()
    more = with_layers(config, Z_MEAN, CONV_2, CONV_1)
    with monkeypatch.context() as patch:
        summary = featray.extract(more, stop=interrupt_after(3, patch))
    assert (summary.exit_code, summary.interrupted, summary.ok, summary.missing) == (130, True, 10, 0)
    assert 0 < summary.done < 10
    computed = calls.count_cells()
    plan = featray.plan(more)
    assert (plan.incomplete, plan.up_to_date) == (10 - summary.done, summary.done)
    left = "scan" if plan.incomplete == 1 else "scans"
    stays = "1 layer is up to date and stays as it is"
    assert plan.work == f"2 incomplete layers for {plan.incomplete} {left}; {stays}"
    calls.clear()
    resumed = featray.extract(more)
    assert (resumed.done, resumed.exit_code) == (plan.incomplete, 0)
    assert computed + calls.count_cells() == {"conv_1": 10, "conv_2": 10}
    assert_equals_fresh_extraction(more)


def test_a_layer_that_the_config_does_not_name_stays_and_every_command_says_so(
    config: Config, collection: Path, phantoms: Path
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    stored = read_layer_files(config, "conv_2")
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "new.nii.gz")
    stays = "this config does not name these layers, so they stay: conv_2 (4 scans); "
    assert stays + "`refresh --drop-layers` removes them" in featray.plan(config).text()
    for command in (featray.extract, featray.refresh):
        summary = command(config)
        assert summary.other_layers == {"conv_2": 4}
        assert stays in summary.text()
    assert read_layer_files(config, "conv_2") == stored
    expected = make_cells(SCAN_NAMES, "z_mean", "conv_2") | {("new.nii.gz", "z_mean")}
    assert list_cells(config) == expected
    result = status(open_output(config))
    assert result.unnamed_layers == ("conv_2",)
    assert (
        "the config of the newest run does not name it, `refresh --drop-layers` removes it" in result.text()
    )


def test_drop_layers_removes_layers_also_if_nothing_else_is_to_do(config: Config) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2, CONV_1))
    stored = read_layer_files(config, "z_mean")
    summary = featray.refresh(config, drop_layers=True)
    assert summary.dropped_layers == ("conv_1", "conv_2")
    assert (summary.done, summary.other_layers, summary.exit_code) == (0, {}, 0)
    assert "dropped layer conv_2" in summary.text()
    assert read_layer_files(config, "z_mean") == stored
    assert_equals_fresh_extraction(config)
    on_disk = {path.parent.name for path in (Path(config["output"]["uri"]) / FEATURES).rglob("*.parquet")}
    assert on_disk == {"layer=z_mean"}
    again = featray.refresh(config, drop_layers=True)
    assert (again.run_id, again.dropped_layers) == ("", ())
    assert status(open_output(config)).unnamed_layers == ()


def test_the_command_line_drops_layers_in_the_run_that_adds_others(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    changed = with_layers(config, Z_MEAN, CONV_1)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(changed))
    assert main(["refresh", str(path), "--drop-layers", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["dropped_layers"], answer["done"]) == (["conv_2"], 4)
    assert answer["work"] == "1 new layer for 4 scans; 1 layer is up to date and stays as it is"
    assert_equals_fresh_extraction(changed)


def test_a_refresh_of_an_output_with_all_layers_drops_nothing(config: Config) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    files = read_layer_files(config, "z_mean", "conv_2")
    version = open_output(config).open_snapshot().versions
    summary = featray.refresh(with_layers(config, Z_MEAN, CONV_2), drop_layers=True)
    assert (summary.run_id, summary.dropped_layers) == ("", ())
    assert "nothing to do: 4 scans are up to date" in summary.text()
    assert open_output(config).open_snapshot().versions == version
    assert read_layer_files(config, "z_mean", "conv_2") == files


def named(layer: str, name: str) -> dict[str, Any]:
    return {"layer": layer, "as": name}


@pytest.mark.parametrize("command", [featray.extract, featray.refresh])
def test_a_layer_whose_name_alone_changes_is_renamed_without_computing(
    config: Config, calls: CallRecord, command: Callable[..., Any]
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    before = read_output(config)
    calls.clear()
    renamed = with_layers(config, named(Z_MEAN, "latent"), CONV_2)
    plan = featray.plan(renamed)
    assert (plan.todo, plan.renamed_layers) == (0, {"z_mean": "latent"})
    assert "to rename, without computing: layer z_mean to latent" in plan.text()
    summary = command(renamed)
    assert (summary.done, summary.renamed_layers) == (0, {"z_mean": "latent"})
    assert "renamed layer z_mean to latent" in summary.text()
    assert not calls
    assert list_cells(config) == make_cells(SCAN_NAMES, "latent", "conv_2")
    for (scan_id, layer, patch), value in read_output(config).items():
        old_name = "z_mean" if layer == "latent" else layer
        np.testing.assert_array_equal(value, before[scan_id, old_name, patch])
    assert command(renamed).run_id == ""


def test_two_layers_can_swap_their_names(config: Config, calls: CallRecord) -> None:
    featray.extract(with_layers(config, named(CONV_1, "x"), named(CONV_2, "y")))
    calls.clear()
    swapped = with_layers(config, named(CONV_1, "y"), named(CONV_2, "x"))
    summary = featray.extract(swapped)
    assert (summary.done, summary.renamed_layers) == (0, {"x": "y", "y": "x"})
    assert not calls
    assert_equals_fresh_extraction(swapped)


def test_a_layer_is_renamed_in_a_run_with_a_new_layer_and_new_scans(
    config: Config, collection: Path, phantoms: Path, calls: CallRecord
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_1))
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "new.nii.gz")
    calls.clear()
    # The new layer takes the name that the renamed one had.
    changed = with_layers(config, named(Z_MEAN, "latent"), named(CONV_2, "z_mean"), CONV_1)
    summary = featray.extract(changed)
    assert summary.renamed_layers == {"z_mean": "latent"}
    assert summary.work == "1 new scan; 1 new layer for 4 scans; 2 layers are up to date and stay as they are"
    assert calls.count_cells() == {"latent": 1, "conv_1": 1, "z_mean": 5}
    assert_equals_fresh_extraction(changed)


def test_two_models_under_different_names_are_side_by_side_in_one_output(
    config: Config, other_model_file: Path
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    first = read_output(config)
    files = read_layer_files(config, "z_mean", "conv_2")
    second = with_layers(config, named(Z_MEAN, "second"), uri=str(other_model_file))
    summary = featray.extract(second)
    assert (summary.done, summary.exit_code) == (4, 0)
    assert summary.other_layers == {"conv_2": 4, "z_mean": 4}
    assert read_layer_files(config, "z_mean", "conv_2") == files
    values = read_output(config)
    assert list_cells(config) == make_cells(SCAN_NAMES, "z_mean", "conv_2", "second")
    for scan_id in SCAN_NAMES:
        assert not np.allclose(values[scan_id, "second", 0], first[scan_id, "z_mean", 0])
    for both in (with_layers(config, Z_MEAN, CONV_2), second):
        assert featray.extract(both).done == 0


def test_the_same_names_with_other_weights_are_refused_by_extract_and_replaced_by_refresh(
    config: Config, other_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    files = read_layer_files(config, "conv_2")
    other = with_layers(config, Z_MEAN, CONV_1, uri=str(other_model_file))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(other))
    assert main(["extract", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "(layers z_mean)" in message
    assert "`featray refresh` extracts them again" in message
    assert "{layer: ..., as: NAME}" in message
    assert featray.plan(other).text().count("refuses") == 1
    summary = featray.refresh(other)
    assert (summary.done, summary.ok, summary.other_layers) == (4, 4, {"conv_2": 4})
    assert summary.work == "1 new layer for 4 scans; 1 stale layer for 4 scans"
    assert read_layer_files(config, "conv_2") == files
    values = read_output(config)
    fresh = {**other, "output": {"uri": str(tmp_path / "fresh")}}
    featray.extract(fresh)
    for key, value in read_output(fresh).items():
        np.testing.assert_allclose(values[key], value, rtol=1e-5, atol=1e-6)
    assert len(values) == 3 * 4


def test_a_refresh_with_another_window_removes_no_layer_that_the_config_does_not_name_unless_asked_to(
    config: Config, calls: CallRecord
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    files = read_layer_files(config, "z_mean", "conv_2")
    other = {**config, "preprocess": {**config["preprocess"], "window": [-500, 500]}}
    calls.clear()
    with pytest.raises(ConfigError, match=r"a refresh would remove them\. .* add --drop-layers") as error:
        featray.refresh(other)
    assert "does not name: conv_2 (4 scans)" in str(error.value)
    assert (read_layer_files(config, "z_mean", "conv_2"), calls.count_cells()) == (files, {})
    plan = featray.plan(other)
    assert (plan.incompatible_layers, plan.lost_layers) == ({"conv_2": 4}, {})
    assert "refresh: refuses, because it would remove layers" in plan.text()
    summary = featray.refresh(other, drop_layers=True)
    assert (summary.done, summary.dropped_layers, summary.other_layers) == (4, ("conv_2",), {})
    assert list_cells(config) == make_cells(SCAN_NAMES, "z_mean")
    assert_equals_fresh_extraction(other)


def test_a_changed_scan_loses_all_its_cells_and_other_configs_add_theirs_again(
    config: Config, collection: Path, phantoms: Path, calls: CallRecord
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "b.nii.gz")
    sentence = "changed scans lose layers that this config does not name: conv_2 (1 scan)"
    assert sentence in featray.plan(config).text()
    summary = featray.refresh(config)
    assert (summary.done, summary.other_layers, summary.lost_layers) == (1, {"conv_2": 3}, {"conv_2": 1})
    assert sentence in summary.text()
    cells = make_cells(SCAN_NAMES, "z_mean", "conv_2")
    assert list_cells(config) == cells - {("b.nii.gz", "conv_2")}
    calls.clear()
    both = with_layers(config, Z_MEAN, CONV_2)
    summary = featray.extract(both)
    assert summary.work == "1 incomplete layer for 1 scan; 1 layer is up to date and stays as it is"
    assert calls.count_cells() == {"conv_2": 1}
    assert_equals_fresh_extraction(both)


@pytest.fixture
def overflow(config: Config, collection: Path, tmp_path: Path) -> Config:
    """Return a config whose layer `hot` is infinite for the scan `bright.nii.gz` and finite for others."""
    volume = keras.Input((8, 32, 32, 1))
    mean = keras.layers.GlobalAveragePooling3D(name="mean")(volume)
    hot = keras.layers.Dense(1, activation="exponential", name="hot")
    model = keras.Model(volume, [hot(mean), keras.layers.Dense(2, name="cold")(mean)])
    hot.set_weights([np.array([[1e4]]), np.array([-0.7e4])])
    model.save(tmp_path / "overflow.keras")
    phantom = make_phantom(0, (16, 40, 48))
    bright = np.clip(phantom.voxels_zyx, -1000, 1000) + 1500
    write_nifti(replace(phantom, voxels_zyx=bright), collection / "bright.nii.gz")
    made = with_layers(config, "mean", uri=str(tmp_path / "overflow.keras"), custom_objects=[])
    return {**made, "limits": {"max_failed_fraction": 0.5}}


def test_a_scan_that_fails_when_a_layer_is_added_keeps_its_other_cells(overflow: Config) -> None:
    featray.extract(overflow)
    before = read_scans(overflow)["bright.nii.gz"]
    more = with_layers(overflow, "mean", "hot")
    summary = featray.extract(more)
    assert (summary.done, summary.ok, summary.failed, summary.exit_code) == (5, 4, 1, 0)
    row = read_scans(overflow)["bright.nii.gz"]
    assert (row["status"], row["reason"], row["stage"]) == ("failed", "non_finite_features", "extract")
    assert (row["layers"], list(row["failed_layers"])) == (before["layers"], ["hot"])
    assert (row["patches"], row["shape"], row["hu_max"]) == (1, before["shape"], before["hu_max"])
    names = sorted([*SCAN_NAMES, "bright.nii.gz"])
    assert list_cells(overflow) == make_cells(names, "mean") | make_cells(SCAN_NAMES, "hot")
    assert sorted(featray.read(overflow["output"]["uri"], "mean").scan_ids) == names
    assert featray.plan(more).failed == 1
    assert featray.extract(more).done == 0
    assert featray.refresh(more).done == 0
    assert featray.refresh(more, retry=["non_finite_features"]).done == 1
    assert read_scans(overflow)["bright.nii.gz"]["layers"] == before["layers"]


def test_a_failure_is_cleared_without_computing_if_the_config_no_longer_names_the_layer(
    overflow: Config, calls: CallRecord
) -> None:
    featray.extract(overflow)
    both = with_layers(overflow, "mean", "hot")
    featray.extract(both)
    calls.clear()
    sentence = "1 failed scans have all layers of this config and become ok, without computing"
    plan = featray.plan(overflow)
    assert (plan.up_to_date, plan.todo, plan.cleared_failures) == (5, 0, 1)
    assert sentence in plan.text()
    why = explain_scan(overflow, "bright.nii.gz")
    assert "it failed (non_finite_features) for a layer that this config does not name" in why
    summary = featray.extract(overflow)
    assert (summary.ok, summary.failed, summary.done, summary.cleared_failures) == (5, 0, 0, 1)
    assert sentence in summary.text()
    assert not calls
    row = read_scans(overflow)["bright.nii.gz"]
    assert (row["status"], row["reason"], row["stage"], row["message"]) == ("ok", None, None, None)
    assert row["failed_layers"] == {}
    read_output(overflow)
    assert featray.extract(overflow).run_id == ""
    assert featray.extract(both).failed == 1, "the layer is tried again if the config names it again"


def test_a_scan_that_failed_because_of_one_layer_gets_the_others_when_the_config_no_longer_names_it(
    overflow: Config, calls: CallRecord
) -> None:
    assert featray.extract(with_layers(overflow, "mean", "hot")).failed == 1
    assert read_scans(overflow)["bright.nii.gz"]["layers"] == {}
    calls.clear()
    why = explain_scan(overflow, "bright.nii.gz")
    assert "tried again, because that run tried other layers" in why
    summary = featray.extract(overflow)
    assert (summary.done, summary.ok, summary.failed) == (1, 5, 0)
    assert calls.count_cells() == {"mean": 1}
    assert featray.extract(overflow).done == 0


def test_a_failed_scan_gets_further_layers_that_do_not_fail(overflow: Config) -> None:
    featray.extract(overflow)
    featray.extract(with_layers(overflow, "mean", "hot"))
    instead = with_layers(overflow, "mean", "cold")
    summary = featray.refresh(instead, drop_layers=True)
    assert (summary.ok, summary.done, summary.dropped_layers) == (5, 5, ("hot",))
    assert_equals_fresh_extraction(instead)


def test_a_changed_failed_scan_keeps_its_cells_until_a_refresh(overflow: Config, collection: Path) -> None:
    featray.extract(overflow)
    both = with_layers(overflow, "mean", "hot")
    featray.extract(both)
    os.utime(collection / "bright.nii.gz", ns=(1, 1))
    assert "only `refresh` processes it again" in explain_scan(both, "bright.nii.gz")
    assert featray.extract(both).done == 0
    assert ("bright.nii.gz", "mean") in list_cells(overflow)
    assert featray.refresh(both).done == 1
    row = read_scans(overflow)["bright.nii.gz"]
    assert (row["status"], row["layers"], sorted(row["failed_layers"])) == ("failed", {}, ["hot", "mean"])


def test_a_failed_scan_that_the_listing_cannot_reach_keeps_its_cells(
    overflow: Config, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featray.extract(overflow)
    both = with_layers(overflow, "mean", "hot")
    featray.extract(both)
    checked, listing = checks.check(both)
    scans = [
        replace(scan, content="", reason=Reason.STORAGE) if scan.scan_id == "bright.nii.gz" else scan
        for scan in listing.scans
    ]
    summary = pipeline.run(checked, Listing(tuple(scans)), RunScope(refresh=True), RunOptions())
    assert (summary.done, summary.failed) == (0, 1)
    assert ("bright.nii.gz", "mean") in list_cells(overflow)


@pytest.mark.parametrize("added", [[], [CONV_1]])
def test_changed_preprocessing_is_refused_by_extract_and_replaces_all_cells_in_refresh(
    config: Config, added: list[str]
) -> None:
    featray.extract(with_layers(config, Z_MEAN, CONV_2))
    files = read_layer_files(config, "z_mean", "conv_2")
    changed = with_layers(config, Z_MEAN, *added)
    changed["preprocess"] = {**config["preprocess"], "window": [-500, 500]}
    with pytest.raises(ConfigError, match=r"featray refresh.*choose another output\.uri"):
        featray.extract(changed)
    renamed = with_layers(changed, named(Z_MEAN, "narrow"))
    with pytest.raises(ConfigError, match=r"featray refresh.*choose another output\.uri"):
        featray.extract(renamed)
    assert read_layer_files(config, "z_mean", "conv_2") == files
    assert featray.refresh(changed, drop_layers=True).done == 4
    assert_equals_fresh_extraction(changed)


def test_values_of_a_sampling_layer_do_not_depend_on_the_layers_beside_it(
    config: Config, tmp_path: Path
) -> None:
    from featray.synthetic.vae import Sampling

    volume = keras.Input((8, 32, 32, 1))
    mean = keras.layers.GlobalAveragePooling3D(name="mean")(volume)
    spread = keras.layers.Dense(1, name="spread")(mean)
    draws = [Sampling(seed=number, name=f"draw_{number}")([mean, spread]) for number in range(2)]
    keras.Model(volume, [*draws, Sampling(seed=2, name="deep_draw")([draws[1], spread])]).save(
        tmp_path / "draws.keras"
    )
    model = {
        "uri": str(tmp_path / "draws.keras"),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "allow_stochastic": True,
    }
    featray.extract(with_layers(config, "draw_1", **model))
    featray.extract(with_layers(config, "mean", "draw_1", "deep_draw", **model))
    all_layers = with_layers(config, "draw_0", "deep_draw", "mean", "draw_1", **model)
    featray.extract(all_layers)
    assert_equals_fresh_extraction(all_layers)


@pytest.mark.ray
def test_engine_ray_adds_layers_and_scans_in_one_run_and_takes_the_inputs_from_the_cache(
    config: Config, collection: Path, phantoms: Path, local_ray: None, tmp_path: Path
) -> None:
    config["cache"] = {"uri": str(tmp_path / "cache")}
    featray.extract(config)
    shutil.copy(phantoms / "nifti" / "phantom_008.nii.gz", collection / "new_1.nii.gz")
    partly = with_layers(config, Z_MEAN, CONV_1)
    featray.extract(partly)
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "new_2.nii.gz")
    os.utime(collection / "a.nii.gz", ns=(1, 1))
    assert featray.refresh(config).done == 2  # new_2 and a have z_mean alone, the others also conv_1
    more = with_layers(config, Z_MEAN, CONV_1, CONV_2_GRID)
    on_ray = {**more, "run": {"engine": "ray", "actors": {"max": 1}}}
    shutil.copy(phantoms / "nifti" / "phantom_010.nii.gz", collection / "new_3.nii.gz")
    summary = featray.extract(on_ray)
    assert (summary.engine, summary.done, summary.ok) == ("ray", 7, 7)
    assert summary.from_cache == 6, "only new_3 was not decoded before"
    assert_equals_fresh_extraction({**more, "cache": {}})
