"""The lease of an output: a file with a heartbeat that lets only one driver at a time use the output.

Each driver writes a lease file of its own, then looks for lease files of other drivers. If two drivers start
at the same time, at least one of them sees the other's file and withdraws. The lease file of a dead driver is
deleted by the next driver. Whether a driver is alive is never decided by comparing two clocks alone: a
heartbeat that is too old, or in the future, is watched for a change, over this machine's own clock.

A driver that was suspended for long finds out that it lost the lease: its file is gone. If a heartbeat that
it was writing makes the file again, the new holder deletes it once more.

While a driver holds the lease, it may delete orphan files. Commits do not depend on the lease: if two drivers
hold it by mistake, the Delta log still rejects the second commit. A driver that takes the lease over from
another machine first appends a commit without changes (`Committer.exclude_earlier_driver`), because the
earlier driver may be suspended in the middle of a commit.
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

from featray.errors import DeletedOutputError, HeldOutputError, OutputBusyError, StorageError
from featray.storage.ray_job import find_submission_id
from featray.storage.store import Store

log = logging.getLogger(__name__)

_RUNS = "runs"
LEASE_FOLDER = f"{_RUNS}/lease"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Seconds without a heartbeat after which a lease counts as stale."""
WATCH_S = 1.5 * HEARTBEAT_S
"""Seconds for which a stale lease is watched for a heartbeat, because the clocks of hosts may differ."""
_WATCH_STEP_S = 1.0
_MAX_ATTEMPTS, _MAX_PAUSE_S = 5, 0.5
_run_ids_of_this_process: set[str] = set()
"""Runs of this process that hold a lease. A run that could not delete its lease file is not among them."""


class Lease:
    """Hold the output's lease for one run while the `with` block lasts.

    Args:
        store: The output folder.
        run_id: The run.

    Attributes:
        was_taken_over: Whether a run of another machine held the lease and wrote no heartbeat any more. It
            may only be suspended.

    Raises:
        HeldOutputError: Another active run holds the lease; the message names run, host and start.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id, self._name = store, run_id, f"{LEASE_FOLDER}/{run_id}.json"
        self._own = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": _format_now(),
        }
        self._own |= {"machine": _identify_machine(), "started": psutil.Process().create_time()}
        self._own |= {"submission_id": find_submission_id()}
        self._progress: Callable[[], dict[str, Any]] = dict
        self._dead: set[str] = set()
        """Runs whose lease files this run has deleted."""
        self.was_taken_over = False
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_heartbeats, name="featray-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease; delete the lease files of dead runs."""
        for _ in range(_MAX_ATTEMPTS):
            raise_if_locked(self._store)
            _run_ids_of_this_process.add(self._run_id)
            self._store.write(self._name, self._make_content())
            others = self._find_other_holders()
            if not others:
                self._thread.start()
                return self
            _run_ids_of_this_process.discard(self._run_id)
            self._store.delete([self._name])
            time.sleep(random.uniform(0, _MAX_PAUSE_S))  # not security-sensitive
        raise _make_held_error(others[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease."""
        self._stop.set()
        self._thread.join()
        _run_ids_of_this_process.discard(self._run_id)
        try:
            self._store.delete([self._name])
        except StorageError:
            if error is None:
                raise
            log.warning("the lease could not be released; it expires in %.0f s", STALE_S)

    def set_progress_source(self, progress: Callable[[], dict[str, Any]]) -> None:
        """Write the result of `progress` (plain JSON data) to the lease file with each heartbeat."""
        self._progress = progress

    def check(self) -> None:
        """Check that this run still holds the lease.

        Raises:
            OutputBusyError: Another run has taken the lease over, because this run wrote no heartbeat for too
                long.
            DeletedOutputError: The folder of all runs is empty or does not exist.
        """
        others = self._find_other_holders()
        self._lost |= self._store.get_size(self._name) is None
        if others or self._lost:
            if not others and not self._store.list_files(_RUNS):
                raise DeletedOutputError(
                    f"the folder {_RUNS} of the output was deleted during the run. The commits of this run "
                    "are in the tables, if these still exist. Run the same command again to continue."
                )
            new_holder = f" by run {others[0]['run_id']} on host {others[0]['host']}" if others else ""
            raise OutputBusyError(
                f"the lease of this run expired, because it wrote no heartbeat for {STALE_S:.0f} s, and the "
                f"output was taken over{new_holder}. What this run had committed is kept. Run the same "
                "command again when the other run has ended."
            )

    def _find_other_holders(self) -> list[dict[str, Any]]:
        """Return the lease contents of other active runs, and delete the lease files of dead runs."""
        others = []
        for name, holder in _iter_holders(self._store):
            # Compare the run, not the file name: a heartbeat that is being written has a temporary name.
            if holder["run_id"] == self._run_id:
                continue
            if holder["run_id"] not in self._dead and _is_alive(self._store, name, holder):
                others.append(holder)
            else:
                self._dead.add(holder["run_id"])
                self.was_taken_over |= holder["machine"] != _identify_machine()
                self._store.delete([name])
        return others

    def _write_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if self._store.get_size(self._name) is None:
                    self._lost = True  # another run has taken the lease over; the next `check` reports it
                    return
                self._store.write(self._name, self._make_content())
            except Exception as error:  # each store has its own exceptions; the next heartbeat tries again
                log.warning("the lease could not be renewed (%s)", type(error).__name__)

    def _make_content(self) -> bytes:
        return json.dumps({**self._own, "heartbeat": time.time(), "progress": self._progress()}).encode()


def read_live_lease(store: Store) -> dict[str, Any] | None:
    """Return the content of the lease that an active run holds; None if no active run holds it.

    If the run is on another machine, its heartbeat is compared with this machine's clock, which may be wrong.
    So use the result for display only, not for decisions.

    Returns:
        Keys run_id, host, pid, since; submission_id of the Ray job that the run is, None outside of jobs;
        heartbeat, in seconds since the epoch; progress, as the source given to `Lease.set_progress_source`
        returns it.
    """
    return next((holder for _, holder in _iter_holders(store) if _looks_alive(holder)), None)


def raise_if_locked(store: Store) -> None:
    """Raise an error if an active run holds the output's lease. Call it before slow work is started.

    Raises:
        HeldOutputError: An active run holds the lease; the message names run, host and start.
    """
    for name, holder in _iter_holders(store):
        if _is_alive(store, name, holder):
            raise _make_held_error(holder)


def _iter_holders(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the content of each lease file; incomplete files are left out."""
    for name in store.list_files(LEASE_FOLDER):
        holder = _read_holder(store, name)
        if holder is not None:
            yield name, holder


def _read_holder(store: Store, name: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(store.read(name))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return holder if isinstance(holder, dict) and "heartbeat" in holder else None


def _is_alive(store: Store, name: str, holder: dict[str, Any]) -> bool:
    """Return whether the run of a lease is active.

    The lease of another machine without a recent heartbeat, by this machine's clock, is watched for WATCH_S.
    """
    if holder["machine"] == _identify_machine():
        return _is_running_here(holder)
    if 0 <= time.time() - holder["heartbeat"] <= STALE_S:
        return True
    return _has_new_heartbeat(store, name, holder)


def _has_new_heartbeat(store: Store, name: str, holder: dict[str, Any]) -> bool:
    """Return whether the heartbeat of a lease changes within WATCH_S."""
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(_WATCH_STEP_S, WATCH_S))
        later = _read_holder(store, name)
        if later is None:
            return False
        if later["heartbeat"] != holder["heartbeat"]:
            return True
    return False


def _looks_alive(holder: dict[str, Any]) -> bool:
    """Return whether the process of a lease exists; on another machine, whether its heartbeat is recent."""
    if holder["machine"] == _identify_machine():
        return _is_running_here(holder)
    return bool(abs(time.time() - holder["heartbeat"]) <= STALE_S)


def _is_running_here(holder: dict[str, Any]) -> bool:
    """Return whether a lease's process runs on this machine; its start time shows if the pid was reused."""
    if holder["pid"] == os.getpid():
        return holder["run_id"] in _run_ids_of_this_process
    try:
        process = psutil.Process(holder["pid"])
        is_same = abs(process.create_time() - holder["started"]) < 1
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _identify_machine() -> str:
    """Return a text that is equal for two processes that see each other's process ids.

    The hostname alone is not enough, because containers often share it.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _make_held_error(holder: dict[str, Any]) -> HeldOutputError:
    who, since = f"run {describe_process(holder)}", f"holds this output since {holder['since']}"
    if _is_suspended_here(holder):
        advice = "Its process is suspended: continue it, or end it."
        return HeldOutputError(f"{who}, which is suspended, {since}", advice)
    return HeldOutputError(
        f"{who} {since}",
        f"Wait until it ends, or use --wait SECONDS. If it has died, the output becomes free within "
        f"{STALE_S + WATCH_S:.0f} s.",
    )


def describe_process(holder: dict[str, Any]) -> str:
    """Return the id of the run that holds a lease, and where it runs: host, process, and Ray job."""
    job = holder.get("submission_id")  # a lease of featray 0.1.0 does not have it
    in_job = f", Ray job {job}" if job else ""
    return f"{holder['run_id']} on host {holder['host']} (pid {holder['pid']}{in_job})"


def _is_suspended_here(holder: dict[str, Any]) -> bool:
    """Return whether a lease's process runs on this machine and was suspended, as by Ctrl-Z."""
    if holder["machine"] != _identify_machine():
        return False
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(holder["pid"]).status() == psutil.STATUS_STOPPED)
    return False


def _format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
