"""Prepare the start and the end of Ray in this process, and explain why Ray does not start."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featray.errors import ConfigError
from featray.hardware import count_usable_cores

log = logging.getLogger(__name__)

MAX_TEMP_BYTES = 38
"""Length of the path of a temporary folder up to which Ray's sockets below it have valid paths."""
SHORT_TEMP = "/tmp"
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SIGACTION_BYTES = 512  # more than `struct sigaction` has on any system
_INSTALL_HANDLERS = "_ZN3ray6RayLog27InstallFailureSignalHandlerEPKcb"
"""The exported name of `ray::RayLog::InstallFailureSignalHandler(char const*, bool)`."""
_REMOVE_HANDLERS = "_ZN3ray6RayLog21UninstallSignalActionEv"
"""The exported name of `ray::RayLog::UninstallSignalAction()`."""
_MAX_CAUSE = 300


def make_local_options(min_cpus: int = 1) -> dict[str, Any]:
    """Return options for a Ray on this machine; it has the cores that this process may use.

    Ray itself counts all cores of the machine, also if this process may use only some of them. Ways out are
    chosen where Ray itself would fail: a temporary folder whose path is too long for sockets is replaced, and
    the token is kept in memory if the home folder cannot be written.

    Args:
        min_cpus: CPUs that Ray has at least, so that tasks of several kinds can share one core.
    """
    if not _can_write_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(min_cpus, count_usable_cores())}
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
    token = (
        "that it accepts the token of this machine (RAY_AUTH_TOKEN or ~/.ray/auth_token)"
        if _has_token()
        else "that it wants no token, because this machine has none (set RAY_AUTH_TOKEN, or "
        "RAY_AUTH_TOKEN_PATH to a file with it; clusters want one by default from Ray 2.61 on)"
    )
    return ConfigError(
        f"{source}: the Ray cluster at {address} cannot be joined ({_describe(error)}). Check that it is "
        f"up, that this is the address of its head node, {token}, and that it has the versions of this "
        f"machine, Ray {ray.__version__} and Python {python}"
    )


def shut_down() -> None:
    """Disconnect from Ray, and end a Ray that this process has started."""
    import ray

    with keep_sigterm_action(remove_native_handlers):
        ray.shutdown()


@contextlib.contextmanager
def keep_sigterm_action(change_handlers: Callable[[], None]) -> Iterator[None]:
    """Keep the reaction of this process to SIGTERM, which native code of Ray replaces.

    At its start, Ray installs handlers that write a stack trace, which itself can crash, and abort the
    process. At its end, it sets the reaction to the default, which ends the process without a message. Ray
    does either somewhere within `ray.init` or `ray.shutdown`, but not twice. So it is done here, and undone
    at once.

    Args:
        change_handlers: `install_native_handlers` for `ray.init`, `remove_native_handlers` for
            `ray.shutdown`.
    """
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(_SIGACTION_BYTES)
    libc.sigaction(signal.SIGTERM, None, before)  # also allowed in a thread, unlike `signal.signal`
    change_handlers()
    libc.sigaction(signal.SIGTERM, before, None)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, before, None)  # needed if this Ray exports no such function


def install_native_handlers() -> None:
    """Install Ray's native handlers of signals, as `ray.init` does the first time."""
    install = _find_native_function(_INSTALL_HANDLERS)
    if install is not None:
        install.argtypes, install.restype = (ctypes.c_char_p, ctypes.c_bool), None
        install(None, 0)  # no name of the program; previous handlers are not called


def remove_native_handlers() -> None:
    """Set the reaction to each signal of the native handlers to the default, as `ray.shutdown` does."""
    remove = _find_native_function(_REMOVE_HANDLERS)
    if remove is not None:
        remove.argtypes, remove.restype = (), None
        remove()


def _find_native_function(name: str) -> Any:
    """Return a function of Ray's native library; None if this version does not export it."""
    import ray._raylet

    return getattr(ctypes.CDLL(ray._raylet.__file__), name, None)


def _can_write_token() -> bool:
    """Return whether Ray finds a token, or can write one to the home folder as it does at its first start."""
    if _has_token() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return True
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return False


def _has_token() -> bool:
    """Return whether Ray finds a token in a variable or in the home folder."""
    if any(name in os.environ for name in _TOKEN_VARIABLES):
        return True
    try:
        return os.access(Path.home() / ".ray" / "auth_token", os.R_OK)
    except RuntimeError:  # there is no home folder
        return False


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MAX_CAUSE]}"
