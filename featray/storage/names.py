"""Find names that an output cannot have, because not every library would take them for the same place.

The Delta log treats a path as a URL: it decodes `%20`, and in an object store cuts the path at `#` and `?`.
fsspec and pyarrow do not, so data and log would lie in different folders.
"""

from __future__ import annotations

import re

MAX_NAME_BYTES = 255
"""Bytes in the name of one file or folder, on all common file systems."""
_MAX_PATH_BYTES = 3500
"""Bytes in the path of an output; Linux allows 4096, and the names inside an output need some of them."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENCODED = re.compile(r"%[0-9a-fA-F]{2}")


def find_name_problem(uri: str, path: str, *, is_local: bool) -> str:
    """Return why an output cannot have a name, as the end of a sentence; empty if it can.

    Args:
        uri: URI of the output as configured.
        path: Path of the output in its file system, absolute if it is local.
        is_local: Whether the file system is that of this machine.
    """
    if "::" in uri:
        return "contains `::`, which chains file systems; an output needs one plain path or URL"
    checked = path if is_local else uri.partition("://")[2]
    if _CONTROL.search(checked):
        return "contains a tab, a line break or another control character; choose a name without it"
    marks = ["\\"] if is_local else ["\\", "#", "?"]
    encoded = _ENCODED.search(checked)
    found = [mark for mark in marks if mark in checked] + ([encoded.group()] if encoded else [])
    if found:
        return (
            f"contains {found[0]}, which the Delta log would read as another name; choose a name without it"
        )
    return _find_length_problem(checked) if is_local else ""


def _find_length_problem(path: str) -> str:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "contains bytes that are not UTF-8; choose another name"
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME_BYTES:
        return f"contains a name of {longest} bytes, but file systems allow {MAX_NAME_BYTES}; shorten it"
    if len(encoded) > _MAX_PATH_BYTES:
        return (
            f"has {len(encoded)} bytes, but only {_MAX_PATH_BYTES} leave room for the files in it; shorten it"
        )
    return ""
