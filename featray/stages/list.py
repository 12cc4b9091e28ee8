"""List the collection: config in, every scan that is there out, none of them read.

Single-file formats are told by name; DICOM files by their headers, which is where one series is told
from another. Zip archives are looked into, not unpacked. What is none of these is counted as ignored,
never silently dropped from a series.
"""

from __future__ import annotations

import functools
import hashlib
import io
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec

from featray import manifest, npy
from featray.config import PolicyConfig, SourceConfig, mask_url
from featray.ct import dicom
from featray.ct.archive import MAX_ARCHIVE_BYTES, ZIP_SUFFIX, Archive, open_archive
from featray.duplicates import settle_duplicates
from featray.errors import ConfigError, Reason, ScanError
from featray.manifest import ManifestRow, read_manifest
from featray.schema import Scan
from featray.storage import file_checksum, file_version, fingerprint, hash_of, open_url, utf8

_SUFFIXES = {
    "nifti": (".nii", ".nii.gz"),
    "nrrd": (".nrrd", ".nhdr"),
    "mha": (".mha", ".mhd"),
    "npy": (npy.SUFFIX,),
}
"""Formats whose scans are one file each, known by its name; a detached header is refused with advice."""
_PAIR = {".hdr": 0, ".hdr.gz": 0, ".img": 1, ".img.gz": 1}
"""Halves of a NIfTI pair: the header, the image."""
_OTHERS = re.compile(
    r"\.(nii|gz|nrrd|nhdr|mha|mhd|hdr|img|z?raw|np[yz]|zip|tar|tgz|bz2|xz|7z|rar|txt|[ct]sv|jsonl?|xml|html?|md"
    r"|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|bmp|tiff?|svg|mp4|avi|py|ipynb|r|m|mat|sh|ya?ml|toml|ini|cfg|log|db"
    r"|sqlite|parquet|h5|hdf5|keras|pth?|onnx|pkl|bval|bvec|md5|sha1|sha256|vtk|stl|obj|lnk|url)$",
    re.IGNORECASE,
)
"""Suffixes of files that are no DICOM and are not opened to see."""
_VOLUMES = ("nifti", "dicom", "nrrd", "mha")
_HEADER_THREADS = 8
_HEADER_BYTES = 2**18


@dataclass(frozen=True)
class Listing:
    """What a collection holds.

    Attributes:
        scans: Every scan, sorted by id; ids are unique.
        ignored: Number of files by suffix that are no scans.
    """

    scans: tuple[Scan, ...]
    ignored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """One file of the collection: path in the file system, name below the root, store's version."""

    path: str
    name: str
    size: int
    version: str
    checksum: str = ""


@dataclass(frozen=True)
class _Place:
    """Files that are looked at together: a folder with all below it, or an archive.

    Attributes:
        files: All of them.
        name: Of a series that has no folder of its own below the root.
        header: Reads the DICOM header of one of the files.
        threads: How many headers may be read at once.
        archive: Path of the archive, if it is one.
    """

    files: list[_File]
    name: str
    header: Callable[[_File], dicom.SliceHeader]
    threads: int = _HEADER_THREADS
    archive: str = ""


@dataclass(frozen=True)
class _Found:
    """A scan, and the files of the collection it is made of."""

    scan: Scan
    members: tuple[_File, ...]


@dataclass(frozen=True)
class _How:
    """What to look for: the collection's config, and the policies that concern listing."""

    source: SourceConfig
    policy: PolicyConfig

    @property
    def formats(self) -> set[str]:
        # Arrays are only taken when asked for: what their values mean, nothing in the file says.
        return set(_VOLUMES) if self.source.format == "auto" else {self.source.format}

    def shown_uri(self, path: str) -> str:
        """Return the location to show: the source's own protocol, no credentials."""
        protocol, separator, _ = mask_url(self.source.uri).partition("://")
        return f"{protocol}://{utf8(path)}" if separator else utf8(path)


def list_scans(source: SourceConfig, policy: PolicyConfig | None = None) -> Listing:
    """Return every scan below `source.uri`, which is a folder, a glob, a file or a manifest.

    Raises:
        ConfigError: The place does not exist, cannot be listed, or holds no scan.
    """
    how = _How(source, policy or PolicyConfig())
    fs, root = open_url(source.uri, source.storage_options)
    try:
        listing = _list(fs, root, how)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"source.uri: {mask_url(source.uri)} does not exist") from None
    except PermissionError:
        raise ConfigError(f"source.uri: no permission to list {mask_url(source.uri)}") from None
    except Exception as error:  # every store has errors of its own, and their texts may hold credentials
        problem = f"source.uri: {mask_url(source.uri)} cannot be listed ({type(error).__name__})"
        raise ConfigError(f"{problem}; check storage_options, credentials and endpoint") from None
    if not listing.scans:
        ignored = ", ".join(f"{count} {suffix}" for suffix, count in listing.ignored.items()) or "no files"
        hint = "; for arrays set source.format: npy" if npy.SUFFIX in listing.ignored else ""
        raise ConfigError(
            f"source.uri: no scan of format {source.format} in {mask_url(source.uri)} ({ignored}){hint}"
        )
    settled = settle_duplicates(listing.scans, how.policy)
    return replace(listing, scans=tuple(_unique_ids(settled)))


def _list(fs: fsspec.AbstractFileSystem, root: str, how: _How) -> Listing:
    source = how.source
    if root.lower().endswith(manifest.SUFFIXES) and fs.isfile(root):
        rows = read_manifest(fs.cat_file(root), source)
        return Listing(tuple(_manifest_scan(row, how) for row in rows))
    if source.id_column is not None:
        raise ConfigError("source.id_column: only a manifest (.csv, .parquet) has columns")
    if not _has_wildcard(root) or _is_there(fs, root):
        return _list_place(fs, root, how)
    base = _before_wildcard(root)
    found = sorted(fs.glob(root, detail=True).items())
    # Only what is no plain file, such as a link, costs a question of its own.
    files = [_file(path, info, base) for path, info in found if info["type"] == "file" or fs.isfile(path)]
    return _list_files(fs, base, files, how)


def _list_place(fs: fsspec.AbstractFileSystem, root: str, how: _How) -> Listing:
    """List a file or a folder; marks of a glob in its name mean nothing here."""
    if fs.isfile(root):
        base, found = posixpath.dirname(root), {root: fs.info(root)}
    elif fs.isdir(root):
        base, found = root, fs.find(root, detail=True)
    else:
        raise FileNotFoundError(root)
    # Links to folders may lead round in a circle, and opening a pipe waits for ever; they are named instead.
    odd = {
        path: "linked folder" if fs.isdir(path) else "no plain file"
        for path, info in found.items()
        if info["type"] not in ("file", "directory") and fs.exists(path) and not fs.isfile(path)
    }
    files = [_file(path, info, base) for path, info in sorted(found.items()) if path not in odd]
    listing = _list_files(fs, base, files, how)
    return replace(listing, ignored={**listing.ignored, **Counter(odd.values())})


def _list_files(fs: fsspec.AbstractFileSystem, base: str, files: list[_File], how: _How) -> Listing:
    visible = [file for file in files if _is_visible(file.name)]
    place = _Place(visible, posixpath.basename(base), functools.partial(_header, fs))
    found = _found_in(place, how)
    if how.formats & set(_VOLUMES):
        archives = (file for file in visible if file.name.lower().endswith(ZIP_SUFFIX))
        found += [one for file in archives for one in _found_in_archive(fs, file, how)]
    used = {file for one in found for file in one.members}
    ignored = Counter(_suffix(file.name) or "without suffix" for file in visible if file not in used)
    return Listing(tuple(one.scan for one in found), dict(ignored))


def _found_in(place: _Place, how: _How) -> list[_Found]:
    """Return the scans of a place."""
    found = []
    for kind in how.formats & _SUFFIXES.keys():
        single = [file for file in place.files if file.name.lower().endswith(_SUFFIXES[kind])]
        found += [_Found(_scan_of((file,), file.name, kind, place, how), (file,)) for file in single]
    pairs, halves = _pairs(place) if "nifti" in how.formats else ([], [])
    found += [_Found(_scan_of(pair, pair[1].name, "nifti", place, how), pair) for pair in pairs]
    if "dicom" in how.formats:
        maybe = [file for file in place.files if _may_be_dicom(file.name)]
        found += _series(place, [*maybe, *(half for half in halves if _PAIR[_half(half)] == 1)], how)
    used = {file for one in found for file in one.members}
    found += [_half_of_a_pair(file, place, how) for file in halves if file not in used]
    return found


def _scan_of(files: Sequence[_File], scan_id: str, kind: str, place: _Place, how: _How) -> Scan:
    paths = [file.path for file in files]
    listed = fingerprint((file.path, file.size, file.version) for file in files)
    return Scan(
        scan_id=scan_id,
        uri=how.shown_uri(place.archive or _place(paths)),
        format=kind,
        files=tuple(paths),
        content=listed,
        size=sum(file.size for file in files),
        listed="" if place.archive else listed,
        checksum=files[0].checksum if len(files) == 1 else "",
        archive=place.archive,
    )


def _pairs(place: _Place) -> tuple[list[tuple[_File, _File]], list[_File]]:
    """Return the NIfTI pairs (header, image) of a place, and halves that lack the other."""
    halves: dict[str, dict[int, _File]] = defaultdict(dict)
    for file in place.files:
        if suffix := _half(file):
            halves[file.name[: -len(suffix)]][_PAIR[suffix]] = file
    pairs = [(both[0], both[1]) for both in halves.values() if len(both) == 2]
    return pairs, [file for one in halves.values() if len(one) == 1 for file in one.values()]


def _half(file: _File) -> str:
    """Return the suffix of a half of a NIfTI pair, or nothing."""
    return next((suffix for suffix in _PAIR if file.name.lower().endswith(suffix)), "")


def _half_of_a_pair(file: _File, place: _Place, how: _How) -> _Found:
    other = "image (.img)" if _PAIR[_half(file)] == 0 else "header (.hdr)"
    message = f"the {other} that belongs to this half of a pair is not beside it; copy both"
    scan = _scan_of((file,), file.name, "nifti", place, how)
    return _Found(replace(scan, reason=Reason.UNREADABLE, message=message), (file,))


def _series(place: _Place, files: list[_File], how: _How) -> list[_Found]:
    """Return one scan per DICOM series among the files."""
    by_name = {file.name: file for file in files}
    with ThreadPoolExecutor(place.threads) as pool:  # object stores answer in parallel
        headers = list(pool.map(place.header, files))
    groups = dicom.group_series(headers, accept_other_modalities=how.policy.not_ct == "warn")
    found = []
    for series, scan_id in zip(groups, _series_ids(groups, place.name), strict=True):
        members = tuple(by_name[name] for name in series.files)
        scan = replace(
            _scan_of(members, scan_id, "dicom", place, how),
            warnings=tuple(str(code) for code in series.warnings),
            reason=series.reason,
            excluded=series.excluded,
            message=series.message,
            series=hashlib.sha256(series.uid.encode()).hexdigest()[:16] if series.uid else "",
        )
        found.append(_Found(scan, members))
    return found


def _header(fs: fsspec.AbstractFileSystem, file: _File) -> dicom.SliceHeader:
    """Return a file's DICOM header; it says itself when the file is none, or cannot be opened."""
    try:
        with fs.open(file.path, "rb", block_size=2**16) as stream:
            return dicom.read_header(stream, file.name)
    except OSError as error:
        problem = ScanError(Reason.STORAGE, f"could not be opened ({type(error).__name__})")
        return dicom.unreadable_header(file.name, problem)


def _found_in_archive(fs: fsspec.AbstractFileSystem, file: _File, how: _How) -> list[_Found]:
    """Return the scans inside a zip archive; one that cannot be looked into is a failed scan itself."""
    try:
        with fs.open(file.path, "rb") as stream:
            archive = open_archive(stream, max_bytes=MAX_ARCHIVE_BYTES)
            members = [
                _File(name, name, archive.size(name), archive.version(name), archive.version(name))
                for name in archive.names
                if _is_visible(name)
            ]
            header = functools.partial(_archived_header, archive)
            found = _found_in(_Place(members, "", header, threads=1, archive=file.path), how)
    except ScanError as error:
        return [_archive_failed(file, error, how)]
    except OSError as error:
        problem = f"the archive could not be opened ({type(error).__name__})"
        return [_archive_failed(file, ScanError(Reason.STORAGE, problem), how)]
    inside = [f"{file.name}/{one.scan.scan_id}" if len(found) > 1 else file.name for one in found]
    return [
        replace(one, scan=replace(one.scan, scan_id=scan_id), members=(file,))
        for one, scan_id in zip(found, inside, strict=True)
    ]


def _archive_failed(file: _File, error: ScanError, how: _How) -> _Found:
    scan = _scan_of((file,), file.name, "zip", _Place([], "", lambda _: NotImplemented), how)
    return _Found(replace(scan, reason=error.reason, message=str(error)), (file,))


def _archived_header(archive: Archive, file: _File) -> dicom.SliceHeader:
    """Return a member's DICOM header; more of it is only inflated where its head does not do."""
    try:
        header = dicom.read_header(io.BytesIO(archive.head(file.path, _HEADER_BYTES)), file.name)
        if header.problem is not Reason.TRUNCATED or file.size <= _HEADER_BYTES:
            return header
        return dicom.read_header(io.BytesIO(archive.head(file.path, dicom.HEADER_LIMIT)), file.name)
    except ScanError as error:
        return dicom.unreadable_header(file.name, error)


def _series_ids(groups: list[dicom.Series], name: str) -> list[str]:
    """Return each series' place as its id, made unique by a short hash of what tells them apart.

    The place is the file of a series of one file, else the folder.
    """
    places = [_place(series.files) or name for series in groups]
    at_place = Counter(places)
    of_uid = Counter(zip(places, (series.uid for series in groups), strict=True))
    return [
        place if at_place[place] == 1 else f"{place}#{_short_hash(series, of_uid[place, series.uid] > 1)}"
        for place, series in zip(places, groups, strict=True)
    ]


def _short_hash(series: dicom.Series, uid_is_shared: bool) -> str:
    # Only a hash of the UID is in the id, for a UID may be traced to a patient. Groups that share a
    # UID, or have none, are told apart by their first file.
    text = f"{series.uid}\n{min(series.files)}" if uid_is_shared or not series.uid else series.uid
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _manifest_scan(row: ManifestRow, how: _How) -> Scan:
    scan = Scan(
        scan_id=row.scan_id,
        uri=mask_url(row.uri),
        format="auto",
        files=(),
        content=hash_of([row.version]),
        columns=row.columns,
        mask=row.mask,
        center_lps=row.center_lps,
    )
    if row.problem:
        return replace(scan, reason=Reason.STORAGE, message=row.problem)
    try:
        found = _named_scan(row, how)
        mask = "" if row.version or not row.mask else _version_of(row.mask, how.source)
    except ScanError as error:
        return replace(scan, reason=error.reason, message=str(error))
    content = scan.content if row.version else found.content
    if row.mask or row.center_lps:
        content = hash_of([content, f"mask {row.mask} {mask}", f"center {row.center_lps}"])
    return replace(
        found,
        scan_id=scan.scan_id,
        uri=scan.uri,
        content=content,
        listed="" if row.version else found.listed,
        columns=scan.columns,
        mask=scan.mask,
        center_lps=scan.center_lps,
    )


def _named_scan(row: ManifestRow, how: _How) -> Scan:
    """Return the one scan that a manifest's row names.

    Raises:
        ScanError: `storage`; the place cannot be read. `not_a_volume`; it holds none, or several.
    """
    wanted = "npy" if how.source.format == "npy" else "auto"
    one = _How(how.source.model_copy(update={"uri": row.uri, "format": wanted}), how.policy)
    try:
        fs, path = open_url(row.uri, how.source.storage_options)
        kinds = [kind for kind in one.formats & _SUFFIXES.keys() if path.lower().endswith(_SUFFIXES[kind])]
        if row.version and kinds:  # nothing is left to ask the store
            return Scan(row.scan_id, mask_url(row.uri), kinds[0], (path,), "")
        found = _list_place(fs, path, one).scans
    except ConfigError as error:
        raise ScanError(Reason.STORAGE, str(error)) from None
    except OSError as error:
        message = f"the manifest names a place that cannot be read ({type(error).__name__})"
        raise ScanError(Reason.STORAGE, message) from None
    if len(found) != 1:
        message = f"the manifest's uri must name one scan; it holds {len(found)}"
        raise ScanError(Reason.NOT_A_VOLUME, message)
    return found[0]


def _version_of(uri: str, source: SourceConfig) -> str:
    """Return the store's version of one file.

    Raises:
        ScanError: `storage`; it cannot be had.
    """
    try:
        fs, path = open_url(uri, source.storage_options)
        info = fs.info(path)
    except (ConfigError, OSError) as error:
        message = f"the manifest names a mask that cannot be read ({type(error).__name__})"
        raise ScanError(Reason.STORAGE, message) from None
    return f"{info.get('size')} {file_version(info)}"


def _unique_ids(scans: Iterable[Scan]) -> Iterator[Scan]:
    """Yield the scans sorted by id; the second of two equal ids fails under a numbered one."""
    seen: Counter[str] = Counter()
    for scan in sorted(scans, key=lambda scan: (scan.scan_id, scan.files)):
        seen[scan.scan_id] += 1
        if seen[scan.scan_id] == 1:
            yield scan
        else:
            message = f"the id {scan.scan_id!r} is used more than once; give each scan its own"
            numbered = f"{scan.scan_id}#{seen[scan.scan_id]}"
            yield replace(scan, scan_id=numbered, reason=Reason.DUPLICATE_ID, message=message, excluded=False)


def _file(path: str, info: dict[str, Any], base: str) -> _File:
    name = path[len(base) :].lstrip("/") if path.startswith(base) else posixpath.basename(path)
    return _File(path, utf8(name), int(info.get("size") or 0), file_version(info), file_checksum(info))


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _may_be_dicom(name: str) -> bool:
    """Whether to look inside: archives name their slices .dcm, .ima, .mag, .0001 or nothing at all."""
    return not _OTHERS.search(name)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _place(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else _common_folder(names)


def _common_folder(names: Iterable[str]) -> str:
    return posixpath.commonpath([posixpath.dirname(name) for name in names])


def _is_there(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    return bool(fs.isfile(path) or fs.isdir(path))


def _has_wildcard(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _before_wildcard(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if _has_wildcard(part))
    return "/".join(parts[:fixed])
