"""Find the scans in a file, in a folder or among the matches of a glob pattern; read headers, no voxels.

Single-file formats are recognized by the file name. DICOM files, and the series that they form, are
recognized by their headers. Zip archives are searched without unpacking them. Files that belong to no scan
are counted as ignored; a file is never silently dropped from a series.
"""

from __future__ import annotations

import functools
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from featray.collection.detached import find_detached_scans
from featray.collection.dicom_series import find_series
from featray.collection.digests import hash_contents
from featray.collection.files import (
    PAIR_PARTS,
    VOLUME_FORMATS,
    File,
    FileGroup,
    FoundScan,
    ListingOptions,
    can_be_dicom,
    detect_format,
    get_pair_suffix,
    get_suffix,
    is_visible,
    make_file,
    make_scan,
)
from featray.collection.listing import Listing
from featray.collection.local_folder import FoundFiles, find_below, find_matches
from featray.collection.scattered_series import mark_scattered_series
from featray.collection.unreadable import UnreadableFiles
from featray.collection.zip_archives import find_in_archive
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.ct.formats.zip_archive import ZIP_SUFFIX
from featray.errors import Reason, ScanError
from featray.storage import retry

log = logging.getLogger(__name__)


def list_path(fs: fsspec.AbstractFileSystem, path: str, options: ListingOptions) -> Listing:
    """List the scans in a file or a folder; glob characters in the path have no special meaning.

    Raises:
        FileNotFoundError: The path is neither a file nor a folder.
    """
    info = _get_info(fs, path)
    is_file = info["type"] == "file" or (info["type"] != "directory" and fs.isfile(path))
    if is_file:  # one request
        root = posixpath.dirname(path)
        found = FoundFiles([make_file(path, info, root)])
        return _list_files(fs, root, found, options, is_whole_folder=False)
    if info["type"] != "directory" and not fs.isdir(path):
        raise FileNotFoundError(path)
    if isinstance(fs, LocalFileSystem):
        found = _run_with_retries(lambda: find_below(path))
    else:
        found = _find_in_store(fs, path)
    return _list_files(fs, path, found, options, is_whole_folder=True)


def _get_info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return the file system's information about a path.

    If an identity may read only the objects below a folder, S3 refuses to say whether an object has the name
    of the folder itself. Such a path is a folder if something is listed below it.

    Raises:
        FileNotFoundError: Nothing has this path.
    """
    try:
        info: dict[str, Any] = _run_with_retries(lambda: fs.info(path))
    except PermissionError:
        if isinstance(fs, LocalFileSystem):
            raise
        names = _run_with_retries(lambda: fs.ls(path, detail=False))
        if not any(name.startswith(f"{path}/") for name in names):
            raise
        return {"type": "directory"}
    return info


def list_glob(fs: fsspec.AbstractFileSystem, pattern: str, options: ListingOptions) -> Listing:
    """List the scans among the files that match a glob pattern."""
    root = _get_fixed_folder(pattern)
    if isinstance(fs, LocalFileSystem):
        root = root or "/"
        found = _run_with_retries(lambda: find_matches(pattern, root))
        return _list_files(fs, root, found, options, is_whole_folder=False)
    infos = sorted(_run_with_retries(lambda: fs.glob(pattern, detail=True)).items())
    # `isfile` is another request to the store; only links and special files need it.
    files = [make_file(path, info, root) for path, info in infos if info["type"] == "file" or fs.isfile(path)]
    return _list_files(fs, root, FoundFiles(files), options, is_whole_folder=False)


def has_wildcard(path: str) -> bool:
    """Return whether a path may be a glob pattern."""
    return any(mark in path for mark in "*?[")


def _get_fixed_folder(pattern: str) -> str:
    """Return the part of a glob pattern before the first path component with a wildcard."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if has_wildcard(part))
    return "/".join(parts[:fixed])


def _find_in_store(fs: fsspec.AbstractFileSystem, root: str) -> FoundFiles:
    """Return the files below a folder of a store; links to folders and special files are only counted."""
    infos: dict[str, Any] = _run_with_retries(lambda: fs.find(root, detail=True))
    special = {
        path: "linked folder" if fs.isdir(path) else "no plain file"
        for path, info in infos.items()
        if info["type"] not in ("file", "directory") and fs.exists(path) and not fs.isfile(path)
    }
    files = [make_file(path, info, root) for path, info in sorted(infos.items()) if path not in special]
    return FoundFiles(files, ignored=Counter(special.values()))


def _run_with_retries(operation: Callable[[], Any]) -> Any:
    return retry.run_with_retries(operation, retry.START_DEADLINE_S)


def _list_files(
    fs: fsspec.AbstractFileSystem,
    root: str,
    files: FoundFiles,
    options: ListingOptions,
    *,
    is_whole_folder: bool,
) -> Listing:
    visible = [file for file in files.files if is_visible(file.name)]
    unreadable = UnreadableFiles(visible, files.folders)
    name = posixpath.basename(root)
    group = FileGroup(
        files=unreadable.get_others(),
        name=name,
        read_header=functools.partial(_read_and_note, fs, unreadable),
        read_start=functools.partial(_read_start, fs),
    )
    if not is_whole_folder:
        group = replace(group, find_file=functools.partial(_find_file, fs, root))
    found = _find_scans(group, options)
    if options.formats & set(VOLUME_FORMATS):
        for file in visible:
            if file.name.lower().endswith(ZIP_SUFFIX):
                found += find_in_archive(fs, file, options, _find_scans)
    found = mark_scattered_series(found) + unreadable.make_scans(found, name, options)
    used = {file for found_scan in found for file in found_scan.members}
    ignored = Counter(get_suffix(file.name) or "without suffix" for file in visible if file not in used)
    if options.source.fingerprint == "bytes":
        found = hash_contents(fs, found)
    return Listing(tuple(found_scan.scan for found_scan in found), {**ignored, **files.ignored})


def _find_scans(group: FileGroup, options: ListingOptions) -> list[FoundScan]:
    """Return the scans in a group of files."""
    found = [
        FoundScan(make_scan((file,), file.name, scan_format, options, group.archive), (file,))
        for file in group.files
        if (scan_format := detect_format(file.name, options.formats))
    ]
    if detached := find_detached_scans(group, options):
        used = {file for found_scan in detached for file in found_scan.members}
        group = replace(group, files=[file for file in group.files if file not in used])
        found += detached
    pairs, unpaired = _match_pairs(group) if "nifti" in options.formats else ([], [])
    found += [
        FoundScan(make_scan(pair, pair[1].name, "nifti", options, group.archive), pair) for pair in pairs
    ]
    if "dicom" in options.formats:
        candidates = [file for file in group.files if can_be_dicom(file.name)]
        # Some DICOM archives name their slices .img, as the image of a NIfTI pair is named.
        images = [file for file in unpaired if PAIR_PARTS[get_pair_suffix(file.name)] == 1]
        found += find_series(group, [*candidates, *images], options)
    used = {file for found_scan in found for file in found_scan.members}
    found += [_make_unpaired_scan(file, group, options) for file in unpaired if file not in used]
    return found


def _match_pairs(group: FileGroup) -> tuple[list[tuple[File, File]], list[File]]:
    """Return the NIfTI pairs (header, image) of a group, and the files without their other part."""
    parts: dict[str, dict[int, File]] = defaultdict(dict)
    for file in group.files:
        if suffix := get_pair_suffix(file.name):
            parts[file.name[: -len(suffix)]][PAIR_PARTS[suffix]] = file
    # Many images may be DICOM slices: their other part is searched only for an image that was listed alone.
    is_alone = len(group.files) == 1
    unpaired = [(stem, pair) for stem, pair in parts.items() if len(pair) == 1 and (0 in pair or is_alone)]
    with ThreadPoolExecutor(group.threads) as pool:
        others = pool.map(lambda item: _find_other_part(group, *item), unpaired)
        for (_, pair), other in zip(unpaired, others, strict=True):
            pair |= other
    pairs = [(pair[0], pair[1]) for pair in parts.values() if len(pair) == 2]
    return pairs, [file for pair in parts.values() if len(pair) == 1 for file in pair.values()]


def _find_other_part(group: FileGroup, stem: str, pair: Mapping[int, File]) -> dict[int, File]:
    """Return the other part of a NIfTI pair, if only a part of its folder was listed."""
    ((part, file),) = pair.items()
    folder = posixpath.dirname(file.path)
    for suffix, other_part in PAIR_PARTS.items():
        path = posixpath.join(folder, posixpath.basename(stem) + suffix)
        if other_part != part and (other := group.find_file(path)):
            return {other_part: other}
    return {}


def _make_unpaired_scan(file: File, group: FileGroup, options: ListingOptions) -> FoundScan:
    """Return the failed scan for one part of a NIfTI pair without the other part."""
    missing = "image (.img)" if PAIR_PARTS[get_pair_suffix(file.name)] == 0 else "header (.hdr)"
    message = f"the {missing} of this NIfTI pair is missing in the same folder; copy both files"
    scan = make_scan((file,), file.name, "nifti", options, group.archive)
    return FoundScan(replace(scan, reason=Reason.UNREADABLE, message=message), (file,))


def _find_file(fs: fsspec.AbstractFileSystem, root: str, path: str) -> File | None:
    """Return the file at a path of the store; None if no file exists there."""
    try:
        info = retry.run_with_retries(lambda: fs.info(path), retry.SOURCE_DEADLINE_S)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return make_file(path, info, root) if info["type"] == "file" or fs.isfile(path) else None


def _read_start(fs: fsspec.AbstractFileSystem, file: File, count: int) -> bytes:
    end = min(count, file.size) if file.size else count  # some stores report no size
    data: bytes = retry.run_with_retries(lambda: fs.cat_file(file.path, 0, end), retry.SOURCE_DEADLINE_S)
    return data


def _read_and_note(fs: fsspec.AbstractFileSystem, unreadable: UnreadableFiles, file: File) -> SliceHeader:
    """Return a file's DICOM header, and note a file that cannot be opened."""
    header = _read_header(fs, file)
    if header.problem is Reason.STORAGE:
        unreadable.add(file, file.problem or f"{header.file_name} {header.message}")
    return header


def _read_header(fs: fsspec.AbstractFileSystem, file: File) -> SliceHeader:
    """Return a file's DICOM header; the header itself says if the file is not DICOM or cannot be opened."""

    def read() -> SliceHeader:
        with fs.open(file.path, "rb", block_size=2**16) as stream:
            return read_header(stream, file.name)

    if file.problem:
        problem = file.problem.removeprefix(f"{posixpath.basename(file.name)} ")
        return make_unreadable_header(file.name, ScanError(Reason.STORAGE, problem))
    try:
        return retry.run_with_retries(read, retry.SOURCE_DEADLINE_S)
    except OSError as error:
        problem = f"could not be opened ({retry.describe_error(error)})"
        return make_unreadable_header(file.name, ScanError(Reason.STORAGE, problem))
    except Exception as error:  # an unexpected error costs one file, not the listing
        if retry.is_store_error(error):
            raise
        log.debug("unexpected error while reading a DICOM header", exc_info=True)
        problem = f"reading the header raised {type(error).__name__}"
        return make_unreadable_header(file.name, ScanError(Reason.UNREADABLE, problem))
