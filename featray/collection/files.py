"""Describe the files of a collection, and recognize scans and formats by file name; open no file.

This module also defines the types that all parts of a listing share: files, groups of files, options, found
scans.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from featray.collection.digest_cache import DigestCache
from featray.collection.header_cache import HeaderCache
from featray.config import PolicyConfig, SourceConfig
from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.parts import StackRange
from featray.ct.formats import npy
from featray.errors import Reason
from featray.schema import Scan
from featray.storage.urls import escape_invalid_utf8, file_checksum, file_version, fingerprint_files, mask_url

FORMAT_SUFFIXES = {
    "nifti": (".nii", ".nii.gz"),
    "nrrd": (".nrrd",),
    "mha": (".mha",),
    "npy": (npy.SUFFIX,),
}
"""Format → suffixes of files that are one scan each."""
PAIR_PARTS = {".hdr": 0, ".hdr.gz": 0, ".img": 1, ".img.gz": 1}
"""File name suffix → part of a NIfTI pair: 0 for the header, 1 for the image."""
VOLUME_FORMATS = ("nifti", "dicom", "nrrd", "mha")
MAX_THREADS = 8
"""Maximum number of requests to a store at the same time."""
_NOT_DICOM = re.compile(
    r"\.(nii|gz|nrrd|nhdr|mha|mhd|hdr|img|z?raw|np[yz]|zip|tar|tgz|bz2|xz|7z|rar|txt|[ct]sv|jsonl?|xml|html?|md"
    r"|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|bmp|tiff?|svg|mp4|avi|py|ipynb|r|m|mat|sh|ya?ml|toml|ini|cfg|log|db"
    r"|sqlite|parquet|h5|hdf5|keras|pth?|onnx|pkl|bval|bvec|md5|sha1|sha256|vtk|stl|obj|lnk|url)$",
    re.IGNORECASE,
)
"""Suffixes of files that are not DICOM and are therefore not opened."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of the collection.

    Attributes:
        path: Path in the file system, or in the archive that holds the file.
        name: Path relative to the root of the collection or archive.
        size: Size in bytes.
        version: Version that the store reports, or empty.
        checksum: Checksum of the bytes that the store reports, or empty.
        problem: Why the file cannot be read, as a sentence; empty unless listing has found that out.
    """

    path: str
    name: str
    size: int
    version: str
    checksum: str = ""
    problem: str = ""


@dataclass(frozen=True)
class FileGroup:
    """Files in which scans are searched together: a folder with all its subfolders, or a zip archive.

    Attributes:
        files: All visible files of the folder or archive.
        name: Scan id of a DICOM series that has no common folder below the root.
        read_header: Reads the DICOM header of one of the files.
        read_start: Reads at most the given number of bytes from the start of one of the files.
        threads: Number of headers that may be read at the same time.
        archive: Path of the archive; empty for a folder.
        find_file: Returns the file at a path that is not among `files`; None if no such file exists, or if
            `files` are complete.
    """

    files: list[File]
    name: str
    read_header: Callable[[File], SliceHeader]
    read_start: Callable[[File, int], bytes]
    threads: int = MAX_THREADS
    archive: str = ""
    find_file: Callable[[str], File | None] = lambda _: None


@dataclass(frozen=True)
class FoundScan:
    """A scan, the files of the collection that belong to it, and where the slices of a DICOM series lie."""

    scan: Scan
    members: tuple[File, ...]
    stack: StackRange | None = None


@dataclass(frozen=True)
class ListingOptions:
    """Options of a listing.

    Attributes:
        source: Configuration of the collection.
        policy: Decides which scans are excluded and which only get a warning.
        header_cache: Results for DICOM folders from an earlier listing; None to read every header.
        digest_cache: Digests of local files from earlier listings.
        show: Whether to show progress on stderr while files are compared.
    """

    source: SourceConfig
    policy: PolicyConfig
    header_cache: HeaderCache | None = None
    digest_cache: DigestCache = field(default_factory=DigestCache)
    show: bool = False

    @property
    def formats(self) -> set[str]:
        """Formats to search for."""
        # "auto" does not include arrays, because an array file does not state the meaning of its values.
        return set(VOLUME_FORMATS) if self.source.format == "auto" else {self.source.format}

    def make_shown_uri(self, path: str) -> str:
        """Return the URI to show for a path: with the source's own protocol, without credentials."""
        protocol, separator, _ = mask_url(self.source.uri).partition("://")
        shown_path = escape_invalid_utf8(path)
        return f"{protocol}://{shown_path}" if separator else shown_path


def make_scan(
    files: Sequence[File], scan_id: str, scan_format: str, options: ListingOptions, archive: str = ""
) -> Scan:
    """Return the scan that consists of some files, which lie in `archive` unless that is empty.

    If one of the files has a problem, the scan has failed with it.
    """
    paths = [file.path for file in files]
    version = fingerprint_files((file.path, file.size, file.version) for file in files)
    problem = next((file.problem for file in files if file.problem), "")
    return Scan(
        scan_id=scan_id,
        uri=options.make_shown_uri(archive or find_common_path(paths)),
        format=scan_format,
        files=tuple(paths),
        content=version,
        size=sum(file.size for file in files),
        files_version="" if archive else version,
        checksum=files[0].checksum if len(files) == 1 else "",
        archive=archive,
        reason=Reason.STORAGE if problem else None,
        message=problem,
    )


def make_file(path: str, info: dict[str, Any], root: str, problem: str = "") -> File:
    """Return the file that fsspec describes with `info`; its name is relative to the path `root`."""
    name = path[len(root) :].lstrip("/") if path.startswith(root) else posixpath.basename(path)
    return File(
        path,
        escape_invalid_utf8(name),
        int(info.get("size") or 0),
        file_version(info),
        file_checksum(info),
        problem,
    )


def get_pair_suffix(name: str) -> str:
    """Return the suffix of a file that may be one part of a NIfTI pair; empty for other files."""
    return next((suffix for suffix in PAIR_PARTS if name.lower().endswith(suffix)), "")


def detect_format(name: str, formats: Iterable[str]) -> str:
    """Return which of some formats a file name belongs to; empty if none has this suffix."""
    lower = name.lower()
    return next(
        (
            candidate
            for candidate in formats
            if candidate in FORMAT_SUFFIXES and lower.endswith(FORMAT_SUFFIXES[candidate])
        ),
        "",
    )


def is_visible(name: str) -> bool:
    """Return whether neither the file nor a folder above it has a name that starts with a dot."""
    return not any(part.startswith(".") for part in name.split("/"))


def can_be_dicom(name: str) -> bool:
    """Return whether the header of a file must be read to know whether the file is DICOM.

    Medical image archives name DICOM slices .dcm, .ima, .mag or .0001, or give them no suffix.
    """
    return not _NOT_DICOM.search(name)


def get_suffix(name: str) -> str:
    """Return the last suffix of a file name in lower case; empty for a name without a suffix."""
    return PurePosixPath(name).suffix.lower()


def find_common_path(names: Sequence[str]) -> str:
    """Return the deepest folder that holds all files; for a single file, the file itself."""
    return names[0] if len(names) == 1 else posixpath.commonpath([posixpath.dirname(name) for name in names])
