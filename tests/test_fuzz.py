"""Test that thousands of damaged files give the correct volume or a reason, within limits of time and memory.

`SCANS` lists small valid scans. Each test damages a file of one of them, then lists, reads and preprocesses
it. A scan that is `ok` is compared with the undamaged scan or, if no checksum can distinguish damage from
another scan, with the result of a second reader. By default the same few examples are tested each time. To
search longer and with new examples each time:

    FEATRAY_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py -k nii
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from featray.config import Config, load
from featray.errors import Reason, WarningCode
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.synthetic.phantom import Phantom, make_phantom, write_dicom_series, write_nifti

EXAMPLES = int(os.environ.get("FEATRAY_FUZZ_EXAMPLES", "0"))
SECONDS, PEAK_BYTES = 2.0, 64 * 2**20
"""Limits of time and memory to list and decode files of a few kB."""

SHAPE = (5, 16, 12)
REASONS = {str(reason) for reason in Reason}

Edit = tuple[str, int, int, bytes]
"""Kind of the edit, two numbers that select positions, and bytes to insert."""


def make_small_phantom() -> Phantom:
    return make_phantom(11, SHAPE, (2.0, 1.5, 1.25))


# Functions that write a valid scan.


def write_nii(folder: Path) -> None:
    write_nifti(make_small_phantom(), folder / "scan.nii")


def write_nii_gz(folder: Path) -> None:
    write_nifti(make_small_phantom(), folder / "scan.nii.gz")


def write_nii_big_endian(folder: Path) -> None:
    image = nib.Nifti1Image(get_voxels_xyz().astype(">f4"), get_ras_affine())
    header = image.header.as_byteswapped(">")
    swapped = nib.Nifti1Image(get_voxels_xyz().astype(">f4"), get_ras_affine(), header)
    (folder / "scan.nii").write_bytes(swapped.to_bytes())


def write_nii_scaled(folder: Path) -> None:
    image = nib.Nifti1Image(get_voxels_xyz().astype(np.uint16) // 2, get_ras_affine())
    image.header.set_slope_inter(2, -1024)
    (folder / "scan.nii").write_bytes(image.to_bytes())


def write_nifti_2(folder: Path) -> None:
    (folder / "scan.nii").write_bytes(nib.Nifti2Image(get_voxels_xyz(), get_ras_affine()).to_bytes())


def write_hdr_img(folder: Path) -> None:
    nib.save(nib.Nifti1Pair(get_voxels_xyz(), get_ras_affine()), folder / "scan.hdr")


def write_nrrd(folder: Path) -> None:
    sitk.WriteImage(make_simpleitk_image(), folder / "scan.nrrd", useCompression=False)


def write_nrrd_gzip(folder: Path) -> None:
    sitk.WriteImage(make_simpleitk_image(), folder / "scan.nrrd", useCompression=True)


def write_mha(folder: Path) -> None:
    sitk.WriteImage(make_simpleitk_image(), folder / "scan.mha", useCompression=False)


def write_mha_zlib(folder: Path) -> None:
    sitk.WriteImage(make_simpleitk_image(), folder / "scan.mha", useCompression=True)


def write_npy(folder: Path) -> None:
    np.save(folder / "scan.npy", make_small_phantom().voxels_zyx)


def write_dicom(folder: Path) -> None:
    write_dicom_series(make_small_phantom(), folder)


def write_dicom_big_endian(folder: Path) -> None:
    write_dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        pydicom.dcmwrite(path, dataset, little_endian=False, implicit_vr=False)


def write_dicom_deflated(folder: Path) -> None:
    write_dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)


def write_dicom_rle(folder: Path) -> None:
    write_dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)


def write_dicom_jpeg(folder: Path) -> None:
    change_transfer_syntax(folder, gdcm.TransferSyntax.JPEGLosslessProcess14_1)


def write_dicom_jpeg_ls(folder: Path) -> None:
    change_transfer_syntax(folder, gdcm.TransferSyntax.JPEGLSLossless)


def write_dicom_jpeg_2000(folder: Path) -> None:
    change_transfer_syntax(folder, gdcm.TransferSyntax.JPEG2000Lossless)


def write_dicom_zip(folder: Path) -> None:
    write_dicom_series(make_small_phantom(), folder / "series")
    with zipfile.ZipFile(folder / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "series").iterdir()):
            archive.write(path, f"series/{path.name}")
    shutil.rmtree(folder / "series")


def change_transfer_syntax(folder: Path, syntax: int) -> None:
    write_dicom(folder)
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def get_voxels_xyz() -> NDArray[np.int16]:
    return np.ascontiguousarray(make_small_phantom().voxels_zyx.transpose(2, 1, 0))


def get_ras_affine() -> NDArray[np.float64]:
    return np.diag([-1.0, -1, 1, 1]) @ make_small_phantom().affine_lps


def make_simpleitk_image() -> Any:
    image = sitk.GetImageFromArray(make_small_phantom().voxels_zyx)
    image.SetSpacing((1.25, 1.5, 2.0))
    return image


@dataclass(frozen=True)
class Kind:
    """A kind of valid scan, and the check of its damaged versions that are still read.

    Attributes:
        write: Writes the files of the scan into a folder.
        check: Asserts that the outcomes are correct. Its arguments are the path of the damaged file, and the
            outcomes before and after the damage.
        unpack: Returns the content of a file that will be damaged, without compression and checksum.
        pack: Reverses `unpack`.
        source_format: `source.format` of the configuration.
    """

    write: Callable[[Path], None]
    check: Callable[[Path, list[Decoded], list[Decoded]], None]
    unpack: Callable[[bytes], bytes] = bytes
    pack: Callable[[bytes], bytes] = bytes
    source_format: str = "auto"


# Functions that check the outcomes of a damaged scan.


def check_unchanged(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    """Assert that a scan whose bytes are protected by a checksum is unchanged."""
    for decoded in select_ok(after):
        (same,) = select_ok(before)
        np.testing.assert_array_equal(decoded.tensor, same.tensor)
        assert get_geometry(decoded) == get_geometry(same)


def check_against_nibabel(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in select_ok(after):
        header_file = path.with_suffix(".hdr") if path.suffix == ".img" else path
        with contextlib.suppress(ImageFileError, HeaderDataError, OSError, ValueError):
            image: Any = nib.load(header_file)
            assert_holds_voxels(decoded, np.asarray(image.dataobj, np.float64))
            units = int(image.header["xyzt_units"]) & 7
            if units in (0, 2) and has_consistent_affines(header_file, decoded):
                spacing = nib.affines.voxel_sizes(image.affine)[::-1]
                np.testing.assert_allclose(decoded.record.spacing, spacing, rtol=1e-4)


def has_consistent_affines(header_file: Path, decoded: Decoded) -> bool:
    """Return whether the qform and sform codes of a file exist in NIfTI and the two affines agree.

    nibabel treats a code that does not exist as 0; ITK and featray use the affine.
    """
    header: Any = parse_header(header_file)
    codes = int(header["qform_code"]), int(header["sform_code"])
    return set(codes) <= set(range(6)) and WarningCode.SFORM_QFORM_DIFFER not in decoded.record.warnings


def parse_header(path: Path) -> Any:
    """Return the header without the corrections of nibabel."""
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = int(kind.sizeof_hdr)
        for endianness, order in (("<", "little"), (">", "big")):
            if int.from_bytes(data[:4], order) == size:  # type: ignore[arg-type]
                return kind(data[:size], endianness=endianness, check=False)
    raise AssertionError("featray has read a file that is not NIfTI")


def check_against_numpy(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in select_ok(after):
        np.testing.assert_allclose(decoded.tensor[0], np.load(path, allow_pickle=False), rtol=1e-6)


def assert_holds_voxels(decoded: Decoded, stored_xyz: NDArray[np.float64]) -> None:
    """Assert that the tensor holds all voxels of a second reader, in any orientation."""
    stored_xyz = stored_xyz.reshape(stored_xyz.shape[:3])
    assert decoded.record.shape == list(stored_xyz.shape[::-1])
    got, want = np.sort(decoded.tensor, axis=None), np.sort(stored_xyz, axis=None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def check_size(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in select_ok(after):
        assert decoded.tensor.size <= path.stat().st_size


def check_slices(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    """Assert that the undamaged slices keep their order and that the damaged slice is reported."""
    (whole,) = select_ok(before)
    slices = list(whole.tensor[0])
    for decoded in select_ok(after):
        matches = [[int(np.array_equal(plane, other)) for other in slices] for plane in decoded.tensor[0]]
        unknown = [index for index, row in enumerate(matches) if not any(row)]
        known = [row.index(1) for row in matches if any(row)]
        assert len(unknown) <= 1, "the volume has slices that are in no file"
        assert known in (sorted(known), sorted(known)[::-1]), "slices changed their order"
        np.testing.assert_allclose(decoded.record.spacing, whole.record.spacing, rtol=0.011)
        if len(matches) < len(slices):
            assert not unknown
            assert len(matches) == len(slices) - 1, "more than the damaged slice is missing"
            assert known[-1] - known[0] == len(known) - 1, "a slice between two others is missing"
            assert len(after) > 1, "the damaged slice belongs to no scan"


def select_ok(outcomes: list[Decoded]) -> list[Decoded]:
    return [decoded for decoded in outcomes if decoded.record.status == "ok"]


def get_geometry(decoded: Decoded) -> tuple[Any, ...]:
    record = decoded.record
    return record.shape, record.spacing, record.orientation


SCANS = {
    "nii": Kind(write_nii, check_against_nibabel),
    "nii.gz": Kind(write_nii_gz, check_unchanged),
    "nii.gz inside": Kind(write_nii_gz, check_against_nibabel, gzip.decompress, gzip.compress),
    "nii big endian": Kind(write_nii_big_endian, check_against_nibabel),
    "nii scaled": Kind(write_nii_scaled, check_against_nibabel),
    "nifti 2": Kind(write_nifti_2, check_against_nibabel),
    "hdr img": Kind(write_hdr_img, check_against_nibabel),
    "nrrd": Kind(write_nrrd, check_size),
    "nrrd gzip": Kind(write_nrrd_gzip, check_size),
    "mha": Kind(write_mha, check_size),
    "mha zlib": Kind(write_mha_zlib, check_size),
    "npy": Kind(write_npy, check_against_numpy, source_format="npy"),
    "dicom": Kind(write_dicom, check_slices),
    "dicom big endian": Kind(write_dicom_big_endian, check_slices),
    "dicom deflated": Kind(write_dicom_deflated, check_slices),
    "dicom rle": Kind(write_dicom_rle, check_slices),
    "dicom jpeg": Kind(write_dicom_jpeg, check_slices),
    "dicom jpeg-ls": Kind(write_dicom_jpeg_ls, check_slices),
    "dicom jpeg 2000": Kind(write_dicom_jpeg_2000, check_slices),
    "dicom zip": Kind(write_dicom_zip, check_unchanged),
}

# Damage: edits of the bytes of a file.

NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63]
SIZES: list[tuple[int, Literal["little", "big"]]] = [
    (size, order) for size in (1, 2, 4, 8) for order in ("little", "big")
]
FLOATS = [float("nan"), float("inf"), 1e38, -1.0, 1e-40]
TEXTS = ["9" * 20, "-1", "nan", "1e400", "\\", "\n", "\0" * 8, " " * 8, "0\\0\\0", "(1,0,0)"]
PIECES = [
    *((number % 256**size).to_bytes(size, order) for number in NUMBERS for size, order in SIZES),
    *(struct.pack(code, number) for number in FLOATS for code in ("<f", ">f", "<d", ">d")),
    *(text.encode() for text in TEXTS),
]
POSITIONS = st.one_of(st.integers(0, 120), st.integers(0, 1000), st.integers(0, 2**20))
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.just("flip"), POSITIONS, st.integers(0, 7), st.just(b"")),
    st.tuples(st.just("overwrite"), POSITIONS, st.just(0), st.sampled_from(PIECES)),
    st.tuples(st.just("overwrite"), POSITIONS, st.just(0), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), POSITIONS, st.just(0), st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("delete"), POSITIONS, st.integers(1, 300), st.just(b"")),
    st.tuples(st.just("cut"), POSITIONS, st.just(0), st.just(b"")),
    st.tuples(st.just("swap"), POSITIONS, POSITIONS, st.just(b"")),
)
DAMAGE = st.tuples(st.integers(0, 4), st.lists(EDITS, min_size=1, max_size=3))


def apply_edits(data: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        data = apply_edit(data, *edit) if data else data
    return data


def apply_edit(data: bytes, kind: str, where: int, second: int, piece: bytes) -> bytes:
    at = where % len(data)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << second)]) + data[at + 1 :]
    if kind == "overwrite":
        return data[:at] + piece + data[at + len(piece) :]
    if kind == "insert":
        return data[:at] + piece + data[at:]
    if kind == "delete":
        return data[:at] + data[at + second :]
    if kind == "cut":
        return data[:at]
    low, high = sorted((at, second % len(data)))
    length = min(16, high - low)
    first, last = data[low : low + length], data[high : high + length]
    return data[:low] + last + data[low + length : high] + first + data[high + length :]


@dataclass(frozen=True)
class Collection:
    """A folder with one valid scan, and the outcome of decoding the undamaged scan."""

    folder: Path
    config: Config
    decode: Decoder
    before: list[Decoded]

    @classmethod
    def make(cls, kind: Kind, folder: Path) -> Collection:
        """Write a scan of this kind into the folder and decode it."""
        kind.write(folder)
        config = make_config(folder, kind.source_format)
        collection = cls(folder, config, Decoder.from_config(config), [])
        collection.before.extend(collection.decode_all())
        return collection

    def decode_all(self) -> list[Decoded]:
        """List the folder and decode all its scans."""
        return [self.decode(scan) for scan in list_scans(self.config.source, self.config.policy).scans]


MakeCollection = Callable[[str], Collection]


@pytest.fixture(scope="module")
def make_collection(tmp_path_factory: pytest.TempPathFactory) -> MakeCollection:
    """Return a function that makes the collection of a kind, once per kind."""
    collections: dict[str, Collection] = {}

    def make(name: str) -> Collection:
        if name not in collections:
            collections[name] = Collection.make(SCANS[name], tmp_path_factory.mktemp("fuzz"))
        return collections[name]

    return make


def make_config(folder: Path, source: str) -> Config:
    return load(
        {
            "source": {"uri": str(folder), "format": source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


@pytest.mark.parametrize("name", SCANS)
def test_every_undamaged_scan_is_read(name: str, make_collection: MakeCollection) -> None:
    (decoded,) = make_collection(name).before
    assert decoded.record.message is None
    assert decoded.tensor.shape == (1, *SHAPE)
    if name != "nii scaled":  # a slope of 2 changes odd values by 1 HU
        assert decoded.tensor.sum() == make_small_phantom().voxels_zyx.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANS)
def test_a_damaged_scan_gives_the_correct_volume_or_a_reason(
    name: str, make_collection: MakeCollection
) -> None:
    kind, collection = SCANS[name], make_collection(name)
    folder = collection.folder
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    @settings(
        max_examples=EXAMPLES or 40,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage=DAMAGE)
    def check(damage: tuple[int, list[Edit]]) -> None:
        number, edits = damage
        path = list(files)[number % len(files)]
        path.write_bytes(kind.pack(apply_edits(kind.unpack(files[path]), edits)))
        try:
            with limit_time_and_memory():
                after = collection.decode_all()
            for decoded in after:
                assert_has_outcome(decoded, folder)
            kind.check(path, collection.before, after)
        finally:
            path.write_bytes(files[path])

    check()


def assert_has_outcome(decoded: Decoded, folder: Path) -> None:
    record, tensor = decoded.record, decoded.tensor
    if record.status == "ok":
        assert tensor.dtype == np.float32
        assert len(tensor) == 1
        assert np.isfinite(tensor).all()
    else:
        assert record.reason in REASONS
        assert record.message
        assert "raised" not in record.message, record.message  # an unexpected exception
        assert str(folder) not in record.message
        assert len(tensor) == 0


@contextlib.contextmanager
def limit_time_and_memory() -> Iterator[None]:
    """Assert that the code in the context stays below the limits of time and memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        taken, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < SECONDS
    assert peak < PEAK_BYTES
