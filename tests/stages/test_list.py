"""Listing: every scan is listed once, with its path as the id; other files are counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from featray.config import SourceConfig
from featray.errors import ConfigError
from featray.schema import Scan
from featray.stages.list import list_scans
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (6, 16, 16)


def write_volume(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(make_phantom(seed, SHAPE), path)
    return path


def write_series(folder: Path, seed: int = 0) -> list[Path]:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return sorted(folder.iterdir())


def list_by_id(uri: Path | str, **more: Any) -> dict[str, Scan]:
    return {scan.scan_id: scan for scan in list_scans(SourceConfig(uri=str(uri), **more)).scans}


def test_ids_are_paths_below_the_root(tmp_path: Path) -> None:
    write_volume(tmp_path / "a" / "b c" / "x.nii.gz")
    write_volume(tmp_path / "y.NII")
    write_series(tmp_path / "d" / "s1")
    scans = list_by_id(tmp_path)
    assert {name: scan.format for name, scan in scans.items()} == {
        "a/b c/x.nii.gz": "nifti",
        "y.NII": "nifti",
        "d/s1": "dicom",
    }
    assert scans["a/b c/x.nii.gz"].uri == str(tmp_path / "a" / "b c" / "x.nii.gz")
    assert scans["d/s1"].uri == str(tmp_path / "d" / "s1")


def test_a_folder_with_glob_characters_in_its_name_is_listed_as_a_folder(tmp_path: Path) -> None:
    write_volume(tmp_path / "CT [2020]*" / "x.nii")
    assert list(list_by_id(tmp_path / "CT [2020]*")) == ["x.nii"]


def test_a_series_directly_in_the_root_has_the_name_of_the_root(tmp_path: Path) -> None:
    write_series(tmp_path / "case7")
    assert list(list_by_id(tmp_path / "case7")) == ["case7"]


def test_several_series_in_one_folder_get_different_ids(tmp_path: Path) -> None:
    for seed in (1, 2):
        for number, path in enumerate(write_series(tmp_path / f"s{seed}", seed)):
            (tmp_path / "mixed").mkdir(exist_ok=True)
            shutil.move(path, tmp_path / "mixed" / f"{number:03}-{seed}")  # a name without a suffix
    scans = list_by_id(tmp_path / "mixed")
    assert [len(scan.files) for scan in scans.values()] == [6, 6]
    assert all(name.startswith("mixed#") for name in scans)


def test_a_series_split_over_two_folders_is_one_scan(tmp_path: Path) -> None:
    files = write_series(tmp_path / "all")
    for index, path in enumerate(files):
        target = tmp_path / "export" / f"part{index % 2}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target / path.name)
    shutil.rmtree(tmp_path / "all")
    (scan,) = list_by_id(tmp_path).values()
    assert (scan.scan_id, len(scan.files)) == ("export", 6)


def test_hidden_files_are_skipped_and_other_files_are_counted(tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii")
    (tmp_path / "._x.nii").write_bytes(b"AppleDouble")
    (tmp_path / "labels.csv").write_text("scan_id\n")
    (tmp_path / "README").write_text("words")
    listing = list_scans(SourceConfig(uri=str(tmp_path)))
    assert [scan.scan_id for scan in listing.scans] == ["x.nii"]
    assert listing.ignored == {".csv": 1, "without suffix": 1}


def test_the_configured_format_selects_the_scans(tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii")
    write_series(tmp_path / "s")
    assert list(list_by_id(tmp_path, format="nifti")) == ["x.nii"]
    assert list(list_by_id(tmp_path, format="dicom")) == ["s"]


def test_content_depends_only_on_the_files_of_the_scan(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "x.nii")
    before = list_by_id(tmp_path)["x.nii"].content
    write_volume(tmp_path / "y.nii")
    assert list_by_id(tmp_path)["x.nii"].content == before
    write_volume(path, seed=1)
    assert list_by_id(tmp_path)["x.nii"].content != before


def test_a_missing_or_empty_folder_is_a_config_error(tmp_path: Path) -> None:
    for uri, fact in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no scan of format auto")):
        with pytest.raises(ConfigError, match=fact):
            list_by_id(uri)
    with pytest.raises(ConfigError, match="cannot open"):
        list_by_id("nosuchprotocol://x")


def test_a_manifest_may_name_another_file_system(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"uri\nnosuch://x.nii\nfile://{write_volume(tmp_path / 'x.nii')}\n")
    scans = list_by_id(manifest)
    assert scans["nosuch://x.nii"].reason == "storage"
    assert scans[f"file://{tmp_path}/x.nii"].files == (str(tmp_path / "x.nii"),)


def test_a_manifest_without_its_columns_is_a_config_error(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,center_x\nx.nii,1.5\n")
    with pytest.raises(ConfigError) as caught:
        list_by_id(manifest, id_column="case")
    assert len(caught.value.problems) == 3


def test_glob_characters_in_a_file_name_never_match_another_file(tmp_path: Path) -> None:
    write_volume(tmp_path / "a" / "scan1.nii", seed=1)
    write_volume(tmp_path / "a" / "scan[1].nii", seed=2)
    manifest = tmp_path / "m.csv"
    manifest.write_text("uri\na/scan[1].nii\na/scan1.nii\n")
    assert {scan.files for scan in list_by_id(manifest).values()} == {
        (str(tmp_path / "a" / "scan[1].nii"),),
        (str(tmp_path / "a" / "scan1.nii"),),
    }
    assert list_by_id(tmp_path / "a" / "scan[1].nii")["scan[1].nii"].files == (
        str(tmp_path / "a" / "scan[1].nii"),
    )


def test_a_glob_lists_linked_files_and_a_folder_counts_linked_folders(tmp_path: Path) -> None:
    write_volume(tmp_path / "else" / "x.nii")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "link.nii").symlink_to(tmp_path / "else" / "x.nii")
    (tmp_path / "c" / "round").symlink_to(tmp_path / "c")
    assert list(list_by_id(f"{tmp_path}/c/*.nii")) == ["link.nii"]
    assert list_scans(SourceConfig(uri=str(tmp_path / "c"))).ignored == {"linked folder": 1}


def test_a_manifest_that_cannot_be_read_or_stored_is_a_config_error(tmp_path: Path) -> None:
    for name, data, fact in (
        ("latin.csv", "uri,ort\nx.nii,M\xfcnchen\n".encode("latin-1"), "neither UTF-8 CSV nor Parquet"),
        ("junk.parquet", b"junk", "neither UTF-8 CSV nor Parquet"),
        ("clash.csv", b"uri,Status\nx.nii,a\n", "rename the manifest column status"),
        ("twins.csv", b"uri,Site,site\nx.nii,a,b\n", "rename the manifest column site"),
        ("rows.csv", b"uri\n", "has no rows"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=fact):
            list_by_id(tmp_path / name)
