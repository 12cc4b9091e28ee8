"""Test the MetaImage reader: voxels, positions and rejected files; SimpleITK is the reference."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featray.ct.formats.metaimage import read_metaimage
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

MANY = 10**6
STORED_XYZ = np.arange(-60, 60, dtype=np.int16).reshape(6, 5, 4, order="F")
RAW = STORED_XYZ.tobytes(order="F")
HEADER = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-7 11 13",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "RAI",
    "ElementSpacing": "0.5 1 2",
    "DimSize": "6 5 4",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def make_file(data: bytes = RAW, **fields: str | None) -> bytes:
    """Return a file with the given header fields; a field of None is left out."""
    header = {name: value for name, value in (HEADER | fields).items() if name != "ElementDataFile"}
    header["ElementDataFile"] = fields.get("ElementDataFile", "LOCAL")
    lines = [f"{name} = {value}\n" for name, value in header.items() if value is not None]
    return "".join(lines).encode() + data


def read(data: bytes, **options: Any) -> Volume:
    return read_metaimage(data, **({"max_voxels": MANY} | options))


def test_voxels_have_axes_z_y_x_and_the_affine_is_lps() -> None:
    volume = read(make_file())

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)
    assert (volume.orientation, volume.warnings) == ("LPS", ())
    assert volume.affine_lps[:3, 3].tolist() == [-7, 11, 13]


def test_a_row_of_the_matrix_is_the_direction_of_a_voxel_axis() -> None:
    volume = read(make_file(TransformMatrix="0 1 0 0 0 -1 -1 0 0"))

    assert volume.orientation == "PIR"


def test_a_missing_matrix_causes_the_warning_orientation_unknown() -> None:
    volume = read(make_file(TransformMatrix=None))

    assert (volume.orientation, volume.warnings) == ("LPS", ("orientation_unknown",))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_file_of_simpleitk_has_the_voxels_and_positions_of_simpleitk(
    tmp_path: Path, compressed: bool, dtype: type
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    stored = (STORED_XYZ + 60).T.astype(dtype)
    image = sitk.GetImageFromArray(stored)
    image.SetSpacing((0.5, 1, 2))
    image.SetOrigin((1, 2, 3))
    image.SetDirection(np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.mha"), useCompression=compressed)

    volume = read((tmp_path / "a.mha").read_bytes())

    assert np.array_equal(volume.voxels_zyx, stored)
    for index in ((0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3), (5, 4, 3)):
        position = (volume.affine_lps @ [*index, 1])[:3]
        assert position == pytest.approx(image.TransformIndexToPhysicalPoint(index), abs=1e-6)


def test_big_endian_voxels_are_read() -> None:
    data = make_file(STORED_XYZ.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True")

    assert (read(data).voxels_zyx == STORED_XYZ.T).all()


def test_a_trailing_axis_of_one_is_dropped() -> None:
    fields = {
        "NDims": "4",
        "DimSize": "6 5 4 1",
        "ElementSpacing": "0.5 1 2 1",
        "Offset": "-7 11 13 0",
        "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
    }

    volume = read(make_file(**fields))

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert (volume.spacing_zyx, volume.orientation) == ((2.0, 1.0, 0.5), "LPS")


def test_one_volume_of_a_series_can_be_chosen() -> None:
    series = np.stack([STORED_XYZ, STORED_XYZ[::-1] + 500])
    fields = {
        "NDims": "4",
        "DimSize": "6 5 4 2",
        "ElementSpacing": "0.5 1 2 1",
        "Offset": "-7 11 13 0",
        "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
    }
    data = make_file(series[0].tobytes(order="F") + series[1].tobytes(order="F"), **fields)

    for index, expected in enumerate(series):
        volume = read(data, volume_index=index)
        assert (volume.voxels_zyx == expected.T).all()
        assert volume.warnings == ("not_a_volume",)
    with pytest.raises(ScanError, match=r"source\.volume"):
        read(data)


@pytest.mark.parametrize(
    ("name", "code"),
    [("MET_LONG", "i4"), ("MET_ULONG", "u4"), ("MET_LONG_LONG", "i8"), ("MET_ULONG_LONG", "u8")],
)
def test_long_integers_are_read_as_by_simpleitk(tmp_path: Path, name: str, code: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    stored = (STORED_XYZ + 60).astype(f"<{code}")
    (tmp_path / "a.mha").write_bytes(make_file(stored.tobytes(order="F"), ElementType=name))

    voxels = read((tmp_path / "a.mha").read_bytes()).voxels_zyx

    assert (voxels == stored.T).all()
    assert np.array_equal(voxels, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.mha"))))


@pytest.mark.parametrize("sizes", ["6 5 inf", "6 5 nan", ""])
def test_the_message_about_sizes_says_what_is_expected(sizes: str) -> None:
    with pytest.raises(ScanError, match="expected one or more, all of them finite"):
        read(make_file(DimSize=sizes))


def test_byte_orders_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ScanError, match="ByteOrderMSB") as caught:
        read(make_file(ElementByteOrderMSB="True"))
    assert caught.value.reason == Reason.UNREADABLE


def test_data_are_binary_unless_the_header_denies_it() -> None:
    assert (read(make_file(BinaryData=None)).voxels_zyx == STORED_XYZ.T).all()


PACKED = zlib.compress(RAW)


def make_compressed_file(data: bytes, **fields: str) -> bytes:
    return make_file(data, CompressedData="True", **fields)


def test_bytes_after_the_compressed_data_are_ignored() -> None:
    assert (read(make_compressed_file(PACKED + b"garbage")).voxels_zyx == STORED_XYZ.T).all()


def test_padding_below_one_slice_in_the_compressed_data_is_ignored() -> None:
    assert (read(make_compressed_file(zlib.compress(RAW + bytes(16)))).voxels_zyx == STORED_XYZ.T).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.EMPTY, id="empty"),
        pytest.param(b"\0" * 400, Reason.UNREADABLE, id="zeros"),
        pytest.param(b"ObjectType = Image\nNDims = 3\n", Reason.TRUNCATED, id="header-alone"),
        pytest.param(make_file()[:-1], Reason.TRUNCATED, id="one-byte-short"),
        pytest.param(make_file() + bytes(60), Reason.UNREADABLE, id="a-slice-too-many"),
        pytest.param(make_compressed_file(PACKED[:-5]), Reason.TRUNCATED, id="stream-cut"),
        pytest.param(make_compressed_file(PACKED[:-1] + b"!"), Reason.UNREADABLE, id="checksum-wrong"),
        pytest.param(make_compressed_file(zlib.compress(RAW[:-2])), Reason.TRUNCATED, id="stream-short"),
        pytest.param(make_compressed_file(zlib.compress(RAW * 2)), Reason.UNREADABLE, id="stream-too-long"),
        pytest.param(make_file(CompressedData="True"), Reason.UNREADABLE, id="not-compressed"),
        pytest.param(make_file(DimSize="30000 30000 30000"), Reason.TOO_LARGE, id="claims-30000-cubed"),
        pytest.param(make_file(DimSize="90 90 90"), Reason.TRUNCATED, id="claims-90-cubed"),
        pytest.param(make_file(DimSize="6 5 4 1"), Reason.UNREADABLE, id="sizes-and-dimensions-differ"),
        pytest.param(make_file(DimSize="6 0 4"), Reason.UNREADABLE, id="size-0"),
        pytest.param(make_file(DimSize="6.5 5 4"), Reason.UNREADABLE, id="half-a-voxel"),
        pytest.param(make_file(NDims="2", DimSize="6 20"), Reason.NOT_A_VOLUME, id="an-image"),
        pytest.param(make_file(NDims="4", DimSize="6 5 2 2"), Reason.NOT_A_VOLUME, id="two-volumes"),
        pytest.param(make_file(ElementNumberOfChannels="3"), Reason.UNSUPPORTED, id="color"),
        pytest.param(make_file(ElementType="MET_STRING"), Reason.UNSUPPORTED, id="no-number"),
        pytest.param(make_file(BinaryData="False"), Reason.UNSUPPORTED, id="text"),
        pytest.param(make_file(HeaderSize="-1"), Reason.UNSUPPORTED, id="header-size"),
        pytest.param(make_file(ElementDataFile="a.raw"), Reason.UNSUPPORTED, id="detached"),
        pytest.param(make_file(ElementToIntensityFunctionSlope="2"), Reason.UNSUPPORTED, id="slope"),
        pytest.param(make_file(ElementSpacing=None), Reason.UNREADABLE, id="no-spacing"),
        pytest.param(make_file(ElementSpacing="0.5 1 -2"), Reason.UNREADABLE, id="spacing-negative"),
        pytest.param(make_file(ElementSpacing="0.5 1 nan"), Reason.UNREADABLE, id="spacing-nan"),
        pytest.param(make_file(Offset="0 0"), Reason.UNREADABLE, id="offset-of-two"),
        pytest.param(make_file(TransformMatrix="2 0 0 0 1 0 0 0 1"), Reason.UNREADABLE, id="no-unit-vector"),
        pytest.param(
            make_file(TransformMatrix="1 0 0 0 1 0 0 0.6 0.8"), Reason.GANTRY_TILT, id="sheared"
        ),
        pytest.param(make_file(bytes(240)), Reason.NOT_A_VOLUME, id="constant"),
        pytest.param(
            make_file(np.repeat(np.float32([0, np.inf]), 60).tobytes(), ElementType="MET_FLOAT"),
            Reason.NON_FINITE,
            id="infinite",
        ),
    ],
)  # fmt: skip
def test_invalid_files_are_rejected_with_their_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(ScanError) as caught:
        read(data)
    assert caught.value.reason == reason
