"""List the collection: config in, every scan that is there out, none of them read.

Folders, globs and files are listed in the store (`featray.collection.discover`); rows of a manifest with a
version are not (`featray.collection.manifest_rows`). Then copies are marked and ids made unique.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import fsspec

from featray.collection import manifest
from featray.collection.discover import has_wildcard, list_glob, list_place
from featray.collection.duplicates import settle_duplicates, unique_ids
from featray.collection.files import How
from featray.collection.header_cache import HeaderCache
from featray.collection.listing import Listing
from featray.collection.manifest import read_manifest
from featray.collection.manifest_rows import scans_of_manifest
from featray.config import PolicyConfig, SourceConfig
from featray.ct.formats import npy
from featray.errors import ConfigError
from featray.storage import retry
from featray.storage.urls import hash_texts, mask_url, open_url

__all__ = ["HeaderCache", "Listing", "list_scans"]

_GROUPING = 1
"""Version of how headers are read and grouped; raise it when the same files would give other series."""


def list_scans(
    source: SourceConfig, policy: PolicyConfig | None = None, header_cache: HeaderCache | None = None
) -> Listing:
    """Return every scan below `source.uri`, which is a folder, a glob, a file or a manifest.

    Args:
        source: The collection.
        policy: As configured.
        header_cache: Filled by an earlier listing of the same collection. Headers of unchanged DICOM files
            are then not read again; the result is the same. Afterwards it holds what this listing found.

    Raises:
        ConfigError: The place does not exist, cannot be listed, or holds no scan.
    """
    how = How(source, policy or PolicyConfig(), header_cache)
    if header_cache is not None:
        header_cache.begin(
            hash_texts([version("featray"), f"grouping {_GROUPING}", f"not_ct {how.policy.not_ct}"])
        )
    fs, root = open_url(source.uri, source.storage_options)
    try:
        listing = retry.run_with_retries(lambda: _list(fs, root, how), retry.START_DEADLINE_S)
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
        raise ConfigError(_nothing_there(source, listing))
    return replace(listing, header_cache=header_cache)


def _list(fs: fsspec.AbstractFileSystem, root: str, how: How) -> Listing:
    try:
        return _list_kind(fs, root, how)
    except FileNotFoundError:
        if not has_wildcard(root):
            fs.info(root)  # a store that is away looks empty to `isfile`; this says what is the matter
        raise


def _list_kind(fs: fsspec.AbstractFileSystem, root: str, how: How) -> Listing:
    if root.lower().endswith(manifest.SUFFIXES) and fs.isfile(root):
        return Listing(scans_of_manifest(read_manifest(fs.cat_file(root), how.source), how))
    if how.source.id_column is not None:
        raise ConfigError("source.id_column: only a manifest (.csv, .parquet) has columns")
    is_glob = has_wildcard(root) and not (fs.isfile(root) or fs.isdir(root))
    listing = list_glob(fs, root, how) if is_glob else list_place(fs, root, how)
    settled = settle_duplicates(listing.scans, how.policy)
    return replace(listing, scans=tuple(unique_ids(settled)))


def _nothing_there(source: SourceConfig, listing: Listing) -> str:
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in listing.ignored.items()) or "no files"
    hint = "; for arrays set source.format: npy" if npy.SUFFIX in listing.ignored else ""
    return f"source.uri: no scan of format {source.format} in {mask_url(source.uri)} ({ignored}){hint}"
