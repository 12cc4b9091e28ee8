"""List the collection: config in, every scan that is there out, none of them read.

NIfTI files are told by name; DICOM files by their headers, which is where one series is told from
another. A file that is neither is counted as ignored, never silently dropped from a series.
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from featray.config import SourceConfig, mask_url
from featray.ct import dicom
from featray.errors import ConfigError, Reason, ScanError
from featray.schema import SCAN_COLUMNS, Scan
from featray.storage import open_url

NIFTI_SUFFIXES = (".nii", ".nii.gz")
MANIFEST_SUFFIXES = (".csv", ".parquet")
ROI_COLUMNS = ("mask", "center_x", "center_y", "center_z")
_HEADER_THREADS = 8


@dataclass(frozen=True)
class Listing:
    """What a collection holds.

    Attributes:
        scans: Every scan, sorted by id; ids are unique.
        ignored: Number of files by suffix that are neither NIfTI nor DICOM.
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


def list_scans(source: SourceConfig) -> Listing:
    """Return every scan below `source.uri`, which is a folder, a glob, a file or a manifest.

    Raises:
        ConfigError: The place does not exist, cannot be listed, or holds no scan.
    """
    fs, root = open_url(source.uri, source.storage_options)
    try:
        listing = _list(fs, root, source)
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
        raise ConfigError(
            f"source.uri: no scan of format {source.format} in {mask_url(source.uri)} ({ignored})"
        )
    return replace(listing, scans=tuple(_unique_ids(listing.scans)))


def _list(fs: fsspec.AbstractFileSystem, root: str, source: SourceConfig) -> Listing:
    if root.lower().endswith(MANIFEST_SUFFIXES) and fs.isfile(root):
        return _list_manifest(fs, root, source)
    if source.id_column is not None:
        raise ConfigError("source.id_column: only a manifest (.csv, .parquet) has columns")
    if not _has_wildcard(root) or _is_there(fs, root):
        return _list_place(fs, root, source)
    base = _before_wildcard(root)
    found = sorted(fs.glob(root, detail=True).items())
    # Only what is no plain file, such as a link, costs a question of its own.
    files = [_file(path, info, base) for path, info in found if info["type"] == "file" or fs.isfile(path)]
    return _list_files(fs, base, files, source)


def _list_place(fs: fsspec.AbstractFileSystem, root: str, source: SourceConfig) -> Listing:
    """List a file or a folder; marks of a glob in its name mean nothing here."""
    if fs.isfile(root):
        base, found = posixpath.dirname(root), {root: fs.info(root)}
    elif fs.isdir(root):
        base, found = root, fs.find(root, detail=True)
    else:
        raise FileNotFoundError(root)
    links = {path for path, info in found.items() if info.get("islink") and fs.isdir(path)}
    files = [_file(path, info, base) for path, info in sorted(found.items()) if path not in links]
    listing = _list_files(fs, base, files, source)
    # Following links to folders may lead round in a circle; they are named instead.
    return replace(listing, ignored={**listing.ignored, "linked folder": len(links)}) if links else listing


def _list_files(
    fs: fsspec.AbstractFileSystem, base: str, files: list[_File], source: SourceConfig
) -> Listing:
    visible = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    nifti = [file for file in visible if file.name.lower().endswith(NIFTI_SUFFIXES)]
    maybe_dicom = [file for file in visible if _may_be_dicom(file.name)]
    scans: list[Scan] = []
    if source.format in ("auto", "nifti"):
        scans += [_nifti_scan(file, source) for file in nifti]
    used = set(nifti) if scans else set()
    if source.format in ("auto", "dicom"):
        series, members = _dicom_scans(fs, base, maybe_dicom, source)
        scans += series
        used |= members
    ignored = Counter(_suffix(file.name) or "without suffix" for file in visible if file not in used)
    return Listing(tuple(scans), dict(ignored))


def _nifti_scan(file: _File, source: SourceConfig) -> Scan:
    return Scan(
        scan_id=file.name,
        uri=_shown_uri(source, file.path),
        format="nifti",
        files=(file.path,),
        content=_fingerprint([file]),
        size=file.size,
    )


def _dicom_scans(
    fs: fsspec.AbstractFileSystem, base: str, files: list[_File], source: SourceConfig
) -> tuple[list[Scan], set[_File]]:
    """Return one scan per series among the files, and the files that belong to one."""
    by_name = {file.name: file for file in files}
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:  # object stores answer in parallel
        headers = list(pool.map(lambda file: _header(fs, file), files))
    groups = dicom.group_series(headers)
    ids = _series_ids(groups, base)
    scans = []
    for series, scan_id in zip(groups, ids, strict=True):
        members = [by_name[name] for name in series.files]
        scans.append(_series_scan(series, scan_id, members, source))
    return scans, {by_name[name] for series in groups for name in series.files}


def _header(fs: fsspec.AbstractFileSystem, file: _File) -> dicom.SliceHeader:
    """Return a file's DICOM header; it says itself when the file is none, or cannot be opened."""
    try:
        with fs.open(file.path, "rb", block_size=2**16) as stream:
            return dicom.read_header(stream, file.name)
    except OSError as error:
        problem = ScanError(Reason.STORAGE, f"could not be opened ({type(error).__name__})")
        return dicom.unreadable_header(file.name, problem)


def _series_scan(series: dicom.Series, scan_id: str, members: list[_File], source: SourceConfig) -> Scan:
    return Scan(
        scan_id=scan_id,
        uri=_shown_uri(source, _place([file.path for file in members])),
        format="dicom",
        files=tuple(file.path for file in members),
        content=_fingerprint(members),
        size=sum(file.size for file in members),
        warnings=tuple(str(code) for code in series.warnings),
        reason=series.reason,
        excluded=series.excluded,
        message=series.message,
    )


def _series_ids(groups: list[dicom.Series], base: str) -> list[str]:
    """Return each series' place as its id, made unique by a short hash of what tells them apart.

    The place is the file of a series of one file, else the folder.
    """
    places = [_place(series.files) or posixpath.basename(base) for series in groups]
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


def _list_manifest(fs: fsspec.AbstractFileSystem, path: str, source: SourceConfig) -> Listing:
    rows = _manifest_rows(fs, path, source)
    return Listing(tuple(_manifest_scan(row, source) for row in rows))


def _manifest_rows(fs: fsspec.AbstractFileSystem, path: str, source: SourceConfig) -> list[dict[str, str]]:
    data = fs.cat_file(path)
    try:
        columns, rows = _parse_csv(data) if path.lower().endswith(".csv") else _parse_parquet(data)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        kind = type(error).__name__
        raise ConfigError(f"source.uri: the manifest is neither UTF-8 CSV nor Parquet ({kind})") from None
    problems = _problems_of_columns(columns, ["uri", *([source.id_column] if source.id_column else [])])
    if not rows and not problems:
        problems = ["source.uri: the manifest has no rows"]
    if problems:
        raise ConfigError(problems)
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def _parse_csv(data: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), restkey="")
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def _parse_parquet(data: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    table = pq.read_table(io.BytesIO(data))
    return table.column_names, table.to_pylist()


def _problems_of_columns(columns: list[str], needed: list[str]) -> list[str]:
    problems = [f"source.uri: the manifest has no column {name}" for name in needed if name not in columns]
    problems += [
        f"source.uri: the manifest column {name} (region of interest) is not supported yet; remove it"
        for name in ROI_COLUMNS
        if name in columns
    ]
    # Column names of a Delta table differ by more than case.
    carried = Counter(name.lower() for name in columns if name not in ("uri", "version", *needed))
    taken = {*SCAN_COLUMNS.names, "layer", *(name for name, count in carried.items() if count > 1)}
    clashes = sorted(taken & set(carried))
    return problems + [
        f"source.uri: rename the manifest column {name}; scans has one of that name" for name in clashes
    ]


def _manifest_scan(row: dict[str, str], source: SourceConfig) -> Scan:
    uri, version = _resolved(row["uri"], source.uri), row.get("version", "")
    scan = Scan(
        scan_id=row[source.id_column] if source.id_column else row["uri"],
        uri=mask_url(uri),
        format="auto",
        files=(),
        content=_hash([version]),
        columns={key: value for key, value in row.items() if key not in ("uri", "version", source.id_column)},
    )
    if not row["uri"]:
        return replace(scan, reason=Reason.STORAGE, message="the manifest's row names no uri")
    try:
        fs, path = open_url(uri, source.storage_options)
    except ConfigError as error:
        return replace(scan, reason=Reason.STORAGE, message=str(error))
    if version and path.lower().endswith(NIFTI_SUFFIXES):  # nothing is left to ask the store
        return replace(scan, format="nifti", files=(path,))
    try:
        found = _list_place(fs, path, source.model_copy(update={"uri": uri, "format": "auto"})).scans
    except OSError as error:
        message = f"the manifest names a place that cannot be read ({type(error).__name__})"
        return replace(scan, reason=Reason.STORAGE, message=message)
    if len(found) != 1:
        message = f"the manifest's uri must name one scan; it holds {len(found)}"
        return replace(scan, reason=Reason.NOT_A_VOLUME, message=message)
    content = scan.content if version else found[0].content
    return replace(found[0], scan_id=scan.scan_id, uri=scan.uri, content=content, columns=scan.columns)


def _resolved(uri: str, manifest: str) -> str:
    """Return a manifest's uri in full: absolute as it is, else relative to the manifest."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return posixpath.join(posixpath.dirname(manifest), uri)


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
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("generation")
    if not version:
        version = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or ""
    return _File(path, name, int(info.get("size") or 0), str(version))


def _fingerprint(files: list[_File]) -> str:
    """Return a hash of the store's version of all files: what a listing shows, without reading one."""
    return _hash(f"{posixpath.basename(f.name)}\t{f.size}\t{f.version}" for f in files)


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:32]


def _may_be_dicom(name: str) -> bool:
    """Whether to look inside: a DICOM suffix, or none (a UID's last number is no suffix)."""
    suffix = _suffix(name)
    return suffix in dicom.DICOM_SUFFIXES or not suffix.strip(".").strip("0123456789")


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


def _shown_uri(source: SourceConfig, path: str) -> str:
    """Return the location to show: the source's own protocol, no credentials."""
    protocol, separator, _ = mask_url(source.uri).partition("://")
    return f"{protocol}://{path}" if separator else path
