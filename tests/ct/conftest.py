"""Small DICOM series made on the spot, with planted names that must never come out again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

PLANTED = ("Quirinius^Ottokar", "PID-4711-ZZ", "19470229", "Hospital Nirgends")

SeriesOf = Callable[..., dict[str, Dataset]]


@pytest.fixture
def planted() -> tuple[str, ...]:
    """Return the identifying values that every synthetic slice carries."""
    return PLANTED


@pytest.fixture
def series_of() -> SeriesOf:
    """Return a function that makes the slices of a series, by file name; each may be edited."""
    return _series


@pytest.fixture
def file_bytes() -> Callable[[Dataset], bytes]:
    """Return a function that gives the content of a slice's file."""
    return _bytes


@pytest.fixture
def files_of() -> Callable[..., list[tuple[str, bytes]]]:
    """Return a function that makes a series as (name, bytes) pairs, edited by tag keywords."""

    def make(count: int = 5, **tags: Any) -> list[tuple[str, bytes]]:
        return [(name, _bytes(slice_)) for name, slice_ in _series(count, **tags).items()]

    return make


def stored_zyx(count: int) -> NDArray[np.int16]:
    """Return the stored values of a synthetic series of 6 rows and 4 columns: they count up from 0."""
    return np.arange(count * 24, dtype=np.int16).reshape(count, 6, 4)


def _series(count: int = 5, uid: str = "1.2.3", step: float = 2.0, **tags: Any) -> dict[str, Dataset]:
    """Axial slices named 001.dcm …, at z = 0, step, …; spacing 0.5 (y) and 0.25 mm (x)."""
    return {f"{i + 1:03d}.dcm": _slice(i, count, uid, step, tags) for i in range(count)}


def _slice(index: int, count: int, uid: str, step: float, tags: dict[str, Any]) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"{uid}.{index}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{uid}.{index}"
    dataset.SeriesInstanceUID = uid
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientName, dataset.PatientID, dataset.StudyDate, dataset.InstitutionName = PLANTED
    dataset.InstanceNumber = index + 1
    dataset.ImagePositionPatient = [-10.0, -20.0, index * step]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.5, 0.25]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = 6, 4
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = stored_zyx(count)[index].tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def _bytes(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()
