"""The input cache: model inputs that were decoded before, so that another layer or model costs no decoding.

Decoding asks the cache before it reads a scan, and stores each volume that it has decoded. One entry is one
Parquet file, whose name is the hash of everything that decides the model input: the scan's location and
content, the keys of reading and preprocessing, and the version of featray. Runs, models and outputs can
therefore share a cache. Entries are written in one step and have checksums; a damaged entry is deleted and
the scan is decoded again. An unreachable cache costs time, but never a scan.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import deflate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featray.config import CacheConfig, Config
from featray.errors import ConfigError, StorageError
from featray.recipe import NUMERICS
from featray.schema import Decoded, Scan, ScanRecord
from featray.storage.store import Store
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{38}\.parquet(\.[0-9a-f]{32}\.tmp)?")
"""Name of an entry, or of one that a killed process left unfinished."""
KEPT_FRACTION = 0.95
"""Share of `max_gb` that remains filled after old entries were deleted."""
CHECK_FRACTION = 0.01
"""Share of `max_gb`; a process that has stored this much compares the size of the cache again."""

_LAYOUT = 2
"""Number of the layout of entries; those of another layout are not found."""
_FACTS, _DIGEST = b"featray.facts", b"featray.digest"
_RECORDED = (
    *("format", "shape", "spacing", "orientation", "slope", "intercept"),
    *("hu_min", "hu_p01", "hu_p50", "hu_p99", "hu_max"),
)
"""Fields of a record that reading fills in."""


@dataclass
class InputCache:
    """The cache of one config; can be pickled.

    Attributes:
        config: The section `cache` of the config.
        decoding: Everything except the scan that decides the model input, ready for JSON.
    """

    config: CacheConfig
    decoding: Mapping[str, Any] = field(repr=False)
    _stored_bytes: float = field(default=float("inf"), repr=False)
    _is_usable: bool = field(default=True, repr=False)

    @classmethod
    def from_config(cls, config: Config) -> InputCache | None:
        """Return the cache of a config; None if it names none, or if the scans are arrays.

        An array is not cached, because its file holds the model input already.
        """
        if config.cache.uri is None or config.source.format == "npy":
            return None
        decoding = {
            "featray": version("featray"),
            "layout": _LAYOUT,
            "numerics": NUMERICS,
            "source": config.source.model_dump(include={"rows", "volume"}),
            "policy": config.policy.model_dump(),
            "preprocess": config.preprocess.model_dump(mode="json"),
            "max_voxels": config.limits.max_voxels,
            "dicom_tags": sorted(config.privacy.dicom_tags),
        }
        # Workers of Ray have other working directories than the driver.
        uri = config.cache.uri if "://" in config.cache.uri else os.path.abspath(config.cache.uri)
        return cls(config.cache.model_copy(update={"uri": uri}), decoding)

    def load(self, scan: Scan) -> Decoded | None:
        """Return the model input of a scan if the cache has it, with a record as decoding makes it.

        The record has `bytes_read` 0, because the files of the scan are not read.
        """
        if not self._is_usable or not scan.content:
            return None
        name = self._make_name(scan)
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            return None
        except (StorageError, ConfigError, OSError) as error:
            self._give_up(error)
            return None
        try:
            facts, tensor = _unpack(data)
        except (ValueError, KeyError, OSError) as error:  # pyarrow's errors are ValueError or OSError
            kind = type(error).__name__
            log.warning("an entry of the input cache is damaged (%s); its scan is decoded again", kind)
            self._delete(name)
            return None
        self._mark_as_used(name)
        return _make_decoded(scan, facts, tensor)

    def save(self, scan: Scan, decoded: Decoded) -> None:
        """Store the model input of a scan that was decoded, unless it is larger than the cache may be."""
        if not self._is_usable or not scan.content or decoded.record.status != "ok":
            return
        data = _pack(scan, decoded)
        if len(data) > self.max_bytes:
            return
        try:
            # Not flushed: a loss of power may damage an entry, but then its checksum shows it.
            self.store.write(self._make_name(scan), data, flush=False)
            self._stored_bytes += len(data)
            if self._stored_bytes >= CHECK_FRACTION * self.max_bytes:
                self._stored_bytes = 0
                delete_oldest(self.store, self.max_bytes)
        except (StorageError, ConfigError, OSError) as error:
            self._give_up(error)

    @property
    def max_bytes(self) -> float:
        """Largest size of the cache in bytes."""
        return self.config.max_gb * 1e9

    @property
    def shown_uri(self) -> str:
        """Location of the cache without credentials."""
        return mask_url(self.config.uri or "")

    @functools.cached_property
    def store(self) -> Store:
        """Folder of the cache."""
        assert self.config.uri is not None
        return Store(self.config.uri, self.config.storage_options, config_key="cache.uri")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "store"}

    def _make_name(self, scan: Scan) -> str:
        """Return the name of a scan's entry, in one of 256 folders so that no folder becomes large."""
        # The content is known before a scan is located, so that a scan with an entry need not be located.
        facts = {**self.decoding, "uri": scan.uri, "content": scan.content}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape"))
        name = digest.hexdigest()
        return f"{name[:2]}/{name[2:40]}.parquet"

    def _mark_as_used(self, name: str) -> None:
        try:
            self.store.touch(name)
        except OSError:  # another process may have deleted the entry meanwhile
            log.debug("an entry of the input cache cannot be marked as used", exc_info=True)

    def _delete(self, name: str) -> None:
        try:
            self.store.delete([name])
        except (StorageError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Use the cache no more in this process, because each further scan would wait for it again."""
        self._is_usable = False
        log.warning("the input cache is not used any more: %s", error)


def is_entry(name: str) -> bool:
    """Return whether a file in the folder of the cache belongs to it; other files are never deleted."""
    return _ENTRY.fullmatch(name) is not None


def delete_oldest(store: Store, max_bytes: float) -> None:
    """Delete the entries that were not used for the longest time, if the cache is larger than `max_bytes`.

    In an object store the time of use is the time of writing, because objects have no other.
    """
    entries = [(name, size) for name, size in store.list_files_by_age() if is_entry(name)]
    total = sum(size for _, size in entries)
    if total <= max_bytes:
        return
    names = []
    for name, size in entries:
        if total <= KEPT_FRACTION * max_bytes:
            break
        names.append(name)
        total -= size
    store.delete(names)


def _pack(scan: Scan, decoded: Decoded) -> bytes:
    """Return an entry: the tensor as one column, the rest as JSON in the metadata of the file."""
    record = decoded.record
    facts = {
        "record": {name: getattr(record, name) for name in _RECORDED},
        "warnings": [code for code in record.warnings if code not in scan.warnings],
        "columns": {name: text for name, text in record.columns.items() if name not in scan.columns},
        "shape": decoded.tensor.shape,
        "origins": decoded.origins.tolist(),
        # libdeflate computes it twenty times as fast as hashlib a hash.
        "crc32": deflate.crc32(decoded.tensor.data),
    }
    text = json.dumps(facts).encode()
    voxels = pa.array(decoded.tensor.reshape(-1))
    # Without nulls, Parquet stores no level for each voxel, and writing takes half the time.
    field = pa.field("voxel", pa.float32(), nullable=False)
    schema = pa.schema([field], {_FACTS: text, _DIGEST: _hash(text).encode()})
    table = pa.Table.from_arrays([voxels], schema=schema)
    buffer = io.BytesIO()
    # Bytes of equal significance lie next to each other, which lets lz4 compress floats.
    pq.write_table(
        table,
        buffer,
        compression="lz4",
        use_dictionary=False,
        use_byte_stream_split=True,
        write_statistics=False,
    )
    return buffer.getvalue()


def _unpack(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Return the facts and the tensor of an entry.

    Raises:
        ValueError, KeyError, OSError: The entry is damaged.
    """
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    metadata = table.schema.metadata or {}
    text = metadata[_FACTS]
    if _hash(text).encode() != metadata[_DIGEST]:
        raise ValueError("the checksum of the facts differs")
    facts = json.loads(text)
    voxels = np.array(table["voxel"].combine_chunks(), np.float32)  # a copy that the caller may change
    tensor = voxels.reshape(facts["shape"])
    if deflate.crc32(tensor.data) != facts["crc32"]:
        raise ValueError("the checksum of the voxels differs")
    return facts, tensor


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _make_decoded(scan: Scan, facts: Mapping[str, Any], tensor: np.ndarray) -> Decoded:
    record = ScanRecord.from_scan(scan)
    for name, value in facts["record"].items():
        setattr(record, name, value)
    record.warn(tuple(facts["warnings"]))
    record.columns |= facts["columns"]
    record.patches = len(tensor)
    return Decoded(record, tensor, np.array(facts["origins"], np.int32).reshape(-1, 3))
