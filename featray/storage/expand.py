"""Expand `~`, `~user` and environment variables in paths and URLs that a user writes, as a shell does."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:(?P<escape>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)
_LOCAL_PREFIX = re.compile(r"^(?:(?:file|local)://)?(?=~)")


def expand_path(path: str) -> str:
    """Return a path or URL with its variables and its home folder expanded; `$$` becomes `$`.

    Raises:
        ValueError: A variable is not set, or the user does not exist. The text names the variable or user.
    """
    return expand_home(_VARIABLE.sub(_get_variable, path))


def expand_home(path: str) -> str:
    """Return a path with `~` or `~user` at its start replaced by the home folder.

    Raises:
        ValueError: The user does not exist.
    """
    prefix = _LOCAL_PREFIX.match(path)
    if prefix is None:
        return path
    local = path[prefix.end() :]
    expanded = os.path.expanduser(local)
    if expanded == local:
        user = local.partition("/")[0]
        raise ValueError(f"{user} names no user; for a file or folder of this name write ./{user}")
    return prefix.group() + expanded


def escape_path(path: str) -> str:
    """Return a path such that `expand_path` returns it unchanged."""
    return path.replace("$", "$$")


def _get_variable(match: re.Match[str]) -> str:
    if match["escape"]:
        return "$"
    name = match["name"] or match["braced"]
    if not name.isidentifier():
        raise ValueError(
            f"${{{name}}} is not the name of an environment variable; write $$ for a $ in a name"
        )
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"the environment variable {name} is not set; set it, or write $$ for a name that contains $"
        )
    return value
