"""One pass through the scans of an output: what it takes from them, and what it leaves out with a reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from small_model import save_small_model

import featray
from featray.commands.report.inputs.found_config import FoundConfig, find_recorded_config
from featray.commands.report.inputs.read_inputs import InputRequest, ReportInputs, read_inputs
from featray.commands.report.labeled.baselines import count_hu_histogram, resize_voxels
from featray.config import Config
from featray.model import Extractor
from featray.stages.decode import Decoder
from featray.stages.list import list_scans

from .conftest import Project


class Counter:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def read(project: Project, config: Config | None = None, /, **wanted: Any) -> ReportInputs:
    request = InputRequest(project.scans(), **wanted)
    counter, folder = Counter(), project.folder / "temporary"
    folder.mkdir(exist_ok=True)
    result = read_inputs(FoundConfig(config or project.config()), request, folder, counter)
    assert counter.calls == len(request.scans)
    return result


def read_tensors(config: Config) -> dict[str, np.ndarray]:
    decoder = Decoder.from_config(config)
    return {scan.scan_id: decoder(scan).tensor for scan in list_scans(config.source).scans}


def layer_recipes(project: Project) -> dict[str, str]:
    (layers,) = {tuple(cells) for cells in project.scans()["layers"].to_pylist()}
    return dict(layers)


def test_the_baselines_are_those_of_the_model_inputs(project: Project) -> None:
    inputs, tensors = read(project), read_tensors(project.config())
    assert inputs.cautions == ()
    assert list(inputs.scan_ids) == project.scans()["scan_id"].to_pylist()
    assert inputs.histogram is not None
    assert inputs.voxels is not None
    assert (inputs.histogram.units, inputs.voxels.units) == (64, 4096)
    histograms, voxels = inputs.histogram.read(slice(None)), inputs.voxels.read(slice(None))
    for row, scan_id in enumerate(inputs.scan_ids):
        (volume,) = tensors[scan_id]
        assert np.array_equal(histograms[row], count_hu_histogram(volume, value_range=(0, 1)))
        assert np.array_equal(voxels[row], resize_voxels(volume))
    assert inputs.slices == {}
    assert inputs.random == ()
    assert inputs.stability == ()


def test_the_config_that_the_run_recorded_is_enough(project: Project) -> None:
    found = find_recorded_config(project.dataset, project.recipe)
    result = read_inputs(found, InputRequest(project.scans()), project.folder, Counter())
    assert len(result.scan_ids) == 6
    assert result.cautions == ()


def test_slices_are_the_middle_planes_of_the_wanted_scans_in_their_proportions(project: Project) -> None:
    scan_id = project.scans()["scan_id"][1].as_py()
    inputs = read(project, slice_ids=[scan_id])
    assert list(inputs.slices) == [scan_id]
    image = inputs.slices[scan_id]
    # 40 x 48 voxels over 400 x 400 mm
    assert (image.height, image.width) == (96, 96)
    pixels = cv2.imdecode(np.frombuffer(image.png, np.uint8), cv2.IMREAD_GRAYSCALE)
    plane = read_tensors(project.config())[scan_id][0, 4]
    resized = cv2.resize(plane, (96, 96), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels / 255 - resized.clip(0, 1)).max() < 1 / 60


@pytest.mark.slow
def test_worker_processes_give_the_same_as_this_process(project: Project) -> None:
    ids = project.scans()["scan_id"].to_pylist()
    wanted = {
        "slice_ids": ids[:3],
        "random_seeds": (0,),
        "stability_ids": ids[:4],
        "recipes": layer_recipes(project),
    }
    here = read(project, **wanted)
    values = [here.histogram.read(slice(None)), *(part.file.read(slice(None)) for part in here.random)]
    there = read(project, project.config(run={"decode": {"workers": 2}}), **wanted)
    assert there.histogram is not None
    others = [there.histogram.read(slice(None)), *(part.file.read(slice(None)) for part in there.random)]
    assert here.scan_ids == there.scan_ids
    assert here.slices == there.slices
    assert here.stability_scans == there.stability_scans == 4
    for one, other in zip(values, others, strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(here.stability, there.stability, strict=True):
        assert np.array_equal(one.reliability.icc_2_1, other.reliability.icc_2_1)


def test_changed_and_removed_scans_are_left_out_and_counted(project: Project) -> None:
    first, second = sorted((project.folder / "ct").rglob("*.nii.gz"))[:2]
    os.utime(first, (1, 1))
    scans = project.scans()
    second.unlink()
    result = read_inputs(
        FoundConfig(project.config()), InputRequest(scans), project.folder, counter := Counter()
    )
    assert counter.calls == 6
    assert len(result.scan_ids) == 4
    assert result.voxels is not None
    assert result.voxels.scans == 4
    changed, removed = sorted(result.cautions, reverse=True)
    assert removed == "Scans that are no longer in the collection: 1. They were not read again."
    assert changed.startswith("Scans that have changed since they were extracted")
    assert changed.endswith("extracts them again): 1. They were not read again.")


@pytest.mark.slow
def test_rows_stay_with_their_scans_if_a_scan_fails(project: Project) -> None:
    before = read(project, random_seeds=(0,), recipes=layer_recipes(project))
    assert before.voxels is not None
    voxels = before.voxels.read(slice(None))
    values = {part.layer: part.file.read(slice(None)) for part in before.random}
    damaged = sorted((project.folder / "ct").rglob("*.nii.gz"))[1]
    stat, size = damaged.stat(), damaged.stat().st_size
    damaged.write_bytes(b"x" * size)
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = read(project, random_seeds=(0,), recipes=layer_recipes(project))
    kept = [row for row, scan_id in enumerate(before.scan_ids) if scan_id in after.scan_ids]
    assert len(kept) == 5
    assert kept != list(range(5))
    assert after.voxels is not None
    assert np.array_equal(after.voxels.read(slice(None)), voxels[kept])
    for part in after.random:  # other groups of scans, so other last digits
        assert part.file.read(slice(None)) == pytest.approx(values[part.layer][kept], rel=1e-4, abs=1e-6)
    assert after.cautions == ("Scans that could not be read again: 1 (1 unreadable). They are left out.",)


def test_another_preprocessing_than_that_of_the_output_is_noticed(project: Project) -> None:
    result = read(project, project.config(preprocess={"window": [-500, 500]}))
    assert result.scan_ids == ()
    assert result.histogram is None
    caution, way_out = result.cautions
    assert "other reading or preprocessing than the config names" in caution
    assert caution.endswith("extracts them again): 6. They were not read again.")
    assert "featray doctor CONFIG" in way_out


def test_a_source_that_is_not_there_is_a_caution_with_a_way_out(project: Project) -> None:
    config = project.config(source={"uri": str(project.folder / "moved")})
    request = InputRequest(project.scans())
    result = read_inputs(FoundConfig(config, is_recorded=True), request, project.folder, Counter())
    assert result.scan_ids == ()
    (caution,) = result.cautions
    assert "does not exist" in caution
    assert caution.endswith("Pass the config file instead of the folder: `featray report CONFIG`.")


@pytest.mark.slow
def test_a_model_of_the_same_weights_gives_the_features_of_the_output(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.commands.report.inputs import load_models
    from featray.model.random_weights import RandomModel

    def load_trained(spec: Any, seed: int, *, input_zyx: Any) -> RandomModel:
        return RandomModel(Extractor(spec, input_zyx=input_zyx), seed)

    monkeypatch.setattr(load_models, "load_random_model", load_trained)
    inputs = read(project, random_seeds=(0,), recipes=layer_recipes(project))
    assert sorted(part.layer for part in inputs.random) == ["conv_2", "grid", "z_mean"]
    for part in inputs.random:
        features = featray.read(str(project.folder / "out"), part.layer)
        expected = features.array.reshape(len(features.scan_ids), -1)
        assert list(features.scan_ids) == list(inputs.scan_ids)
        assert part.file.read(slice(None)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_random_weights_give_features_of_each_seed_and_layer(project: Project) -> None:
    inputs = read(project, random_seeds=(0, 1), recipes=layer_recipes(project))
    assert inputs.cautions == ()
    values = {(part.seed, part.layer): part.file.read(slice(None)) for part in inputs.random}
    assert {key: array.shape for key, array in values.items() if key[0] == 1} == {
        (1, "z_mean"): (6, 4),
        (1, "conv_2"): (6, 3),
        (1, "grid"): (6, 16),
    }
    trained = featray.read(str(project.folder / "out"), "grid").array.reshape(6, 16)
    assert not np.allclose(values[0, "grid"], values[1, "grid"], rtol=0.1)
    assert not np.allclose(values[0, "grid"], trained, rtol=0.1)
    assert values[0, "grid"].std(axis=0).max() > 0


@pytest.mark.slow
def test_layers_of_another_model_are_left_out(project: Project) -> None:
    recipes = {**layer_recipes(project), "gone": "0" * 16}
    save_small_model(project.folder / "model.keras", 2)
    ids = project.scans()["scan_id"].to_pylist()
    inputs = read(project, random_seeds=(0,), stability_ids=ids, recipes=recipes)
    assert inputs.random == ()
    assert inputs.stability == ()
    assert len(inputs.cautions) == 2
    assert all("gone" in caution and "z_mean" in caution for caution in inputs.cautions)
    assert len(inputs.scan_ids) == 6


@pytest.mark.slow
def test_the_stability_of_the_demo_model_is_measured_on_the_wanted_scans(project: Project) -> None:
    ids = project.scans()["scan_id"].to_pylist()[:5]
    inputs = read(project, stability_ids=ids, recipes=layer_recipes(project))
    assert inputs.stability_scans == 5
    found = {(part.layer, part.perturbation.name): part for part in inputs.stability}
    assert {layer for layer, _ in found} == {"z_mean", "conv_2", "grid"}
    assert len(found) == 9
    assert np.median(found["conv_2", "noise"].reliability.icc_2_1) > 0.9
    assert inputs.cautions == ()


def test_a_model_that_cannot_be_loaded_costs_only_what_needs_it(project: Project) -> None:
    (project.folder / "model.keras").unlink()
    ids = project.scans()["scan_id"].to_pylist()
    inputs = read(project, random_seeds=(0,), stability_ids=ids, recipes=layer_recipes(project))
    assert len(inputs.scan_ids) == 6
    assert inputs.histogram is not None
    random, stability = inputs.cautions
    assert random.startswith("There is no baseline of random weights: ")
    assert stability.startswith("The stability was not measured: ")


def test_a_recorded_config_may_not_name_code_for_the_model(project: Project) -> None:
    config = project.config(model={"custom_objects": ["layers.py:Sampling"]})
    found = FoundConfig(config, is_recorded=True)
    request = InputRequest(project.scans(), random_seeds=(0,), recipes=layer_recipes(project))
    inputs = read_inputs(found, request, project.folder, Counter())
    (caution,) = inputs.cautions
    assert caution.startswith("The model was not loaded, because it needs code that only the config file may")
    assert len(inputs.scan_ids) == 6
    without_model = replace(request, random_seeds=())
    assert read_inputs(found, without_model, project.folder, Counter()).cautions == ()


def test_the_input_cache_is_used(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = project.config()
    config = config.model_copy(
        update={"cache": config.cache.model_copy(update={"uri": str(project.folder / "cache")})}
    )
    first = read(project, config)
    assert first.voxels is not None
    voxels = first.voxels.read(slice(None))

    def refuse(*_: Any) -> None:
        raise AssertionError("a scan was read")

    monkeypatch.setattr("featray.stages.read.Reader.read", refuse)
    second = read(project, config)
    assert second.voxels is not None
    assert len(second.scan_ids) == 6
    assert np.array_equal(second.voxels.read(slice(None)), voxels)


def save_arrays(folder: Path, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Save one array per shape, and a model and an output of them; return the config."""
    import keras

    rng = np.random.default_rng(0)
    (folder / "arrays").mkdir(parents=True)
    for number, shape in enumerate(shapes):
        np.save(folder / "arrays" / f"{number}.npy", rng.random(shape, np.float32))
    shape = (None, None, 3) if len(set(shapes)) > 1 else shapes[0]
    image = keras.Input(shape)
    mean = keras.layers.GlobalAveragePooling2D(name="mean")(image) if len(shape) == 3 else image
    keras.Model(image, keras.layers.Dense(2, name="dense")(mean)).save(folder / "model.keras")
    values: dict[str, Any] = {
        "source": {"uri": str(folder / "arrays"), "format": "npy"},
        "model": {"uri": str(folder / "model.keras"), "layers": ["dense"]},
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline", "decode": {"workers": 0}},
    }
    featray.extract(values)
    return values


@pytest.mark.slow
def test_arrays_have_voxels_and_pictures_where_they_have_planes(tmp_path: Path) -> None:
    images = Project(tmp_path / "images", save_arrays(tmp_path / "images", [(20, 24, 3)] * 3))
    inputs = read(images, slice_ids=["0.npy"])
    assert inputs.voxels is not None
    assert inputs.voxels.units == 4096
    assert (inputs.slices["0.npy"].height, inputs.slices["0.npy"].width) == (80, 96)
    assert inputs.histogram is None
    (caution,) = inputs.cautions
    assert "arrays without preprocess.window" in caution
    vectors = Project(tmp_path / "vectors", save_arrays(tmp_path / "vectors", [(7,)] * 3))
    inputs = read(
        vectors, slice_ids=["0.npy"], stability_ids=["0.npy", "1.npy"], recipes=layer_recipes(vectors)
    )
    assert inputs.voxels is not None
    expected = np.stack([np.load(tmp_path / f"vectors/arrays/{number}.npy") for number in range(3)])
    assert np.array_equal(inputs.voxels.read(slice(None)), expected)
    assert inputs.slices == {}
    assert inputs.stability == ()
    assert any("no meaning for arrays" in caution for caution in inputs.cautions)
