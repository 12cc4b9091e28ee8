"""Where scans lie and what may be asked of them: archives, pairs, copies, regions, files that change."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from featray.checks import check_source
from featray.config import Config, load
from featray.errors import ConfigError
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (6, 16, 16)
RAS_TO_LPS = np.diag([-1.0, -1, 1, 1])


def config_for(uri: Path, **sections: Any) -> Config:
    source = {"uri": str(uri), **sections.pop("source", {})}
    rest = {"model": {"uri": "m.keras", "layers": ["a"]}, "output": {"uri": "out"}}
    return load({"source": source, "preprocess": {"size": None, "window": None}, **rest, **sections})


def listed(config: Config) -> dict[str, Scan]:
    return {scan.scan_id: scan for scan in check_source(config).scans}


def decoded(config: Config) -> dict[str, Decoded]:
    decoder = Decoder.from_config(config)
    return {name: decoder(Scan.from_json(scan.to_json())) for name, scan in listed(config).items()}


def series(folder: Path, seed: int = 0) -> Path:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return folder


def volume(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(make_phantom(seed, SHAPE), path)
    return path


def zipped(path: Path, *places: Path, below: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for place in places:
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            for file in files:
                archive.write(file, f"{below}{place.name}/{file.name}" if place.is_dir() else file.name)
    return path


def grid(path: Path, values: np.ndarray, affine_lps: np.ndarray) -> Path:
    """Write a NIfTI file whose array axes are (x, y, z)."""
    nib.save(nib.Nifti1Image(values, RAS_TO_LPS @ affine_lps), path)
    return path


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def test_a_series_in_a_zip_archive_is_the_series_unpacked(tmp_path: Path) -> None:
    folder = series(tmp_path / "plain" / "s1")
    zipped(tmp_path / "packed" / "case.zip", folder)
    plain, packed = decoded(config_for(tmp_path / "plain")), decoded(config_for(tmp_path / "packed"))
    assert list(packed) == ["case.zip"]
    assert packed["case.zip"].record.status == "ok"
    assert np.array_equal(packed["case.zip"].tensor, plain["s1"].tensor)
    assert packed["case.zip"].record.uri.endswith("case.zip")


def test_an_archive_of_several_scans_gives_each_its_own_id(tmp_path: Path) -> None:
    places = series(tmp_path / "a"), series(tmp_path / "b", 1), volume(tmp_path / "x" / "v.nii.gz")
    zipped(tmp_path / "all" / "case.zip", *places)
    found = decoded(config_for(tmp_path / "all"))
    assert sorted(found) == ["case.zip/a", "case.zip/b", "case.zip/v.nii.gz"]
    assert all(one.record.status == "ok" for one in found.values())


def test_an_archive_that_cannot_be_trusted_is_one_failed_scan(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "climbs.zip", "w") as archive:
        archive.writestr("../../x.nii", b"0")
    (tmp_path / "cut.zip").write_bytes(
        zipped(tmp_path / "in" / "a.zip", series(tmp_path / "s")).read_bytes()[:-90]
    )
    shutil.rmtree(tmp_path / "in")
    found = listed(config_for(tmp_path))
    assert {name: str(scan.reason) for name, scan in found.items() if scan.reason} == {
        "climbs.zip": "unreadable",
        "cut.zip": "truncated",
    }


def test_an_archive_without_scans_is_ignored_and_counted(tmp_path: Path) -> None:
    volume(tmp_path / "v.nii")
    (tmp_path / "letter.txt").write_text("hello")
    zipped(tmp_path / "letters.zip", tmp_path / "letter.txt")
    listing = check_source(config_for(tmp_path))
    assert [scan.scan_id for scan in listing.scans] == ["v.nii"]
    assert listing.ignored == {".txt": 1, ".zip": 1}


def test_the_content_of_an_archived_scan_follows_its_bytes_alone(tmp_path: Path) -> None:
    def content(seed: int, name: str) -> str:
        archive = zipped(tmp_path / name / "c.zip", series(tmp_path / f"s{seed}", seed))
        os.utime(archive, (seed, seed))
        (scan,) = listed(config_for(tmp_path / name)).values()
        return scan.content

    assert content(1, "first") == content(1, "again") != content(2, "other")


@pytest.mark.parametrize("ends", [(".hdr", ".img"), (".hdr.gz", ".img.gz")])
def test_a_nifti_pair_is_one_scan(tmp_path: Path, ends: tuple[str, str]) -> None:
    values = ramp(4, 5, 6)
    nib.save(nib.Nifti1Pair(values, np.eye(4)), tmp_path / f"v{ends[1]}")
    found = decoded(config_for(tmp_path, preprocess={"size": None, "window": None, "orientation": "RAS"}))
    assert list(found) == [f"v{ends[1]}"]
    assert np.array_equal(found[f"v{ends[1]}"].tensor[0], values.transpose(2, 1, 0))


def test_half_of_a_pair_fails_and_names_what_is_missing(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(ramp(2, 3, 4), np.eye(4)), tmp_path / "v.img")
    (tmp_path / "v.hdr").unlink()
    (scan,) = listed(config_for(tmp_path)).values()
    assert (scan.reason, scan.scan_id) == ("unreadable", "v.img")
    assert "header (.hdr)" in scan.message


def test_a_copy_of_a_series_is_accepted_with_a_warning_or_excluded(tmp_path: Path) -> None:
    shutil.copytree(series(tmp_path / "a"), tmp_path / "b")
    found = listed(config_for(tmp_path))
    assert {name: scan.warnings for name, scan in found.items()} == {"a": (), "b": ("duplicate_id",)}
    found = listed(config_for(tmp_path, policy={"duplicates": "exclude"}))
    assert {name: scan.excluded for name, scan in found.items()} == {"a": False, "b": True}
    assert (found["b"].reason, "a copy of a" in found["b"].message) == ("duplicate_id", True)
    first = min((tmp_path / "a").iterdir())
    first.write_bytes(first.read_bytes()[:-100])  # nobody knows yet which of the two is whole
    found = listed(config_for(tmp_path, policy={"duplicates": "exclude"}))
    assert {name: (scan.excluded, scan.warnings) for name, scan in found.items()} == {
        "a": (False, ()),
        "b": (False, ("duplicate_id",)),
    }


@pytest.mark.parametrize("kind", [".nii", ".nii.gz"])
def test_a_file_with_the_same_bytes_is_a_copy_and_one_of_the_same_size_is_not(
    tmp_path: Path, kind: str
) -> None:
    first = volume(tmp_path / f"a{kind}")
    shutil.copy(first, tmp_path / f"b{kind}")
    other = bytearray(first.read_bytes())
    other[len(other) // 3] ^= 1
    (tmp_path / f"c{kind}").write_bytes(other)
    found = listed(config_for(tmp_path))
    assert {name[0]: scan.warnings for name, scan in found.items()} == {
        "a": (), "b": ("duplicate_id",), "c": ()
    }  # fmt: skip
    found = listed(config_for(tmp_path, policy={"duplicates": "exclude"}))
    assert [name[0] for name, scan in found.items() if scan.excluded] == ["b"]


def test_rows_of_one_scan_are_copies_unless_they_ask_for_other_regions(tmp_path: Path) -> None:
    grid(tmp_path / "v.nii", ramp(5, 5, 5), np.eye(4))
    header = "uri,case,version,center_x,center_y,center_z"
    rows = "v.nii,a,1,1,2,3", "v.nii,b,1,1,2,4", "v.nii,c,1,1,2,3"
    path = manifest(tmp_path, header, *rows)
    found = listed(config_for(path, source={"id_column": "case"}, preprocess=CROP))
    assert {name: scan.warnings for name, scan in found.items()} == {
        "a": (), "b": (), "c": ("duplicate_id",)
    }  # fmt: skip


def test_a_file_that_changed_since_it_was_listed_is_not_taken(tmp_path: Path) -> None:
    path = volume(tmp_path / "v.nii")
    config = config_for(tmp_path)
    (scan,) = listed(config).values()
    assert Decoder.from_config(config)(scan).record.status == "ok"
    volume(path, seed=9)
    os.utime(path, (1, 1))
    record = Decoder.from_config(config)(scan).record
    assert (record.reason, record.message) == ("storage", "changed since it was listed; run again")


def manifest(tmp_path: Path, header: str, *rows: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def test_the_box_of_a_mask_is_cut_out_with_its_margin(tmp_path: Path) -> None:
    values, affine = ramp(20, 20, 20), np.diag([2.0, 2, 2, 1])
    grid(tmp_path / "v.nii", values, affine)
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[4:7, 8:10, 12:13] = 1
    grid(tmp_path / "m.nii.gz", mask, affine)
    path = manifest(tmp_path, "uri,mask", "v.nii,m.nii.gz")
    (found,) = decoded(config_for(path)).values()
    assert np.array_equal(found.tensor[0], values.transpose(2, 1, 0)[12:13, 8:10, 4:7])
    (wide,) = decoded(config_for(path, preprocess={"size": None, "window": None, "margin": 2.5})).values()
    assert np.array_equal(wide.tensor[0], values.transpose(2, 1, 0)[10:15, 6:12, 2:9])
    assert found.record.shape == [20, 20, 20]  # of the input


def test_a_mask_on_another_grid_is_carried_over_in_millimetres(tmp_path: Path) -> None:
    values = ramp(20, 20, 20)
    grid(tmp_path / "v.nii", values, np.diag([1.0, 1, 1, 1]))
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[3, 4, 5] = 1  # 2 mm voxels, x turned round: centre at x = 18 - 6, y = 8, z = 10
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = 18, 0, 0
    grid(tmp_path / "m.nii", mask, affine)
    (found,) = decoded(config_for(manifest(tmp_path, "uri,mask", "v.nii,m.nii"))).values()
    # From 11 to 13, 7 to 9 and 9 to 11 mm: the voxels that this box touches.
    assert np.array_equal(found.tensor[0], values.transpose(2, 1, 0)[9:12, 7:10, 11:14])


@pytest.mark.parametrize(
    ("mask", "reason"), [("empty", "not_a_volume"), ("outside", "preprocess"), ("none.nii", "storage")]
)
def test_a_mask_that_cannot_be_used_fails_its_scan(tmp_path: Path, mask: str, reason: str) -> None:
    grid(tmp_path / "v.nii", ramp(4, 4, 4), np.eye(4))
    one, moved = np.ones((2, 2, 2), np.uint8), np.eye(4)
    moved[:3, 3] = 50
    grid(tmp_path / "empty.nii", np.pad(0 * one, 1), np.eye(4))
    grid(tmp_path / "outside.nii", np.pad(one, 1), moved)
    name = mask if mask.endswith(".nii") else f"{mask}.nii"
    (found,) = decoded(config_for(manifest(tmp_path, "uri,mask", f"v.nii,{name}"))).values()
    assert found.record.reason == reason
    assert "mask" in str(found.record.message)


CROP = {"size": [3, 3, 3], "window": None, "fit": "crop_pad"}


@pytest.mark.parametrize(("frame", "sign"), [("LPS", 1), ("RAS", -1)])
def test_a_crop_lies_around_the_centre_in_the_stated_frame(tmp_path: Path, frame: str, sign: int) -> None:
    values, affine = ramp(20, 20, 20), np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -10, -20, 5
    grid(tmp_path / "v.nii", values, affine)
    x, y, z = (2 * index + at for index, at in zip((4, 9, 15), (-10, -20, 5), strict=True))
    path = manifest(tmp_path, "uri,center_x,center_y,center_z", f"v.nii,{sign * x},{sign * y},{z + 0.4}")
    (found,) = decoded(config_for(path, source={"center_frame": frame}, preprocess=CROP)).values()
    assert np.array_equal(found.tensor[0], values.transpose(2, 1, 0)[14:17, 8:11, 3:6])


def test_a_crop_lies_around_the_centre_after_resampling_to_a_spacing(tmp_path: Path) -> None:
    values = np.zeros((20, 20, 20), np.int16)
    values[4:6, 8:10, 14:16] = 100
    grid(tmp_path / "v.nii", values, np.eye(4))
    path = manifest(tmp_path, "uri,center_x,center_y,center_z", "v.nii,4.5,8.5,14.5")
    crop = {**CROP, "spacing": [2, 2, 2], "interpolation": "area"}
    (found,) = decoded(config_for(path, preprocess=crop)).values()
    assert found.tensor[0, 1, 1, 1] == 100
    assert found.tensor[0].sum() == 100


def test_a_centre_outside_of_the_scan_fails_it_and_a_row_without_one_takes_the_middle(tmp_path: Path) -> None:
    values = ramp(5, 5, 5)
    grid(tmp_path / "a.nii", values, np.eye(4))
    shutil.copy(tmp_path / "a.nii", tmp_path / "b.nii")
    path = manifest(tmp_path, "uri,center_x,center_y,center_z", "a.nii,,,", "b.nii,99,0,0")
    found = decoded(config_for(path, preprocess=CROP))
    assert np.array_equal(found["a.nii"].tensor[0], values.transpose(2, 1, 0)[1:4, 1:4, 1:4])
    assert found["b.nii"].record.reason == "preprocess"


@pytest.mark.parametrize("row", ["v.nii,1,2,", "v.nii,1,2,x", "v.nii,1,2,nan"])
def test_a_centre_that_is_no_point_fails_its_row(tmp_path: Path, row: str) -> None:
    grid(tmp_path / "v.nii", ramp(5, 5, 5), np.eye(4))
    (scan,) = listed(config_for(manifest(tmp_path, "uri,center_x,center_y,center_z", row))).values()
    assert "three numbers" in scan.message


def test_a_centre_without_a_crop_is_a_config_error(tmp_path: Path) -> None:
    grid(tmp_path / "v.nii", ramp(5, 5, 5), np.eye(4))
    path = manifest(tmp_path, "uri,center_x,center_y,center_z", "v.nii,1,2,3")
    with pytest.raises(ConfigError, match="need fit: crop_pad"):
        check_source(config_for(path))


def test_content_follows_the_mask_and_the_centre(tmp_path: Path) -> None:
    grid(tmp_path / "v.nii", ramp(5, 5, 5), np.eye(4))
    mask = grid(tmp_path / "m.nii", np.ones((5, 5, 5), np.uint8), np.eye(4))
    header = "uri,mask,center_x,center_y,center_z"

    def content(row: str) -> str:
        (scan,) = listed(config_for(manifest(tmp_path, header, row), preprocess=CROP)).values()
        return scan.content

    first = content("v.nii,m.nii,1,2,3")
    assert first == content("v.nii,m.nii,1.0,2,3")
    os.utime(mask, (1, 1))
    others = [content(row) for row in ("v.nii,m.nii,1,2,3", "v.nii,m.nii,1,2,4", "v.nii,,1,2,3")]
    assert len({first, *others}) == 4


def test_one_of_several_volumes_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    values = ramp(4, 5, 6, 3)
    nib.save(nib.Nifti1Image(values, RAS_TO_LPS), tmp_path / "v.nii.gz")
    (refused,) = decoded(config_for(tmp_path)).values()
    assert refused.record.reason == "not_a_volume"
    (found,) = decoded(config_for(tmp_path, source={"volume": 1})).values()
    assert np.array_equal(found.tensor[0], values[..., 1].transpose(2, 1, 0))


def test_values_that_are_no_hu_are_refused_where_policy_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grid(tmp_path / "v.nii", rng.integers(0, 255, (20, 20, 20)).astype(np.uint8), np.eye(4))
    (found,) = decoded(config_for(tmp_path)).values()
    assert (found.record.status, "not_hu" in found.record.warnings) == ("ok", True)
    (refused,) = decoded(config_for(tmp_path, policy={"not_hu": "refuse"})).values()
    assert (refused.record.status, refused.record.reason) == ("failed", "not_ct")
