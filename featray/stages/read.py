"""Read one scan: its files from the store in, one checked volume in HU, or an array's samples, out.

Knows the formats only by name; what a header may lie about is the readers' business in `featray.ct` and
`featray.ct.formats.npy`. The readers are imported where scans are read: the driver needs none of them.
"""

from __future__ import annotations

import functools
import posixpath
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from featray.config import PolicyConfig, SourceConfig
from featray.ct.formats.npy import Samples, read_npy
from featray.ct.formats.voxel_data import convert_to_shifted_slices
from featray.ct.formats.zip_archive import MAX_ARCHIVE_BYTES, open_archive
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError
from featray.schema import Scan
from featray.storage import retry
from featray.storage.urls import file_version, fingerprint_files, open_url

Files = list[tuple[str, bytes]]
T = TypeVar("T")

_MAX_VOXEL_BYTES, _MAX_HEADER_BYTES = 8, 2**24
"""What an archive's members of one scan may take for each voxel and for each file."""
_FETCH_THREADS = 8
"""Files of one series that are fetched at once from a store; each waits for the store, not for a core."""
_CHANGED = "changed since it was listed; run again"
_MASK_FORMATS = {".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "nrrd", ".mha": "mha"}


@dataclass(frozen=True)
class ReadResult:
    """What a scan holds and what it took: bytes fetched, seconds to fetch, seconds to decode.

    `mask` is the volume whose bounding box is to be cut out, if the scan has one.
    """

    content: Volume | Samples
    mask: Volume | None
    bytes_read: int
    read_s: float
    decode_s: float


@dataclass(frozen=True)
class Reader:
    """How the scans of one collection are read.

    Attributes:
        source: The collection.
        policy: What to do with odd ones.
        max_voxels: Larger volumes are refused from their header, before anything is allocated.
        dicom_tags: Keywords whose values may leave the header.
    """

    source: SourceConfig = field(repr=False)  # its uri may hold credentials
    policy: PolicyConfig
    max_voxels: int
    dicom_tags: Sequence[str] = ()

    def read(self, scan: Scan) -> ReadResult:
        """Return the scan's volume or samples.

        Raises:
            ScanError: The scan cannot be used; its reason says why.
        """
        start = time.perf_counter()
        files = self._files(scan)
        fetched = time.perf_counter()
        content, mask = self._decode(scan.format, files), self._mask(scan.mask)
        done = time.perf_counter()
        total = sum(len(data) for _, data in files)
        return ReadResult(content, mask, total, fetched - start, done - fetched)

    def has_scan(self, scan: Scan) -> bool:
        """Return whether the store still has the scan's first file, and lets it be looked at."""
        fs = self._fs(scan)
        fs.invalidate_cache()
        path = scan.archive or scan.files[0]
        try:
            _asked(path, lambda: fs.info(path))
        except ScanError:
            return False
        return True

    def _decode(self, kind: str, files: Files) -> Volume | Samples:
        first = files[0][1]
        if kind == "npy":
            return read_npy(first, rows=self.source.rows, max_values=self.max_voxels)
        if kind == "dicom":
            from featray.ct import readers

            return readers.read_series(
                files,
                max_voxels=self.max_voxels,
                dicom_tags=self.dicom_tags,
                resample_tilt=self.policy.gantry_tilt == "resample",
                resample_steps=self.policy.irregular_spacing == "resample",
            )
        shear = self.policy.gantry_tilt == "resample"
        volume = _read_single(kind, files, self.max_voxels, self.source.volume, shear)
        return convert_to_shifted_slices(volume)

    def _mask(self, uri: str) -> Volume | None:
        """Return the mask at `uri`, if there is one; where it lies counts, its axes may be anything."""
        if not uri:
            return None
        kind = next((kind for end, kind in _MASK_FORMATS.items() if uri.lower().endswith(end)), "")
        if not kind:
            known = ", ".join(_MASK_FORMATS)
            raise ScanError(Reason.UNSUPPORTED, f"a mask must be one of {known}; convert it")
        fs, path = open_url(uri, self.source.storage_options)
        try:
            files = _fetch_all(fs, [path])
            return _read_single(kind, files, self.max_voxels, None, True)
        except ScanError as error:
            raise ScanError(error.reason, f"the mask: {error}") from None

    def _fs(self, scan: Scan) -> fsspec.AbstractFileSystem:
        # A manifest may name scans on another file system than its own.
        fs, _ = open_url(scan.uri if "://" in scan.uri else self.source.uri, self.source.storage_options)
        return fs

    def _files(self, scan: Scan) -> Files:
        fs = self._fs(scan)
        if scan.archive:
            return _asked(scan.archive, lambda: self._archived(fs, scan))
        files = _fetch_all(fs, scan.files)
        _refuse_changed(scan, fs, files)
        return [(posixpath.basename(path), data) for path, data in files]

    def _archived(self, fs: fsspec.AbstractFileSystem, scan: Scan) -> Files:
        """Return the scan's members of its zip archive."""
        limit = _MAX_VOXEL_BYTES * self.max_voxels + _MAX_HEADER_BYTES * len(scan.files)
        files = []
        with fs.open(scan.archive, "rb") as stream:
            archive = open_archive(stream, max_bytes=MAX_ARCHIVE_BYTES)
            for name in scan.files:
                if name not in archive.names:
                    raise ScanError(Reason.STORAGE, _CHANGED)
                files.append((posixpath.basename(name), archive.read(name, limit)))
                limit -= archive.get_size(name)
        return files


def _read_single(kind: str, files: Files, max_voxels: int, volume: int | None, keep_shear: bool) -> Volume:
    """Return the volume of a format that has one file for each, or a NIfTI pair (header, image)."""
    from featray.ct import readers

    data = [content for _, content in files]
    if kind == "nrrd":
        return readers.read_nrrd(data[0], max_voxels=max_voxels, keep_shear=keep_shear)
    if kind == "mha":
        return readers.read_metaimage(data[0], max_voxels=max_voxels, keep_shear=keep_shear)
    read = readers.read_nifti_pair if len(data) == 2 else readers.read_nifti
    return read(*data, max_voxels=max_voxels, volume_index=volume, keep_shear=keep_shear)


def _refuse_changed(scan: Scan, fs: fsspec.AbstractFileSystem, files: Files) -> None:
    """Compare with what was listed: the bytes of a newer file must not go down under an older fingerprint.

    Stores are asked once more only where that is one quick question; elsewhere the size has to do.
    """
    if not scan.files_version:
        return
    same = sum(len(data) for _, data in files) == scan.size
    if same and (len(files) == 1 or isinstance(fs, LocalFileSystem)):
        fs.invalidate_cache()
        there = [(path, _asked(path, functools.partial(fs.info, path))) for path, _ in files]
        same = scan.files_version == fingerprint_files(
            (path, info["size"], file_version(info)) for path, info in there
        )
    if not same:
        raise ScanError(Reason.STORAGE, _CHANGED)


def _fetch_all(fs: fsspec.AbstractFileSystem, paths: Sequence[str]) -> Files:
    """Return the bytes of all files; from a store, several are on the way at once."""
    if len(paths) == 1 or isinstance(fs, LocalFileSystem):
        return [(path, _fetch(fs, path)) for path in paths]
    with ThreadPoolExecutor(min(_FETCH_THREADS, len(paths))) as pool:
        coming = [(path, pool.submit(_fetch, fs, path)) for path in paths]
        try:
            return [(path, one.result()) for path, one in coming]
        except ScanError:  # without one of its files the scan is of no use: leave the others where they are
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    data: bytes = _asked(path, lambda: fs.cat_file(path))
    return data


def _asked(path: str, act: Callable[[], T]) -> T:
    """Return what `act` asks the store about `path`, trying again while that may help."""
    try:
        return retry.run_with_retries(act, retry.SOURCE_DEADLINE_S)
    except Exception as error:  # every store has errors of its own
        if not retry.is_store_error(error):
            raise
        raise _unfetched(path, error) from None


def _unfetched(path: str, error: Exception) -> ScanError:
    name = posixpath.basename(path)
    if retry.is_missing(error):
        return ScanError(Reason.STORAGE, f"{name} is gone since it was listed")
    kind = retry.describe_error(error)
    if retry.is_denied(error):
        return ScanError(Reason.STORAGE, f"no permission to read {name} ({kind})")
    if retry.is_transient(error):
        waited = f"the store did not answer for {retry.SOURCE_DEADLINE_S:g} s ({kind})"
        return ScanError(Reason.STORAGE, f"{name}: {waited}; run again")
    return ScanError(Reason.STORAGE, f"{name} could not be fetched ({kind}); run again")
