"""Find the DICOM series among some files: read headers, group them, and give each series an id.

With a header cache, headers are only read in new and changed folders, and in folders that share a series with
one of these.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from featray.collection.files import (
    File,
    FileGroup,
    FoundScan,
    ListingOptions,
    find_common_path,
    make_scan,
)
from featray.collection.header_cache import CacheEntry, HashedSeries, HeaderCache
from featray.config import PolicyConfig
from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason
from featray.storage.urls import hash_texts, mask_url

log = logging.getLogger(__name__)

_Folders = Mapping[str, list[File]]
"""Hash of a folder's name → candidate files in the folder."""


def find_series(group: FileGroup, files: Sequence[File], options: ListingOptions) -> list[FoundScan]:
    """Return one scan per DICOM series among some files of a group; other files are in no scan."""
    by_name = {file.name: file for file in files}
    if options.header_cache is None:
        all_series = _group_headers(_read_headers(group, files), options.policy)
    else:
        all_series = _find_series_with_cache(group, files, options, options.header_cache)
    return [
        _make_found_scan(series.scan, scan_id, [by_name[name] for name in series.scan.files], group, options)
        for series, scan_id in zip(all_series, _make_ids(all_series, group.name), strict=True)
    ]


def _make_found_scan(
    series: DicomScan, scan_id: str, members: Sequence[File], group: FileGroup, options: ListingOptions
) -> FoundScan:
    scan = replace(
        make_scan(members, scan_id, "dicom", options, group.archive),
        warnings=series.warnings,
        reason=series.reason,
        excluded=series.excluded,
        message=series.message,
        series=series.series_uid,
    )
    return FoundScan(scan, tuple(members), series.stack)


def _find_series_with_cache(
    group: FileGroup, files: Sequence[File], options: ListingOptions, cache: HeaderCache
) -> list[HashedSeries]:
    """Return the series that reading every header would give; read only headers that may have changed."""
    folders: dict[str, list[File]] = defaultdict(list)
    for file in files:
        folders[_hash_folder(file.name)].append(file)
    key = _hash_text(f"{mask_url(options.source.uri)}\n{group.archive}")
    valid = [entry for entry in cache.get(key) if _is_unchanged(entry, folders)]
    unread = folders.keys() - {folder for entry in valid for folder in entry.folders}
    headers: list[SliceHeader] = []
    while unread:
        headers += _read_headers(group, [file for folder in sorted(unread) for file in folders[folder]])
        uids = {_hash_uid(header.series_uid) for header in headers if header.series_uid}
        # A series with slices in a folder just read may have slices in an unchanged folder too. The two
        # folders must be grouped together, so the unchanged folder is read as well.
        unread = {folder for entry in valid if entry.uids & uids for folder in entry.folders}
        valid = [entry for entry in valid if not entry.uids & uids]
    new_series = _group_headers(headers, options.policy)
    cache.put(key, [*valid, *_make_entries(new_series, headers, folders)])
    all_series = new_series + [series for entry in valid for series in _restore_series(entry, folders)]
    return sorted(all_series, key=lambda series: series.scan.files)


def _read_headers(group: FileGroup, files: Sequence[File]) -> list[SliceHeader]:
    with ThreadPoolExecutor(group.threads) as pool:  # an object store answers several requests at once
        return list(pool.map(group.read_header, files))


def _group_headers(headers: Sequence[SliceHeader], policy: PolicyConfig) -> list[HashedSeries]:
    group = functools.partial(group_into_scans, accept_other_modalities=policy.not_ct == "warn")
    try:
        scans = group(headers)
    except Exception:  # an unexpected error costs one series, not the listing
        log.debug("unexpected error while grouping DICOM headers", exc_info=True)
        scans = _group_one_by_one(headers, group)
    return [_hash_series(scan) for scan in scans]


def _group_one_by_one(
    headers: Sequence[SliceHeader], group: Callable[[Sequence[SliceHeader]], list[DicomScan]]
) -> list[DicomScan]:
    """Return the scans of headers that cannot be grouped together; a series that cannot be grouped fails."""
    by_uid: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in headers:
        by_uid[header.series_uid].append(header)
    good, failed = [], []
    for uid, members in by_uid.items():
        try:
            group(members)
            good += members
        except Exception as error:  # any kind: the cause is a bug
            files = tuple(sorted(header.name for header in members))
            message = f"grouping the files of the series raised {type(error).__name__}"
            failed.append(DicomScan(files, uid, Reason.UNREADABLE, message=message))
    return sorted([*group(good), *failed], key=lambda scan: scan.files)


def _hash_series(scan: DicomScan) -> HashedSeries:
    """Return a series with hashes in place of its UID."""
    return HashedSeries(
        scan=replace(
            scan,
            series_uid=_hash_uid(scan.series_uid),
            warnings=tuple(str(code) for code in scan.warnings),
        ),
        series_hash=hashlib.sha256(f"{scan.series_uid}\n{min(scan.files)}".encode()).hexdigest()[:8],
    )


def _is_unchanged(entry: CacheEntry, folders: _Folders) -> bool:
    has_folders = all(folder in folders for folder in entry.folders)
    return has_folders and entry.fingerprint == _compute_fingerprint(entry.folders, folders)


def _compute_fingerprint(names: Iterable[str], folders: _Folders) -> str:
    return hash_texts(f"{file.name}\t{file.size}\t{file.version}" for name in names for file in folders[name])


def _restore_series(entry: CacheEntry, folders: _Folders) -> Iterator[HashedSeries]:
    """Yield the series of a cache entry with the names of their files."""
    candidates = _list_candidates(entry.folders, folders)
    for series in entry.series:
        numbers = series.file_numbers
        names = candidates if numbers is None else tuple(candidates[number] for number in numbers)
        yield HashedSeries(replace(series.scan, files=names), series.series_hash)


def _list_candidates(names: Iterable[str], folders: _Folders) -> tuple[str, ...]:
    return tuple(sorted(file.name for name in names for file in folders[name]))


def _make_entries(
    all_series: Sequence[HashedSeries], headers: Sequence[SliceHeader], folders: _Folders
) -> Iterator[CacheEntry]:
    """Yield the cache entries for folders that were just read.

    Folders with a file that could not be opened get no entry, because the file may be readable next time.
    Folders with a file without a version get none either, because a change of the file would not be noticed.
    """
    uids: dict[str, set[str]] = defaultdict(set)
    failing = set()
    for header in headers:
        folder = _hash_folder(header.name)
        uids[folder] |= {_hash_uid(header.series_uid)} if header.series_uid else set()
        if header.problem is Reason.STORAGE:
            failing.add(folder)
    in_folder: dict[str, list[HashedSeries]] = defaultdict(list)
    for series in all_series:
        in_folder[_hash_folder(series.scan.files[0])].append(series)
    for connected in _connect_folders(uids):
        has_versions = all(file.version for folder in connected for file in folders[folder])
        if has_versions and not failing & set(connected):
            yield CacheEntry(
                folders=connected,
                fingerprint=_compute_fingerprint(connected, folders),
                uids=frozenset().union(*(uids[folder] for folder in connected)),
                series=_number_files(
                    [series for folder in connected for series in in_folder[folder]],
                    _list_candidates(connected, folders),
                ),
            )


def _connect_folders(uids: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the folders in sets that are connected by shared series, directly or through other folders.

    Args:
        uids: Folder → UIDs of the series that have files in the folder.
    """
    sets: dict[str, list[str]] = {folder: [folder] for folder in uids}
    first_folder: dict[str, str] = {}
    for folder, folder_uids in uids.items():
        for uid in folder_uids:
            other, own = sets[first_folder.setdefault(uid, folder)], sets[folder]
            if other is not own:
                small, large = sorted((other, own), key=len)
                large += small
                sets |= dict.fromkeys(small, large)
    return sorted({tuple(sorted(connected)) for connected in sets.values()})


def _number_files(
    all_series: Iterable[HashedSeries], candidates: tuple[str, ...]
) -> tuple[HashedSeries, ...]:
    """Return series with the positions of their files among the candidates in place of the file names."""
    number = {name: position for position, name in enumerate(candidates)}
    return tuple(
        HashedSeries(
            replace(series.scan, files=()),
            series.series_hash,
            None if series.scan.files == candidates else tuple(number[name] for name in series.scan.files),
        )
        for series in sorted(all_series, key=lambda series: series.scan.files)
    )


def _make_ids(all_series: Sequence[HashedSeries], default: str) -> list[str]:
    """Return the path of each series as its id; series with the same path get a short hash appended.

    The path is the common folder of the files, or the file if there is only one.

    Args:
        all_series: The series of one group of files.
        default: Id for a series without a common folder below the root.
    """
    paths = [find_common_path(series.scan.files) or default for series in all_series]
    path_count = Counter(paths)
    uid_count = Counter(zip(paths, (series.scan.series_uid for series in all_series), strict=True))
    return [
        path
        if path_count[path] == 1
        else f"{path}#{_choose_hash(series, is_uid_shared=uid_count[path, series.scan.series_uid] > 1)}"
        for path, series in zip(paths, all_series, strict=True)
    ]


def _choose_hash(series: HashedSeries, *, is_uid_shared: bool) -> str:
    # The id holds only a hash of the UID, because a UID may be traced to a patient. For series that share
    # a UID or have none, the hash includes the name of the first file.
    uid_hash = series.scan.series_uid
    return series.series_hash if is_uid_shared or not uid_hash else uid_hash[:8]


def _hash_uid(uid: str) -> str:
    """Return the hash of a SeriesInstanceUID; empty for an empty UID."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16] if uid else ""


def _hash_folder(file_name: str) -> str:
    return _hash_text(posixpath.dirname(file_name))


def _hash_text(text: str) -> str:
    return hash_texts([text])
