"""List the collection: the source configuration in, every scan in the collection out. Reads no voxels.

Folders, glob patterns and files are listed in the store (`featray.collection.discover`). For rows of a
manifest that give a version, the store is not asked (`featray.collection.manifest_rows`). Finally copies are
marked and ids are made unique.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from importlib.metadata import version

import fsspec

from featray.collection.digest_cache import CachePlace, DigestCache
from featray.collection.discover import has_wildcard, list_glob, list_path
from featray.collection.duplicates import make_ids_unique, mark_duplicates
from featray.collection.files import ListingOptions
from featray.collection.header_cache import HeaderCache
from featray.collection.listing import Listing
from featray.collection.manifest import MANIFEST_SUFFIXES, read_manifest
from featray.collection.manifest_rows import list_manifest
from featray.config import PolicyConfig, SourceConfig
from featray.ct.formats import npy
from featray.errors import ConfigError
from featray.storage import retry
from featray.storage.urls import hash_texts, mask_url, open_url

__all__ = ["CachePlace", "DigestCache", "HeaderCache", "Listing", "list_scans"]

_GROUPING_VERSION = 2
"""Version of how headers are read and grouped; increase it when the same files would give other series."""


def list_scans(
    source: SourceConfig,
    policy: PolicyConfig | None = None,
    header_cache: HeaderCache | None = None,
    *,
    digest_cache: DigestCache | None = None,
    show: bool = False,
) -> Listing:
    """Return every scan of the collection at `source.uri`: a folder, a glob pattern, a file or a manifest.

    Args:
        source: Configuration of the collection.
        policy: Decides which scans are excluded and which only get a warning; default: `PolicyConfig()`.
        header_cache: Cache of an earlier listing of the same collection. Headers of unchanged DICOM files
            are then not read again; the result is the same. Afterwards it holds the results of this listing.
        digest_cache: Cache of earlier listings. Unchanged local files are then not read again to find
            copies. Afterwards it holds the digests that this listing used.
        show: Whether to show progress on stderr while files are compared.

    Raises:
        ConfigError: `source.uri` does not exist, cannot be listed, or holds no scan.
    """
    digest_cache = digest_cache or DigestCache()
    options = ListingOptions(source, policy or PolicyConfig(), header_cache, digest_cache, show)
    if header_cache is not None:
        header_cache.start_listing(_make_stamp(options.policy))
    fs, root = open_url(source.uri, source.storage_options)
    try:
        listing = retry.run_with_retries(lambda: _list_source(fs, root, options), retry.START_DEADLINE_S)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"source.uri: {mask_url(source.uri)} does not exist") from None
    except PermissionError:
        raise ConfigError(f"source.uri: no permission to list {mask_url(source.uri)}") from None
    except RecursionError:
        raise ConfigError(
            f"source.uri: folders in {mask_url(source.uri)} are nested hundreds deep; move them up, or list "
            "the scans in a manifest"
        ) from None
    except Exception as error:  # each store has its own exceptions, and their texts may hold credentials
        problem = f"source.uri: {mask_url(source.uri)} cannot be listed ({type(error).__name__})"
        raise ConfigError(f"{problem}; check storage_options, credentials and endpoint") from None
    if not listing.scans:
        raise ConfigError(_describe_empty_listing(source, listing))
    return replace(listing, header_cache=header_cache, digest_cache=digest_cache)


def _make_stamp(policy: PolicyConfig) -> str:
    """Return a hash of everything except the files on which the grouping of DICOM headers depends."""
    return hash_texts([version("featray"), f"grouping {_GROUPING_VERSION}", f"not_ct {policy.not_ct}"])


def _list_source(fs: fsspec.AbstractFileSystem, root: str, options: ListingOptions) -> Listing:
    try:
        return _list_by_kind(fs, root, options)
    except FileNotFoundError:
        if not has_wildcard(root):
            # For a store that cannot be reached, `isfile` returns False. `info` raises the actual error. If
            # only objects below the path may be read, it is refused although the path does not exist.
            with contextlib.suppress(PermissionError):
                fs.info(root)
        raise


def _list_by_kind(fs: fsspec.AbstractFileSystem, root: str, options: ListingOptions) -> Listing:
    """Return the scans of a manifest, of a glob pattern, or of a file or folder."""
    if root.lower().endswith(MANIFEST_SUFFIXES) and fs.isfile(root):
        return Listing(list_manifest(read_manifest(fs.cat_file(root), options.source), options))
    if options.source.id_column is not None:
        raise ConfigError("source.id_column: only a manifest (.csv, .parquet) has columns")
    is_glob = has_wildcard(root) and not (fs.isfile(root) or fs.isdir(root))
    listing = list_glob(fs, root, options) if is_glob else list_path(fs, root, options)
    scans = make_ids_unique(mark_duplicates(listing.scans, options))
    return replace(listing, scans=tuple(scans))


def _describe_empty_listing(source: SourceConfig, listing: Listing) -> str:
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in listing.ignored.items()) or "no files"
    hint = "; for arrays set source.format: npy" if npy.SUFFIX in listing.ignored else ""
    return f"source.uri: no scan of format {source.format} in {mask_url(source.uri)} ({ignored}){hint}"
