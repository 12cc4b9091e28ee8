"""The rows of a manifest in, their scans out; the store is only asked about rows that give no version.

Works on whole columns; only rows without a version, and those that share something with another, are looked
at one by one (`featray.collection.manifest_row`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.collection.duplicates import settle_duplicates, unique_ids
from featray.collection.files import SUFFIXES, THREADS, How
from featray.collection.listing import TEXT, RowScans, point
from featray.collection.manifest import Manifest
from featray.collection.manifest_row import scan_of_row, version_content, wanted_formats, with_region
from featray.schema import Scan
from featray.storage.urls import mask_url, open_url

log = logging.getLogger(__name__)

_PLAIN_URL = r"^[a-z][a-z0-9+.-]*://[A-Za-z0-9._-]*(/[^?#\t\r\n]*)?$"
"""URLs that are shown as they are; others may hold credentials, or several protocols."""
_PROTOCOL = re.compile(r"^[a-z][a-z0-9+.-]*://")
_BLOCK = 10_000

_Flags = NDArray[np.bool_]


def scans_of_manifest(manifest: Manifest, how: How) -> RowScans:
    """Return the scans that a manifest names, sorted by id, ids unique, copies marked as policy says."""
    uris = _shown(manifest.uri)
    is_whole = _is_plain(manifest.uri) & ~np.asarray(pc.equal(manifest.version, ""))
    is_whole[list(manifest.problems)] = False
    strip = _Stripper(how)
    is_whole &= strip.knows(manifest.uri)
    asked = dict(_asked(manifest, np.flatnonzero(~is_whole).tolist(), how))
    columns = _columns(manifest, uris, how)
    whole = RowScans(
        columns,
        manifest.extra_columns,
        manifest.centers_lps,
        strip,
        [],
        np.arange(len(manifest), dtype=np.int64),
    )
    # Only what shares its id or its place with another row has to be looked at beside the others.
    shares_id = _shared(manifest.scan_id)
    odd = ~is_whole | shares_id | _shared_places(manifest, uris)
    at = np.flatnonzero(odd)
    known = iter(whole.take(at[is_whole[at]]))
    scans = [next(known) if is_whole[row] else asked[row] for row in at.tolist()]
    kept = np.flatnonzero(~odd)
    ids = manifest.scan_id.take(pa.array(kept))
    others = frozenset(ids.to_pylist()) if shares_id.any() else frozenset()
    made = unique_ids(settle_duplicates(scans, how.policy), others)
    order = _by_id(ids, [scan.scan_id for scan in made])
    centers = None if manifest.centers_lps is None else manifest.centers_lps[kept]
    rows, extra_columns = (table.take(pa.array(kept)) for table in (columns, manifest.extra_columns))
    return RowScans(rows, extra_columns, centers, strip, made, order)


def _columns(manifest: Manifest, uris: pa.Array, how: How) -> pa.Table:
    return pa.table(
        {
            "scan_id": manifest.scan_id,
            "uri": uris,
            "format": _formats(manifest.uri, wanted_formats(how)),
            "content": _contents(manifest),
            "mask": manifest.mask,
        }
    )


def _contents(manifest: Manifest) -> pa.Array:
    """Return the content of rows, all of them taken to have a version."""
    contents = _each(manifest.version, version_content)
    masks, centers = manifest.mask, manifest.centers_lps
    if centers is None and not pc.any(pc.not_equal(masks, "")).as_py():
        return contents
    points = [None] * len(masks) if centers is None else map(point, centers.tolist())
    rows = zip(contents.to_pylist(), masks.to_pylist(), points, strict=True)
    return pa.array([with_region(content, mask, center) for content, mask, center in rows], TEXT)


def _formats(uris: pa.Array, wanted: set[str]) -> pa.Array:
    """Return the format that each name tells, or "auto"."""
    lower = pc.utf8_lower(uris)
    formats = pa.repeat(pa.scalar("auto", TEXT), len(uris))
    for kind in sorted(wanted & SUFFIXES.keys()):
        for end in SUFFIXES[kind]:
            formats = pc.if_else(pc.ends_with(lower, end), pa.scalar(kind, TEXT), formats)
    return formats


def _shown(uris: pa.Array) -> pa.Array:
    """Return the uris without credentials."""
    odd = np.flatnonzero(~_is_plain(uris))
    if not len(odd):
        return uris
    masked = pa.array([mask_url(uri) for uri in uris.take(pa.array(odd)).to_pylist()], TEXT)
    is_odd = np.zeros(len(uris), bool)
    is_odd[odd] = True
    return pc.replace_with_mask(uris, pa.array(is_odd), masked)


def _is_plain(uris: pa.Array) -> _Flags:
    is_path = pc.and_(pc.invert(pc.match_substring(uris, "://")), pc.invert(pc.match_substring(uris, "::")))
    return np.asarray(pc.or_(is_path, pc.match_substring_regex(uris, _PLAIN_URL)), bool)


class _Stripper:
    """Gives the path of a uri in its file system; a file system is opened once per protocol.

    Args:
        how: Its storage options are those of all.
    """

    def __init__(self, how: How) -> None:
        self._options = how.source.storage_options
        self._of: dict[str, Callable[[str], str]] = {}

    def __call__(self, uri: str) -> str:
        strip = self._of.get(_protocol(uri))
        path = open_url(uri, self._options)[1] if strip is None else strip(uri)
        return path.rstrip("/") or path

    def knows(self, uris: pa.Array) -> _Flags:
        """Return of each uri whether its protocol can be opened."""
        found = pc.struct_field(pc.extract_regex(uris, r"^(?P<name>[a-z][a-z0-9+.-]*://)"), "name")
        protocols = pc.fill_null(found, "")
        names = pc.unique(protocols).to_pylist()
        can = [
            name
            for name in names
            if self._opens(name, uris[pc.index(protocols, pa.scalar(name, TEXT)).as_py()])
        ]
        return np.asarray(pc.is_in(protocols, value_set=pa.array(can, TEXT)), bool)

    def _opens(self, protocol: str, example: pa.Scalar) -> bool:
        try:
            fs, _ = open_url(example.as_py(), self._options)
        except Exception as error:  # each store has errors of its own; its rows tell, looked at one by one
            log.debug("%s cannot be opened (%s)", protocol, type(error).__name__)
            return False
        self._of[protocol] = fs._strip_protocol
        return True


def _protocol(uri: str) -> str:
    found = _PROTOCOL.match(uri)
    return found.group() if found else ""


def _shared(texts: pa.Array) -> _Flags:
    """Return which of the texts occur more than once."""
    numbers = np.asarray(texts.dictionary_encode().indices)
    shared: _Flags = np.bincount(numbers)[numbers] > 1
    return shared


def _shared_places(manifest: Manifest, uris: pa.Array) -> _Flags:
    """Return which rows ask for the same region of the same place as another."""
    shared = _shared(uris)
    at = np.flatnonzero(shared)
    keys = [
        np.asarray(array.take(pa.array(at)).dictionary_encode().indices) for array in (uris, manifest.mask)
    ]
    if manifest.centers_lps is not None:
        keys += list(np.nan_to_num(manifest.centers_lps[at], nan=np.inf).T)
    order = np.lexsort(keys)
    is_next = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    shared[at[order]] = np.append(is_next, False) | np.insert(is_next, 0, False) if len(at) else False
    return shared


def _by_id(ids: pa.Array, further: Sequence[str]) -> NDArray[np.int64]:
    everything = pa.chunked_array([ids, pa.array(further, TEXT)], TEXT)
    return np.asarray(pc.sort_indices(everything), np.int64)


def _each(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    blocks = [
        pa.array([change(text) for text in texts.slice(start, _BLOCK).to_pylist()], TEXT)
        for start in range(0, len(texts), _BLOCK)
    ]
    return pa.chunked_array(blocks, TEXT).combine_chunks()


def _asked(manifest: Manifest, rows: Sequence[int], how: How) -> Iterator[tuple[int, Scan]]:
    """Yield row and scan of some rows; where the store has to be asked, several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            found = pool.map(lambda at: scan_of_row(manifest.row(at), how), block)
            yield from zip(block, found, strict=True)
