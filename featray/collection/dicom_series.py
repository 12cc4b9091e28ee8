"""The DICOM series among files: headers read, grouped, and given ids that say where they lie.

With a memory only the headers of new and changed files are read, and of those that share a series with them.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from featray.collection.files import File, Found, How, Place, common_place, scan_of
from featray.collection.header_cache import HeaderCache, KnownGroup, KnownSeries
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason
from featray.storage.urls import hash_texts, mask_url

_Folders = Mapping[str, list[File]]
"""Candidate files by the hash of their folder."""


@dataclass(frozen=True)
class _Series:
    """One series of a place: names of its files, sorted, and what is known of it without them."""

    names: tuple[str, ...]
    known: KnownSeries


def series_in(place: Place, files: Sequence[File], how: How) -> list[Found]:
    """Return one scan per DICOM series among the files of a place; files that are no DICOM are in none."""
    by_name = {file.name: file for file in files}
    grouped = (
        _read(place, files, how)
        if how.header_cache is None
        else _recalled(place, files, how, how.header_cache)
    )
    found = []
    for series, scan_id in zip(grouped, _ids(grouped, place.name), strict=True):
        members = tuple(by_name[name] for name in series.names)
        scan = replace(
            scan_of(members, scan_id, "dicom", place, how),
            warnings=series.known.warnings,
            reason=series.known.reason,
            excluded=series.known.excluded,
            message=series.known.message,
            series=series.known.uid,
        )
        found.append(Found(scan, members))
    return found


def _read(place: Place, files: Sequence[File], how: How) -> list[_Series]:
    return _series_of(_headers(place, files), how)


def _recalled(place: Place, files: Sequence[File], how: How, header_cache: HeaderCache) -> list[_Series]:
    """Return the series as `_read` would; headers are only read where what they say may have changed."""
    folders: dict[str, list[File]] = defaultdict(list)
    for file in files:
        folders[_folder(file.name)].append(file)
    key = _hash(f"{mask_url(how.source.uri)}\n{place.archive}")
    trusted = [group for group in header_cache.recall(key) if _is_unchanged(group, folders)]
    unread = folders.keys() - {folder for group in trusted for folder in group.folders}
    headers: list[SliceHeader] = []
    while unread:
        headers += _headers(place, [file for folder in sorted(unread) for file in folders[folder]])
        uids = {_uid(header.series_uid) for header in headers if header.series_uid}
        # A series of what was read may have slices in a folder that is unchanged: the two belong together.
        unread = {folder for group in trusted if group.uids & uids for folder in group.folders}
        trusted = [group for group in trusted if not group.uids & uids]
    fresh = _series_of(headers, how)
    header_cache.keep(key, [*trusted, *_to_remember(fresh, headers, folders)])
    series = fresh + [one for group in trusted for one in _series_from(group, folders)]
    return sorted(series, key=lambda one: one.names)


def _headers(place: Place, files: Sequence[File]) -> list[SliceHeader]:
    with ThreadPoolExecutor(place.threads) as pool:  # object stores answer in parallel
        return list(pool.map(place.header, files))


def _series_of(headers: Sequence[SliceHeader], how: How) -> list[_Series]:
    groups = group_into_scans(headers, accept_other_modalities=how.policy.not_ct == "warn")
    return [
        _Series(
            group.files,
            KnownSeries(
                files=None,
                uid=_uid(group.series_uid),
                own=hashlib.sha256(f"{group.series_uid}\n{min(group.files)}".encode()).hexdigest()[:8],
                reason=group.reason,
                excluded=group.excluded,
                message=group.message,
                warnings=tuple(str(code) for code in group.warnings),
            ),
        )
        for group in groups
    ]


def _is_unchanged(group: KnownGroup, folders: _Folders) -> bool:
    is_there = all(folder in folders for folder in group.folders)
    return is_there and group.fingerprint == _fingerprint(group.folders, folders)


def _fingerprint(names: Iterable[str], folders: _Folders) -> str:
    return hash_texts(f"{file.name}\t{file.size}\t{file.version}" for name in names for file in folders[name])


def _series_from(group: KnownGroup, folders: _Folders) -> Iterator[_Series]:
    names = _candidates(group.folders, folders)
    for known in group.series:
        yield _Series(names if known.files is None else tuple(names[at] for at in known.files), known)


def _candidates(names: Iterable[str], folders: _Folders) -> tuple[str, ...]:
    return tuple(sorted(file.name for name in names for file in folders[name]))


def _to_remember(
    series: Sequence[_Series], headers: Sequence[SliceHeader], folders: _Folders
) -> Iterator[KnownGroup]:
    """Yield the groups of folders that share series, with their series; not what may pass by itself."""
    uids: dict[str, set[str]] = defaultdict(set)
    failing = set()
    for header in headers:
        folder = _folder(header.name)
        uids[folder] |= {_uid(header.series_uid)} if header.series_uid else set()
        if header.problem is Reason.STORAGE:
            failing.add(folder)
    in_folder: dict[str, list[_Series]] = defaultdict(list)
    for one in series:
        in_folder[_folder(one.names[0])].append(one)
    for group in _sharing(uids):
        has_versions = all(file.version for folder in group for file in folders[folder])
        if has_versions and not failing & set(group):
            found = [one for folder in group for one in in_folder[folder]]
            yield KnownGroup(
                folders=group,
                fingerprint=_fingerprint(group, folders),
                uids=frozenset().union(*(uids[folder] for folder in group)),
                series=_numbered(found, _candidates(group, folders)),
            )


def _sharing(uids: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the folders, those together that share a series with each other, be it through others."""
    groups: dict[str, list[str]] = {folder: [folder] for folder in uids}
    owner: dict[str, str] = {}
    for folder, found in uids.items():
        for uid in found:
            first, own = groups[owner.setdefault(uid, folder)], groups[folder]
            if first is not own:
                small, large = sorted((first, own), key=len)
                large += small
                groups |= dict.fromkeys(small, large)
    return sorted({tuple(sorted(group)) for group in groups.values()})


def _numbered(series: Iterable[_Series], candidates: tuple[str, ...]) -> tuple[KnownSeries, ...]:
    number = {name: at for at, name in enumerate(candidates)}
    return tuple(
        one.known
        if one.names == candidates
        else replace(one.known, files=tuple(number[name] for name in one.names))
        for one in sorted(series, key=lambda one: one.names)
    )


def _ids(series: Sequence[_Series], name: str) -> list[str]:
    """Return each series' place as its id, made unique by a short hash of what tells them apart.

    The place is the file of a series of one file, else the folder.
    """
    places = [common_place(one.names) or name for one in series]
    at_place = Counter(places)
    of_uid = Counter(zip(places, (one.known.uid for one in series), strict=True))
    return [
        place if at_place[place] == 1 else f"{place}#{_mark(one.known, of_uid[place, one.known.uid] > 1)}"
        for place, one in zip(places, series, strict=True)
    ]


def _mark(series: KnownSeries, uid_is_shared: bool) -> str:
    # Only a hash of the UID is in the id, for a UID may be traced to a patient. Groups that share a
    # UID, or have none, are told apart by their first file.
    return series.own if uid_is_shared or not series.uid else series.uid[:8]


def _uid(text: str) -> str:
    """Return the hash of a SeriesInstanceUID; nothing for none."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def _folder(name: str) -> str:
    return _hash(posixpath.dirname(name))


def _hash(text: str) -> str:
    return hash_texts([text])
