"""Read one scan: its files from the store in, one checked volume in HU out.

Knows the formats only by name; what a header may lie about is the readers' business in `featray.ct`.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fsspec

from featray.ct import dicom, nifti
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError
from featray.schema import Scan

Files = list[tuple[str, bytes]]


@dataclass(frozen=True)
class ReadResult:
    """A volume and what it took: bytes fetched, seconds to fetch, seconds to decode."""

    volume: Volume
    bytes_read: int
    read_s: float
    decode_s: float


def read(
    scan: Scan, fs: fsspec.AbstractFileSystem, *, max_voxels: int, dicom_tags: Sequence[str] = ()
) -> ReadResult:
    """Return the scan's volume.

    Args:
        scan: As listed.
        fs: The source's file system.
        max_voxels: Larger volumes are refused from their header, before anything is allocated.
        dicom_tags: Keywords whose values may leave the header.

    Raises:
        ScanError: The scan cannot be used; its reason says why.
    """
    readers: dict[str, Callable[[Files], Volume]] = {
        "nifti": lambda files: nifti.read_nifti(files[0][1], max_voxels=max_voxels),
        "dicom": lambda files: dicom.read_series(files, max_voxels=max_voxels, dicom_tags=dicom_tags),
    }
    start = time.perf_counter()
    files = [(posixpath.basename(path), _fetch(fs, path)) for path in scan.files]
    fetched = time.perf_counter()
    volume = readers[scan.format](files)
    done = time.perf_counter()
    return ReadResult(volume, sum(len(data) for _, data in files), fetched - start, done - fetched)


def _fetch(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    try:
        data: bytes = fs.cat_file(path)
    except FileNotFoundError:
        raise ScanError(Reason.STORAGE, f"{posixpath.basename(path)} is gone since it was listed") from None
    except PermissionError:
        raise ScanError(Reason.STORAGE, f"no permission to read {posixpath.basename(path)}") from None
    except OSError as error:
        problem = f"{posixpath.basename(path)} could not be fetched ({type(error).__name__}); run again"
        raise ScanError(Reason.STORAGE, problem) from None
    return data
