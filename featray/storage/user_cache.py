"""Name the folder in which featray keeps files for all outputs of one user on one machine."""

from __future__ import annotations

import os
from pathlib import Path


def get_user_cache(name: str) -> Path:
    """Return a folder for files that can be made again; it need not exist.

    It lies in the folder FEATRAY_CACHE if this environment variable is set, otherwise in `featray` in
    XDG_CACHE_HOME or in ~/.cache.

    Args:
        name: Name of the folder for one kind of file.

    Raises:
        RuntimeError: None of the variables is set, and the user has no home folder.
    """
    if folder := os.environ.get("FEATRAY_CACHE"):
        return Path(folder) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featray" / name
