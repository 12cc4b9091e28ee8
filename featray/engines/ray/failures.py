"""Errors of a Ray Data pass: which ones end the pass early, and which ones are featray's own."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

from featray.errors import FeatrayError

log = logging.getLogger(__name__)

_RAY_ADVICE = re.compile(r"\nFailed to .*", re.DOTALL)
"""Text that Ray Data adds to an error: advice for programmers on how to retry."""


@contextlib.contextmanager
def raise_original_errors() -> Iterator[None]:
    """Raise a FeatrayError of a stage as it is, without Ray's wrapping and advice."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, FeatrayError):
            raise
        cause.args = (_RAY_ADVICE.sub("", str(cause)), *cause.args[1:])
        raise cause from None


@contextlib.contextmanager
def end_pass_on_crash() -> Iterator[list[str]]:
    """End a pass early when workers die, and add the error's name to the list that this yields.

    Other errors, such as bugs, are raised.
    """
    from ray import exceptions
    from ray.data.exceptions import ExecutionTimeoutError

    crashes = (
        exceptions.ActorDiedError,
        exceptions.ActorUnavailableError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
        ExecutionTimeoutError,
    )
    crash_names: list[str] = []
    try:
        yield crash_names
    except crashes as error:
        crash_names.append(type(error).__name__)
        log.warning("a pass ended early: %s; its finished scans are kept", type(error).__name__)


@contextlib.contextmanager
def hide_deprecations() -> Iterator[None]:
    """Hide Ray's deprecation warning about `ray_remote_args`.

    Ray 2.60 offers no other way to limit retries yet.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        yield
