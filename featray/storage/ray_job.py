"""The Ray job that this process may be: its submission id, the time that a stop may take, and lost folders.

Ray starts the command of a job with environment variables that describe the job, in a folder to which it has
unpacked the working directory (`ray job submit --working-dir`). Ray deletes that folder when no job needs it,
and makes another folder as soon as one file of the working directory has changed.
"""

from __future__ import annotations

import json
import math
import os
import re

from featray.errors import ConfigError

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable with the runtime environment and the metadata of the job, as JSON."""
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Variable, from the runtime environment of the job, with the seconds between SIGTERM and SIGKILL."""
_DEFAULT_STOP_WAIT_S = 3.0
_EXIT_S = 10.0
"""Seconds of a long time to stop that are left for the end of the process."""
_PACKAGE = re.compile(r"/_ray_pkg_[0-9a-f]{8,}(/|$)|/runtime_resources/\w+_files/")
"""Folders of Ray for unpacked working directories and modules of any origin."""
_LOCAL_PROTOCOLS = ("file", "local")


def find_submission_id() -> str | None:
    """Return the submission id of the Ray job whose command this process is; None outside of jobs."""
    try:
        config = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
        found = config.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None
    return str(found) if found else None


def find_stop_limit_s() -> float:
    """Return the seconds after a stop signal after which a job must give up the scans in progress.

    The process then has time to end by itself before Ray kills it. Infinite outside of jobs.
    """
    if find_submission_id() is None:
        return math.inf
    try:
        wait_s = float(os.environ.get(_STOP_WAIT, _DEFAULT_STOP_WAIT_S))
    except ValueError:
        wait_s = _DEFAULT_STOP_WAIT_S
    return max(wait_s / 3, wait_s - _EXIT_S)


def find_package_problem(uri: str) -> str:
    """Return why nothing may be written to a path or URL, as the end of a sentence; empty if it may.

    Args:
        uri: Path or URL. Relative paths are relative to the working directory, and links are followed.
    """
    protocol, separator, path = uri.partition("://")
    if separator and protocol not in _LOCAL_PROTOCOLS:
        return ""
    if not _PACKAGE.search(os.path.realpath(path if separator else uri)):
        return ""
    return (
        "is in the folder to which Ray has unpacked the working directory of this job. Ray deletes that "
        "folder; give a URL, or an absolute path that all nodes share"
    )


def refuse_package(uri: str | os.PathLike[str], key: str) -> None:
    """Raise if files written to a path or URL would be lost with the working directory of a Ray job.

    Args:
        uri: Path or URL.
        key: Config key or option that names it, for the message.

    Raises:
        ConfigError: The path is inside a folder that Ray deletes.
    """
    if problem := find_package_problem(os.fspath(uri)):
        raise ConfigError(f"{key}: {os.fspath(uri)} {problem}")
