"""Shares of one series in several archives fail, and a share of a complete series is excluded."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from featray.collection.header_cache import HeaderCache
from featray.config import SourceConfig
from featray.stages.list import list_scans


def write_slice(path: Path, number: int, **tags: str) -> Path:
    """Write a slice of one series, 2 mm above the slice with the number before."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"1.2.3.{number}"
    dataset.Modality, dataset.PatientID, dataset.StudyInstanceUID = "CT", "P1", "1.5"
    dataset.SeriesInstanceUID, dataset.InstanceNumber = "1.2.3", number
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.Rows, dataset.Columns = [1, 1], 2, 2
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelData = bytes([number] * 8)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def write_zip(path: Path, numbers: Iterable[int], **tags: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number in numbers:
            part = write_slice(path.parent.parent / "parts" / path.stem / f"{number}.dcm", number, **tags)
            archive.write(part, f"series/{part.name}")


def list_outcomes(folder: Path, cache: HeaderCache | None = None) -> dict[str, str]:
    """Return the outcome of each scan by its id; failed and excluded scans by reason."""
    scans = list_scans(SourceConfig(uri=str(folder)), header_cache=cache).scans
    return {scan.scan_id: ("excluded " if scan.excluded else "") + str(scan.reason or "ok") for scan in scans}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (range(0, 12, 2), range(1, 12, 2)),
        (range(6), range(6, 12)),
        (range(7), range(5, 12)),
        (range(4), range(8, 12)),
        (range(0, 11, 2), range(1, 10, 2)),
    ],
)
def test_shares_in_two_archives_fail_and_say_what_to_do(tmp_path: Path, first: range, second: range) -> None:
    write_zip(tmp_path / "all" / "1.zip", first)
    write_zip(tmp_path / "all" / "2.zip", second)

    scans = list_scans(SourceConfig(uri=str(tmp_path / "all"))).scans

    assert [str(scan.reason) for scan in scans] == ["missing_slices"] * 2
    assert all("unpack the archives" in scan.message for scan in scans)


def test_shares_in_an_archive_and_a_folder_fail(tmp_path: Path) -> None:
    write_zip(tmp_path / "all" / "1.zip", range(6))
    for number in range(6, 12):
        write_slice(tmp_path / "all" / "rest" / f"{number}.dcm", number)

    assert set(list_outcomes(tmp_path / "all").values()) == {"missing_slices"}


def test_unpacked_shares_are_one_scan_and_the_archives_are_excluded(tmp_path: Path) -> None:
    write_zip(tmp_path / "all" / "1.zip", range(6))
    write_zip(tmp_path / "all" / "2.zip", range(6, 12))
    for number in range(12):
        write_slice(tmp_path / "all" / "whole" / f"{number}.dcm", number)

    assert list_outcomes(tmp_path / "all") == {
        "1.zip": "excluded duplicate_slices",
        "2.zip": "excluded duplicate_slices",
        "whole": "ok",
    }


def test_copies_in_two_archives_are_two_scans(tmp_path: Path) -> None:
    write_zip(tmp_path / "all" / "1.zip", range(12))
    write_zip(tmp_path / "all" / "2.zip", range(12))

    assert list_outcomes(tmp_path / "all") == {"1.zip": "ok", "2.zip": "ok"}


def test_patients_with_one_series_uid_in_their_own_archives_are_two_scans(tmp_path: Path) -> None:
    write_zip(tmp_path / "all" / "1.zip", range(12))
    write_zip(tmp_path / "all" / "2.zip", range(3, 9), PatientID="P2")

    assert list_outcomes(tmp_path / "all") == {"1.zip": "ok", "2.zip": "ok"}


def test_shares_are_found_with_headers_from_the_cache(tmp_path: Path) -> None:
    cache = HeaderCache()
    write_zip(tmp_path / "all" / "1.zip", range(6))
    assert list_outcomes(tmp_path / "all", cache) == {"1.zip": "ok"}
    cache = HeaderCache.from_bytes(cache.to_bytes())
    write_zip(tmp_path / "all" / "2.zip", range(6, 12))

    assert list_outcomes(tmp_path / "all", cache) == {"1.zip": "missing_slices", "2.zip": "missing_slices"}
