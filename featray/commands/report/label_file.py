"""Read a table of labels from a local path or a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from featray.commands.report.labeled.labels import LabelTable, parse_labels
from featray.errors import UsageError
from featray.storage import retry
from featray.storage.urls import mask_url, open_url


def read_labels(
    uri: str | os.PathLike[str], scan_ids: Sequence[str], options: Mapping[str, Any] | None = None
) -> LabelTable:
    """Return the labels of scans from a file: CSV or Parquet, see `parse_labels`.

    Args:
        uri: Local path or fsspec URL.
        scan_ids: Ids of the scans of the report.
        options: fsspec storage options of the URL.

    Raises:
        UsageError: The file does not exist or cannot be read, or as `parse_labels`.
        ConfigError: The protocol of the URL is unknown, or its package is not installed.
    """
    name = os.fspath(uri)
    fs, path = open_url(name, dict(options or {}))
    try:
        data = retry.run_with_retries(lambda: fs.cat_file(path), retry.START_DEADLINE_S)
    except Exception as error:  # each store's library has its own exception classes
        if not retry.is_store_error(error):
            raise
        raise UsageError(f"--labels: {mask_url(name)} {_explain(error)}") from None
    return parse_labels(data, scan_ids)


def _explain(error: Exception) -> str:
    """Return why a file cannot be read. The error's own text may hold credentials, so it is not used."""
    if retry.is_missing(error):
        return "does not exist"
    if isinstance(error, IsADirectoryError):
        return "is a folder; name a file"
    reason = retry.describe_error(error)
    if retry.is_denied(error):
        return f"cannot be read: no permission ({reason})"
    if retry.is_transient(error):
        return f"cannot be read: the store did not answer for {retry.START_DEADLINE_S:g} s ({reason})"
    return f"cannot be read ({reason})"
