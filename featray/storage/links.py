"""Describe symbolic links without a target, and files that only stand for a file that must be fetched first.

DVC, DataLad, git-annex and Git LFS keep large files outside of the repository. Until a file is fetched, its
place is taken by a link without a target, or by a small text file.
"""

from __future__ import annotations

import errno
import os
import re

_ANNEX_LINK = re.compile(r"(^|/)annex/objects/")
_DVC_LINK = re.compile(r"(^|/)files/md5/[0-9a-f]{2}/")
_MAX_POINTER_BYTES = 32 * 1024
"""git-annex reads no more of a pointer file; those of Git LFS are smaller."""
_ADVICE = {
    "git-annex": "fetch the file with `git annex get` or `datalad get`",
    "DVC": "fetch the file with `dvc pull`",
    "Git LFS": "fetch the file with `git lfs pull`",
}


def describe_broken_link(path: str, error: OSError) -> str:
    """Return the problem of a local link, as the end of a sentence that begins with its name.

    Args:
        path: The link.
        error: The error that following it raised.
    """
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return f"is a link whose target cannot be read ({os.strerror(error.errno or 0)})"
    tool = _find_tool(os.readlink(path))
    advice = _ADVICE.get(tool, "mount or copy the target, or remove the link")
    return f"is a link whose target does not exist; {advice}"


def find_broken_link(path: str, error: BaseException) -> str:
    """Return the problem of a path that could not be read if it is a local link; empty otherwise.

    Args:
        path: Path in any file system.
        error: The error that reading the path raised.
    """
    if isinstance(error, OSError) and error.errno and not os.path.exists(path) and os.path.islink(path):
        return describe_broken_link(path, error)
    return ""


def is_link_to_stored_file(path: str) -> bool:
    """Return whether a local link leads to where git-annex or DVC keeps files, which are never folders."""
    return os.path.islink(path) and bool(_find_tool(os.readlink(path)))


def describe_pointer(data: bytes) -> str:
    """Return the problem of a pointer file of git-annex or Git LFS, and its remedy; otherwise empty."""
    if len(data) > _MAX_POINTER_BYTES:
        return ""
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        tool = "Git LFS"
    elif data.startswith(b"/annex/objects/"):
        tool = "git-annex"
    else:
        return ""
    return f"holds only a pointer of {tool}; {_ADVICE[tool]}"


def _find_tool(target: str) -> str:
    """Return the program that keeps a file at the target of a link; empty if it is not known."""
    if _ANNEX_LINK.search(target):
        return "git-annex"
    return "DVC" if _DVC_LINK.search(target) else ""
