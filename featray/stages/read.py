"""Read: one located scan in, its checked volume in HU or the samples of its array out.

This stage knows the formats only by name; the readers in `featray.ct` check headers and voxels. The readers
of volumes are imported when the first scan is read, because the driver needs none of them.
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

from featray.collection.detached import HEADER_SUFFIXES, list_data_files
from featray.config import PolicyConfig, SourceConfig
from featray.ct.formats.npy import Samples, read_npy
from featray.ct.formats.voxel_data import convert_to_shifted_slices
from featray.ct.formats.zip_archive import MAX_ARCHIVE_BYTES, open_archive
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError
from featray.schema import Scan
from featray.storage import retry
from featray.storage.links import describe_pointer, find_broken_link
from featray.storage.urls import file_version, fingerprint_files, open_url

Files = list[tuple[str, bytes]]
T = TypeVar("T")

_MAX_VOXEL_BYTES, _MAX_HEADER_BYTES = 8, 2**24
"""Bytes that the archive members of one scan may take, per voxel and per file."""
_FETCH_THREADS = 8
"""Files of one series that are fetched from a store at once; a fetch waits for the store, not for a core."""
_CHANGED = "the scan changed after it was listed; run again"
_MASK_FORMATS = {".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "nrrd", ".mha": "mha"} | {
    suffix: kind for kind, suffix in HEADER_SUFFIXES.items()
}


@dataclass(frozen=True)
class ReadResult:
    """The content of a scan, and the time and bytes that reading it took.

    Attributes:
        content: The volume, or the samples of an array.
        mask: The mask that gives the bounding box to cut out; None if the scan has none.
        bytes_read: Bytes fetched.
        read_s: Seconds to fetch the files.
        decode_s: Seconds to decode them.
    """

    content: Volume | Samples
    mask: Volume | None
    bytes_read: int
    read_s: float
    decode_s: float


@dataclass(frozen=True)
class Reader:
    """Reads the scans of one collection.

    Attributes:
        source: The collection.
        policy: How unusual scans are handled.
        max_voxels: Maximum number of voxels; larger volumes are refused from their header, before memory is
            allocated.
        dicom_tags: DICOM keywords whose values are copied to the record.
    """

    source: SourceConfig = field(repr=False)  # its URI may contain credentials
    policy: PolicyConfig
    max_voxels: int
    dicom_tags: Sequence[str] = ()

    def read(self, scan: Scan) -> ReadResult:
        """Return the volume or the samples of a scan.

        Raises:
            ScanError: The scan cannot be used; `reason` says why.
        """
        start = time.perf_counter()
        files = self._fetch_files(scan)
        fetched = time.perf_counter()
        content, mask = self._decode(scan.format, files), self._read_mask(scan.mask)
        done = time.perf_counter()
        total = sum(len(data) for _, data in files)
        return ReadResult(content, mask, total, fetched - start, done - fetched)

    def has_scan(self, scan: Scan) -> bool:
        """Return whether the store still has the first file of the scan and allows access to it."""
        fs = self._open_fs(scan)
        fs.invalidate_cache()
        path = scan.archive or scan.files[0]
        try:
            _ask_store(path, lambda: fs.info(path))
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
        keep_shear = self.policy.gantry_tilt == "resample"
        volume = _read_single(kind, files, self.max_voxels, volume=self.source.volume, keep_shear=keep_shear)
        return convert_to_shifted_slices(volume)

    def _read_mask(self, uri: str) -> Volume | None:
        """Return the mask at `uri`, or None if `uri` is empty. Its voxel grid may differ from the scan's."""
        if not uri:
            return None
        kind = next((kind for end, kind in _MASK_FORMATS.items() if uri.lower().endswith(end)), "")
        if not kind:
            known = ", ".join(_MASK_FORMATS)
            raise ScanError(Reason.UNSUPPORTED, f"a mask must be one of {known}; convert it")
        fs, path = open_url(uri, self.source.storage_options)
        try:
            files = _fetch_all(fs, [path], was_listed=False)
            if uri.lower().endswith(HEADER_SUFFIXES.get(kind, "/")):
                files += _fetch_data_files(fs, path, list_data_files(kind, files[0][1]))
            return _read_single(kind, files, self.max_voxels, volume=None, keep_shear=True)
        except ScanError as error:
            raise ScanError(error.reason, f"the mask: {error}") from None

    def _open_fs(self, scan: Scan) -> fsspec.AbstractFileSystem:
        # A manifest may name scans that lie on another file system.
        fs, _ = open_url(scan.uri if "://" in scan.uri else self.source.uri, self.source.storage_options)
        return fs

    def _fetch_files(self, scan: Scan) -> Files:
        fs = self._open_fs(scan)
        if scan.archive:
            return _ask_store(scan.archive, lambda: self._read_members(fs, scan))
        files = _fetch_all(fs, scan.files, was_listed=bool(scan.files_version))
        _refuse_changed(scan, fs, files)
        _refuse_pointers(files)
        return _name_files(scan, files)

    def _read_members(self, fs: fsspec.AbstractFileSystem, scan: Scan) -> Files:
        """Return the members of the zip archive that belong to the scan."""
        limit = _MAX_VOXEL_BYTES * self.max_voxels + _MAX_HEADER_BYTES * len(scan.files)
        files = []
        with fs.open(scan.archive, "rb") as stream:
            archive = open_archive(stream, max_bytes=MAX_ARCHIVE_BYTES)
            for name in scan.files:
                if name not in archive.names:
                    raise ScanError(Reason.STORAGE, _CHANGED)
                files.append((name, archive.read(name, limit)))
                limit -= archive.get_size(name)
        return _name_files(scan, files)


def _name_files(scan: Scan, files: Files) -> Files:
    """Return the files with names without folders; data files of a header relative to the header's folder."""
    if scan.format not in HEADER_SUFFIXES:
        return [(posixpath.basename(path), data) for path, data in files]
    folder = posixpath.dirname(scan.files[0])
    return [(posixpath.relpath(path, folder), data) for path, data in files]


def _read_single(kind: str, files: Files, max_voxels: int, *, volume: int | None, keep_shear: bool) -> Volume:
    """Return the volume of a single file, of a NIfTI pair, or of a header followed by its data files."""
    from featray.ct import readers

    data = [content for _, content in files]
    if kind in HEADER_SUFFIXES:
        read_header = readers.read_nrrd if kind == "nrrd" else readers.read_metaimage
        return read_header(
            data[0], files[1:], max_voxels=max_voxels, volume_index=volume, keep_shear=keep_shear
        )
    read = readers.read_nifti_pair if len(data) == 2 else readers.read_nifti
    return read(*data, max_voxels=max_voxels, volume_index=volume, keep_shear=keep_shear)


def _refuse_changed(scan: Scan, fs: fsspec.AbstractFileSystem, files: Files) -> None:
    """Refuse a scan that changed after listing: new bytes must not be stored with an old fingerprint.

    The store's version is compared only for one or two files and for local files, because that is quick. For
    other scans only the size is compared.
    """
    if not scan.files_version:
        return
    same = sum(len(data) for _, data in files) == scan.size
    if same and (len(files) <= 2 or isinstance(fs, LocalFileSystem)):
        fs.invalidate_cache()
        infos = [(path, _ask_store(path, functools.partial(fs.info, path))) for path, _ in files]
        same = scan.files_version == fingerprint_files(
            (path, info["size"], file_version(info)) for path, info in infos
        )
    if not same:
        raise ScanError(Reason.STORAGE, _CHANGED)


def _refuse_pointers(files: Files) -> None:
    """Refuse files that only stand for a file that git-annex or Git LFS has not fetched yet."""
    for path, data in files:
        if problem := describe_pointer(data):
            raise ScanError(Reason.STORAGE, f"{posixpath.basename(path)} {problem}")


def _fetch_all(fs: fsspec.AbstractFileSystem, paths: Sequence[str], *, was_listed: bool) -> Files:
    """Return the bytes of all files; from a store, several files are fetched at once.

    Args:
        fs: The file system.
        paths: Paths of the files.
        was_listed: Whether listing has seen the files, or only a manifest names them.
    """
    fetch = functools.partial(_fetch if was_listed else _fetch_unlisted, fs)
    if len(paths) == 1 or isinstance(fs, LocalFileSystem):
        return [(path, fetch(path)) for path in paths]
    with ThreadPoolExecutor(min(_FETCH_THREADS, len(paths))) as pool:
        fetches = [(path, pool.submit(fetch, path)) for path in paths]
        try:
            return [(path, result.result()) for path, result in fetches]
        except ScanError:  # without one of its files the scan is useless, so the others are not fetched
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_data_files(fs: fsspec.AbstractFileSystem, header: str, names: Sequence[str]) -> Files:
    """Return the data files that a header names, with names relative to its folder."""
    folder = posixpath.dirname(header)
    fetched = _fetch_all(fs, [posixpath.join(folder, name) for name in names], was_listed=False)
    return [(name, data) for name, (_, data) in zip(names, fetched, strict=True)]


def _fetch(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    data: bytes = _ask_store(path, lambda: fs.cat_file(path))
    return data


def _fetch_unlisted(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """Return the bytes of a file that only a manifest names."""
    data: bytes = _ask_store(path, lambda: fs.cat_file(path), was_listed=False)
    return data


def _ask_store(path: str, act: Callable[[], T], *, was_listed: bool = True) -> T:
    """Return the result of `act`, a request to the store about `path`; retry transient errors."""
    try:
        return retry.run_with_retries(act, retry.SOURCE_DEADLINE_S)
    except Exception as error:  # each kind of store raises its own errors
        if not retry.is_store_error(error):
            raise
        raise _make_fetch_error(path, error, was_listed=was_listed) from None


def _make_fetch_error(path: str, error: Exception, *, was_listed: bool) -> ScanError:
    name = posixpath.basename(path)
    if retry.is_missing(error):
        problem = find_broken_link(path, error)
        if not problem and was_listed:
            problem = "is missing; it was there when it was listed"
        missing = "does not exist; correct the manifest, or copy the file"
        return ScanError(Reason.STORAGE, f"{name} {problem or missing}")
    kind = retry.describe_error(error)
    if retry.is_denied(error):
        return ScanError(Reason.STORAGE, f"no permission to read {name} ({kind})")
    if retry.is_transient(error):
        waited = f"the store did not answer for {retry.SOURCE_DEADLINE_S:g} s ({kind})"
        return ScanError(Reason.STORAGE, f"{name}: {waited}; run again")
    return ScanError(Reason.STORAGE, f"{name} could not be fetched ({kind}); run again")
