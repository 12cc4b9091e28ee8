"""The lease: one driver per output, and a dead one's lease is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featray.errors import OutputBusyError
from featray.lease import NAME, STALE_S, Lease
from featray.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def plant(store: Store, **changes: Any) -> None:
    holder = {"run_id": "other", "host": "elsewhere", "pid": 1, "since": "2026", "started": 0.0}
    holder["heartbeat"] = time.time()
    store.write(NAME, json.dumps({**holder, **changes}).encode())


def test_a_second_run_is_refused_with_who_holds_the_output(store: Store) -> None:
    with Lease(store, "first"), pytest.raises(OutputBusyError, match=rf"run first .* \(pid {os.getpid()}\)"):
        Lease(store, "second").__enter__()


def test_the_lease_is_given_back(store: Store) -> None:
    with Lease(store, "first"):
        assert store.size(NAME)
    assert store.size(NAME) is None
    with Lease(store, "second"):
        pass


def test_a_lease_of_another_host_holds_while_its_heart_beats(store: Store) -> None:
    plant(store)
    with pytest.raises(OutputBusyError, match="host elsewhere"):
        Lease(store, "second").__enter__()


def test_a_lease_without_heartbeat_is_taken_over(store: Store) -> None:
    plant(store, heartbeat=time.time() - STALE_S - 1)
    with Lease(store, "second"):
        assert json.loads(store.read(NAME))["run_id"] == "second"


def test_a_killed_process_gives_its_lease_back_at_once(store: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from featray.lease import Lease\nfrom featray.storage import Store\n"
        "Lease(Store(sys.argv[1]), 'killed').__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=False)
    assert json.loads(store.read(NAME))["run_id"] == "killed"
    with Lease(store, "second"):
        pass
