"""Thousands of damaged files: each ends as the right volume or with a reason, in time and in memory.

A table of small valid scans (`SCANS`), mutations of one of their files, and the whole way from listing to
model input. What comes out `ok` is held against the undamaged scan or, where no checksum can tell damage
from another scan, against a second reader. The same few examples run each time; for a long search with
other ones each time:

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
import SimpleITK as sitk  # noqa: N813 - the name its users know
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
"""For one listing and decoding of files of a few kB."""

SHAPE = (5, 16, 12)
REASONS = {str(reason) for reason in Reason}

Edit = tuple[str, int, int, bytes]
"""Kind, two numbers that choose places, and bytes."""


def phantom() -> Phantom:
    return make_phantom(11, SHAPE, (2.0, 1.5, 1.25))


# valid scans


def nii(folder: Path) -> None:
    write_nifti(phantom(), folder / "scan.nii")


def nii_gz(folder: Path) -> None:
    write_nifti(phantom(), folder / "scan.nii.gz")


def nii_big_endian(folder: Path) -> None:
    image = nib.Nifti1Image(voxels_xyz().astype(">f4"), ras_affine())
    swapped = nib.Nifti1Image(voxels_xyz().astype(">f4"), ras_affine(), image.header.as_byteswapped(">"))
    (folder / "scan.nii").write_bytes(swapped.to_bytes())


def nii_scaled(folder: Path) -> None:
    image = nib.Nifti1Image(voxels_xyz().astype(np.uint16) // 2, ras_affine())
    image.header.set_slope_inter(2, -1024)
    (folder / "scan.nii").write_bytes(image.to_bytes())


def nifti_2(folder: Path) -> None:
    (folder / "scan.nii").write_bytes(nib.Nifti2Image(voxels_xyz(), ras_affine()).to_bytes())


def hdr_img(folder: Path) -> None:
    nib.save(nib.Nifti1Pair(voxels_xyz(), ras_affine()), folder / "scan.hdr")


def nrrd(folder: Path) -> None:
    sitk.WriteImage(simpleitk_image(), folder / "scan.nrrd", useCompression=False)


def nrrd_gzip(folder: Path) -> None:
    sitk.WriteImage(simpleitk_image(), folder / "scan.nrrd", useCompression=True)


def mha(folder: Path) -> None:
    sitk.WriteImage(simpleitk_image(), folder / "scan.mha", useCompression=False)


def mha_zlib(folder: Path) -> None:
    sitk.WriteImage(simpleitk_image(), folder / "scan.mha", useCompression=True)


def npy(folder: Path) -> None:
    np.save(folder / "scan.npy", phantom().voxels_zyx)


def dicom(folder: Path) -> None:
    write_dicom_series(phantom(), folder)


def dicom_big_endian(folder: Path) -> None:
    dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        pydicom.dcmwrite(path, dataset, little_endian=False, implicit_vr=False)


def dicom_deflated(folder: Path) -> None:
    dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)


def dicom_rle(folder: Path) -> None:
    dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)


def dicom_jpeg(folder: Path) -> None:
    recode(folder, gdcm.TransferSyntax.JPEGLosslessProcess14_1)


def dicom_jpeg_ls(folder: Path) -> None:
    recode(folder, gdcm.TransferSyntax.JPEGLSLossless)


def dicom_jpeg_2000(folder: Path) -> None:
    recode(folder, gdcm.TransferSyntax.JPEG2000Lossless)


def dicom_zip(folder: Path) -> None:
    write_dicom_series(phantom(), folder / "series")
    with zipfile.ZipFile(folder / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "series").iterdir()):
            archive.write(path, f"series/{path.name}")
    shutil.rmtree(folder / "series")


def recode(folder: Path, syntax: int) -> None:
    dicom(folder)
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


def voxels_xyz() -> NDArray[np.int16]:
    return np.ascontiguousarray(phantom().voxels_zyx.transpose(2, 1, 0))


def ras_affine() -> NDArray[np.float64]:
    return np.diag([-1.0, -1, 1, 1]) @ phantom().affine_lps


def simpleitk_image() -> Any:
    image = sitk.GetImageFromArray(phantom().voxels_zyx)
    image.SetSpacing((1.25, 1.5, 2.0))
    return image


@dataclass(frozen=True)
class Kind:
    """A valid scan and what is known of a damaged one that is still read.

    Attributes:
        write: Puts its files into a folder.
        right: Asserts that what came out is right, from the damaged file, the outcomes before and after.
        unpack, pack: Take a file's content out of what a checksum guards, and put the damaged back.
        source: `source.format`.
    """

    write: Callable[[Path], None]
    right: Callable[[Path, list[Decoded], list[Decoded]], None]
    unpack: Callable[[bytes], bytes] = bytes
    pack: Callable[[bytes], bytes] = bytes
    source: str = "auto"


# what is right


def unchanged(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    """A checksum guards every byte that counts."""
    for decoded in ok(after):
        (same,) = ok(before)
        np.testing.assert_array_equal(decoded.tensor, same.tensor)
        assert geometry_of(decoded) == geometry_of(same)


def as_nibabel_reads(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in ok(after):
        header_file = path.with_suffix(".hdr") if path.suffix == ".img" else path
        with contextlib.suppress(ImageFileError, HeaderDataError, OSError, ValueError):
            image: Any = nib.load(header_file)
            holds_the_voxels(decoded, np.asarray(image.dataobj, np.float64))
            units = int(image.header["xyzt_units"]) & 7
            if units in (0, 2) and one_geometry(header_file, decoded):
                spacing = nib.affines.voxel_sizes(image.affine)[::-1]
                np.testing.assert_allclose(decoded.record.spacing, spacing, rtol=1e-4)


def one_geometry(header_file: Path, decoded: Decoded) -> bool:
    """Return whether a file's qform and sform codes exist in NIfTI and do not contradict each other.

    nibabel takes a code that does not exist for 0; ITK and featray take the affine that is there.
    """
    header: Any = decoded_header(header_file)
    codes = int(header["qform_code"]), int(header["sform_code"])
    return set(codes) <= set(range(6)) and WarningCode.SFORM_QFORM_DIFFER not in decoded.record.warnings


def decoded_header(path: Path) -> Any:
    """Return the header as it stands, without nibabel's repairs."""
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = int(kind.sizeof_hdr)
        for endianness, order in (("<", "little"), (">", "big")):
            if int.from_bytes(data[:4], order) == size:  # type: ignore[arg-type]
                return kind(data[:size], endianness=endianness, check=False)
    raise AssertionError("read, but not NIfTI")


def as_numpy_reads(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in ok(after):
        np.testing.assert_allclose(decoded.tensor[0], np.load(path, allow_pickle=False), rtol=1e-6)


def holds_the_voxels(decoded: Decoded, stored_xyz: NDArray[np.float64]) -> None:
    """Assert that all voxels of a second reader are there, whatever way the array is turned."""
    stored_xyz = stored_xyz.reshape(stored_xyz.shape[:3])
    assert decoded.record.shape == list(stored_xyz.shape[::-1])
    got, want = np.sort(decoded.tensor, axis=None), np.sort(stored_xyz, axis=None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def as_large_as_the_file(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    for decoded in ok(after):
        assert decoded.tensor.size <= path.stat().st_size


def no_slice_lost_or_moved(path: Path, before: list[Decoded], after: list[Decoded]) -> None:
    """The slices of the other files are all there, in their places, and the damaged one is accounted for."""
    (whole,) = ok(before)
    slices = list(whole.tensor[0])
    for decoded in ok(after):
        found = [[int(np.array_equal(one, other)) for other in slices] for one in decoded.tensor[0]]
        unknown = [place for place, row in enumerate(found) if not any(row)]
        known = [row.index(1) for row in found if any(row)]
        assert len(unknown) <= 1, "slices came out that are in no file"
        assert known in (sorted(known), sorted(known)[::-1]), "slices changed their order"
        np.testing.assert_allclose(decoded.record.spacing, whole.record.spacing, rtol=0.011)
        if len(found) < len(slices):
            assert not unknown
            assert len(found) == len(slices) - 1, "more than the damaged slice is missing"
            assert known[-1] - known[0] == len(known) - 1, "a slice is missing in between"
            assert len(after) > 1, "the damaged slice is in no scan"


def ok(outcomes: list[Decoded]) -> list[Decoded]:
    return [decoded for decoded in outcomes if decoded.record.status == "ok"]


def geometry_of(decoded: Decoded) -> tuple[Any, ...]:
    record = decoded.record
    return record.shape, record.spacing, record.orientation


SCANS = {
    "nii": Kind(nii, as_nibabel_reads),
    "nii.gz": Kind(nii_gz, unchanged),
    "nii.gz inside": Kind(nii_gz, as_nibabel_reads, gzip.decompress, gzip.compress),
    "nii big endian": Kind(nii_big_endian, as_nibabel_reads),
    "nii scaled": Kind(nii_scaled, as_nibabel_reads),
    "nifti 2": Kind(nifti_2, as_nibabel_reads),
    "hdr img": Kind(hdr_img, as_nibabel_reads),
    "nrrd": Kind(nrrd, as_large_as_the_file),
    "nrrd gzip": Kind(nrrd_gzip, as_large_as_the_file),
    "mha": Kind(mha, as_large_as_the_file),
    "mha zlib": Kind(mha_zlib, as_large_as_the_file),
    "npy": Kind(npy, as_numpy_reads, source="npy"),
    "dicom": Kind(dicom, no_slice_lost_or_moved),
    "dicom big endian": Kind(dicom_big_endian, no_slice_lost_or_moved),
    "dicom deflated": Kind(dicom_deflated, no_slice_lost_or_moved),
    "dicom rle": Kind(dicom_rle, no_slice_lost_or_moved),
    "dicom jpeg": Kind(dicom_jpeg, no_slice_lost_or_moved),
    "dicom jpeg-ls": Kind(dicom_jpeg_ls, no_slice_lost_or_moved),
    "dicom jpeg 2000": Kind(dicom_jpeg_2000, no_slice_lost_or_moved),
    "dicom zip": Kind(dicom_zip, unchanged),
}

# damage

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
PLACES = st.one_of(st.integers(0, 120), st.integers(0, 1000), st.integers(0, 2**20))
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7), st.just(b"")),
    st.tuples(st.just("overwrite"), PLACES, st.just(0), st.sampled_from(PIECES)),
    st.tuples(st.just("overwrite"), PLACES, st.just(0), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), PLACES, st.just(0), st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 300), st.just(b"")),
    st.tuples(st.just("cut"), PLACES, st.just(0), st.just(b"")),
    st.tuples(st.just("swap"), PLACES, PLACES, st.just(b"")),
)
DAMAGE = st.tuples(st.integers(0, 4), st.lists(EDITS, min_size=1, max_size=3))


def damaged(data: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        data = edited(data, *edit) if data else data
    return data


def edited(data: bytes, kind: str, where: int, second: int, piece: bytes) -> bytes:
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
    one, other = sorted((at, second % len(data)))
    length = min(16, other - one)
    first, then = data[one : one + length], data[other : other + length]
    return data[:one] + then + data[one + length : other] + first + data[other + length :]


@dataclass(frozen=True)
class Collection:
    """A folder with one valid scan, and what comes out of it."""

    folder: Path
    config: Config
    decode: Decoder
    before: list[Decoded]

    @classmethod
    def of(cls, kind: Kind, folder: Path) -> Collection:
        kind.write(folder)
        config = config_of(folder, kind.source)
        found = cls(folder, config, Decoder.from_config(config), [])
        found.before.extend(found.outcomes())
        return found

    def outcomes(self) -> list[Decoded]:
        return [self.decode(scan) for scan in list_scans(self.config.source, self.config.policy).scans]


CollectionOf = Callable[[str], Collection]


@pytest.fixture(scope="module")
def collection_of(tmp_path_factory: pytest.TempPathFactory) -> CollectionOf:
    """Return a function that makes the collection of a kind, once."""
    made: dict[str, Collection] = {}

    def collection(name: str) -> Collection:
        if name not in made:
            made[name] = Collection.of(SCANS[name], tmp_path_factory.mktemp("fuzz"))
        return made[name]

    return collection


def config_of(folder: Path, source: str) -> Config:
    return load(
        {
            "source": {"uri": str(folder), "format": source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


@pytest.mark.parametrize("name", SCANS)
def test_every_undamaged_scan_is_read(name: str, collection_of: CollectionOf) -> None:
    (decoded,) = collection_of(name).before
    assert decoded.record.message is None
    assert decoded.tensor.shape == (1, *SHAPE)
    if name != "nii scaled":  # a step of 2 HU costs the odd values 1 HU
        assert decoded.tensor.sum() == phantom().voxels_zyx.sum()


@pytest.mark.parametrize("name", SCANS)
def test_damage_ends_as_the_right_volume_or_with_a_reason(name: str, collection_of: CollectionOf) -> None:
    kind, collection = SCANS[name], collection_of(name)
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
        path.write_bytes(kind.pack(damaged(kind.unpack(files[path]), edits)))
        try:
            with bounded():
                after = collection.outcomes()
            for decoded in after:
                is_settled(decoded, folder)
            kind.right(path, collection.before, after)
        finally:
            path.write_bytes(files[path])

    check()


def is_settled(decoded: Decoded, folder: Path) -> None:
    record, tensor = decoded.record, decoded.tensor
    if record.status == "ok":
        assert tensor.dtype == np.float32
        assert len(tensor) == 1
        assert np.isfinite(tensor).all()
    else:
        assert record.reason in REASONS
        assert record.message
        assert "raised" not in record.message, record.message  # an exception that nobody foresaw
        assert str(folder) not in record.message
        assert len(tensor) == 0


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Assert that what is done inside is quick and allocates little."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        taken, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < SECONDS
    assert peak < PEAK_BYTES
