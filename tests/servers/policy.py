"""A proxy in front of an S3 server that grants what the policies of an IAM identity allow, as AWS does.

It knows the requests that S3 clients of this project send. A request that it does not know is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from servers.faulty import FaultyProxy, _Answer

_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code>'
    b"<Message>Access Denied</Message></Error>"
)
_NOT_FOUND = 404


class PolicyProxy(FaultyProxy):
    """Forward the requests that policies allow, and answer 403 to all others.

    Args:
        server_port: Port of the S3 server on 127.0.0.1.
        statements: Statements of all policies: `Action` and `Resource`, each a text or a list of texts. There
            must be no conditions.

    Attributes:
        used: Actions that were allowed.
        refused: Actions that were refused, with the resource.
    """

    def __init__(self, server_port: int, statements: list[dict[str, Any]]) -> None:
        super().__init__(server_port)
        assert not any("Condition" in statement for statement in statements)
        self._statements = statements
        self.used: set[str] = set()
        self.refused: list[tuple[str, str]] = []

    def forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        """Answer as S3 would: an object that does not exist is refused if the bucket cannot be listed."""
        needed = list(_list_actions(method, path, dict(headers), body))
        refused = [(action, resource) for action, resource in needed if not self._allows(action, resource)]
        if refused or not needed:
            self.refused += refused or [(f"{method} {path}", "")]
            return _refuse(method)
        self.used |= {action for action, _ in needed}
        answer = super().forward(method, path, headers, body)
        bucket = f"arn:aws:s3:::{path.lstrip('/').partition('/')[0]}"
        if answer.status == _NOT_FOUND and not self._allows("s3:ListBucket", bucket):
            self.refused.append(("s3:ListBucket", bucket))
            return _refuse(method)
        return answer

    def _allows(self, action: str, resource: str) -> bool:
        return any(
            action in _make_list(statement["Action"])
            and any(fnmatchcase(resource, pattern) for pattern in _make_list(statement["Resource"]))
            for statement in self._statements
        )


def _refuse(method: str) -> _Answer:
    return _Answer(403, [("Content-Type", "application/xml")], b"" if method == "HEAD" else _DENIED)


def _list_actions(method: str, path: str, headers: dict[str, str], body: bytes) -> Iterator[tuple[str, str]]:
    """Yield each action of IAM that a request needs, with the resource; nothing for an unknown request."""
    url = urlsplit(path)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True).keys()
    arn = f"arn:aws:s3:::{bucket}"
    source = next((value for name, value in headers.items() if name.lower() == "x-amz-copy-source"), None)
    if source:
        yield "s3:GetObject", f"arn:aws:s3:::{unquote(source).lstrip('/')}"
    if not key:
        yield from _list_bucket_actions(method, arn, query, body)
    elif method in ("GET", "HEAD") and "uploadId" not in query:
        yield "s3:GetObject", f"{arn}/{key}"
    elif method == "PUT" or (method == "POST" and query & {"uploads", "uploadId"}):
        yield "s3:PutObject", f"{arn}/{key}"
    elif method == "DELETE":
        yield "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", f"{arn}/{key}"


def _list_bucket_actions(method: str, arn: str, query: Any, body: bytes) -> Iterator[tuple[str, str]]:
    if method == "HEAD" or (method == "GET" and not query & {"uploads", "location", "versions"}):
        yield "s3:ListBucket", arn
    elif method == "POST" and "delete" in query:
        for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
            yield "s3:DeleteObject", f"{arn}/{key}"


def _make_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
