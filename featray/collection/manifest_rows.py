"""List the scans that the rows of a manifest name; ask the store only about rows that give no version.

Most rows are processed as whole columns. Some rows are processed one by one, with
`featray.collection.manifest_row`: rows that give no version, that cannot be used, or whose URL may hold
credentials or cannot be opened. Rows that share their id or their region with another row are compared one by
one, too.
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

from featray.collection.duplicates import make_ids_unique, mark_duplicates
from featray.collection.files import FORMAT_SUFFIXES, MAX_THREADS, ListingOptions
from featray.collection.listing import TEXT, LazyScans, ScanColumns
from featray.collection.manifest import Manifest, make_point
from featray.collection.manifest_row import add_region, get_row_formats, hash_version, list_row
from featray.hardware import return_free_memory
from featray.schema import Scan
from featray.storage.urls import mask_url, open_url

log = logging.getLogger(__name__)

_PLAIN_URL = r"^[a-z][a-z0-9+.-]*://[A-Za-z0-9._-]*(/[^?#\t\r\n]*)?$"
"""URLs that can be shown unchanged; other URLs may hold credentials or chain several protocols."""
_PROTOCOL = re.compile(r"^[a-z][a-z0-9+.-]*://")
_BLOCK = 10_000

_Flags = NDArray[np.bool_]


def list_manifest(manifest: Manifest, options: ListingOptions) -> LazyScans:
    """Return the scans that a manifest names: sorted by id, ids unique, copies marked as the policy says."""
    return_free_memory()  # of the parsed file
    shown_uris = _mask_uris(manifest.uri)
    resolver = _PathResolver(options)
    is_complete = _is_plain(manifest.uri) & ~np.asarray(pc.equal(manifest.version, ""))
    is_complete[list(manifest.problems)] = False
    is_complete &= resolver.can_resolve(manifest.uri)
    listed = dict(_list_rows(manifest, np.flatnonzero(~is_complete).tolist(), options))
    columns = _make_columns(manifest, shown_uris, options)
    # Only rows that share their id or their region with another row must be compared with other rows.
    shares_id = _find_repeated(manifest.scan_id)
    is_single = ~is_complete | shares_id | _find_shared_regions(manifest, shown_uris)
    singles = np.flatnonzero(is_single)
    complete = iter(LazyScans(columns, resolver, [], singles[is_complete[singles]]))
    scans = [next(complete) if is_complete[row] else listed[row] for row in singles.tolist()]
    others = np.flatnonzero(~is_single)
    other_ids = manifest.scan_id.take(pa.array(others))
    built = make_ids_unique(
        mark_duplicates(scans, options),
        frozenset(other_ids.to_pylist()) if shares_id.any() else frozenset(),
    )
    order = _sort_by_id(other_ids, [scan.scan_id for scan in built])
    if len(singles):
        columns = columns.take(others)
    return_free_memory()
    return LazyScans(columns, resolver, built, order)


def _make_columns(manifest: Manifest, shown_uris: pa.Array, options: ListingOptions) -> ScanColumns:
    """Return the scans of all rows as columns, as if every row gave a version."""
    main = pa.table(
        {
            "scan_id": manifest.scan_id,
            "uri": shown_uris,
            "format": _detect_formats(manifest.uri, get_row_formats(options)),
            "content": _compute_contents(manifest),
            "mask": manifest.mask,
        }
    )
    return ScanColumns(main, manifest.extra_columns, manifest.centers_lps)


def _compute_contents(manifest: Manifest) -> pa.Array:
    """Return the content of every row, as if every row gave a version."""
    contents = _map_texts(manifest.version, hash_version)
    masks, centers = manifest.mask, manifest.centers_lps
    if centers is None and not pc.any(pc.not_equal(masks, "")).as_py():
        return contents
    points = [None] * len(masks) if centers is None else map(make_point, centers.tolist())
    rows = zip(contents.to_pylist(), masks.to_pylist(), points, strict=True)
    return pa.array([add_region(content, mask, center) for content, mask, center in rows], TEXT)


def _detect_formats(uris: pa.Array, formats: set[str]) -> pa.Array:
    """Return the format that the suffix of each URI names; "auto" if it names none of `formats`."""
    lower = pc.utf8_lower(uris)
    detected = pa.repeat(pa.scalar("auto", TEXT), len(uris))
    for candidate in sorted(formats & FORMAT_SUFFIXES.keys()):
        for suffix in FORMAT_SUFFIXES[candidate]:
            detected = pc.if_else(pc.ends_with(lower, suffix), pa.scalar(candidate, TEXT), detected)
    return detected


def _mask_uris(uris: pa.Array) -> pa.Array:
    """Return the URIs without credentials."""
    is_masked = ~_is_plain(uris)
    if not is_masked.any():
        return uris
    masked = [mask_url(uri) for uri in uris.filter(pa.array(is_masked)).to_pylist()]
    return pc.replace_with_mask(uris, pa.array(is_masked), pa.array(masked, TEXT))


def _is_plain(uris: pa.Array) -> _Flags:
    """Return for each URI whether it is a path or a URL that certainly holds no credentials."""
    is_path = pc.and_(pc.invert(pc.match_substring(uris, "://")), pc.invert(pc.match_substring(uris, "::")))
    return np.asarray(pc.or_(is_path, pc.match_substring_regex(uris, _PLAIN_URL)), bool)


class _PathResolver:
    """Returns the path of a URI in its file system; opens one file system per protocol.

    Args:
        options: `options.source.storage_options` are used for every file system.
    """

    def __init__(self, options: ListingOptions) -> None:
        self._options = options.source.storage_options
        self._strip_protocol: dict[str, Callable[[str], str]] = {}

    def __call__(self, uri: str) -> str:
        strip_protocol = self._strip_protocol.get(_get_protocol(uri))
        path = open_url(uri, self._options)[1] if strip_protocol is None else strip_protocol(uri)
        return path.rstrip("/") or path

    def can_resolve(self, uris: pa.Array) -> _Flags:
        """Return for each URI whether the file system of its protocol can be opened."""
        matches = pc.struct_field(pc.extract_regex(uris, r"^(?P<name>[a-z][a-z0-9+.-]*://)"), "name")
        protocols = pc.fill_null(matches, "")
        opened = [
            name
            for name in pc.unique(protocols).to_pylist()
            if self._try_open(name, uris[pc.index(protocols, pa.scalar(name, TEXT)).as_py()])
        ]
        return np.asarray(pc.is_in(protocols, value_set=pa.array(opened, TEXT)), bool)

    def _try_open(self, protocol: str, example: pa.Scalar) -> bool:
        try:
            fs, _ = open_url(example.as_py(), self._options)
        except Exception as error:  # each store has its own exceptions; `list_row` reports them for each row
            log.debug("%s cannot be opened (%s)", protocol, type(error).__name__)
            return False
        self._strip_protocol[protocol] = fs._strip_protocol
        return True


def _get_protocol(uri: str) -> str:
    match = _PROTOCOL.match(uri)
    return match.group() if match else ""


def _find_repeated(texts: pa.Array) -> _Flags:
    """Return for each text whether it occurs more than once."""
    # The system's pool returns the copies of the texts as soon as they are free.
    numbers = np.asarray(pc.dictionary_encode(texts, memory_pool=pa.system_memory_pool()).indices)
    repeated: _Flags = np.bincount(numbers)[numbers] > 1
    return repeated


def _find_shared_regions(manifest: Manifest, uris: pa.Array) -> _Flags:
    """Return for each row whether another row asks for the same region of the same URI."""
    shared = _find_repeated(uris)
    candidates = np.flatnonzero(shared)
    keys = [
        np.asarray(array.take(pa.array(candidates)).dictionary_encode().indices)
        for array in (uris, manifest.mask)
    ]
    if manifest.centers_lps is not None:
        keys += list(np.nan_to_num(manifest.centers_lps[candidates], nan=np.inf).T)
    order = np.lexsort(keys)
    equals_next = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    shared[candidates[order]] = (
        np.append(equals_next, False) | np.insert(equals_next, 0, False) if len(candidates) else False
    )
    return shared


def _sort_by_id(ids: pa.Array, further_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the positions that sort all ids; positions count through `ids`, then through `further_ids`."""
    all_ids = pa.chunked_array([ids, pa.array(further_ids, TEXT)], TEXT)
    return np.asarray(pc.sort_indices(all_ids), np.int64)


def _map_texts(texts: pa.Array, convert: Callable[[str], str]) -> pa.Array:
    blocks = [
        pa.array([convert(text) for text in texts.slice(start, _BLOCK).to_pylist()], TEXT)
        for start in range(0, len(texts), _BLOCK)
    ]
    return pa.chunked_array(blocks, TEXT).combine_chunks()


def _list_rows(
    manifest: Manifest, rows: Sequence[int], options: ListingOptions
) -> Iterator[tuple[int, Scan]]:
    """Yield the number and the scan of some rows; several rows are looked up at the same time."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            scans = pool.map(lambda row: list_row(manifest.get_row(row), options), block)
            yield from zip(block, scans, strict=True)
