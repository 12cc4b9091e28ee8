"""Content by bytes: scans as found in, the same with the SHA-256 of their files as content out.

For stores whose versions change though the bytes do not, such as folders that are copied anew each night.
Reads every file whole, in threads. Members of an archive keep the checksums that the archive has of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec

from featray.collection.files import THREADS, File, Found
from featray.errors import Reason
from featray.storage import retry
from featray.storage.urls import fingerprint_files

_CHUNK_BYTES = 2**22


def by_bytes(fs: fsspec.AbstractFileSystem, found: Sequence[Found]) -> list[Found]:
    """Return the scans with their files' bytes as content; what cannot be read fails with `storage`."""
    files = list(dict.fromkeys(file for one in found if not one.scan.archive for file in one.members))
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(files, pool.map(lambda file: _digest(fs, file), files), strict=True))
    return [one if one.scan.archive else _with_digests(one, digests) for one in found]


def file_digest(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; never more than a chunk of it is in memory.

    Raises:
        OSError: It cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        with fs.open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return retry.run_with_retries(read, retry.SOURCE_DEADLINE_S)


def _digest(fs: fsspec.AbstractFileSystem, file: File) -> str | OSError:
    try:
        return file_digest(fs, file.path)
    except OSError as error:
        return error


def _with_digests(one: Found, digests: dict[File, str | OSError]) -> Found:
    texts = []
    for file in one.members:
        digest = digests[file]
        if isinstance(digest, OSError):
            message = (
                f"a file could not be read for its fingerprint ({retry.describe_error(digest)}); run again"
            )
            return replace(
                one, scan=replace(one.scan, reason=Reason.STORAGE, message=message, excluded=False)
            )
        texts.append((file.path, file.size, digest))
    content = fingerprint_files(texts)
    checksum = texts[0][2] if len(texts) == 1 else ""
    return replace(one, scan=replace(one.scan, content=content, checksum=checksum))
