"""Format commands that a user can copy to the shell in which this process was started."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

_PROGRAM = "featray"


def format_command(*arguments: str) -> str:
    """Return a shell command that runs featray with these arguments.

    The program is named as the user named it: `featray` if that is found on PATH, the path of the script
    (`.venv/bin/featray`) if it was started by its path, and `python -m featray` otherwise.
    """
    return shlex.join([*_find_program(), *arguments])


def find_python() -> str:
    """Return the word that starts this Python in the user's shell, e.g. `.venv/bin/python3`."""
    typed = sys.orig_argv[0]
    if shutil.which(typed) == sys.executable:
        return typed
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith(os.pardir) else relative


def _find_program() -> list[str]:
    script = sys.argv[0]
    if os.path.basename(script) != _PROGRAM or not os.path.isfile(script):
        return [find_python(), "-m", _PROGRAM]
    on_path = shutil.which(_PROGRAM)
    return [_PROGRAM if on_path and os.path.samefile(on_path, script) else script]
