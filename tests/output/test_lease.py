"""The lease: one driver per output, and a dead one's lease is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from featray.errors import OutputBusyError, StorageError
from featray.output import lease
from featray.output.lease import LEASE_FOLDER, STALE_S, Lease, raise_if_locked, read_live_lease
from featray.storage.store import Store

OTHER = f"{LEASE_FOLDER}/other.json"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 0.2)


def plant(store: Store, **changes: Any) -> None:
    holder = {
        "run_id": "other",
        "host": "elsewhere",
        "machine": "m",
        "pid": 1,
        "since": "2026",
        "started": 0.0,
    }
    store.write(OTHER, json.dumps({**holder, "heartbeat": time.time(), **changes}).encode())


def held(store: Store) -> list[str]:
    return store.list_files(LEASE_FOLDER)


def test_a_second_run_is_refused_with_who_holds_the_output(store: Store) -> None:
    with Lease(store, "first"), pytest.raises(OutputBusyError, match=rf"run first .* \(pid {os.getpid()}\)"):
        Lease(store, "second").__enter__()


def test_the_lease_is_given_back_also_after_an_error(store: Store) -> None:
    def fail() -> None:
        with Lease(store, "first"):
            assert held(store) == [f"{LEASE_FOLDER}/first.json"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert held(store) == []
    with Lease(store, "second"):
        pass


def test_a_lease_of_another_host_holds_while_its_heart_beats(store: Store) -> None:
    plant(store)
    with pytest.raises(OutputBusyError, match="host elsewhere"):
        Lease(store, "second").__enter__()
    assert held(store) == [OTHER]


def test_a_lease_without_heartbeat_is_taken_over(store: Store) -> None:
    plant(store, heartbeat=time.time() - STALE_S - 1)
    with Lease(store, "second"):
        assert held(store) == [f"{LEASE_FOLDER}/second.json"]


def test_a_lease_that_only_looks_stale_because_clocks_differ_holds(store: Store) -> None:
    plant(store, heartbeat=time.time() - 3600)
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.05):
            beats += 1
            plant(store, heartbeat=time.time() - 3600 + beats)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OutputBusyError):
            raise_if_locked(store)
    finally:
        stop.set()
        thread.join()


def test_the_same_hostname_and_pid_in_another_container_is_not_this_machine(store: Store) -> None:
    plant(store, host=socket.gethostname(), pid=2**22 + 1)
    with pytest.raises(OutputBusyError):
        raise_if_locked(store)


def test_a_killed_process_gives_its_lease_back_at_once(store: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from featray.output.lease import Lease\nfrom featray.storage.store import Store\n"
        "Lease(Store(sys.argv[1]), 'killed').__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=False)
    assert held(store) == [f"{LEASE_FOLDER}/killed.json"]
    with Lease(store, "second"):
        assert held(store) == [f"{LEASE_FOLDER}/second.json"]


def test_of_many_that_start_at_one_moment_at_most_one_holds_the_output(store: Store) -> None:
    holding, most, lock = 0, 0, threading.Lock()
    start = threading.Barrier(8)

    def race(number: int) -> None:
        nonlocal holding, most
        start.wait()
        try:
            with Lease(store, f"run{number}"):
                with lock:
                    holding += 1
                    most = max(most, holding)
                time.sleep(0.01)
                with lock:
                    holding -= 1
        except OutputBusyError:
            pass

    for _ in range(10):
        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
    assert held(store) == []


def test_a_run_whose_lease_was_taken_over_is_told_and_does_not_put_it_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    with Lease(store, "first") as first:
        first.check()
        store.delete([f"{LEASE_FOLDER}/first.json"])
        plant(store)
        time.sleep(0.2)
        with pytest.raises(OutputBusyError, match="taken over; run other on host elsewhere"):
            first.check()
    assert held(store) == [OTHER]


def test_the_heart_goes_on_beating_after_the_store_was_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    with Lease(store, "first") as first:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(OSError("away")))
            time.sleep(0.1)
        before = store.read(f"{LEASE_FOLDER}/first.json")
        time.sleep(0.2)
        assert store.read(f"{LEASE_FOLDER}/first.json") != before
        first.check()


def test_a_holder_does_not_take_its_own_heartbeat_for_another_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.0)  # a file that is being put is seen under another name
    with Lease(store, "first") as own:
        for _ in range(300):
            own.check()


def test_a_run_of_this_process_that_could_not_give_its_lease_back_holds_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        first = Lease(store, "first").__enter__()
        patch.setattr(Store, "delete", away)
        with pytest.raises(StorageError):
            first.__exit__(None, None, None)
    assert held(store) == [f"{LEASE_FOLDER}/first.json"]
    with Lease(store, "second"):
        assert held(store) == [f"{LEASE_FOLDER}/second.json"]


def test_how_far_its_holder_is_can_be_read_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    assert read_live_lease(store) is None
    with Lease(store, "first") as held_lease:
        found = read_live_lease(store)
        assert found is not None
        assert (found["run_id"], found["pid"], found["progress"]) == ("first", os.getpid(), {})
        held_lease.set_progress_source(lambda: {"done": 3})
        until = time.monotonic() + 10
        while found["progress"] != {"done": 3} and time.monotonic() < until:
            found = read_live_lease(store) or found
    assert found["progress"] == {"done": 3}
    assert read_live_lease(store) is None


def test_a_holder_elsewhere_is_running_as_long_as_its_heart_beats(store: Store) -> None:
    plant(store)
    assert read_live_lease(store) is not None
    plant(store, heartbeat=time.time() - 2 * STALE_S)
    assert read_live_lease(store) is None
