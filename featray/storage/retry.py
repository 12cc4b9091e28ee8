"""Retry operations of a store while their errors are transient, and classify the errors of all stores.

In: an operation. Out: its result, or its last error. Each store's library has its own exception classes. They
are recognized by their names and by the HTTP status that they carry, so that no library has to be imported
here. Their texts may contain URLs with credentials, so this module never passes on the text of an error.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

OUTPUT_DEADLINE_S = 120.0
"""Seconds for which the output may be unreachable before a run fails; the run can be resumed."""
SOURCE_DEADLINE_S = 60.0
"""Seconds for which the files of a scan may be unreachable before the scan fails with reason `storage`."""
START_DEADLINE_S = 20.0
"""Seconds for which a store may be unreachable when a listing or the check of the output begins.

This deadline is shorter than the others, because a wrong address is then as likely as an outage.
"""
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
_WARN_AFTER_S = 5.0
"""Seconds of retrying after which retries are logged as warnings."""

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 529}
_TRANSIENT_CODES = {  # sent with a status for wrong requests, but the same request may succeed if repeated
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_CLASSES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "aiohttp.http_exceptions.BadHttpMessage",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "http.client.HTTPException",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
}
_PERMANENT_CLASSES = {
    "aiohttp.client_exceptions.ClientConnectorCertificateError",
    "botocore.exceptions.SSLError",
    "requests.exceptions.SSLError",
    "ssl.SSLCertVerificationError",
}
_CREDENTIAL_CLASSES = {
    "azure.core.exceptions.ClientAuthenticationError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.TokenRetrievalError",
    "google.auth.exceptions.DefaultCredentialsError",
    "google.auth.exceptions.RefreshError",
}
_LIBRARIES = (
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs"),
    *("google", "http", "requests", "s3fs", "urllib3"),
)
# deltalake raises one class for all errors. Only its text, which contains the server's answer, differs.
_TRANSIENT_TEXT = re.compile(
    r"error sending request|connection error|response body error|operation timed out"
    r"|\b(408|429|500|502|503|504) [A-Z]"
)
_STATUS_ATTRIBUTES = ("status_code", "status", "code")
_DENIED_TEXT = re.compile(r"^Forbidden\b|\b40[13] [A-Z]|lacked the necessary privileges")

T = TypeVar("T")


def run_with_retries(operation: Callable[[], T], deadline_s: float) -> T:
    """Run `operation`, retrying transient errors with exponential backoff and jitter.

    Args:
        operation: Makes requests to a store. It must be safe to repeat, because an attempt that raised an
            error may have succeeded in the store, with only the store's answer lost.
        deadline_s: Seconds after which no further attempt is started; a running attempt is waited for.

    Returns:
        The result of `operation`.

    Raises:
        Exception: The last error of `operation`. An error that is not transient is raised at once.
    """
    start, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return operation()
        except Exception as error:  # errors that are not transient are raised unchanged
            pause = random.uniform(wait / 2, wait)
            waited = time.monotonic() - start
            if not is_transient(error) or waited + pause > deadline_s:
                raise
            level = logging.WARNING if waited > _WARN_AFTER_S else logging.INFO
            remaining = deadline_s - waited
            log.log(
                level,
                "a store does not answer (%s); trying for %.0f s more",
                describe_error(error),
                remaining,
            )
        time.sleep(pause)
        wait = min(LONGEST_WAIT_S, 2 * wait)


def is_transient(error: BaseException) -> bool:
    """Return whether an error can go away by itself: no connection, a timeout, HTTP 5xx, throttling."""
    if not is_store_error(error) or is_missing(error) or isinstance(error, PermissionError | FileExistsError):
        return False
    for cause in _iter_causes(error):
        if _class_names(cause) & _PERMANENT_CLASSES:
            return False
        status = _get_status(cause)
        if status is not None:
            return status in _TRANSIENT_STATUS or _get_code(cause) in _TRANSIENT_CODES
        if isinstance(cause, ConnectionError | TimeoutError) or _class_names(cause) & _TRANSIENT_CLASSES:
            return True
    return isinstance(error, OSError) and bool(_TRANSIENT_TEXT.search(str(error)))


def is_denied(error: BaseException) -> bool:
    """Return whether a store denies access: no, wrong or expired credentials, or a missing permission."""
    if isinstance(error, PermissionError):
        return True
    for cause in _iter_causes(error):
        if _class_names(cause) & _CREDENTIAL_CLASSES or _get_status(cause) in (401, 403):
            return True
    return isinstance(error, OSError) and bool(_DENIED_TEXT.search(str(error)))


def is_missing(error: BaseException) -> bool:
    """Return whether an error says that a file, folder or bucket does not exist."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or _find_status(error) == 404


def is_name_taken(error: BaseException) -> bool:
    """Return whether an error says that a file to be created already exists."""
    return isinstance(error, FileExistsError) or _find_status(error) == 412


def is_store_error(error: BaseException) -> bool:
    """Return whether an error comes from a store or a file system, and not from a bug in the program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def describe_error(error: BaseException) -> str:
    """Return a short name of an error, such as `HTTP 503 SlowDown`.

    Of the error's text, at most an HTTP status is used, because the rest may contain credentials.
    """
    for cause in _iter_causes(error):
        status = _get_status(cause)
        if status is not None:
            code = _get_code(cause)
            return f"HTTP {status} {code}" if code and code != str(status) else f"HTTP {status}"
        if _class_names(cause) & _TRANSIENT_CLASSES:
            return type(cause).__name__
    if type(error) is OSError and error.errno:
        return os.strerror(error.errno)
    if type(error) is OSError:
        status_text = re.search(r"\b([45]\d\d) [A-Z]", str(error))
        if status_text:
            return f"HTTP {status_text[1]}"
        return "no connection" if is_transient(error) else "OSError"
    return type(error).__name__


def is_out_of_space(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, outermost first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _class_names(error: BaseException) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}


def _find_status(error: BaseException) -> int | None:
    return next((status for cause in _iter_causes(error) if (status := _get_status(cause)) is not None), None)


def _get_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries; each library stores it in another attribute."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # azure, aiohttp, gcsfs
        status = next(
            (getattr(error, name, None) for name in _STATUS_ATTRIBUTES if hasattr(error, name)), None
        )
    return int(status) if str(status).isdigit() and 100 <= int(status) < 600 else None


def _get_code(error: BaseException) -> str:
    """Return the store's own code for an error that has a status, such as `SlowDown`; empty if unknown."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    code = code or getattr(error, "error_code", None) or ""
    text = str(getattr(code, "value", code))
    return text if re.fullmatch(r"[A-Za-z0-9]{1,60}", text) else ""
