"""Scans whose header and voxels are in different files; SimpleITK is the reference."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest

from featray.collection.detached import list_data_files
from featray.config import Config, load
from featray.ct import readers
from featray.errors import ScanError
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.stages.read import Reader

VOXELS_ZYX = np.random.default_rng(5).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
RAW = VOXELS_ZYX.tobytes()
MHD = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    "CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -7 11 13\n"
    "ElementSpacing = 0.5 1 2\nDimSize = 6 5 4\nElementType = MET_SHORT\n"
)
NHDR = (
    "NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\n"
    "space directions: (0.5,0,0) (0,1,0) (0,0,2)\nendian: little\nspace origin: (-7,11,13)\n"
)


def make_config(uri: Path | str, **source: Any) -> Config:
    return load(
        {
            "source": {"uri": str(uri), **source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def list_by_id(config: Config) -> dict[str, Scan]:
    return {scan.scan_id: scan for scan in list_scans(config.source, config.policy).scans}


def decode_by_id(config: Config) -> dict[str, Decoded]:
    decoder = Decoder.from_config(config)
    return {name: decoder(Scan.from_json(scan.to_json())) for name, scan in list_by_id(config).items()}


def assert_is_read(folder: Path | str, name: str, files: int, **source: Any) -> None:
    """Check that the only scan of a collection has the voxels and the files that it should have."""
    config = make_config(folder, **source)
    ((scan_id, decoded),) = decode_by_id(config).items()
    (scan,) = list_by_id(config).values()

    assert (scan_id, decoded.record.message) == (name, None)
    assert np.array_equal(decoded.tensor[0], VOXELS_ZYX)
    assert decoded.record.spacing == [2.0, 1.0, 0.5]
    assert len(scan.files) == files or not scan.files


def get_failure(folder: Path) -> tuple[str | None, str]:
    (decoded,) = decode_by_id(make_config(folder)).values()
    return decoded.record.reason, str(decoded.record.message)


def write_mhd(folder: Path, data_file: str, **fields: str) -> Path:
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
    header = "".join(line for line in MHD.splitlines(True) if line.split(" =")[0] not in fields)
    (folder / "a.mhd").write_text(f"{header}{lines}ElementDataFile = {data_file}\n")
    return folder


def write_nhdr(folder: Path, data_file: str, encoding: str = "raw", **fields: str) -> Path:
    lines = "".join(f"{name.replace('_', ' ')}: {value}\n" for name, value in fields.items())
    (folder / "a.nhdr").write_text(f"{NHDR}{lines}encoding: {encoding}\ndata file: {data_file}\n")
    return folder


def write_slices(folder: Path, pattern: str = "s%03d.raw", *, first: int = 1, head: bytes = b"") -> list[str]:
    names = [pattern % number for number in range(first, first + len(VOXELS_ZYX))]
    for name, plane in zip(names, VOXELS_ZYX, strict=True):
        (folder / name).write_bytes(head + plane.tobytes())
    return names


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.int64, np.uint64, np.int32])
def test_files_of_simpleitk_have_its_voxels_and_positions(
    tmp_path: Path, suffix: str, compressed: bool, dtype: type[np.generic]
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    values = VOXELS_ZYX.astype(np.int64) + (2000 if dtype is np.uint64 else 0)
    image = sitk.GetImageFromArray(values.astype(dtype))
    image.SetSpacing((0.5, 1, 2))
    image.SetOrigin((1, 2, 3))
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / f"a.{suffix}"), useCompression=compressed)

    config = make_config(tmp_path)
    (scan,) = list_by_id(config).values()
    read = Reader(config.source, config.policy, 10**6).read(scan)

    assert len(scan.files) == len(list(tmp_path.iterdir())) == 2
    assert scan.uri == str(tmp_path / f"a.{suffix}")
    assert read.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert np.array_equal(read.content.voxels_zyx, sitk.GetArrayViewFromImage(image))
    for index in ((0, 0, 0), (5, 4, 3)):
        position = (read.content.affine_lps @ [*index, 1])[:3]
        assert position == pytest.approx(image.TransformIndexToPhysicalPoint(index), abs=1e-6)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_files_of_pynrrd_are_read(tmp_path: Path, encoding: str) -> None:
    header = {"space": "LPS", "space directions": np.diag([0.5, 1, 2]), "encoding": encoding}
    nrrd.write(str(tmp_path / "a.nhdr"), VOXELS_ZYX.T, header, detached_header=True)

    assert_is_read(tmp_path, "a.nhdr", 2)


@pytest.mark.parametrize(
    ("data_file", "names", "fields"),
    [
        pytest.param("LIST", write_slices, {}, id="list"),
        pytest.param("LIST 2", write_slices, {}, id="list-of-slices"),
        pytest.param("s%03d.raw 1 4 1", write_slices, {}, id="pattern"),
        pytest.param("s%03d.raw 1 4", write_slices, {}, id="pattern-without-step"),
        pytest.param("s%03d.raw", write_slices, {}, id="pattern-alone"),
        pytest.param("s%d.x 9", lambda at: write_slices(at, "s%d.x", first=9), {}, id="pattern-from-9"),
        pytest.param("s%03d.raw", lambda at: write_slices(at, head=b"xyz"), {"HeaderSize": "3"}, id="skip"),
        pytest.param("s%03d.raw", lambda at: write_slices(at, head=b"xy"), {"HeaderSize": "-1"}, id="end"),
    ],
)  # fmt: skip
def test_a_mhd_with_a_file_per_slice_is_read_as_by_simpleitk(
    tmp_path: Path, data_file: str, names: Any, fields: dict[str, str]
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    files = names(tmp_path)
    listed = "\n".join(["", *files]) if data_file.startswith("LIST") else ""
    write_mhd(tmp_path, data_file + listed, **fields)

    assert_is_read(tmp_path, "a.mhd", 5)
    if data_file != "s%03d.raw 1 4":  # ITK computes a step of 0 for this form
        image = sitk.ReadImage(str(tmp_path / "a.mhd"))
        assert np.array_equal(sitk.GetArrayViewFromImage(image), VOXELS_ZYX)


@pytest.mark.parametrize(
    ("data_file", "names", "fields"),
    [
        pytest.param("LIST", write_slices, {}, id="list"),
        pytest.param("LIST 2", write_slices, {}, id="list-of-slices"),
        pytest.param("s%03d.raw 1 4 1", write_slices, {}, id="pattern"),
        pytest.param("./s%03d.raw 1 4 1 2", write_slices, {}, id="pattern-of-slices"),
        pytest.param("s%03d.raw 1 4 1", lambda at: write_slices(at, head=b"x\ny"),
                     {"line_skip": "1", "byte_skip": "1"}, id="skip"),
        pytest.param("s%03d.raw 1 4 1", lambda at: write_slices(at, head=b"xyz"),
                     {"byte_skip": "-1"}, id="skip-all"),
    ],
)  # fmt: skip
def test_a_nhdr_with_a_file_per_slice_is_read(
    tmp_path: Path, data_file: str, names: Any, fields: dict[str, str]
) -> None:
    files = names(tmp_path)
    listed = "\n".join(["", *files]) if data_file.startswith("LIST") else ""
    write_nhdr(tmp_path, data_file + listed, **fields)

    assert_is_read(tmp_path, "a.nhdr", 5)


def test_a_nhdr_with_one_file_is_read_by_simpleitk_alike(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    (tmp_path / "other name.raw").write_bytes(b"head" + RAW)
    write_nhdr(tmp_path, "other name.raw", byte_skip="4")

    assert_is_read(tmp_path, "a.nhdr", 2)
    image = sitk.ReadImage(str(tmp_path / "a.nhdr"))
    assert np.array_equal(sitk.GetArrayViewFromImage(image), VOXELS_ZYX)


def test_byte_skip_counts_uncompressed_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.raw.gz").write_bytes(gzip.compress(b"head" + RAW))

    assert_is_read(write_nhdr(tmp_path, "a.raw.gz", "gzip", byte_skip="4"), "a.nhdr", 2)


def test_a_gzip_file_is_compressed_data_of_a_mhd(tmp_path: Path) -> None:
    (tmp_path / "a.raw.gz").write_bytes(gzip.compress(RAW))

    assert_is_read(write_mhd(tmp_path, "a.raw.gz", CompressedData="True"), "a.mhd", 2)


def test_data_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(VOXELS_ZYX.astype(">i2").tobytes())

    assert_is_read(write_mhd(tmp_path, "a.raw", BinaryDataByteOrderMSB="True"), "a.mhd", 2)


def test_a_mhd_that_holds_its_data_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_bytes(f"{MHD}ElementDataFile = LOCAL\n".encode() + RAW)

    assert_is_read(tmp_path, "a.mhd", 1)


def test_the_header_decides_between_two_neighbors(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(len(RAW)))
    (tmp_path / "a.zraw").write_bytes(gzip.compress(RAW))

    assert_is_read(write_mhd(tmp_path, "a.zraw", CompressedData="True"), "a.mhd", 2)


def test_data_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.raw").write_bytes(RAW)

    assert_is_read(write_mhd(tmp_path, "data/a.raw"), "a.mhd", 2)


def test_a_neighbor_is_not_taken_for_a_file_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(RAW[::-1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.raw").write_bytes(RAW)
    reason, message = get_failure(write_mhd(tmp_path, "data/a.raw"))

    assert reason == "unreadable"
    assert "correct the name" in message


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
@pytest.mark.parametrize("kind", ["glob", "file", "manifest", "manifest-with-version"])
def test_the_data_file_is_found_from_the_header_alone(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "b.raw").write_bytes(RAW)
    write = write_mhd if name == "a.mhd" else write_nhdr
    write(tmp_path, "b.raw")
    uri = tmp_path / ("*" + name[1:] if kind == "glob" else name)
    if kind.startswith("manifest"):
        version = "7" if kind.endswith("version") else ""
        uri = tmp_path / "list.csv"
        uri.write_text(f"uri,version\n{name},{version}\n")

    assert_is_read(uri, name, 2)


@pytest.mark.parametrize("name", ["v.hdr", "v.img"])
def test_the_other_part_of_a_nifti_pair_is_found_from_one_part(tmp_path: Path, name: str) -> None:
    import nibabel as nib

    nib.save(nib.Nifti1Pair(VOXELS_ZYX.T, np.diag([-0.5, -1, 2, 1])), tmp_path / "v.img")
    (tmp_path / "list.csv").write_text(f"uri\n{name}\n")

    for uri in (tmp_path / name, tmp_path / "list.csv", tmp_path / ("*" + name[1:])):
        ((_, decoded),) = decode_by_id(make_config(uri)).items()
        assert np.array_equal(decoded.tensor[0], VOXELS_ZYX)


def test_scans_in_an_archive_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write_mhd(tmp_path / "in", "LIST\n" + "\n".join(write_slices(tmp_path / "in")))
    with zipfile.ZipFile(tmp_path / "out" / "z.zip", "w") as archive:
        for path in (tmp_path / "in").iterdir():
            archive.write(path, f"folder/{path.name}")

    assert_is_read(tmp_path / "out", "z.zip", 5)


def test_data_files_are_neither_ignored_nor_other_scans(tmp_path: Path) -> None:
    names = write_slices(tmp_path, "slice%d")
    write_mhd(tmp_path, "LIST\n" + "\n".join(names))
    (tmp_path / "left.raw").write_bytes(b"0")
    config = make_config(tmp_path)
    listing = list_scans(config.source, config.policy)

    assert [scan.scan_id for scan in listing.scans] == ["a.mhd"]
    assert listing.ignored == {".raw": 1}


@pytest.mark.parametrize("fingerprint", ["store", "bytes"])
def test_a_changed_data_file_changes_the_scan(tmp_path: Path, fingerprint: str) -> None:
    (tmp_path / "a.raw").write_bytes(RAW)
    config = make_config(write_mhd(tmp_path, "a.raw"), fingerprint=fingerprint)
    before = list_by_id(config)["a.mhd"]
    (tmp_path / "a.raw").write_bytes(RAW[::-1])
    os.utime(tmp_path / "a.raw", (1, 1))
    after = list_by_id(config)["a.mhd"]

    assert before.content != after.content
    assert Decoder.from_config(config)(before).record.reason == "storage"
    assert Decoder.from_config(config)(after).record.reason is None


@pytest.mark.parametrize(
    "data_file",
    [
        "/etc/passwd",
        "../b.raw",
        "x/../../b.raw",
        "C:\\b.raw",
        "..\\b.raw",
        "https://a.b/c.raw",
        "\\\\host\\b",
    ],
)
@pytest.mark.parametrize("write", [write_mhd, write_nhdr])
def test_a_data_file_outside_of_the_folder_is_not_read(tmp_path: Path, write: Any, data_file: str) -> None:
    (tmp_path / "b.raw").write_bytes(RAW)
    (tmp_path / "in").mkdir()
    reason, message = get_failure(write(tmp_path / "in", data_file))

    assert reason == "unreadable"
    assert "outside of its own folder" in message


@pytest.mark.parametrize(
    ("name", "data", "header", "reason"),
    [
        pytest.param("b.raw", RAW, ("c.raw", {}), "unreadable", id="missing"),
        pytest.param("a.raw", RAW, ("b.raw", {}), "unreadable", id="renamed"),
        pytest.param("a.raw", b"", ("a.raw", {}), "empty", id="empty"),
        pytest.param("a.raw", RAW[:-1], ("a.raw", {}), "truncated", id="short"),
        pytest.param("a.raw", RAW + bytes(60), ("a.raw", {}), "unreadable", id="long"),
        pytest.param("a.raw", RAW, ("a.raw", {"HeaderSize": "1"}), "truncated", id="skip-too-much"),
        pytest.param("a.raw", RAW, ("a.raw", {"HeaderSize": "-2"}), "unsupported", id="skip-below"),
        pytest.param("a.zraw", gzip.compress(RAW)[:-9], ("a.zraw", {"CompressedData": "True"}), "truncated",
                     id="compressed-short"),
        pytest.param("a.raw", RAW, ("LIST", {}), "unreadable", id="empty-list"),
        pytest.param("a.raw", RAW, ("LIST\na.raw\na.raw", {}), "unreadable", id="twice"),
        pytest.param("a.raw", RAW, ("s%d.raw 1 1000000000 1", {}), "unreadable", id="too-many"),
        pytest.param("a.dcm", RAW, ("a.dcm", {}), "unsupported", id="dicom"),
    ],
)  # fmt: skip
def test_damaged_or_missing_data_fail_with_their_reason(
    tmp_path: Path, name: str, data: bytes, header: tuple[str, dict[str, str]], reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    write_mhd(tmp_path, header[0], **header[1])
    decoded = decode_by_id(make_config(tmp_path))["a.mhd"]

    assert decoded.record.reason == reason


def test_slices_of_other_sizes_are_refused(tmp_path: Path) -> None:
    names = write_slices(tmp_path)
    (tmp_path / names[0]).write_bytes(RAW[:58])
    (tmp_path / names[1]).write_bytes(RAW[58:120])
    write_mhd(tmp_path, "s%03d.raw")

    assert get_failure(tmp_path)[0] == "truncated"


def test_a_header_named_like_a_single_file_says_how_to_rename_it(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(RAW)
    write_mhd(tmp_path, "a.raw").joinpath("a.mhd").rename(tmp_path / "a.mha")
    reason, message = get_failure(tmp_path)

    assert (reason, "rename this file to .mhd" in message) == ("unsupported", True)
    shutil.move(tmp_path / "a.mha", tmp_path / "a.mhd")
    assert_is_read(tmp_path, "a.mhd", 2)


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_a_mask_may_have_a_detached_header(tmp_path: Path, suffix: str) -> None:
    mask = np.zeros_like(VOXELS_ZYX)
    mask[1:3, 1:4, 2:5] = 1
    (tmp_path / "a.raw").write_bytes(RAW)
    write_mhd(tmp_path, "a.raw")
    (tmp_path / "m.raw").write_bytes(mask.tobytes())
    header = (
        f"{MHD}ElementDataFile = m.raw\n" if suffix == "mhd" else f"{NHDR}encoding: raw\ndata file: m.raw\n"
    )
    (tmp_path / f"m.{suffix}").write_text(header)
    (tmp_path / "list.csv").write_text(f"uri,mask\na.mhd,m.{suffix}\n")
    config = make_config(tmp_path / "list.csv")
    ((_, decoded),) = decode_by_id(config).items()

    assert np.array_equal(decoded.tensor[0], VOXELS_ZYX[1:3, 1:4, 2:5])
    before = list_by_id(config)["a.mhd"].content
    os.utime(tmp_path / "m.raw", (1, 1))
    assert list_by_id(config)["a.mhd"].content != before


@pytest.mark.parametrize("write", [write_mhd, write_nhdr])
def test_mutated_headers_give_a_volume_or_a_reason(tmp_path: Path, write: Any) -> None:
    (path,) = write(tmp_path, "s%d.raw 1 4 1").iterdir()
    is_nrrd = path.suffix == ".nhdr"
    read = readers.read_nrrd if is_nrrd else readers.read_metaimage
    kind = "nrrd" if is_nrrd else "mha"
    words = [
        b"LIST",
        b"..",
        b"/",
        b"%03d",
        b"-1",
        b"9" * 30,
        b"nan",
        b"\0",
        b"\n",
        b"none",
        b"dimension: 4\n",
    ]
    rng = random.Random(16)
    for _ in range(400):
        header = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 2, 4))):
            start = rng.randrange(len(header))
            header[start : start + rng.choice((0, 1, 8))] = rng.choice([*words, bytes([rng.randrange(256)])])
        with contextlib.suppress(ScanError):
            names = list_data_files(kind, bytes(header))
            size = len(RAW) // max(1, len(names))
            read(bytes(header), [(name, RAW[:size]) for name in names], max_voxels=10**6)
