"""One driver per output: a lease file with a heartbeat, so a second run is refused at once.

The lease keeps two honest drivers apart and lets its holder delete orphans. It is not what makes
commits safe: should it ever be broken, the transaction log still refuses the second commit.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import psutil

from featray.errors import OutputBusyError
from featray.storage import Store

NAME = "runs/lease.json"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lease without a heartbeat for this long belongs to a run that is dead."""


class Lease:
    """Hold the output for one run while the `with` block lasts.

    Raises:
        OutputBusyError: Another live run holds it; says which, where and since when.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._own = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        self._own["started"] = psutil.Process().create_time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="featray-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease, over a dead run's if need be."""
        if not self._store.create(NAME, self._content()):
            refuse_if_held(self._store)
            self._store.write(NAME, self._content())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        holder = _read(self._store)
        if holder is not None and holder["run_id"] == self._own["run_id"]:
            self._store.delete([NAME])

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self._store.write(NAME, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._own, "heartbeat": time.time()}).encode()


def refuse_if_held(store: Store) -> None:
    """Look whether another run holds the output, before anything slow is done for nothing.

    Raises:
        OutputBusyError: A live run does; says which, where and since when.
    """
    holder = _read(store)
    if holder is not None and _is_alive(holder):
        raise OutputBusyError(_busy(holder))


def _read(store: Store) -> dict[str, Any] | None:
    try:
        holder = json.loads(store.read(NAME))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return holder if isinstance(holder, dict) and "run_id" in holder else None


def _is_alive(holder: dict[str, Any]) -> bool:
    if time.time() - holder["heartbeat"] > STALE_S:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:  # a pid may have been given to another process since
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1)
    except psutil.NoSuchProcess:
        return False


def _busy(holder: dict[str, Any]) -> str:
    return (
        f"run {holder['run_id']} on host {holder['host']} (pid {holder['pid']}) holds this output "
        f"since {holder['since']}. Wait until it ends; a run that died gives the output back within "
        f"{STALE_S:.0f} s."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
