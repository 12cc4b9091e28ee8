"""A file, a folder or a glob in, the scans there out, none of them read.

Single-file formats are told by name; DICOM files by their headers, which is where one series is told
from another. Zip archives are looked into, not unpacked. What is none of these is counted as ignored,
never silently dropped from a series.
"""

from __future__ import annotations

import functools
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fsspec

from featray.collection.dicom_series import series_in
from featray.collection.digests import by_bytes
from featray.collection.files import (
    PAIR,
    VOLUMES,
    File,
    Found,
    How,
    Place,
    file_of,
    half,
    is_visible,
    kind_by_name,
    may_be_dicom,
    scan_of,
    suffix,
)
from featray.collection.listing import Listing
from featray.collection.zip_archives import found_in_archive
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.ct.formats.zip_archive import ZIP_SUFFIX
from featray.errors import Reason, ScanError
from featray.storage import retry


def list_place(fs: fsspec.AbstractFileSystem, root: str, how: How) -> Listing:
    """List a file or a folder; marks of a glob in its name mean nothing here.

    Raises:
        FileNotFoundError: There is neither.
    """
    base, found = _found_below(fs, root)
    # Links to folders may lead round in a circle, and opening a pipe waits for ever; they are named instead.
    odd = {
        path: "linked folder" if fs.isdir(path) else "no plain file"
        for path, info in found.items()
        if info["type"] not in ("file", "directory") and fs.exists(path) and not fs.isfile(path)
    }
    files = [file_of(path, info, base) for path, info in sorted(found.items()) if path not in odd]
    listing = _list_files(fs, base, files, how)
    return replace(listing, ignored={**listing.ignored, **Counter(odd.values())})


def list_glob(fs: fsspec.AbstractFileSystem, pattern: str, how: How) -> Listing:
    """List the files that match a glob."""
    base = _before_wildcard(pattern)
    found = sorted(_asked(lambda: fs.glob(pattern, detail=True)).items())
    # Only what is no plain file, such as a link, costs a question of its own.
    files = [file_of(path, info, base) for path, info in found if info["type"] == "file" or fs.isfile(path)]
    return _list_files(fs, base, files, how)


def has_wildcard(path: str) -> bool:
    """Whether a path may be a glob."""
    return any(mark in path for mark in "*?[")


def _before_wildcard(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if has_wildcard(part))
    return "/".join(parts[:fixed])


def _found_below(fs: fsspec.AbstractFileSystem, root: str) -> tuple[str, dict[str, Any]]:
    """Return the root's folder, and path and info of every file; one question does for a plain file."""
    info = _asked(lambda: fs.info(root))
    is_file = info["type"] == "file" or (info["type"] != "directory" and fs.isfile(root))
    if is_file:
        return posixpath.dirname(root), {root: info}
    if info["type"] == "directory" or fs.isdir(root):
        return root, _asked(lambda: fs.find(root, detail=True))
    raise FileNotFoundError(root)


def _asked(act: Callable[[], Any]) -> Any:
    return retry.run_with_retries(act, retry.START_DEADLINE_S)


def _list_files(fs: fsspec.AbstractFileSystem, base: str, files: list[File], how: How) -> Listing:
    visible = [file for file in files if is_visible(file.name)]
    place = Place(visible, posixpath.basename(base), functools.partial(_header, fs))
    found = _found_in(place, how)
    if how.formats & set(VOLUMES):
        archives = (file for file in visible if file.name.lower().endswith(ZIP_SUFFIX))
        found += [one for file in archives for one in found_in_archive(fs, file, how, _found_in)]
    used = {file for one in found for file in one.members}
    ignored = Counter(suffix(file.name) or "without suffix" for file in visible if file not in used)
    if how.source.fingerprint == "bytes":
        found = by_bytes(fs, found)
    return Listing(tuple(one.scan for one in found), dict(ignored))


def _found_in(place: Place, how: How) -> list[Found]:
    """Return the scans of a place."""
    found = []
    for file in place.files:
        if kind := kind_by_name(file.name, how.formats):
            found.append(Found(scan_of((file,), file.name, kind, place, how), (file,)))
    pairs, halves = _pairs(place) if "nifti" in how.formats else ([], [])
    found += [Found(scan_of(pair, pair[1].name, "nifti", place, how), pair) for pair in pairs]
    if "dicom" in how.formats:
        maybe = [file for file in place.files if may_be_dicom(file.name)]
        images = [file for file in halves if PAIR[half(file.name)] == 1]
        found += series_in(place, [*maybe, *images], how)
    used = {file for one in found for file in one.members}
    found += [_half_of_a_pair(file, place, how) for file in halves if file not in used]
    return found


def _pairs(place: Place) -> tuple[list[tuple[File, File]], list[File]]:
    """Return the NIfTI pairs (header, image) of a place, and halves that lack the other."""
    halves: dict[str, dict[int, File]] = defaultdict(dict)
    for file in place.files:
        if end := half(file.name):
            halves[file.name[: -len(end)]][PAIR[end]] = file
    pairs = [(both[0], both[1]) for both in halves.values() if len(both) == 2]
    return pairs, [file for one in halves.values() if len(one) == 1 for file in one.values()]


def _half_of_a_pair(file: File, place: Place, how: How) -> Found:
    other = "image (.img)" if PAIR[half(file.name)] == 0 else "header (.hdr)"
    message = f"the {other} that belongs to this half of a pair is not beside it; copy both"
    scan = scan_of((file,), file.name, "nifti", place, how)
    return Found(replace(scan, reason=Reason.UNREADABLE, message=message), (file,))


def _header(fs: fsspec.AbstractFileSystem, file: File) -> SliceHeader:
    """Return a file's DICOM header; it says itself when the file is none, or cannot be opened."""

    def read() -> SliceHeader:
        with fs.open(file.path, "rb", block_size=2**16) as stream:
            return read_header(stream, file.name)

    try:
        return retry.run_with_retries(read, retry.SOURCE_DEADLINE_S)
    except OSError as error:
        problem = ScanError(Reason.STORAGE, f"could not be opened ({retry.describe_error(error)})")
        return make_unreadable_header(file.name, problem)
