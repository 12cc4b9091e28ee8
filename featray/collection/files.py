"""Files of a collection and what their names tell; which of them, by name, may be scans."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from featray.collection.header_cache import HeaderCache
from featray.config import PolicyConfig, SourceConfig
from featray.ct.dicom.header import SliceHeader
from featray.ct.formats import npy
from featray.schema import Scan
from featray.storage.urls import escape_invalid_utf8, file_checksum, file_version, fingerprint_files, mask_url

SUFFIXES = {
    "nifti": (".nii", ".nii.gz"),
    "nrrd": (".nrrd", ".nhdr"),
    "mha": (".mha", ".mhd"),
    "npy": (npy.SUFFIX,),
}
"""Formats whose scans are one file each, known by its name; a detached header is refused with advice."""
PAIR = {".hdr": 0, ".hdr.gz": 0, ".img": 1, ".img.gz": 1}
"""Halves of a NIfTI pair: the header, the image."""
VOLUMES = ("nifti", "dicom", "nrrd", "mha")
THREADS = 8
"""Questions asked of a store at once."""
_OTHERS = re.compile(
    r"\.(nii|gz|nrrd|nhdr|mha|mhd|hdr|img|z?raw|np[yz]|zip|tar|tgz|bz2|xz|7z|rar|txt|[ct]sv|jsonl?|xml|html?|md"
    r"|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|bmp|tiff?|svg|mp4|avi|py|ipynb|r|m|mat|sh|ya?ml|toml|ini|cfg|log|db"
    r"|sqlite|parquet|h5|hdf5|keras|pth?|onnx|pkl|bval|bvec|md5|sha1|sha256|vtk|stl|obj|lnk|url)$",
    re.IGNORECASE,
)
"""Suffixes of files that are no DICOM and are not opened to see."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of the collection.

    Attributes:
        path: In the file system, or in its archive.
        name: Below the root.
        size: Bytes.
        version: The store's; empty where it tells none.
        checksum: The store's own of the bytes; empty where it has none.
    """

    path: str
    name: str
    size: int
    version: str
    checksum: str = ""


@dataclass(frozen=True)
class Place:
    """Files that are looked at together: a folder with all below it, or an archive.

    Attributes:
        files: All of them.
        name: Of a series that has no folder of its own below the root.
        header: Reads the DICOM header of one of the files.
        threads: How many headers may be read at once.
        archive: Path of the archive, if it is one.
    """

    files: list[File]
    name: str
    header: Callable[[File], SliceHeader]
    threads: int = THREADS
    archive: str = ""


@dataclass(frozen=True)
class Found:
    """A scan, and the files of the collection it is made of."""

    scan: Scan
    members: tuple[File, ...]


@dataclass(frozen=True)
class How:
    """What to look for: the collection's config, the policies that concern listing, what is remembered."""

    source: SourceConfig
    policy: PolicyConfig
    header_cache: HeaderCache | None = None

    @property
    def formats(self) -> set[str]:
        """Formats to look for."""
        # Arrays are only taken when asked for: what their values mean, nothing in the file says.
        return set(VOLUMES) if self.source.format == "auto" else {self.source.format}

    def shown_uri(self, path: str) -> str:
        """Return the location to show: the source's own protocol, no credentials."""
        protocol, separator, _ = mask_url(self.source.uri).partition("://")
        return f"{protocol}://{escape_invalid_utf8(path)}" if separator else escape_invalid_utf8(path)


def scan_of(files: Sequence[File], scan_id: str, kind: str, place: Place, how: How) -> Scan:
    """Return the scan that some files of a place make."""
    paths = [file.path for file in files]
    listed = fingerprint_files((file.path, file.size, file.version) for file in files)
    return Scan(
        scan_id=scan_id,
        uri=how.shown_uri(place.archive or common_place(paths)),
        format=kind,
        files=tuple(paths),
        content=listed,
        size=sum(file.size for file in files),
        listed="" if place.archive else listed,
        checksum=files[0].checksum if len(files) == 1 else "",
        archive=place.archive,
    )


def file_of(path: str, info: dict[str, Any], base: str) -> File:
    """Return a file from its entry in a listing; `base` is the root's path."""
    name = path[len(base) :].lstrip("/") if path.startswith(base) else posixpath.basename(path)
    return File(
        path, escape_invalid_utf8(name), int(info.get("size") or 0), file_version(info), file_checksum(info)
    )


def half(name: str) -> str:
    """Return the suffix of a half of a NIfTI pair, or nothing."""
    return next((suffix for suffix in PAIR if name.lower().endswith(suffix)), "")


def kind_by_name(name: str, formats: Iterable[str]) -> str:
    """Return the format that a name tells, if it is one of these and has one file per scan."""
    lower = name.lower()
    return next((kind for kind in formats if kind in SUFFIXES and lower.endswith(SUFFIXES[kind])), "")


def is_visible(name: str) -> bool:
    """Whether neither a file nor a folder above it is hidden."""
    return not any(part.startswith(".") for part in name.split("/"))


def may_be_dicom(name: str) -> bool:
    """Whether to look inside: archives name their slices .dcm, .ima, .mag, .0001 or nothing at all."""
    return not _OTHERS.search(name)


def suffix(name: str) -> str:
    """Return a name's last suffix, in small letters."""
    return PurePosixPath(name).suffix.lower()


def common_place(names: Sequence[str]) -> str:
    """Return the one name, or the folder that holds all of them."""
    return names[0] if len(names) == 1 else posixpath.commonpath([posixpath.dirname(name) for name in names])
