"""Fixtures that make small DICOM series whose headers contain identifying values, to test that none leaks."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

IDENTIFYING_VALUES = ("Quirinius^Ottokar", "PID-4711-ZZ", "19470229", "Hospital Nirgends")

MakeSeries = Callable[..., dict[str, Dataset]]


@pytest.fixture
def identifying_values() -> tuple[str, ...]:
    """Return the identifying values in the header of every synthetic slice."""
    return IDENTIFYING_VALUES


@pytest.fixture
def make_series() -> MakeSeries:
    """Return a function that makes the slices of a series as data sets by file name, for editing."""
    return make_datasets


@pytest.fixture
def encode_file() -> Callable[[Dataset], bytes]:
    """Return a function that encodes a data set as the content of a DICOM file."""
    return _encode


@pytest.fixture
def make_files() -> Callable[..., list[tuple[str, bytes]]]:
    """Return a function that makes the files of a series as (name, content) pairs.

    Keyword arguments of that function set DICOM attributes of all slices.
    """

    def make(count: int = 5, **tags: Any) -> list[tuple[str, bytes]]:
        return [(name, _encode(dataset)) for name, dataset in make_datasets(count, **tags).items()]

    return make


def make_stored_zyx(count: int) -> NDArray[np.int16]:
    """Return the stored values of a synthetic series, (count, 6, 4): they count up from 0."""
    return np.arange(count * 24, dtype=np.int16).reshape(count, 6, 4)


def make_datasets(count: int = 5, uid: str = "1.2.3", step: float = 2.0, **tags: Any) -> dict[str, Dataset]:
    """Return axial slices named 001.dcm ... at z = 0, step, ... mm, with spacing 0.5 mm (y) and 0.25 mm (x).

    `tags` are attributes of all slices, by DICOM keyword.
    """
    return {f"{i + 1:03d}.dcm": _make_slice(i, count, uid, step, tags) for i in range(count)}


def _make_slice(index: int, count: int, uid: str, step: float, tags: dict[str, Any]) -> Dataset:
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
    dataset.PatientName, dataset.PatientID, dataset.StudyDate, dataset.InstitutionName = IDENTIFYING_VALUES
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
    dataset.PixelData = make_stored_zyx(count)[index].tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def _encode(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()
