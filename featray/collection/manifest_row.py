"""Return the scan that one row of a manifest names; ask the store about it only if the row gives no version.

A row with a version and a file name whose suffix names the format gives a complete scan. A row with a version
and another name (a DICOM folder, an archive) gives a scan that is left open: it has the format "auto" and no
files. `find_files` finds its files later, in the process that reads the scan.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import posixpath
from dataclasses import replace
from typing import Any

from featray.collection.detached import HEADER_SUFFIXES, list_data_files
from featray.collection.digests import hash_file
from featray.collection.discover import list_path
from featray.collection.files import VOLUME_FORMATS, ListingOptions, detect_format
from featray.collection.manifest import ManifestRow
from featray.config import PolicyConfig, SourceConfig
from featray.errors import ConfigError, Reason, ScanError
from featray.schema import Scan
from featray.storage import retry
from featray.storage.links import find_broken_link
from featray.storage.urls import file_version, hash_texts, make_absolute, mask_url, open_url

log = logging.getLogger(__name__)


def list_row(row: ManifestRow, options: ListingOptions) -> Scan:
    """Return the scan that a row names, or, if it cannot be used, a scan with the reason."""
    scan = Scan(
        scan_id=row.scan_id,
        uri=mask_url(row.uri),
        format="auto",
        files=(),
        content=hash_version(row.version),
        columns=row.columns,
        mask=make_absolute(row.mask),
        center_lps=row.center_lps,
    )
    if row.problem:
        return replace(scan, reason=Reason.STORAGE, message=row.problem)
    try:
        return _list_version(scan, row, options) if row.version else _look_up(scan, row, options)
    except ScanError as error:
        return replace(scan, reason=error.reason, message=str(error))
    except Exception as error:  # an unexpected error costs one row, not the listing
        if retry.is_store_error(error):
            raise
        log.debug("unexpected error while looking up a row", exc_info=True)
        message = f"looking up the manifest's uri raised {type(error).__name__}; correct the uri"
        return replace(scan, reason=Reason.STORAGE, message=message)


def find_files(scan: Scan, source: SourceConfig, policy: PolicyConfig) -> Scan:
    """Complete a scan that listing left open: add its files, or the reason why they cannot be found.

    Args:
        scan: A listed scan. A scan that has files or a reason is returned as it is.
        source: Configuration of the collection.
        policy: Decides, as in listing, which scans are excluded.
    """
    if not scan.open_path or scan.reason is not None:
        return scan
    # The content of the scan is known already, so the bytes need not be read to compute it.
    options = ListingOptions(source.model_copy(update={"fingerprint": "store"}), policy)
    try:
        fs, _ = _open_uri(scan.uri if "://" in scan.uri else source.uri, source)
        found = _find_only_scan(fs, scan.open_path, _set_uri(options, scan.uri))
    except ScanError as error:
        return replace(scan, reason=error.reason, message=str(error))
    except Exception as error:  # each store has its own exceptions; they fail this scan, not the run
        if not retry.is_store_error(error):
            raise
        return replace(
            scan, reason=Reason.STORAGE, message=_describe_unreadable("path", error, scan.open_path)
        )
    return replace(_merge(scan, found), content=scan.content, files_version="")


def hash_version(version: str) -> str:
    """Return the content of a scan for the version that its row gives."""
    return hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def add_region(content: str, mask: str, center_lps: tuple[float, ...] | None, mask_version: str = "") -> str:
    """Return the content hash for the region of a scan that a row asks for, given that of the whole scan."""
    if not mask and not center_lps:
        return content
    return hash_texts([content, f"mask {mask} {mask_version}", f"center {center_lps}"])


def get_row_formats(options: ListingOptions) -> set[str]:
    """Return the formats of files that rows may name: any volume format, or arrays."""
    return {"npy"} if options.source.format == "npy" else set(VOLUME_FORMATS)


def _list_version(scan: Scan, row: ManifestRow, options: ListingOptions) -> Scan:
    """Return the scan of a row with a version, without a request to the store."""
    _, path = _open_uri(row.uri, options.source)
    scan_format = detect_format(path, get_row_formats(options))
    content = add_region(scan.content, row.mask, row.center_lps)
    if scan_format:
        return replace(scan, content=content, format=scan_format, files=(path,))
    return replace(scan, content=content, open_path=path)


def _look_up(scan: Scan, row: ManifestRow, options: ListingOptions) -> Scan:
    """Return the scan of a row without a version, with the files and the content that the store reports."""
    fs, path = _open_uri(row.uri, options.source)
    found = _find_only_scan(fs, path, _set_uri(options, row.uri))
    mask_version = _get_mask_version(row.mask, options.source) if row.mask else ""
    content = add_region(found.content, row.mask, row.center_lps, mask_version)
    return replace(_merge(scan, found), content=content)


def _set_uri(options: ListingOptions, uri: str) -> ListingOptions:
    """Return the options for listing the URI of one row."""
    row_format = "npy" if options.source.format == "npy" else "auto"
    return replace(options, source=options.source.model_copy(update={"uri": uri, "format": row_format}))


def _merge(scan: Scan, found: Scan) -> Scan:
    """Return the found scan with the values that only the row knows, which `scan` holds."""
    return replace(
        found,
        scan_id=scan.scan_id,
        uri=scan.uri,
        columns=scan.columns,
        mask=scan.mask,
        center_lps=scan.center_lps,
    )


def _open_uri(uri: str, source: SourceConfig) -> tuple[Any, str]:
    """Return the file system of a URI and the path in it.

    Raises:
        ScanError: `storage`: the file system does not exist or cannot be reached.
    """
    try:
        return open_url(uri, source.storage_options)
    except ConfigError as error:
        raise ScanError(Reason.STORAGE, str(error)) from None
    except OSError as error:
        raise ScanError(Reason.STORAGE, _describe_unreadable("path", error, "")) from None


def _find_only_scan(fs: Any, path: str, options: ListingOptions) -> Scan:
    """Return the only scan in a file or folder.

    Raises:
        ScanError: `storage`: the path cannot be read. `not_a_volume`: it holds no scan, or several.
    """
    try:
        scans = list_path(fs, path, options).scans
    except Exception as error:  # each store has its own exceptions
        if not _is_limited_to_path(error):
            raise
        raise ScanError(Reason.STORAGE, _describe_unreadable("path", error, path)) from None
    if len(scans) > 1:  # a file of another kind that cannot be read, such as a broken link, does not count
        scans = tuple(scan for scan in scans if scan.reason is not Reason.STORAGE) or scans
    if len(scans) != 1:
        message = f"the manifest's uri must name one scan; it holds {len(scans)}"
        raise ScanError(Reason.NOT_A_VOLUME, message)
    return scans[0]


def _get_mask_version(uri: str, source: SourceConfig) -> str:
    """Return the version of a mask that the store reports, or the hash of the mask's bytes.

    Raises:
        ScanError: `storage`: the mask cannot be read.
    """
    fs, path = _open_uri(uri, source)
    try:
        paths = [path, *_list_mask_data_files(fs, path)]
        if source.fingerprint == "bytes":
            return "\n".join(hash_file(fs, path) for path in paths)
        infos = [
            retry.run_with_retries(functools.partial(fs.info, path), retry.SOURCE_DEADLINE_S)
            for path in paths
        ]
    except Exception as error:  # each store has its own exceptions
        if not _is_limited_to_path(error):
            raise
        raise ScanError(Reason.STORAGE, _describe_unreadable("mask", error, path)) from None
    return "\n".join(f"{info.get('size')} {file_version(info)}" for info in infos)


def _list_mask_data_files(fs: Any, path: str) -> list[str]:
    """Return the paths of the data files of a mask that is a detached header; none for other masks."""
    kind = next((kind for kind, end in HEADER_SUFFIXES.items() if path.lower().endswith(end)), "")
    if not kind:
        return []
    header = retry.run_with_retries(lambda: fs.cat_file(path), retry.SOURCE_DEADLINE_S)
    return [posixpath.join(posixpath.dirname(path), name) for name in list_data_files(kind, header)]


def _describe_unreadable(item: str, error: Exception, path: str) -> str:
    if problem := find_broken_link(path, error):
        return f"the manifest names a {item} that {problem}"
    return f"the manifest names a {item} that cannot be read ({retry.describe_error(error)})"


def _is_limited_to_path(error: Exception) -> bool:
    """Return whether an error concerns one path; missing credentials, for example, concern all paths."""
    return isinstance(error, OSError) or retry.is_transient(error)
