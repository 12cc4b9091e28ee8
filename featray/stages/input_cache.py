"""The input cache: model inputs that were decoded before, so that another layer or model costs no decoding.

Decoding asks the cache before it reads a scan, and stores each volume that it has decoded. One entry is one
file (`input_entry.py`), whose name is the hash of everything that decides the model input: the scan's
location and content, the keys of reading and preprocessing, and the version of featray. Runs, models and
outputs can therefore share a cache. Entries are written in one step and have checksums; a damaged entry is
deleted and the scan is decoded again. An unreachable cache costs time, but never a scan.

If the cache is full, the entries go first that were not used for the longest time. Entries that the present
run has used or written stay, and the run stores no more of them. Otherwise a run over more scans than the
cache holds would delete each entry before the next run comes to it, and no run would find any.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from featray.config import CacheConfig, Config
from featray.errors import ConfigError, StorageError
from featray.recipe import NUMERICS
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.input_entry import pack, unpack
from featray.storage.store import FileInfo, Store
from featray.storage.urls import identify_store, make_absolute, mask_url

log = logging.getLogger(__name__)

_FILE = re.compile(r"([0-9a-f]{2}/[0-9a-f]{38})(\.input|\.used|\.input\.[0-9a-f]{32}\.tmp)")
"""Name of a file of the cache: an entry, the mark of its last use, or an entry that a killed process left
unfinished."""
KEPT_FRACTION = 0.95
"""Share of `max_gb` that remains filled after old entries were deleted."""
LOCAL_CLOCK_S, STORE_CLOCK_S = 0.02, 1.0
"""Largest time by which the time of a file is earlier than its writing: the kernel's clock ticks every few
milliseconds, and object stores give whole seconds."""
CHECK_FRACTION = 0.01
"""Share of `max_gb`; a process that has stored this much compares the size of the cache again."""

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
        is_writable: Whether entries are also written, marked as used and deleted; false once that failed.
        started: Time at which the run began, in seconds since the epoch. Younger entries are not deleted to
            make room for others.
    """

    config: CacheConfig
    decoding: Mapping[str, Any] = field(repr=False)
    is_writable: bool = True
    started: float = field(default_factory=time.time)
    _stored_bytes: float = field(default=float("inf"), repr=False)
    _is_readable: bool = field(default=True, repr=False)
    _is_full: bool = field(default=False, repr=False)

    @classmethod
    def from_config(cls, config: Config, *, is_read_only: bool = False) -> InputCache | None:
        """Return the cache of a config; None if it names none, or if the scans are arrays.

        An array is not cached, because its file holds the model input already.
        """
        if config.cache.uri is None or config.source.format == "npy":
            return None
        decoding = {
            "featray": version("featray"),
            "numerics": NUMERICS,
            "source": config.source.model_dump(include={"rows", "volume"}),
            # Two stores may have scans of the same URI and, in a manifest, of the same version.
            "store": identify_store(config.source.uri, config.source.storage_options),
            "policy": config.policy.model_dump(),
            "preprocess": config.preprocess.model_dump(mode="json"),
            "max_voxels": config.limits.max_voxels,
            "dicom_tags": sorted(config.privacy.dicom_tags),
        }
        # Workers of Ray have other working directories than the driver.
        uri = make_absolute(config.cache.uri)
        return cls(config.cache.model_copy(update={"uri": uri}), decoding, is_writable=not is_read_only)

    def load(self, scan: Scan) -> Decoded | None:
        """Return the model input of a scan if the cache has it, with a record as decoding makes it.

        The record has `bytes_read` 0, because the files of the scan are not read.
        """
        if not self._is_readable or not scan.content:
            return None
        name = self._make_name(scan)
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            return None
        except (StorageError, ConfigError, OSError) as error:
            # Each further scan would wait for the store again.
            self._is_readable = self.is_writable = False
            log.warning("the input cache is not used any more: %s", error)
            return None
        try:
            facts, tensor = unpack(data)
        except ValueError as error:
            log.warning("an entry of the input cache is damaged (%s); its scan is decoded again", error)
            self._delete(name)
            return None
        except MemoryError:  # decoding, which needs more, says so in its message
            return None
        self._mark_as_used(name)
        return _make_decoded(scan, facts, tensor)

    def save(self, scan: Scan, decoded: Decoded) -> None:
        """Store the model input of a scan that was decoded, if the cache has or can make room for it."""
        if self._is_full or not self.is_writable:
            return
        if not scan.content or decoded.record.status != "ok":
            return
        try:
            data = pack(_describe(scan, decoded), decoded.tensor)
            if len(data) > self.max_bytes:
                return
            # Not flushed: a loss of power may damage an entry, but then its checksum shows it.
            self.store.write(self._make_name(scan), data, flush=False)
            self._stored_bytes += len(data)
            limit = CHECK_FRACTION * self.max_bytes
            if self._stored_bytes >= limit:
                # Processes that began together must not all check at the same time, long after each other.
                self._stored_bytes = limit * random.random()
                clock_s = LOCAL_CLOCK_S if self.store.is_local else STORE_CLOCK_S
                self._is_full = not make_room(self.store, self.max_bytes, self.started - clock_s)
        except (MemoryError, RuntimeError):  # Blosc raises RuntimeError without memory
            log.warning("a model input is not stored in the input cache, because memory is too short")
        except (StorageError, ConfigError, OSError) as error:
            self._stop_writing(error)

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
        # The version in a manifest says nothing about the place. Local paths are absolute, except in `uri`.
        uri = scan.uri if "://" in scan.uri else ""
        places = (uri, scan.archive, scan.open_path, scan.mask, *scan.files)
        facts = {**self.decoding, "places": places, "content": scan.content}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape"))
        name = digest.hexdigest()
        return f"{name[:2]}/{name[2:40]}.input"

    def _mark_as_used(self, name: str) -> None:
        """Note that an entry was used now: in the time of a local file, in other stores in an empty file."""
        if not self.is_writable:
            return
        try:
            if self.store.is_local:
                self.store.touch(name)
            else:
                self.store.write(f"{name.removesuffix('.input')}.used", b"")
        except OSError:  # another process may have deleted the entry meanwhile
            log.debug("an entry of the input cache cannot be marked as used", exc_info=True)
        except StorageError as error:
            self._stop_writing(error)

    def _delete(self, name: str) -> None:
        if not self.is_writable:
            return
        try:
            self.store.delete([name])
        except (StorageError, OSError) as error:
            self._stop_writing(error)

    def _stop_writing(self, error: Exception) -> None:
        """Only read entries from now on in this process; each further write would fail or wait, too."""
        self.is_writable = False
        log.warning("the input cache stores no more inputs: %s", error)


def is_entry(name: str) -> bool:
    """Return whether a file in the folder of the cache holds a model input."""
    return is_cache_file(name) and name.endswith(".input")


def is_cache_file(name: str) -> bool:
    """Return whether a file in the folder of the cache belongs to it; other files are never deleted."""
    return _FILE.fullmatch(name) is not None


def make_room(store: Store, max_bytes: float, started: float) -> bool:
    """Delete entries if the cache is larger than `max_bytes`; return whether it has room for more.

    First go the entries that were last used before the present run, in the order of their last use, until
    `KEPT_FRACTION` of `max_bytes` is left. If the entries of the present run alone are too large, the last
    ones of these go.

    Args:
        store: Folder of the cache.
        max_bytes: Largest size of the cache.
        started: Time at which the present run began, in seconds since the epoch.
    """
    entries = _list_by_last_use(store)
    total = sum(entry.size for entry in entries)
    if total <= max_bytes:
        return True
    older = [entry for entry in entries if entry.last_use < started]
    deleted = _take_until(older, total - KEPT_FRACTION * max_bytes)
    total -= sum(entry.size for entry in deleted)
    younger = entries[len(older) :]
    surplus = _take_until(younger[::-1], total - max_bytes)
    names = [name for entry in deleted for name in entry.names]
    # Another process may be writing a young unfinished entry.
    names += [name for entry in surplus for name in entry.names if not name.endswith(".tmp")]
    store.delete(names)
    return not surplus


class _Entry(NamedTuple):
    """The files of one entry, their total size in bytes, and the time of its last use."""

    names: tuple[str, ...]
    size: int
    last_use: float


def _list_by_last_use(store: Store) -> list[_Entry]:
    """Return all entries; the one that was not used for the longest time comes first."""
    files: dict[str, list[FileInfo]] = defaultdict(list)
    for file in store.list_file_infos():
        if match := _FILE.fullmatch(file.name):
            files[match.group(1)].append(file)
    entries = [
        _Entry(
            tuple(file.name for file in of_entry),
            sum(file.size for file in of_entry),
            max(file.written for file in of_entry),
        )
        for of_entry in files.values()
    ]
    return sorted(entries, key=lambda entry: entry.last_use)


def _take_until(entries: Sequence[_Entry], size: float) -> list[_Entry]:
    """Return the first entries that together have at least this size in bytes; all if they have less."""
    taken: list[_Entry] = []
    for entry in entries:
        if size <= 0:
            break
        taken.append(entry)
        size -= entry.size
    return taken


def _describe(scan: Scan, decoded: Decoded) -> dict[str, Any]:
    """Return what an entry holds besides the tensor, ready for JSON."""
    record = decoded.record
    return {
        "record": {name: getattr(record, name) for name in _RECORDED},
        "warnings": [code for code in record.warnings if code not in scan.warnings],
        "columns": {name: text for name, text in record.columns.items() if name not in scan.columns},
        "origins": decoded.origins.tolist(),
    }


def _make_decoded(scan: Scan, facts: Mapping[str, Any], tensor: np.ndarray) -> Decoded:
    record = ScanRecord.from_scan(scan)
    for name, value in facts["record"].items():
        setattr(record, name, value)
    record.warn(tuple(facts["warnings"]))
    record.columns |= facts["columns"]
    record.patches = len(tensor)
    record.is_from_cache = True
    return Decoded(record, tensor, np.array(facts["origins"], np.int32).reshape(-1, 3))
