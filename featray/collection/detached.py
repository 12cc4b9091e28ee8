"""Find the scans whose header names the files with the voxels: MetaImage .mhd and NRRD .nhdr.

Nearly every such header has one data file next to it, with the same name and a suffix such as .raw. This file
is taken without opening the header, because a listing of a million scans would otherwise need a million
requests. The reader refuses the scan if its header names another file. Headers without such a file, or with
several, are read here.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from featray.collection.files import File, FileGroup, FoundScan, ListingOptions, make_scan
from featray.errors import Reason, ScanError
from featray.storage import retry
from featray.storage.links import describe_pointer

log = logging.getLogger(__name__)

HEADER_SUFFIXES = {"mha": ".mhd", "nrrd": ".nhdr"}
"""Format → suffix of detached headers."""

_HEADER_BYTES = {"mha": 2**18, "nrrd": 2**22}
"""Number of bytes at the start of a header file that are searched for the names of data files."""

_DATA_SUFFIXES = (".raw", ".zraw", ".raw.gz", ".raw.bz2", ".mda")
"""Suffixes that ITK, teem, pynrrd and MetaIO give to data files."""


def find_detached_scans(group: FileGroup, options: ListingOptions) -> list[FoundScan]:
    """Return one scan per detached header of a group; one without its data files has a reason."""
    kinds = {
        file: kind
        for kind, suffix in HEADER_SUFFIXES.items()
        if kind in options.formats
        for file in group.files
        if file.name.lower().endswith(suffix)
    }
    if not kinds:
        return []
    by_path = {file.path: file for file in group.files}
    neighbors = {header: _find_neighbor(header, kind, by_path) for header, kind in kinds.items()}
    unclear = [header for header, neighbor in neighbors.items() if neighbor is None]
    with ThreadPoolExecutor(group.threads) as pool:
        results = pool.map(lambda header: _find_data_files(header, kinds[header], group, by_path), unclear)
        data_files = dict(zip(unclear, results, strict=True))
    return [
        _make_found_scan(
            header, data_files[header] if neighbor is None else (neighbor,), kinds, group, options
        )
        for header, neighbor in neighbors.items()
    ]


def list_data_files(kind: str, header: bytes) -> tuple[str, ...]:
    """Return the names, relative to the header's folder, of the data files that a header names.

    Args:
        kind: Format of the header, a key of `HEADER_SUFFIXES`.
        header: Content of the header file.

    Raises:
        ScanError: The header is damaged, or names files that must not be read.
    """
    # Imported here because most collections have no such headers, and the libraries take time to import.
    if kind == "nrrd":
        from featray.ct.formats.nrrd import list_nrrd_data_files

        return list_nrrd_data_files(header)
    from featray.ct.formats.metaimage import list_metaimage_data_files

    return list_metaimage_data_files(header)


def _find_neighbor(header: File, kind: str, by_path: Mapping[str, File]) -> File | None:
    """Return the only data file that has the name of the header; None if no file or several files have it."""
    stem = header.path[: -len(HEADER_SUFFIXES[kind])]
    found = [by_path[stem + suffix] for suffix in _DATA_SUFFIXES if stem + suffix in by_path]
    return found[0] if len(found) == 1 else None


def _find_data_files(
    header: File, kind: str, group: FileGroup, by_path: Mapping[str, File]
) -> tuple[File, ...] | ScanError:
    """Return the data files that a header names, or the reason why they cannot be found."""
    folder = posixpath.dirname(header.path)
    try:
        start = group.read_start(header, _HEADER_BYTES[kind])
        if problem := describe_pointer(start):
            return ScanError(Reason.STORAGE, f"{posixpath.basename(header.name)} {problem}")
        names = list_data_files(kind, start)
        paths = [posixpath.join(folder, name) for name in names]
        files = [by_path.get(path) or group.find_file(path) for path in paths]
    except ScanError as error:
        return error
    except OSError as error:
        return ScanError(Reason.STORAGE, f"the header could not be read ({retry.describe_error(error)})")
    except Exception as error:  # an unexpected error costs one scan, not the listing
        if retry.is_store_error(error):
            raise
        log.debug("unexpected error while reading a detached header", exc_info=True)
        return ScanError(Reason.UNREADABLE, f"reading the header raised {type(error).__name__}")
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        text = f"the header names the data file {posixpath.basename(missing[0])}, which is missing"
        return ScanError(Reason.UNREADABLE, f"{text}; copy it next to the header, or correct the name in it")
    return tuple(file for file in files if file is not None)


def _make_found_scan(
    header: File,
    data_files: Sequence[File] | ScanError,
    kinds: Mapping[File, str],
    group: FileGroup,
    options: ListingOptions,
) -> FoundScan:
    problem = data_files if isinstance(data_files, ScanError) else None
    members = (header,) if isinstance(data_files, ScanError) else (header, *data_files)
    scan = make_scan(members, header.name, kinds[header], options, group.archive)
    scan = replace(scan, uri=options.make_shown_uri(group.archive or header.path))
    if problem and scan.reason is None:
        scan = replace(scan, reason=problem.reason, message=str(problem))
    return FoundScan(scan, members)
