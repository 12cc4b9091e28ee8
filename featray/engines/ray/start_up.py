"""What a Ray that starts needs from this machine, and what to do if it does not start."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featray.errors import ConfigError
from featray.hardware import count_usable_cores

log = logging.getLogger(__name__)

MAX_TEMP_BYTES = 38
"""Length of the path of a temporary folder up to which Ray's sockets below it have valid paths."""
SHORT_TEMP = "/tmp"
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SIGACTION_BYTES = 512  # more than `struct sigaction` has on any system
_MAX_CAUSE = 300


def make_local_options() -> dict[str, Any]:
    """Return options for a Ray on this machine; on one core, an actor and a decode task share it.

    Ways out are chosen where Ray itself would fail: a temporary folder whose path is too long for sockets is
    replaced, and the token is kept in memory if the home folder cannot be written.
    """
    if not _can_write_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    options: dict[str, Any] = {"include_dashboard": False}
    if count_usable_cores() < 2:
        options["num_cpus"] = 2
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT_TEMP
    if len(os.fsencode(chosen)) > MAX_TEMP_BYTES and os.access(SHORT_TEMP, os.W_OK):
        log.info("the path in TMPDIR is too long for the sockets of Ray; Ray uses %s", SHORT_TEMP)
        options["_temp_dir"] = f"{SHORT_TEMP}/ray"
    return options


def make_start_error(error: Exception) -> ConfigError:
    """Return the error to report when a Ray on this machine does not start."""
    return ConfigError(
        f"run.engine: Ray cannot start on this machine ({_describe(error)}). Ray needs a writable home "
        "folder or RAY_AUTH_TOKEN, a temporary folder (RAY_TMPDIR) with free space and a path of at most "
        f"{MAX_TEMP_BYTES} bytes, shared memory (/dev/shm), and time to start. Or set run.engine: inline, "
        "which needs no Ray"
    )


def make_join_error(source: str, address: str, error: Exception) -> ConfigError:
    """Return the error to report when a cluster cannot be joined.

    Args:
        source: The key or the variable that gives the address.
        address: The address.
        error: The error of Ray.
    """
    import ray

    python = ".".join(map(str, sys.version_info[:3]))
    return ConfigError(
        f"{source}: the Ray cluster at {address} cannot be joined ({_describe(error)}). Check that it is "
        "up, that this is the address of its head node, that it accepts the token of this machine "
        "(RAY_AUTH_TOKEN or ~/.ray/auth_token), and that it has the versions of this machine, Ray "
        f"{ray.__version__} and Python {python}"
    )


@contextlib.contextmanager
def keep_sigterm_action() -> Iterator[None]:
    """Undo at the end that native code of Ray replaces the reaction of this process to SIGTERM.

    The replacement would write a stack trace and abort the process three seconds later.
    """
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(_SIGACTION_BYTES)
    libc.sigaction(signal.SIGTERM, None, before)  # also allowed in a thread, unlike `signal.signal`
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, before, None)


def _can_write_token() -> bool:
    """Return whether Ray finds a token, or can write one to the home folder as it does at its first start."""
    if any(name in os.environ for name in _TOKEN_VARIABLES):
        return True
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return os.access(folder / "auth_token", os.R_OK)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return False


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MAX_CAUSE]}"
