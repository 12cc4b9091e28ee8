"""`featray cache`: show the size of a config's input cache, or clear it.

A config in, counts out. The collection and the output are not opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from featray.config import Config
from featray.errors import ConfigError
from featray.stages.input_cache import InputCache, is_cache_file, is_entry


@dataclass(frozen=True)
class CacheResult:
    """The number and size of the entries of an input cache, and the number of deleted files.

    Attributes:
        uri: Location of the cache without credentials.
        entries: Number of model inputs in the cache, each of one scan.
        bytes: Their size.
        max_bytes: Largest size of the cache.
        deleted: Number of files that were deleted.
    """

    uri: str
    entries: int
    bytes: int
    max_bytes: int
    deleted: int

    def text(self) -> str:
        """Return the result as text for the terminal."""
        held = f"{self.uri}: {self.entries} model inputs, {_format_gb(self.bytes)} of at most "
        lines = [f"deleted {self.deleted} files"] if self.deleted else []
        return "\n".join([*lines, f"{held}{_format_gb(self.max_bytes)}"])


def show_cache(config: Config, *, clear: bool = False) -> CacheResult:
    """Return the size of a config's cache; if `clear` is true, delete all its entries first.

    Other files in the folder are neither counted nor deleted.

    Raises:
        ConfigError: The config has no cache.
        StorageError: The store of the cache does not answer.
    """
    cache = InputCache.from_config(config)
    if cache is None:
        raise ConfigError("cache.uri: this config has no input cache; set cache.uri to a folder or URL")
    deleted: list[str] = []
    if clear:
        deleted = [name for name in cache.store.list_files() if is_cache_file(name)]
        cache.store.delete(deleted)
    sizes = [size for name, size in cache.store.list_file_sizes().items() if is_entry(name)]
    return CacheResult(cache.shown_uri, len(sizes), sum(sizes), int(cache.max_bytes), len(deleted))


def _format_gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
