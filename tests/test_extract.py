"""`featray.extract`, end to end: each scan of a collection is stored once, or fails with a reason."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import featray
from featray.errors import ConfigError, OutputBusyError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.lease import Lease
from featray.storage.store import Store
from featray.synthetic.phantom import make_phantom, write_nifti

LAYER_NAMES = ["encoder.conv_2", "encoder.pre_latent", "encoder.z_log_var", "encoder.z_mean"]


def open_output(config: dict[str, Any]) -> Dataset:
    return Dataset(Store(config["output"]["uri"]))


def read_features(config: dict[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """Return (scan_id, layer) → feature; check that each pair has one row."""
    table: pa.Table = open_output(config).read(FEATURES, ("scan_id", "layer", "feature"))
    rows = table.to_pylist()
    features = {(row["scan_id"], row["layer"]): np.array(row["feature"]) for row in rows}
    assert len(features) == len(rows), "a scan has two rows in a layer"
    return features


def read_scans(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return scan_id → row of the scans table."""
    return {row["scan_id"]: row for row in open_output(config).read(SCANS).to_pylist()}


def list_files(folder: str) -> dict[str, int]:
    """Return path → time of the last change, for all files below the folder."""
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_scan_of_a_mixed_collection_has_every_layer(config_of: Any) -> None:
    config = config_of()
    summary = featray.extract(config)
    assert (summary.found, summary.ok, summary.failed, summary.excluded) == (12, 12, 0, 0)
    assert summary.exit_code == 0
    features = read_features(config)
    scans = [*(f"nifti/phantom_{n:03}.nii.gz" for n in range(11)), "dicom/phantom_011"]
    assert sorted(features) == sorted((scan, layer) for scan in scans for layer in LAYER_NAMES)
    assert {layer: len(features[scans[0], layer]) for layer in LAYER_NAMES} == dict(
        zip(LAYER_NAMES, [8, 16, 4, 4], strict=True)
    )


@pytest.mark.slow
def test_features_equal_the_values_of_the_full_model_for_the_same_input(
    config_of: Any, vae_file: Path
) -> None:
    import keras
    import nibabel

    from featray.synthetic.vae import Sampling

    config = config_of(preprocess={"interpolation": "nearest"})
    featray.extract(config)
    path = Path(config["source"]["uri"]) / "nifti/phantom_000.nii.gz"
    # Preprocessing by hand: the RAS array of nibabel is flipped along x and y to get LPS, and the nearest
    # voxel is taken, with half-pixel centers.
    image = nibabel.as_closest_canonical(nibabel.load(path))
    volume = np.asanyarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    index = [
        np.floor((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip((8, 32, 32), volume.shape, strict=True)
    ]
    tensor = (np.clip(volume[np.ix_(*index)], -1000, 1000).astype(np.float32) + 1000) / 2000
    vae = keras.models.load_model(vae_file, custom_objects={"Sampling": Sampling}, compile=False)
    encoder = vae.get_layer("encoder")
    expected = keras.Model(encoder.input, encoder.get_layer("z_mean").output)(tensor[None, ..., None])
    actual = read_features(config)["nifti/phantom_000.nii.gz", "encoder.z_mean"]
    np.testing.assert_allclose(actual, np.asarray(expected)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_second_extract_writes_nothing_and_reports_that_nothing_is_to_do(config_of: Any) -> None:
    config = config_of()
    featray.extract(config)
    before = list_files(config["output"]["uri"])
    summary = featray.extract(config)
    assert list_files(config["output"]["uri"]) == before
    assert (summary.done, summary.ok, summary.exit_code) == (0, 12, 0)
    assert "nothing to do: 12 scans are up to date" in summary.text()


@pytest.fixture
def broken(phantoms: Path, tmp_path: Path) -> Path:
    """Return a folder with two readable scans, six broken files, and a file that is no scan."""
    folder = tmp_path / "broken"
    (folder / "more").mkdir(parents=True)
    good = phantoms / "nifti" / "phantom_000.nii.gz"
    shutil.copy(good, folder / "good.nii.gz")
    shutil.copytree(phantoms / "dicom" / "phantom_011", folder / "series")
    data = good.read_bytes()
    (folder / "more" / "truncated.nii.gz").write_bytes(data[: len(data) // 2])
    (folder / "truncated.nii").write_bytes(gzip.decompress(data)[:5000])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii").write_text("this is no image")
    (folder / "noise.nii.gz").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "noise.dcm").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "notes.txt").write_text("not a scan at all")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_broken_files_fail_with_a_reason_and_do_not_affect_other_scans(
    config_of: Any, broken: Path, workers: int
) -> None:
    config = config_of(source={"uri": str(broken)}, run={"decode": {"workers": workers}})
    summary = featray.extract(config)
    scans = read_scans(config)
    assert {name: row["reason"] for name, row in scans.items()} == {
        "good.nii.gz": None,
        "series": None,
        "more/truncated.nii.gz": "truncated",
        "truncated.nii": "truncated",
        "empty.nii.gz": "empty",
        "text.nii": "unreadable",
        "noise.nii.gz": "unreadable",
        "noise.dcm": "unreadable",
    }
    assert (summary.found, summary.ok, summary.failed) == (8, 2, 6)
    assert summary.exit_code == 3
    assert summary.ignored == {".txt": 1}
    assert {scan for scan, _ in read_features(config)} == {"good.nii.gz", "series"}
    assert all(
        row["message"] and str(broken) not in row["message"] for row in scans.values() if row["reason"]
    )


@pytest.mark.slow
def test_with_failures_within_the_limit_the_exit_code_is_0(config_of: Any, broken: Path) -> None:
    config = config_of(source={"uri": str(broken)}, limits={"max_failed_fraction": 0.8})
    assert featray.extract(config).exit_code == 0


@pytest.mark.slow
def test_a_later_run_extracts_only_the_scans_that_were_added(
    config_of: Any, phantoms: Path, tmp_path: Path
) -> None:
    collection = tmp_path / "growing"
    collection.mkdir()
    shutil.copy(phantoms / "nifti" / "phantom_000.nii.gz", collection)
    config = config_of(source={"uri": str(collection)})
    assert featray.extract(config).done == 1
    shutil.copy(phantoms / "nifti" / "phantom_001.nii.gz", collection)
    assert featray.extract(config).done == 1
    assert len(read_features(config)) == 2 * len(LAYER_NAMES)


@pytest.mark.slow
def test_superseded_files_that_a_killed_run_left_are_deleted_by_a_run_that_extracts_nothing(
    config_of: Any, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = tmp_path / "collection"
    collection.mkdir()
    (collection / "x.nii.gz").write_bytes(b"")
    config = config_of(source={"uri": str(collection)})
    assert featray.extract(config).failed == 1
    shutil.copy(phantoms / "nifti" / "phantom_000.nii.gz", collection / "x.nii.gz")

    def interrupt(self: Store, names: list[str]) -> None:
        if any(name.startswith("scans/") for name in names):
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "delete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        featray.extract(config)
    monkeypatch.undo()
    assert len(list((Path(config["output"]["uri"]) / "scans").glob("*.parquet"))) == 2
    summary = featray.extract(config)
    assert (summary.done, summary.ok) == (0, 1)
    assert len(list((Path(config["output"]["uri"]) / "scans").glob("*.parquet"))) == 1


@pytest.mark.slow
def test_another_recipe_is_refused_before_anything_is_written(config_of: Any) -> None:
    config = config_of()
    featray.extract(config)
    before = list_files(config["output"]["uri"])
    with pytest.raises(ConfigError, match="another recipe"):
        featray.extract(config, ["preprocess.window=[-500, 500]"])
    assert list_files(config["output"]["uri"]) == before


def test_an_output_that_another_run_holds_is_refused(config_of: Any) -> None:
    config = config_of()
    with Lease(Store(config["output"]["uri"]), "someone"), pytest.raises(OutputBusyError, match="someone"):
        featray.extract(config)


@pytest.mark.slow
def test_each_patch_has_a_number_and_its_origin(config_of: Any) -> None:
    config = config_of(
        preprocess={"fit": "patches", "stride": [8, 8, 16]}, model={"layers": ["encoder/z_mean"]}
    )
    featray.extract(config, ["source.uri=" + config["source"]["uri"] + "/nifti/phantom_000.nii.gz"])
    rows = open_output(config).read(FEATURES, ("patch", "origin")).sort_by("patch").to_pylist()
    origins = [[z, y, x] for z in (0, 8) for y in (0, 8) for x in (0, 16)]
    assert rows == [{"patch": n, "origin": origin} for n, origin in enumerate(origins)]
    assert read_scans(config)["phantom_000.nii.gz"]["patches"] == len(origins)


@pytest.mark.slow
def test_a_fully_convolutional_model_takes_scans_at_their_native_size(config_of: Any, tmp_path: Path) -> None:
    import keras

    volume = keras.Input((None, None, None, 1))
    maps = keras.layers.Conv3D(3, 3, padding="same", name="maps")(volume)
    keras.Model(volume, keras.layers.GlobalAveragePooling3D(name="mean")(maps)).save(tmp_path / "fcn.keras")
    (tmp_path / "c").mkdir()
    for seed, shape in enumerate([(6, 20, 24), (7, 16, 16), (6, 20, 24)]):
        write_nifti(make_phantom(seed, shape), tmp_path / "c" / f"{seed}.nii")
    model = {
        "uri": str(tmp_path / "fcn.keras"),
        "custom_objects": [],
        "layers": [{"layer": "maps", "pool": "none"}],
    }
    config = config_of(
        source={"uri": str(tmp_path / "c")},
        preprocess={"size": None},
        model=model,
        run={"decode": {"workers": 2}},
    )
    assert featray.extract(config).ok == 3
    shapes = open_output(config).read(FEATURES, ("scan_id", "shape")).to_pylist()
    assert {row["scan_id"]: row["shape"] for row in shapes} == {
        "0.nii": [6, 20, 24, 3],
        "1.nii": [7, 16, 16, 3],
        "2.nii": [6, 20, 24, 3],
    }


@pytest.mark.slow
def test_the_run_folder_holds_the_config_the_versions_and_the_counts(config_of: Any) -> None:
    config = config_of(source={"storage_options": {"auto_mkdir": False}})
    summary = featray.extract(config)
    folder = Path(config["output"]["uri"]) / "runs" / summary.run_id
    run = json.loads((folder / "run.json").read_text())
    assert {"python", "featray", "keras", "tensorflow", "ray", "numpy"} <= set(run["versions"])
    assert run["config"]["source"]["storage_options"] == {"auto_mkdir": "***"}
    assert run["summary"]["ok"] == 12
    assert run["recipe"]["preprocess"]["window"] == [-1000, 1000]
    assert len(run["model_sha256"]) == 64
    assert run["machine"]["cpus"] >= 1
    assert "12 ok" in (folder / "summary.md").read_text()


@pytest.mark.slow
def test_a_manifest_sets_ids_and_further_columns_of_scans(
    config_of: Any, phantoms: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "uri,case,site\n"
        f"{phantoms}/nifti/phantom_000.nii.gz,one,A\n"
        f"{phantoms}/dicom/phantom_011,two,B\n"
        f"{phantoms}/nifti/nowhere.nii.gz,three,B\n"
        f"{phantoms}/nifti/phantom_001.nii.gz,one,A\n"
    )
    config = config_of(
        source={"uri": str(manifest), "id_column": "case"}, output={"partition_by": ["layer", "site"]}
    )
    summary = featray.extract(config)
    rows = read_scans(config)
    assert {name: (row["site"], row["reason"]) for name, row in rows.items()} == {
        "one": ("A", None),
        "two": ("B", None),
        "three": ("B", "storage"),
        "one#2": ("A", "duplicate_id"),
    }
    assert summary.found == 4
    table = pl.scan_delta(str(Path(config["output"]["uri"]) / "features")).collect()
    assert dict(table.select("scan_id", "site").iter_rows()) == {"one": "A", "two": "B"}


@pytest.mark.slow
def test_a_failed_scan_has_no_features(config_of: Any, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.nii").write_bytes(b"\0" * 352)
    config = config_of(source={"uri": str(tmp_path / "c")})
    assert featray.extract(config).failed == 1
    assert read_features(config) == {}
