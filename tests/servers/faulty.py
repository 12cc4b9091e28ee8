"""An HTTP proxy that injects the faults of networks and busy stores between a client and a server.

It forwards requests as the client sent them, including the Host header, so that signatures stay valid.
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
_HOP_BY_HOP_HEADERS = {"connection", "expect", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Faults:
    """Faults to inject. All except `delay_s` and `only` are shares of the requests, from 0 to 1.

    Attributes:
        unavailable: The proxy answers 503 without asking the server.
        reset: The proxy resets the connection without asking the server.
        lose_answer: The server executes the request, then the proxy resets the connection. So the client does
            not know whether the request was executed.
        truncate: The proxy sends half of the answer's body, then closes the connection.
        delay_s: Seconds by which every answer is delayed.
        only: Regular expression; faults are injected only into requests whose "METHOD /path" it matches.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    lose_answer: float = 0.0
    truncate: float = 0.0
    delay_s: float = 0.0
    only: str = ""


class FaultyProxy:
    """Forward from `port` to a server's port on 127.0.0.1 while the `with` block lasts.

    Attributes:
        faults: Faults to inject; may be changed at any time.
        counts: Fault → number of requests that had it; `ok` → number of requests without a fault.
        requests: "METHOD /path" of all requests, in order.
    """

    def __init__(self, server_port: int, faults: Faults | None = None, seed: int = 1) -> None:
        self.faults = faults or Faults()
        self.counts: Counter[str] = Counter()
        self.requests: list[str] = []
        self._server_port = server_port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.proxy = self
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        """Port to connect to instead of the server's port."""
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

    def choose_fault(self, request: str) -> str:
        """Draw what happens to a request; return the name of a fault, or `ok`."""
        faults = self.faults
        with self._lock:
            self.requests.append(request)
            number = self._random.random()
            fault = "ok"
            if re.search(faults.only, request):
                fault = _choose_fault(faults, number)
            self.counts[fault] += 1
        return fault

    def forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        """Forward a request to the server; return its answer without the hop-by-hop headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in _HOP_BY_HOP_HEADERS:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            answer_headers = [
                (name, value)
                for name, value in response.getheaders()
                if name.lower() not in _HOP_BY_HOP_HEADERS
            ]
            return _Answer(response.status, answer_headers, response.read())
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
        """Print nothing: this proxy expects clients and servers to close connections."""


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
        fault = proxy.choose_fault(f"{self.command} {self.path}")
        if re.search(proxy.faults.only, f"{self.command} {self.path}"):
            time.sleep(proxy.faults.delay_s)
        if fault == "unavailable":
            self._send(_Answer(503, [("Content-Type", "application/xml")], _UNAVAILABLE))
        elif fault == "reset":
            self._reset()
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: str) -> None:
        try:
            answer = self.server.proxy.forward(self.command, self.path, self.headers.items(), body)
        except (OSError, http.client.HTTPException):  # the server is down, so the client must see no answer
            self._reset()
            return
        if fault == "lose_answer":
            self._reset()
        else:
            self._send(answer, truncate=fault == "truncate")

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
        # With a linger time of 0, close() sends a TCP reset instead of closing the connection normally.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _choose_fault(faults: Faults, number: float) -> str:
    """Return the fault to which a random number from 0 to 1 belongs, according to the shares; else `ok`."""
    for name in ("unavailable", "reset", "lose_answer", "truncate"):
        share = getattr(faults, name)
        if number < share:
            return name
        number -= share
    return "ok"
