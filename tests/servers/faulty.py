"""An HTTP proxy that makes a healthy server behave as networks and busy stores do, on command.

Requests go on as the client sent them, with its Host header, so signatures stay valid.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_UNAVAILABLE = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ServiceUnavailable</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_HOP = {"connection", "expect", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Faults:
    """What goes wrong: each but `delay_s` is a share of the requests, from 0 to 1.

    Attributes:
        unavailable: Answered 503 without asking the server.
        reset: The connection is reset before the server is asked.
        forget: The server does what was asked, then the connection is reset: nobody knows what happened.
        truncate: Half of the answer's body comes, then the connection ends.
        delay_s: Every answer waits that long, in seconds.
        only: Pattern that "METHOD /path" must match for anything to happen to a request.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    forget: float = 0.0
    truncate: float = 0.0
    delay_s: float = 0.0
    only: str = ""


class FaultyProxy:
    """Forwards from `port` to a server's port on 127.0.0.1 while the `with` block lasts.

    Attributes:
        faults: What goes wrong now; set it at any time.
        met: How many requests met which fault, and how many passed (`ok`).
        requests: "METHOD /path" of all requests, in order.
    """

    def __init__(self, server_port: int, faults: Faults | None = None, seed: int = 1) -> None:
        self.faults = faults or Faults()
        self.met: Counter[str] = Counter()
        self.requests: list[str] = []
        self._server_port = server_port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.proxy = self
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        """The port to connect to instead of the server's."""
        return int(self._listener.server_address[1])

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def fate(self, request: str) -> str:
        """Draw what happens to a request: the name of a fault, or `ok`."""
        faults = self.faults
        with self._lock:
            self.requests.append(request)
            drawn = self._random.random()
            fate = "ok"
            if re.search(faults.only, request):
                fate = _drawn(faults, drawn)
            self.met[fate] += 1
        return fate

    def ask_server(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        """Forward a request; its answer whole, headers without those that concern the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
            return _Answer(response.status, kept, response.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients and servers that vanish are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy = self.server.proxy
        fate = proxy.fate(f"{self.command} {self.path}")
        if re.search(proxy.faults.only, f"{self.command} {self.path}"):
            time.sleep(proxy.faults.delay_s)
        if fate == "unavailable":
            self._send(_Answer(503, [("Content-Type", "application/xml")], _UNAVAILABLE))
        elif fate == "reset":
            self._reset()
        else:
            self._forward(body, fate)

    def _forward(self, body: bytes, fate: str) -> None:
        try:
            answer = self.server.proxy.ask_server(self.command, self.path, self.headers.items(), body)
        except (OSError, http.client.HTTPException):  # the server is down: so are we
            self._reset()
            return
        if fate == "forget":
            self._reset()
        else:
            self._send(answer, truncate=fate == "truncate")

    def _send(self, answer: _Answer, *, truncate: bool = False) -> None:
        self.send_response_only(answer.status)
        known = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            self.send_header(name, value)
        if "content-length" not in known and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if truncate else answer.body)
        if truncate:
            self.wfile.flush()
            self.close_connection = True

    def _reset(self) -> None:
        # Lingering for no time makes close() send a reset instead of a polite end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _drawn(faults: Faults, drawn: float) -> str:
    for name in ("unavailable", "reset", "forget", "truncate"):
        share = getattr(faults, name)
        if drawn < share:
            return name
        drawn -= share
    return "ok"
