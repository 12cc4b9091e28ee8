"""Kinds of small valid scans, and how to check the damaged versions that are still read.

A scan that is `ok` after damage is compared with the undamaged scan or, if no checksum can distinguish damage
from another scan, with the result of a second reader.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813  # its usual name
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from featray.errors import WarningCode
from featray.schema import Decoded
from featray.synthetic.phantom import Phantom, make_phantom, write_dicom_series, write_nifti

SHAPE = (5, 16, 12)


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
