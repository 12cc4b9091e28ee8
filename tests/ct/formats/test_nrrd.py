"""Test the NRRD reader: voxels, positions and rejected files; SimpleITK and pynrrd are the references."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct.formats.nrrd import read_nrrd
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

MANY = 10**6
STORED_XYZ = np.arange(-60, 60, dtype=np.int16).reshape(6, 5, 4, order="F")
LPS = "left-posterior-superior"
HEADER = {
    "type": "short",
    "dimension": "3",
    "space": LPS,
    "sizes": "6 5 4",
    "space directions": "(0.5,0,0) (0,1,0) (0,0,2)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-7,11,13)",
}


def make_file(data: bytes = STORED_XYZ.tobytes(order="F"), **fields: str | None) -> bytes:
    """Return a file with the given header fields; a field of None is left out."""
    header = HEADER | {name.replace("_", " "): value for name, value in fields.items()}
    lines = [f"{name}: {value}" for name, value in header.items() if value is not None]
    return "\n".join(["NRRD0005", "# a comment", *lines, "", ""]).encode() + data


def read(data: bytes, **options: Any) -> Volume:
    return read_nrrd(data, **({"max_voxels": MANY} | options))


def test_voxels_have_axes_z_y_x_and_the_affine_is_lps() -> None:
    volume = read(make_file())

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)
    assert (volume.orientation, volume.warnings) == ("LPS", ())
    assert volume.affine_lps[:3, 3].tolist() == [-7, 11, 13]


@pytest.mark.parametrize(
    ("space", "orientation", "origin"),
    [
        (LPS, "LPS", [-7, 11, 13]),
        ("LPS", "LPS", [-7, 11, 13]),
        ("right-anterior-superior", "RAS", [7, -11, 13]),
        ("RAS", "RAS", [7, -11, 13]),
        ("left-anterior-superior", "LAS", [-7, -11, 13]),
        ("LAS", "LAS", [-7, -11, 13]),
    ],
)
def test_every_patient_space_is_converted_to_lps(space: str, orientation: str, origin: list[float]) -> None:
    volume = read(make_file(space=space))

    assert (volume.orientation, volume.warnings) == (orientation, ())
    assert volume.affine_lps[:3, 3].tolist() == origin


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"space": "scanner-xyz"}, id="scanner"),
        pytest.param({"space": "3D-right-handed"}, id="right-handed"),
        pytest.param({"space": None, "space_dimension": "3"}, id="a-dimension-alone"),
        pytest.param(
            {"space": None, "space_directions": None, "space_origin": None, "spacings": "0.5 1 2"},
            id="spacings-alone",
        ),
    ],
)
def test_a_space_that_is_not_the_patients_is_told(fields: dict[str, str | None]) -> None:
    volume = read(make_file(**fields))

    assert (volume.orientation, volume.warnings) == ("LPS", ("orientation_unknown",))
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)


@pytest.mark.parametrize("space", [LPS, "right-anterior-superior", "left-anterior-superior"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_file_of_pynrrd_has_the_voxels_and_positions_of_simpleitk(
    tmp_path: Path, space: str, encoding: str
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    header = {
        "space": space,
        "space directions": turn * [[0.7], [0.8], [3.0]],
        "space origin": [10.0, -20.0, 30.0],
        "encoding": encoding,
    }
    nrrd.write(str(tmp_path / "oblique.nrrd"), STORED_XYZ, header)

    assert_agrees_with_simpleitk(
        read((tmp_path / "oblique.nrrd").read_bytes()), sitk.ReadImage(str(tmp_path / "oblique.nrrd"))
    )


def assert_agrees_with_simpleitk(volume: Volume, image: Any) -> None:
    sitk = pytest.importorskip("SimpleITK")

    assert np.array_equal(volume.voxels_zyx, sitk.GetArrayViewFromImage(image))
    for index in ((0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3), (5, 4, 3)):
        position = (volume.affine_lps @ [*index, 1])[:3]
        assert position == pytest.approx(image.TransformIndexToPhysicalPoint(index), abs=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_of_simpleitk_has_the_voxels_and_positions_of_simpleitk(
    tmp_path: Path, compressed: bool
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(STORED_XYZ.T.astype(np.float32) / 4)
    image.SetSpacing((0.5, 1, 2))
    image.SetOrigin((1, 2, 3))
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), useCompression=compressed)

    volume = read((tmp_path / "a.nrrd").read_bytes())

    assert_agrees_with_simpleitk(volume, image)
    assert volume.warnings == ("oblique",)


@pytest.mark.parametrize(
    ("name", "code"), [("uchar", "u1"), ("ushort", "u2"), ("int32", "i4"), ("float", "f4"), ("double", "f8")]
)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_every_dtype_and_byte_order_gives_the_same_values(name: str, code: str, endian: str) -> None:
    stored = (STORED_XYZ + 60).astype((">" if endian == "big" else "<") + code)

    voxels = read(make_file(stored.tobytes(order="F"), type=name, endian=endian)).voxels_zyx

    assert (voxels == stored.T).all()
    assert voxels.dtype.isnative


@pytest.mark.parametrize(
    "fields",
    [
        {"dimension": "4", "sizes": "6 5 4 1", "space_directions": "(0.5,0,0) (0,1,0) (0,0,2) none"},
        {"dimension": "4", "sizes": "1 6 5 4", "space_directions": "none (0.5,0,0) (0,1,0) (0,0,2)"},
    ],
)
def test_an_axis_of_one_sample_outside_of_space_is_dropped(fields: dict[str, str]) -> None:
    volume = read(make_file(**fields, kinds=None))

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)


SERIES = np.stack([STORED_XYZ, STORED_XYZ[::-1] + 500])


@pytest.mark.parametrize("kind", ["list", "time", "none", None])
@pytest.mark.parametrize("is_first", [False, True])
def test_one_volume_of_a_series_can_be_chosen(kind: str | None, is_first: bool) -> None:
    stored = np.moveaxis(SERIES, 0, 0 if is_first else 3)
    directions, kinds = HEADER["space directions"], "domain domain domain"
    fields: dict[str, str | None] = {
        "dimension": "4",
        "sizes": " ".join(map(str, stored.shape)),
        "space_directions": f"none {directions}" if is_first else f"{directions} none",
        "kinds": kind and (f"{kind} {kinds}" if is_first else f"{kinds} {kind}"),
    }
    data = make_file(stored.tobytes(order="F"), **fields)

    for index, expected in enumerate(SERIES):
        volume = read(data, volume_index=index)
        assert (volume.voxels_zyx == expected.T).all()
        assert (volume.spacing_zyx, volume.warnings) == ((2.0, 1.0, 0.5), ("not_a_volume",))
    for bad_index in (None, 2):
        with pytest.raises(ScanError, match=r"source\.volume") as caught:
            read(data, volume_index=bad_index)
        assert caught.value.reason == Reason.NOT_A_VOLUME


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"kinds": "space space time", "space_directions": None, "spacings": "1 1 2"}, id="time"),
        pytest.param({"kinds": "domain domain list"}, id="list"),
        pytest.param({"kinds": "vector domain domain"}, id="vector"),
        pytest.param({"space_directions": "(1,0,0) (0,1,0) none"}, id="no-direction"),
        pytest.param({"kinds": None, "space_directions": None, "spacings": "1 1 nan"}, id="no-spacing"),
        pytest.param(
            {"dimension": "4", "sizes": "2 3 5 4", "space_directions": "none " + HEADER["space directions"],
             "kinds": "vector domain domain domain"}, id="vectors"),
        pytest.param(
            {"dimension": "4", "sizes": "3 2 5 4", "space_directions": "(1,0,0) none (0,1,0) (0,0,1)",
             "kinds": None}, id="list-between"),
        pytest.param({"space": "left-posterior-superior-time"}, id="space-with-time"),
        pytest.param(
            {"dimension": "1", "sizes": "120", "space": None, "space_directions": None, "space_origin": None,
             "kinds": "list", "spacings": "1"}, id="one-list"),
    ],
)  # fmt: skip
def test_an_axis_outside_of_space_is_never_taken_for_z(fields: dict[str, str | None]) -> None:
    with pytest.raises(ScanError) as caught:
        read(make_file(**fields), volume_index=0)
    assert caught.value.reason == Reason.NOT_A_VOLUME


def test_units_of_spacings_are_converted_to_mm() -> None:
    fields = {"space": None, "space_directions": None, "space_origin": None, "spacings": "0.05 0.1 0.2"}

    assert read(make_file(**fields, units='"cm" "cm" "cm"')).spacing_zyx == pytest.approx((2, 1, 0.5))


def test_a_unit_that_cannot_be_right_is_named() -> None:
    stored = np.zeros((300, 300, 2), np.int16, "F")
    stored[0] = 1
    units = " ".join(['"m"'] * 3)
    with pytest.raises(ScanError, match="unit") as caught:
        read(make_file(stored.tobytes(order="F"), sizes="300 300 2", space_units=units))
    assert caught.value.reason == Reason.UNREADABLE


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("int64", "i8"),
        ("long long int", "i8"),
        ("longlong", "i8"),
        ("uint64", "u8"),
        ("ulonglong", "u8"),
        ("unsigned long long int", "u8"),
        ("uint32", "u4"),
    ],
)
def test_long_integers_are_exact(name: str, code: str) -> None:
    stored = (STORED_XYZ + 60).astype(f"<{code}")

    voxels = read(make_file(stored.tobytes(order="F"), type=name)).voxels_zyx

    assert (voxels == stored.T).all()
    assert voxels.dtype == np.int16


@pytest.mark.parametrize(
    ("unit", "directions"),
    [
        ("mm", "(0.5,0,0) (0,1,0) (0,0,2)"),
        ("cm", "(0.05,0,0) (0,0.1,0) (0,0,0.2)"),
        ("um", "(500,0,0) (0,1000,0) (0,0,2000)"),
    ],
)
def test_units_are_converted_to_mm(unit: str, directions: str) -> None:
    volume = read(make_file(space_directions=directions, space_units=" ".join([f'"{unit}"'] * 3)))

    assert volume.spacing_zyx == pytest.approx((2, 1, 0.5))


def test_lines_may_end_with_carriage_return_and_line_feed() -> None:
    head, data = make_file().split(b"\n\n", 1)

    assert (read(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + data).voxels_zyx == STORED_XYZ.T).all()


def test_key_value_pairs_are_ignored() -> None:
    head, data = make_file().split(b"\n\n", 1)
    pairs = "\nDICOM_0010_0010:=Müller: a, b\nsegmentation extent:=0 1 2".encode()

    assert (read(head + pairs + b"\n\n" + data).voxels_zyx == STORED_XYZ.T).all()


RAW = STORED_XYZ.tobytes(order="F")
TILTED = "(0.5,0,0) (0,1,0) (0,0.5,2)"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.EMPTY, id="empty"),
        pytest.param(b"\0" * 400, Reason.UNREADABLE, id="zeros"),
        pytest.param(b"NRRD0005\ntype: short\n", Reason.TRUNCATED, id="header-alone"),
        pytest.param(make_file()[:-1], Reason.TRUNCATED, id="one-byte-short"),
        pytest.param(make_file() + bytes(60), Reason.UNREADABLE, id="a-slice-too-many"),
        pytest.param(make_file(gzip.compress(RAW)[:-9], encoding="gzip"), Reason.TRUNCATED, id="gzip-cut"),
        pytest.param(make_file(gzip.compress(RAW[:-2]), encoding="gzip"), Reason.TRUNCATED, id="gzip-short"),
        pytest.param(make_file(sizes="6 5 4 1"), Reason.UNREADABLE, id="sizes-and-dimension-differ"),
        pytest.param(make_file(sizes="6 0 4"), Reason.UNREADABLE, id="size-0"),
        pytest.param(make_file(sizes="6 5e300 4"), Reason.UNREADABLE, id="size-beyond-integers"),
        pytest.param(make_file(sizes="30000 30000 30000"), Reason.TOO_LARGE, id="claims-30000-cubed"),
        pytest.param(make_file(sizes="90 90 90"), Reason.TRUNCATED, id="claims-90-cubed"),
        pytest.param(
            make_file(dimension="2", sizes="6 20", space_directions=None, spacings="1 1"),
            Reason.NOT_A_VOLUME,
            id="an-image",
        ),
        pytest.param(
            make_file(dimension="4", sizes="2 3 5 4", space_directions="none " + HEADER["space directions"]),
            Reason.NOT_A_VOLUME,
            id="two-volumes",
        ),
        pytest.param(
            make_file(dimension="4", sizes="3 2 5 4", space_directions=None, spacings="nan 1 1 1"),
            Reason.NOT_A_VOLUME,
            id="color",
        ),
        pytest.param(make_file(type="block"), Reason.UNSUPPORTED, id="block"),
        pytest.param(make_file(type=None), Reason.UNREADABLE, id="no-type"),
        pytest.param(make_file(endian=None), Reason.UNREADABLE, id="no-endian"),
        pytest.param(make_file(encoding="bzip2"), Reason.UNSUPPORTED, id="bzip2"),
        pytest.param(make_file(encoding="ascii"), Reason.UNSUPPORTED, id="ascii"),
        pytest.param(make_file(byte_skip="10"), Reason.UNSUPPORTED, id="byte-skip"),
        pytest.param(make_file(data_file="a.raw"), Reason.UNSUPPORTED, id="detached"),
        pytest.param(make_file(b"", data_file="a.raw")[:-2], Reason.UNSUPPORTED, id="nhdr"),
        pytest.param(make_file(space_units='"inch" "inch" "inch"'), Reason.UNSUPPORTED, id="inches"),
        pytest.param(
            make_file(space_directions="(1,0) (0,1) (1,1)"), Reason.UNREADABLE, id="flat-directions"
        ),
        pytest.param(make_file(space_directions=None), Reason.UNREADABLE, id="no-directions"),
        pytest.param(make_file(space_origin="(nan,0,0)"), Reason.UNREADABLE, id="origin-nan"),
        pytest.param(make_file(space_origin="7 8 9"), Reason.UNREADABLE, id="origin-unparsable"),
        pytest.param(make_file(space_directions=TILTED), Reason.GANTRY_TILT, id="sheared"),
        pytest.param(make_file(bytes(240)), Reason.NOT_A_VOLUME, id="constant"),
        pytest.param(
            make_file(np.full(120, np.nan, "<f4").tobytes(), type="float"), Reason.NON_FINITE, id="nan"
        ),
    ],
)
def test_invalid_files_are_rejected_with_their_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(ScanError) as caught:
        read(data)
    assert caught.value.reason == reason


def test_sheared_axes_are_kept_if_requested() -> None:
    assert "gantry_tilt" in read(make_file(space_directions=TILTED), keep_shear=True).warnings


def test_a_real_nrrd_file_equals_its_nifti_twin(shared_ct: Path) -> None:
    from featray.ct.formats.nifti import read_nifti

    volume = read((shared_ct / "twins/ct-64.nrrd").read_bytes())
    twin = read_nifti((shared_ct / "twins/ct-64.nii.gz").read_bytes(), max_voxels=MANY)

    assert np.array_equal(volume.voxels_zyx, twin.voxels_zyx)
    assert volume.affine_lps == pytest.approx(twin.affine_lps, abs=1e-3)


def test_plain_int16_is_not_copied() -> None:
    data = make_file()

    shared: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    assert np.shares_memory(read(data).voxels_zyx, shared)
