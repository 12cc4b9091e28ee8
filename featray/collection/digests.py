"""Compute the content fingerprint of found scans from the bytes of their files, with SHA-256.

This serves stores that change a file's version although its bytes stay the same, such as folders that are
copied again each night. Every file is read completely, in several threads. Scans inside archives keep the
fingerprints of the checksums that the archive stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec

from featray.collection.files import MAX_THREADS, File, FoundScan
from featray.errors import Reason
from featray.storage import retry
from featray.storage.urls import fingerprint_files

_CHUNK_BYTES = 2**22


def hash_contents(fs: fsspec.AbstractFileSystem, found: Sequence[FoundScan]) -> list[FoundScan]:
    """Return the scans with fingerprints of their files' bytes as content.

    A scan with a file that cannot be read gets the reason `storage`. Scans inside archives are unchanged.
    """
    files = list(
        dict.fromkeys(
            file
            for found_scan in found
            if not found_scan.scan.archive
            for file in found_scan.members
            if not file.problem
        )
    )
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        digests = dict(zip(files, pool.map(lambda file: _try_hash(fs, file), files), strict=True))
    return [
        found_scan if found_scan.scan.archive else _set_content(found_scan, digests) for found_scan in found
    ]


def hash_file(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal; hold only one chunk of the file in memory.

    Raises:
        OSError: The file cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        with fs.open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return retry.run_with_retries(read, retry.SOURCE_DEADLINE_S)


def _try_hash(fs: fsspec.AbstractFileSystem, file: File) -> str | OSError:
    try:
        return hash_file(fs, file.path)
    except OSError as error:
        return error


def _set_content(found_scan: FoundScan, digests: dict[File, str | OSError]) -> FoundScan:
    files = []
    if any(file.problem for file in found_scan.members):  # the scan has failed with it already
        return found_scan
    for file in found_scan.members:
        digest = digests[file]
        if isinstance(digest, OSError):
            error = retry.describe_error(digest)
            message = f"a file could not be read for its fingerprint ({error}); run again"
            scan = replace(found_scan.scan, reason=Reason.STORAGE, message=message, excluded=False)
            return replace(found_scan, scan=scan)
        files.append((file.path, file.size, digest))
    content = fingerprint_files(files)
    checksum = files[0][2] if len(files) == 1 else ""
    return replace(found_scan, scan=replace(found_scan.scan, content=content, checksum=checksum))
