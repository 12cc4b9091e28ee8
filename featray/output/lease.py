"""One driver per output: a lease file with a heartbeat, so a second run is refused at once.

Every driver puts a file of its own, then looks who else has one: of two that start at one moment, at least
one sees the other and withdraws. A dead one's file is deleted by the next. No clock is trusted alone.
The lease keeps honest drivers apart and lets its holder delete orphans. It is not what makes commits
safe: should it ever be broken, the transaction log still refuses the second commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import psutil

from featray.errors import OutputBusyError, StorageError
from featray.storage.store import Store

log = logging.getLogger(__name__)

LEASE_FOLDER = "runs/lease"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lease without a heartbeat for this long belongs to a run that is dead."""
WATCH_S = 1.5 * HEARTBEAT_S
"""A lease that looks stale by this machine's clock is watched for this long: clocks may differ."""
_TRIES, _PAUSE_S = 5, 0.5
_held_here: set[str] = set()
"""Runs of this process: one that could not give its lease back holds nothing any more."""


class Lease:
    """Hold the output for one run while the `with` block lasts.

    Raises:
        OutputBusyError: Another live run holds it; says which, where and since when.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id, self._name = store, run_id, f"{LEASE_FOLDER}/{run_id}.json"
        self._own = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        self._own |= {"machine": _machine(), "started": psutil.Process().create_time()}
        self._progress: Callable[[], dict[str, Any]] = dict
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="featray-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease, over dead runs' if need be."""
        for _ in range(_TRIES):
            raise_if_locked(self._store)
            _held_here.add(self._run_id)
            self._store.write(self._name, self._content())
            others = self._others()
            if not others:
                self._thread.start()
                return self
            _held_here.discard(self._run_id)
            self._store.delete([self._name])
            time.sleep(random.uniform(0, _PAUSE_S))  # nobody guesses this for gain
        raise OutputBusyError(_busy(others[0]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        _held_here.discard(self._run_id)
        try:
            self._store.delete([self._name])
        except StorageError:
            if error is None:
                raise
            log.warning("the lease could not be given back; it is void in %.0f s", STALE_S)

    def set_progress_source(self, progress: Callable[[], dict[str, Any]]) -> None:
        """Write what `progress` returns (plain JSON data) to the lease file with each heartbeat."""
        self._progress = progress

    def check(self) -> None:
        """Make sure that this run still holds the output.

        Raises:
            OutputBusyError: Another run took it over, for this one was not heard of for too long.
        """
        others = self._others()
        if others or self._store.get_size(self._name) is None:
            who = f"; run {others[0]['run_id']} on host {others[0]['host']} did" if others else ""
            raise OutputBusyError(
                f"this run was not heard of for {STALE_S:.0f} s, and its output was taken over{who}. What it "
                "had committed is kept; run the same command again when the other run has ended."
            )

    def _others(self) -> list[dict[str, Any]]:
        """Return the other live holders; dead ones' files are deleted on the way."""
        found = []
        for name, holder in _holders(self._store):
            if holder["run_id"] == self._run_id:  # not the name: a heartbeat that is being put has another
                continue
            if _is_alive(self._store, name, holder):
                found.append(holder)
            else:
                self._store.delete([name])
        return found

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if self._store.get_size(self._name) is None:
                    return  # taken over; the next commit says so
                self._store.write(self._name, self._content())
            except Exception as error:  # each store has errors of its own; the next beat tries again
                log.warning("the lease could not be renewed (%s)", type(error).__name__)

    def _content(self) -> bytes:
        return json.dumps({**self._own, "heartbeat": time.time(), "progress": self._progress()}).encode()


def read_live_lease(store: Store) -> dict[str, Any] | None:
    """Return what the live run that holds the output says of itself; None if there is none.

    Keys: run_id, host, pid, since; heartbeat, seconds since the epoch; progress, as
    `Lease.set_progress_source` was told. By this machine's clock, where the run is on another: this is to
    know, not to decide by.
    """
    return next((holder for _, holder in _holders(store) if _looks_alive(holder)), None)


def raise_if_locked(store: Store) -> None:
    """Look whether another run holds the output, before anything slow is done for nothing.

    Raises:
        OutputBusyError: A live run does; says which, where and since when.
    """
    for name, holder in _holders(store):
        if _is_alive(store, name, holder):
            raise OutputBusyError(_busy(holder))


def _holders(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in store.list_files(LEASE_FOLDER):
        holder = _read(store, name)
        if holder is not None:
            yield name, holder


def _read(store: Store, name: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(store.read(name))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return holder if isinstance(holder, dict) and "heartbeat" in holder else None


def _is_alive(store: Store, name: str, holder: dict[str, Any]) -> bool:
    if _looks_alive(holder):
        return True
    if holder["machine"] == _machine():
        return False
    time.sleep(WATCH_S)
    now = _read(store, name)
    return now is not None and now["heartbeat"] != holder["heartbeat"]


def _looks_alive(holder: dict[str, Any]) -> bool:
    if holder["machine"] == _machine():
        return _runs_here(holder)
    return bool(time.time() - holder["heartbeat"] <= STALE_S)


def _runs_here(holder: dict[str, Any]) -> bool:
    if holder["pid"] == os.getpid():
        return holder["run_id"] in _held_here
    try:  # a pid may have been given to another process since
        process = psutil.Process(holder["pid"])
        is_same = abs(process.create_time() - holder["started"]) < 1
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Return what two processes share that can see each other's pids: containers often share a hostname."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _busy(holder: dict[str, Any]) -> str:
    return (
        f"run {holder['run_id']} on host {holder['host']} (pid {holder['pid']}) holds this output "
        f"since {holder['since']}. Wait until it ends; a run that died gives the output back within "
        f"{STALE_S + WATCH_S:.0f} s."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
