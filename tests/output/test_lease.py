"""The lease: only one driver at a time holds an output, and the lease of a dead driver is taken over."""

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
def shorten_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 0.2)


def write_lease(store: Store, **changes: Any) -> None:
    holder = {
        "run_id": "other",
        "host": "elsewhere",
        "machine": "m",
        "pid": 1,
        "since": "2026",
        "started": 0.0,
    }
    store.write(OTHER, json.dumps({**holder, "heartbeat": time.time(), **changes}).encode())


def list_leases(store: Store) -> list[str]:
    return store.list_files(LEASE_FOLDER)


def test_a_second_run_is_refused_and_the_message_names_the_holder(store: Store) -> None:
    with Lease(store, "first"), pytest.raises(OutputBusyError, match=rf"run first .* \(pid {os.getpid()}\)"):
        Lease(store, "second").__enter__()


def test_the_lease_is_released_after_an_error_too(store: Store) -> None:
    def fail() -> None:
        with Lease(store, "first"):
            assert list_leases(store) == [f"{LEASE_FOLDER}/first.json"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list_leases(store) == []
    with Lease(store, "second"):
        pass


def test_a_lease_of_another_host_is_valid_while_its_heartbeat_is_recent(store: Store) -> None:
    write_lease(store)
    with pytest.raises(OutputBusyError, match="host elsewhere"):
        Lease(store, "second").__enter__()
    assert list_leases(store) == [OTHER]


def test_a_lease_without_a_recent_heartbeat_is_taken_over(store: Store) -> None:
    write_lease(store, heartbeat=time.time() - STALE_S - 1)
    with Lease(store, "second"):
        assert list_leases(store) == [f"{LEASE_FOLDER}/second.json"]


def test_a_lease_that_looks_stale_only_because_clocks_differ_is_valid(store: Store) -> None:
    write_lease(store, heartbeat=time.time() - 3600)
    stop = threading.Event()

    def write_heartbeats() -> None:
        beats = 0
        while not stop.wait(0.05):
            beats += 1
            write_lease(store, heartbeat=time.time() - 3600 + beats)

    thread = threading.Thread(target=write_heartbeats)
    thread.start()
    try:
        with pytest.raises(OutputBusyError):
            raise_if_locked(store)
    finally:
        stop.set()
        thread.join()


def test_a_process_in_another_container_with_the_same_hostname_is_not_on_this_machine(store: Store) -> None:
    write_lease(store, host=socket.gethostname(), pid=2**22 + 1)
    with pytest.raises(OutputBusyError):
        raise_if_locked(store)


def test_the_lease_of_a_killed_process_can_be_taken_at_once(store: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from featray.output.lease import Lease\nfrom featray.storage.store import Store\n"
        "Lease(Store(sys.argv[1]), 'killed').__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=False)
    assert list_leases(store) == [f"{LEASE_FOLDER}/killed.json"]
    with Lease(store, "second"):
        assert list_leases(store) == [f"{LEASE_FOLDER}/second.json"]


@pytest.mark.slow
def test_of_many_runs_that_start_together_at_most_one_holds_the_output(store: Store) -> None:
    holders, max_holders, lock = 0, 0, threading.Lock()
    start = threading.Barrier(8)

    def take_lease(number: int) -> None:
        nonlocal holders, max_holders
        start.wait()
        try:
            with Lease(store, f"run{number}"):
                with lock:
                    holders += 1
                    max_holders = max(max_holders, holders)
                time.sleep(0.01)
                with lock:
                    holders -= 1
        except OutputBusyError:
            pass

    for _ in range(10):
        threads = [threading.Thread(target=take_lease, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max_holders == 1
    assert list_leases(store) == []


def test_a_run_whose_lease_was_taken_over_gets_an_error_and_does_not_restore_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    with Lease(store, "first") as first:
        first.check()
        store.delete([f"{LEASE_FOLDER}/first.json"])
        write_lease(store)
        time.sleep(0.2)
        with pytest.raises(OutputBusyError, match="taken over by run other on host elsewhere"):
            first.check()
    assert list_leases(store) == [OTHER]


def test_heartbeats_continue_after_the_store_was_unreachable(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    with Lease(store, "first") as first:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(OSError("unreachable")))
            time.sleep(0.1)
        before = store.read(f"{LEASE_FOLDER}/first.json")
        time.sleep(0.2)
        assert store.read(f"{LEASE_FOLDER}/first.json") != before
        first.check()


def test_a_run_does_not_mistake_its_own_heartbeat_for_another_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.0)  # while a file is being written, it has a temporary name
    with Lease(store, "first") as own:
        for _ in range(300):
            own.check()


def test_a_run_of_this_process_that_could_not_release_its_lease_does_not_hold_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_unreachable(*_: object) -> None:
        raise StorageError("unreachable")

    with monkeypatch.context() as patch:
        first = Lease(store, "first").__enter__()
        patch.setattr(Store, "delete", raise_unreachable)
        with pytest.raises(StorageError):
            first.__exit__(None, None, None)
    assert list_leases(store) == [f"{LEASE_FOLDER}/first.json"]
    with Lease(store, "second"):
        assert list_leases(store) == [f"{LEASE_FOLDER}/second.json"]


def test_the_progress_of_the_holder_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    assert read_live_lease(store) is None
    with Lease(store, "first") as held_lease:
        holder = read_live_lease(store)
        assert holder is not None
        assert (holder["run_id"], holder["pid"], holder["progress"]) == ("first", os.getpid(), {})
        held_lease.set_progress_source(lambda: {"done": 3})
        deadline = time.monotonic() + 10
        while holder["progress"] != {"done": 3} and time.monotonic() < deadline:
            holder = read_live_lease(store) or holder
    assert holder["progress"] == {"done": 3}
    assert read_live_lease(store) is None


def test_a_holder_on_another_host_is_running_while_its_heartbeat_is_recent(store: Store) -> None:
    write_lease(store)
    assert read_live_lease(store) is not None
    write_lease(store, heartbeat=time.time() - 2 * STALE_S)
    assert read_live_lease(store) is None


def test_the_lease_of_a_dead_run_whose_clock_is_ahead_is_taken_over(store: Store) -> None:
    write_lease(store, heartbeat=time.time() + 3600)
    with Lease(store, "second"):
        assert list_leases(store) == [f"{LEASE_FOLDER}/second.json"]


@pytest.mark.parametrize("skew_s", [3600, -3600])
def test_a_run_whose_clock_differs_is_seen_by_the_change_of_its_heartbeat(
    store: Store, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 10.0)
    monkeypatch.setattr(lease, "_WATCH_STEP_S", 0.01)
    write_lease(store, heartbeat=time.time() + skew_s)
    later = threading.Timer(0.1, lambda: write_lease(store, heartbeat=time.time() + skew_s))
    later.start()
    with pytest.raises(OutputBusyError):
        raise_if_locked(store)
    later.join()


def test_a_run_that_was_suspended_for_long_continues_if_no_other_run_took_the_output(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 3600.0)  # no heartbeat, as while the process is suspended
    with Lease(store, "first") as first:
        name = f"{LEASE_FOLDER}/first.json"
        holder = json.loads(store.read(name))
        store.write(name, json.dumps({**holder, "heartbeat": time.time() - 10 * STALE_S}).encode())
        first.check()
        assert not first.was_taken_over


def test_a_late_heartbeat_of_a_suspended_run_does_not_give_the_lease_back(store: Store) -> None:
    write_lease(store, heartbeat=time.time() - 2 * STALE_S)
    with Lease(store, "second") as second:
        assert second.was_taken_over
        write_lease(store)  # by the suspended run, which was writing a heartbeat
        second.check()
        assert list_leases(store) == [f"{LEASE_FOLDER}/second.json"]


def test_a_run_whose_lease_was_taken_over_never_holds_it_again(store: Store) -> None:
    store.write("runs/other/run.json", b"{}")
    with Lease(store, "first") as first:
        content = store.read(f"{LEASE_FOLDER}/first.json")
        store.delete([f"{LEASE_FOLDER}/first.json"])
        for _ in range(2):
            with pytest.raises(OutputBusyError):
                first.check()
            store.write(f"{LEASE_FOLDER}/first.json", content)


def test_the_submission_id_of_a_ray_job_is_in_the_lease_and_in_the_message(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "nightly-7"}}')
    with Lease(store, "first"):
        holder = read_live_lease(store)
        assert holder is not None
        assert holder["submission_id"] == "nightly-7"
        with pytest.raises(
            OutputBusyError, match=r"run first on host .* \(pid \d+, Ray job nightly-7\) holds"
        ):
            raise_if_locked(store)


def test_the_message_about_a_suspended_holder_says_so(store: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from featray.output.lease import Lease\nfrom featray.storage.store import Store\n"
        "Lease(Store(sys.argv[1]), 'suspended').__enter__()\n"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    with subprocess.Popen([sys.executable, "-c", code, store.uri]) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        try:
            with pytest.raises(OutputBusyError, match="Its process is suspended: continue it, or end it"):
                raise_if_locked(store)
        finally:
            process.kill()
