"""Trying again: which of a store's errors pass by themselves, how long to wait for that, what to call them.

In: an action that asks a store. Out: its answer, or its last error. Every store's library has errors of its
own; they are told by name and by the HTTP status they carry, so none of the libraries is imported here. Their
texts may hold URLs with credentials, so no text is ever passed on.
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
"""How long the output may be out of reach before a run gives up; it can be resumed."""
SOURCE_DEADLINE_S = 60.0
"""How long one scan's files may be out of reach before the scan fails as `storage`."""
START_DEADLINE_S = 20.0
"""The same before any work has begun, when a wrong address is as likely as an outage."""
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
_OUTAGE_S = 5.0
"""An error that lasts longer than this is worth telling while it lasts."""

_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 529}
_PASSING_CODES = {  # sent with a status that says the request was wrong, though it only arrived so
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_PASSING = {
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
_LASTING = {
    "aiohttp.client_exceptions.ClientConnectorCertificateError",
    "botocore.exceptions.SSLError",
    "requests.exceptions.SSLError",
    "ssl.SSLCertVerificationError",
}
_WITHOUT_CREDENTIALS = {
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
# deltalake has one class for all, and only its text, which holds the server's answer, tells them apart.
_PASSING_TEXT = re.compile(
    r"error sending request|connection error|response body error|operation timed out"
    r"|\b(408|429|500|502|503|504) [A-Z]"
)
_DENIED_TEXT = re.compile(r"^Forbidden\b|\b40[13] [A-Z]|lacked the necessary privileges")

T = TypeVar("T")


def run_with_retries(act: Callable[[], T], deadline_s: float) -> T:
    """Return what `act` returns, calling it again while it raises errors that pass by themselves.

    Waits longer from time to time, never the same for two callers. `act` must be safe to repeat: an error
    may mean that only the answer was lost.

    Args:
        act: Asks the store.
        deadline_s: Seconds after which no further attempt is made; one that is under way is waited for.

    Raises:
        Exception: The last error of `act`; at once if it is of a kind that stays.
    """
    start, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return act()
        except Exception as error:  # whatever does not pass goes on as it came
            pause = random.uniform(wait / 2, wait)
            waited = time.monotonic() - start
            if not is_transient(error) or waited + pause > deadline_s:
                raise
            level = logging.WARNING if waited > _OUTAGE_S else logging.INFO
            left = deadline_s - waited
            log.log(
                level, "a store does not answer (%s); trying for %.0f s more", describe_error(error), left
            )
        time.sleep(pause)
        wait = min(LONGEST_WAIT_S, 2 * wait)


def is_transient(error: BaseException) -> bool:
    """Return whether an error passes by itself: no connection, no answer in time, 5xx, throttling."""
    if not is_store_error(error) or is_missing(error) or isinstance(error, PermissionError | FileExistsError):
        return False
    for one in _chain(error):
        if _names(one) & _LASTING:
            return False
        status = _status(one)
        if status is not None:
            return status in _PASSING_STATUS or _code(one) in _PASSING_CODES
        if isinstance(one, ConnectionError | TimeoutError) or _names(one) & _PASSING:
            return True
    return isinstance(error, OSError) and bool(_PASSING_TEXT.search(str(error)))


def is_denied(error: BaseException) -> bool:
    """Return whether a store refuses: no, wrong or expired credentials, or a right that is lacking."""
    if isinstance(error, PermissionError):
        return True
    for one in _chain(error):
        if _names(one) & _WITHOUT_CREDENTIALS or _status(one) in (401, 403):
            return True
    return isinstance(error, OSError) and bool(_DENIED_TEXT.search(str(error)))


def is_missing(error: BaseException) -> bool:
    """Return whether there is no such file, folder or bucket."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or _first_status(error) == 404


def is_name_taken(error: BaseException) -> bool:
    """Return whether a file was to be created whose name is taken."""
    return isinstance(error, FileExistsError) or _first_status(error) == 412


def is_store_error(error: BaseException) -> bool:
    """Return whether an error comes from a store or a file system, not from a mistake in the program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def describe_error(error: BaseException) -> str:
    """Return a short name of an error that holds nothing of its text."""
    for one in _chain(error):
        status = _status(one)
        if status is not None:
            code = _code(one)
            return f"HTTP {status} {code}" if code and code != str(status) else f"HTTP {status}"
        if _names(one) & _PASSING:
            return type(one).__name__
    if type(error) is OSError and error.errno:
        return os.strerror(error.errno)
    if type(error) is OSError:
        found = re.search(r"\b([45]\d\d) [A-Z]", str(error))
        return f"HTTP {found[1]}" if found else "no connection" if is_transient(error) else "OSError"
    return type(error).__name__


def is_out_of_space(error: BaseException) -> bool:
    """Return whether a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was made from, outermost first."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _names(error: BaseException) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}


def _first_status(error: BaseException) -> int | None:
    return next((status for one in _chain(error) if (status := _status(one)) is not None), None)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, wherever its library puts it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # azure, aiohttp, gcsfs
        found = next((getattr(error, name, None) for name in _STATUS_NAMES if hasattr(error, name)), None)
    return int(found) if str(found).isdigit() and 100 <= int(found) < 600 else None


_STATUS_NAMES = ("status_code", "status", "code")


def _code(error: BaseException) -> str:
    """Return the store's own name of an error that has a status, such as `SlowDown`."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    found = found or getattr(error, "error_code", None) or ""
    text = str(getattr(found, "value", found))
    return text if re.fullmatch(r"[A-Za-z0-9]{1,60}", text) else ""
