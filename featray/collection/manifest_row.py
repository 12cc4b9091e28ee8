"""One row of a manifest in, its scan out. The store is asked about the scan only if the row gives no version.

A row with a version and a file name that tells the format gives a complete scan. Other names (a DICOM folder,
an archive) are left open: the format is "auto" and there are no files. `find_files` finds them later, in the
process that reads the scan.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from featray.collection.digests import file_digest
from featray.collection.discover import list_place
from featray.collection.files import VOLUMES, How, kind_by_name
from featray.collection.manifest import ManifestRow
from featray.config import PolicyConfig, SourceConfig
from featray.errors import ConfigError, Reason, ScanError
from featray.schema import Scan
from featray.storage import retry
from featray.storage.urls import file_version, hash_texts, mask_url, open_url


def scan_of_row(row: ManifestRow, how: How) -> Scan:
    """Return the scan that a row names; if it cannot be had, with the reason."""
    scan = Scan(
        scan_id=row.scan_id,
        uri=mask_url(row.uri),
        format="auto",
        files=(),
        content=version_content(row.version),
        columns=row.columns,
        mask=row.mask,
        center_lps=row.center_lps,
    )
    if row.problem:
        return replace(scan, reason=Reason.STORAGE, message=row.problem)
    try:
        fs, path = _opened(row.uri, how.source)
        if row.version:
            kind = kind_by_name(path, wanted_formats(how))
            content = with_region(scan.content, row.mask, row.center_lps)
            known = {"format": kind, "files": (path,)} if kind else {"place": path}
            return replace(scan, content=content, **known)
        found = _only_scan(fs, path, _for_row(how, row.uri))
        mask = _version_of(row.mask, how.source) if row.mask else ""
    except ScanError as error:
        return replace(scan, reason=error.reason, message=str(error))
    return replace(
        _in_place_of(scan, found), content=with_region(found.content, row.mask, row.center_lps, mask)
    )


def find_files(scan: Scan, source: SourceConfig, policy: PolicyConfig) -> Scan:
    """Return a scan that listing left open with its files; one that cannot be found has the reason why.

    Args:
        scan: As listed: with files, with a reason, or open.
        source: The collection.
        policy: As configured.
    """
    if not scan.place or scan.reason is not None:
        return scan
    # Its content is known: the bytes need not be read to tell it.
    how = How(source.model_copy(update={"fingerprint": "store"}), policy)
    try:
        fs, _ = _opened(scan.uri if "://" in scan.uri else source.uri, source)
        found = _only_scan(fs, scan.place, _for_row(how, scan.uri))
    except ScanError as error:
        return replace(scan, reason=error.reason, message=str(error))
    except Exception as error:  # every store has errors of its own; here they cost one scan, not the run
        if not retry.is_store_error(error):
            raise
        return replace(scan, reason=Reason.STORAGE, message=_unreadable("place", error))
    return replace(_in_place_of(scan, found), content=scan.content, listed="")


def version_content(version: str) -> str:
    """Return the content of a scan whose row gives a version."""
    return hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def with_region(content: str, mask: str, center_lps: tuple[float, ...] | None, mask_version: str = "") -> str:
    """Return the content of the part of a scan that a row asks for."""
    if not mask and not center_lps:
        return content
    return hash_texts([content, f"mask {mask} {mask_version}", f"center {center_lps}"])


def wanted_formats(how: How) -> set[str]:
    """Return the formats that rows may name: any kind of volume, or arrays."""
    return {"npy"} if how.source.format == "npy" else set(VOLUMES)


def _for_row(how: How, uri: str) -> How:
    wanted = "npy" if how.source.format == "npy" else "auto"
    return replace(how, source=how.source.model_copy(update={"uri": uri, "format": wanted}))


def _in_place_of(scan: Scan, found: Scan) -> Scan:
    """Return what was found under the id of the row, with what only the row knows."""
    return replace(
        found,
        scan_id=scan.scan_id,
        uri=scan.uri,
        columns=scan.columns,
        mask=scan.mask,
        center_lps=scan.center_lps,
    )


def _opened(uri: str, source: SourceConfig) -> tuple[Any, str]:
    """Return the file system of a uri and the path in it.

    Raises:
        ScanError: `storage`; there is no such file system, or it cannot be reached.
    """
    try:
        return open_url(uri, source.storage_options)
    except ConfigError as error:
        raise ScanError(Reason.STORAGE, str(error)) from None
    except OSError as error:
        raise ScanError(Reason.STORAGE, _unreadable("place", error)) from None


def _only_scan(fs: Any, path: str, how: How) -> Scan:
    """Return the one scan at a place.

    Raises:
        ScanError: `storage`; the place cannot be read. `not_a_volume`; it holds none, or several.
    """
    try:
        found = list_place(fs, path, how).scans
    except Exception as error:  # every store has errors of its own
        if not _concerns_this_place(error):
            raise
        raise ScanError(Reason.STORAGE, _unreadable("place", error)) from None
    if len(found) != 1:
        message = f"the manifest's uri must name one scan; it holds {len(found)}"
        raise ScanError(Reason.NOT_A_VOLUME, message)
    return found[0]


def _version_of(uri: str, source: SourceConfig) -> str:
    """Return the store's version of a mask, or that of its bytes.

    Raises:
        ScanError: `storage`; it cannot be had.
    """
    fs, path = _opened(uri, source)
    try:
        if source.fingerprint == "bytes":
            return file_digest(fs, path)
        info = retry.run_with_retries(lambda: fs.info(path), retry.SOURCE_DEADLINE_S)
    except Exception as error:  # every store has errors of its own
        if not _concerns_this_place(error):
            raise
        raise ScanError(Reason.STORAGE, _unreadable("mask", error)) from None
    return f"{info.get('size')} {file_version(info)}"


def _unreadable(what: str, error: Exception) -> str:
    return f"the manifest names a {what} that cannot be read ({retry.describe_error(error)})"


def _concerns_this_place(error: Exception) -> bool:
    """Tell an error of one place from what would befall all of them, such as missing credentials."""
    return isinstance(error, OSError) or retry.is_transient(error)
