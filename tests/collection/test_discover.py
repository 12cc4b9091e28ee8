"""Scans in archives, NIfTI pairs, copies, regions that a manifest asks for, and files that change."""

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


def make_config(uri: Path, **sections: Any) -> Config:
    source = {"uri": str(uri), **sections.pop("source", {})}
    rest = {"model": {"uri": "m.keras", "layers": ["a"]}, "output": {"uri": "out"}}
    return load({"source": source, "preprocess": {"size": None, "window": None}, **rest, **sections})


def list_by_id(config: Config) -> dict[str, Scan]:
    return {scan.scan_id: scan for scan in check_source(config).scans}


def decode_by_id(config: Config) -> dict[str, Decoded]:
    decoder = Decoder.from_config(config)
    return {name: decoder(Scan.from_json(scan.to_json())) for name, scan in list_by_id(config).items()}


def write_series(folder: Path, seed: int = 0) -> Path:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return folder


def write_volume(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(make_phantom(seed, SHAPE), path)
    return path


def write_zip(path: Path, *places: Path, below: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for place in places:
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            for file in files:
                archive.write(file, f"{below}{place.name}/{file.name}" if place.is_dir() else file.name)
    return path


def write_grid(path: Path, values: np.ndarray, affine_lps: np.ndarray) -> Path:
    """Write a NIfTI file with the array axes (x, y, z)."""
    nib.save(nib.Nifti1Image(values, RAS_TO_LPS @ affine_lps), path)
    return path


def make_ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def test_a_series_in_a_zip_archive_decodes_as_the_unpacked_series(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "plain" / "s1")
    write_zip(tmp_path / "packed" / "case.zip", folder)
    plain, packed = (
        decode_by_id(make_config(tmp_path / "plain")),
        decode_by_id(make_config(tmp_path / "packed")),
    )
    assert list(packed) == ["case.zip"]
    assert packed["case.zip"].record.status == "ok"
    assert np.array_equal(packed["case.zip"].tensor, plain["s1"].tensor)
    assert packed["case.zip"].record.uri.endswith("case.zip")


def test_each_scan_in_an_archive_has_its_own_id(tmp_path: Path) -> None:
    places = (
        write_series(tmp_path / "a"),
        write_series(tmp_path / "b", 1),
        write_volume(tmp_path / "x" / "v.nii.gz"),
    )
    write_zip(tmp_path / "all" / "case.zip", *places)
    decoded = decode_by_id(make_config(tmp_path / "all"))
    assert sorted(decoded) == ["case.zip/a", "case.zip/b", "case.zip/v.nii.gz"]
    assert all(scan.record.status == "ok" for scan in decoded.values())


def test_an_unsafe_or_truncated_archive_is_one_failed_scan(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "climbs.zip", "w") as archive:
        archive.writestr("../../x.nii", b"0")
    (tmp_path / "cut.zip").write_bytes(
        write_zip(tmp_path / "in" / "a.zip", write_series(tmp_path / "s")).read_bytes()[:-90]
    )
    shutil.rmtree(tmp_path / "in")
    scans = list_by_id(make_config(tmp_path))
    assert {name: str(scan.reason) for name, scan in scans.items() if scan.reason} == {
        "climbs.zip": "unreadable",
        "cut.zip": "truncated",
    }


def test_an_archive_whose_directory_moves_a_slice_to_another_folder_is_one_failed_scan(
    tmp_path: Path,
) -> None:
    path = write_zip(tmp_path / "case.zip", write_series(tmp_path.parent / "series"))
    data = path.read_bytes()
    first_entry = data.index(b"PK\x01\x02")
    path.write_bytes(data[: first_entry + 46] + b"r" + data[first_entry + 47 :])  # series/ becomes reries/
    (scan,) = list_by_id(make_config(tmp_path)).values()
    assert (scan.scan_id, str(scan.reason)) == ("case.zip", "unreadable")


def test_an_archive_without_scans_is_counted_as_ignored(tmp_path: Path) -> None:
    write_volume(tmp_path / "v.nii")
    (tmp_path / "letter.txt").write_text("hello")
    write_zip(tmp_path / "letters.zip", tmp_path / "letter.txt")
    listing = check_source(make_config(tmp_path))
    assert [scan.scan_id for scan in listing.scans] == ["v.nii"]
    assert listing.ignored == {".txt": 1, ".zip": 1}


def test_the_content_of_an_archived_scan_depends_only_on_its_bytes(tmp_path: Path) -> None:
    def get_content(seed: int, name: str) -> str:
        archive = write_zip(tmp_path / name / "c.zip", write_series(tmp_path / f"s{seed}", seed))
        os.utime(archive, (seed, seed))
        (scan,) = list_by_id(make_config(tmp_path / name)).values()
        return scan.content

    assert get_content(1, "first") == get_content(1, "again") != get_content(2, "other")


@pytest.mark.parametrize("ends", [(".hdr", ".img"), (".hdr.gz", ".img.gz")])
def test_a_nifti_pair_is_one_scan(tmp_path: Path, ends: tuple[str, str]) -> None:
    values = make_ramp(4, 5, 6)
    nib.save(nib.Nifti1Pair(values, np.eye(4)), tmp_path / f"v{ends[1]}")
    decoded = decode_by_id(
        make_config(tmp_path, preprocess={"size": None, "window": None, "orientation": "RAS"})
    )
    assert list(decoded) == [f"v{ends[1]}"]
    assert np.array_equal(decoded[f"v{ends[1]}"].tensor[0], values.transpose(2, 1, 0))


def test_half_of_a_pair_fails_and_names_the_missing_file(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(make_ramp(2, 3, 4), np.eye(4)), tmp_path / "v.img")
    (tmp_path / "v.hdr").unlink()
    (scan,) = list_by_id(make_config(tmp_path)).values()
    assert (scan.reason, scan.scan_id) == ("unreadable", "v.img")
    assert "header (.hdr)" in scan.message


def test_a_copy_of_a_series_is_accepted_with_a_warning_or_excluded(tmp_path: Path) -> None:
    shutil.copytree(write_series(tmp_path / "a"), tmp_path / "b")
    scans = list_by_id(make_config(tmp_path))
    assert {name: scan.warnings for name, scan in scans.items()} == {"a": (), "b": ("duplicate_id",)}
    scans = list_by_id(make_config(tmp_path, policy={"duplicates": "exclude"}))
    assert {name: scan.excluded for name, scan in scans.items()} == {"a": False, "b": True}
    assert (scans["b"].reason, "a copy of a" in scans["b"].message) == ("duplicate_id", True)
    first = min((tmp_path / "a").iterdir())
    first.write_bytes(first.read_bytes()[:-100])  # the complete one of the two can only be found by reading
    scans = list_by_id(make_config(tmp_path, policy={"duplicates": "exclude"}))
    assert {name: (scan.excluded, scan.warnings) for name, scan in scans.items()} == {
        "a": (False, ()),
        "b": (False, ("duplicate_id",)),
    }


@pytest.mark.parametrize("kind", [".nii", ".nii.gz"])
def test_a_file_with_the_same_bytes_is_a_copy_and_another_file_of_the_same_size_is_not(
    tmp_path: Path, kind: str
) -> None:
    first = write_volume(tmp_path / f"a{kind}")
    shutil.copy(first, tmp_path / f"b{kind}")
    other = bytearray(first.read_bytes())
    other[len(other) // 3] ^= 1
    (tmp_path / f"c{kind}").write_bytes(other)
    scans = list_by_id(make_config(tmp_path))
    assert {name[0]: scan.warnings for name, scan in scans.items()} == {
        "a": (), "b": ("duplicate_id",), "c": ()
    }  # fmt: skip
    scans = list_by_id(make_config(tmp_path, policy={"duplicates": "exclude"}))
    assert [name[0] for name, scan in scans.items() if scan.excluded] == ["b"]


def test_rows_with_the_same_scan_are_copies_unless_they_ask_for_different_regions(tmp_path: Path) -> None:
    write_grid(tmp_path / "v.nii", make_ramp(5, 5, 5), np.eye(4))
    header = "uri,case,version,center_x,center_y,center_z"
    rows = "v.nii,a,1,1,2,3", "v.nii,b,1,1,2,4", "v.nii,c,1,1,2,3"
    path = write_manifest(tmp_path, header, *rows)
    scans = list_by_id(make_config(path, source={"id_column": "case"}, preprocess=CROP))
    assert {name: scan.warnings for name, scan in scans.items()} == {
        "a": (), "b": (), "c": ("duplicate_id",)
    }  # fmt: skip


def test_a_file_that_changed_after_listing_fails_its_scan(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "v.nii")
    config = make_config(tmp_path)
    (scan,) = list_by_id(config).values()
    assert Decoder.from_config(config)(scan).record.status == "ok"
    write_volume(path, seed=9)
    os.utime(path, (1, 1))
    record = Decoder.from_config(config)(scan).record
    assert (record.reason, record.message) == ("storage", "the scan changed after it was listed; run again")


def write_manifest(tmp_path: Path, header: str, *rows: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def test_the_bounding_box_of_a_mask_is_cut_out_with_the_margin(tmp_path: Path) -> None:
    values, affine = make_ramp(20, 20, 20), np.diag([2.0, 2, 2, 1])
    write_grid(tmp_path / "v.nii", values, affine)
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[4:7, 8:10, 12:13] = 1
    write_grid(tmp_path / "m.nii.gz", mask, affine)
    path = write_manifest(tmp_path, "uri,mask", "v.nii,m.nii.gz")
    (decoded,) = decode_by_id(make_config(path)).values()
    assert np.array_equal(decoded.tensor[0], values.transpose(2, 1, 0)[12:13, 8:10, 4:7])
    (wide,) = decode_by_id(
        make_config(path, preprocess={"size": None, "window": None, "margin": 2.5})
    ).values()
    assert np.array_equal(wide.tensor[0], values.transpose(2, 1, 0)[10:15, 6:12, 2:9])
    assert decoded.record.shape == [20, 20, 20]  # the shape of the input


def test_a_mask_on_another_grid_is_applied_in_millimeters(tmp_path: Path) -> None:
    values = make_ramp(20, 20, 20)
    write_grid(tmp_path / "v.nii", values, np.diag([1.0, 1, 1, 1]))
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[3, 4, 5] = 1  # 2 mm voxels, x reversed: center at x = 18 - 6, y = 8, z = 10
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = 18, 0, 0
    write_grid(tmp_path / "m.nii", mask, affine)
    (decoded,) = decode_by_id(make_config(write_manifest(tmp_path, "uri,mask", "v.nii,m.nii"))).values()
    # The box reaches from 11 to 13, 7 to 9 and 9 to 11 mm; all voxels that it touches are cut out.
    assert np.array_equal(decoded.tensor[0], values.transpose(2, 1, 0)[9:12, 7:10, 11:14])


@pytest.mark.parametrize(
    ("mask", "reason"), [("empty", "not_a_volume"), ("outside", "preprocess"), ("none.nii", "storage")]
)
def test_a_mask_that_cannot_be_used_fails_its_scan(tmp_path: Path, mask: str, reason: str) -> None:
    write_grid(tmp_path / "v.nii", make_ramp(4, 4, 4), np.eye(4))
    box, moved = np.ones((2, 2, 2), np.uint8), np.eye(4)
    moved[:3, 3] = 50
    write_grid(tmp_path / "empty.nii", np.pad(0 * box, 1), np.eye(4))
    write_grid(tmp_path / "outside.nii", np.pad(box, 1), moved)
    name = mask if mask.endswith(".nii") else f"{mask}.nii"
    (decoded,) = decode_by_id(make_config(write_manifest(tmp_path, "uri,mask", f"v.nii,{name}"))).values()
    assert decoded.record.reason == reason
    assert "mask" in str(decoded.record.message)


CROP = {"size": [3, 3, 3], "window": None, "fit": "crop_pad"}


@pytest.mark.parametrize(("frame", "sign"), [("LPS", 1), ("RAS", -1)])
def test_a_crop_lies_around_the_center_in_the_configured_frame(tmp_path: Path, frame: str, sign: int) -> None:
    values, affine = make_ramp(20, 20, 20), np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -10, -20, 5
    write_grid(tmp_path / "v.nii", values, affine)
    x, y, z = (2 * index + offset for index, offset in zip((4, 9, 15), (-10, -20, 5), strict=True))
    path = write_manifest(
        tmp_path, "uri,center_x,center_y,center_z", f"v.nii,{sign * x},{sign * y},{z + 0.4}"
    )
    (decoded,) = decode_by_id(make_config(path, source={"center_frame": frame}, preprocess=CROP)).values()
    assert np.array_equal(decoded.tensor[0], values.transpose(2, 1, 0)[14:17, 8:11, 3:6])


def test_a_crop_lies_around_the_center_after_resampling_to_a_spacing(tmp_path: Path) -> None:
    values = np.zeros((20, 20, 20), np.int16)
    values[4:6, 8:10, 14:16] = 100
    write_grid(tmp_path / "v.nii", values, np.eye(4))
    path = write_manifest(tmp_path, "uri,center_x,center_y,center_z", "v.nii,4.5,8.5,14.5")
    crop = {**CROP, "spacing": [2, 2, 2], "interpolation": "area"}
    (decoded,) = decode_by_id(make_config(path, preprocess=crop)).values()
    assert decoded.tensor[0, 1, 1, 1] == 100
    assert decoded.tensor[0].sum() == 100


def test_a_center_outside_the_scan_fails_it_and_a_row_without_a_center_is_cropped_in_the_middle(
    tmp_path: Path,
) -> None:
    values = make_ramp(5, 5, 5)
    write_grid(tmp_path / "a.nii", values, np.eye(4))
    shutil.copy(tmp_path / "a.nii", tmp_path / "b.nii")
    path = write_manifest(tmp_path, "uri,center_x,center_y,center_z", "a.nii,,,", "b.nii,99,0,0")
    decoded = decode_by_id(make_config(path, preprocess=CROP))
    assert np.array_equal(decoded["a.nii"].tensor[0], values.transpose(2, 1, 0)[1:4, 1:4, 1:4])
    assert decoded["b.nii"].record.reason == "preprocess"


@pytest.mark.parametrize("row", ["v.nii,1,2,", "v.nii,1,2,x", "v.nii,1,2,nan"])
def test_a_center_that_is_not_a_point_fails_its_row(tmp_path: Path, row: str) -> None:
    write_grid(tmp_path / "v.nii", make_ramp(5, 5, 5), np.eye(4))
    (scan,) = list_by_id(
        make_config(write_manifest(tmp_path, "uri,center_x,center_y,center_z", row))
    ).values()
    assert "three numbers" in scan.message


def test_a_center_without_a_crop_is_a_config_error(tmp_path: Path) -> None:
    write_grid(tmp_path / "v.nii", make_ramp(5, 5, 5), np.eye(4))
    path = write_manifest(tmp_path, "uri,center_x,center_y,center_z", "v.nii,1,2,3")
    with pytest.raises(ConfigError, match="need fit: crop_pad"):
        check_source(make_config(path))


def test_content_depends_on_the_mask_and_the_center(tmp_path: Path) -> None:
    write_grid(tmp_path / "v.nii", make_ramp(5, 5, 5), np.eye(4))
    mask = write_grid(tmp_path / "m.nii", np.ones((5, 5, 5), np.uint8), np.eye(4))
    header = "uri,mask,center_x,center_y,center_z"

    def get_content(row: str) -> str:
        (scan,) = list_by_id(make_config(write_manifest(tmp_path, header, row), preprocess=CROP)).values()
        return scan.content

    first = get_content("v.nii,m.nii,1,2,3")
    assert first == get_content("v.nii,m.nii,1.0,2,3")
    os.utime(mask, (1, 1))
    others = [get_content(row) for row in ("v.nii,m.nii,1,2,3", "v.nii,m.nii,1,2,4", "v.nii,,1,2,3")]
    assert len({first, *others}) == 4


def test_one_of_several_volumes_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    values = make_ramp(4, 5, 6, 3)
    nib.save(nib.Nifti1Image(values, RAS_TO_LPS), tmp_path / "v.nii.gz")
    (refused,) = decode_by_id(make_config(tmp_path)).values()
    assert refused.record.reason == "not_a_volume"
    (decoded,) = decode_by_id(make_config(tmp_path, source={"volume": 1})).values()
    assert np.array_equal(decoded.tensor[0], values[..., 1].transpose(2, 1, 0))


def test_values_that_are_not_hu_are_refused_if_the_policy_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_grid(tmp_path / "v.nii", rng.integers(0, 255, (20, 20, 20)).astype(np.uint8), np.eye(4))
    (decoded,) = decode_by_id(make_config(tmp_path)).values()
    assert (decoded.record.status, "not_hu" in decoded.record.warnings) == ("ok", True)
    (refused,) = decode_by_id(make_config(tmp_path, policy={"not_hu": "refuse"})).values()
    assert (refused.record.status, refused.record.reason) == ("failed", "not_ct")
