"""A command waits for an output that another run holds: who holds it, until when, and what happens then."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import featray
from featray import pipeline
from featray.cli.main import main
from featray.errors import ExitCode, HeldOutputError, InterruptedWaitError
from featray.output import lease_wait
from featray.output.lease import Lease, raise_if_locked
from featray.output.lease_wait import LeaseWait
from featray.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def shorten_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_wait, "POLL_S", 0.02)


@pytest.fixture
def held(store: Store) -> Iterator[HeldOutputError]:
    """Hold the lease of the output, and return the error of a second run."""
    with Lease(store, "first"):
        with pytest.raises(HeldOutputError) as error:
            raise_if_locked(store)
        yield error.value


def test_the_wait_ends_when_the_other_run_ends(store: Store) -> None:
    with Lease(store, "first") as lease:
        release = threading.Timer(0.1, lambda: lease.__exit__(None, None, None))
        with pytest.raises(HeldOutputError) as error:
            raise_if_locked(store)
        release.start()
        LeaseWait(60).wait(store, error.value)
        raise_if_locked(store)


def test_the_holder_is_named_once_and_then_at_intervals(
    store: Store, held: HeldOutputError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="featray")
    with pytest.raises(HeldOutputError):
        LeaseWait(0.2).wait(store, held)
    assert [record.message for record in caplog.records] == [f"{held.holder}; waiting for at most 0 s"]
    monkeypatch.setattr(lease_wait, "REPORT_S", 0.0)
    with pytest.raises(HeldOutputError):
        LeaseWait(0.2).wait(store, held)
    assert caplog.records[-1].message == f"{held.holder}; still waiting for at most 0 s"


def test_after_the_time_the_error_says_how_long_the_command_has_waited(
    store: Store, held: HeldOutputError
) -> None:
    with pytest.raises(HeldOutputError, match=r"run first .*, and did not end within 0\.1 s\. Wait") as error:
        LeaseWait(0.1).wait(store, held)
    assert error.value.exit_code == ExitCode.BUSY


def test_without_a_wait_the_error_is_raised_at_once(store: Store, held: HeldOutputError) -> None:
    with pytest.raises(HeldOutputError) as error:
        LeaseWait(0).wait(store, held)
    assert error.value is held


def test_a_stop_ends_the_wait_as_an_interruption(store: Store, held: HeldOutputError) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedWaitError) as error:
        LeaseWait(float("inf"), stop).wait(store, held)
    assert error.value.exit_code == ExitCode.INTERRUPTED


class OtherRun(LeaseWait):
    """Replaces the wait: the run that held the output processes a new scan too, and ends."""

    lease: Lease
    config: dict[str, Any]

    def wait(self, store: Store, error: HeldOutputError) -> None:
        assert "other" in error.holder
        self.lease.__exit__(None, None, None)
        scans = sorted(Path(self.config["source"]["uri"]).iterdir())
        shutil.copy(scans[0], scans[0].with_name("new.nii.gz"))
        assert featray.extract(self.config).done == len(scans) + 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [featray.extract, featray.refresh])
def test_the_collection_is_listed_and_planned_after_the_wait(
    command: Any, config_of: Any, tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = tmp_path / "ct"
    collection.mkdir()
    for scan in sorted((phantoms / "nifti").iterdir())[:2]:
        shutil.copy(scan, collection)
    config = config_of()
    config["source"]["uri"] = str(collection)
    with Lease(Store(config["output"]["uri"]), "other") as lease:
        monkeypatch.setattr(OtherRun, "lease", lease, raising=False)
        monkeypatch.setattr(OtherRun, "config", config, raising=False)
        monkeypatch.setattr(pipeline, "LeaseWait", OtherRun)
        summary = command(config, wait=60)
    assert (summary.found, summary.done, summary.removed) == (3, 0, 0)


@pytest.mark.parametrize("command", [["vacuum"], ["verify", "--repair"]])
def test_commands_that_change_an_output_wait_too(
    command: list[str], config_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of()
    config["source"]["uri"] += "/nifti/phantom_000.nii.gz"
    featray.extract(config)
    output = config["output"]["uri"]
    with Lease(Store(output), "other"):
        assert main([*command, output, "--wait", "0.1"]) == ExitCode.BUSY
    assert "did not end within 0.1 s" in capsys.readouterr().err
    assert main([*command, output, "--wait", "0.1"]) == ExitCode.OK


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["extract", "c.yaml", f"--wait={text}"])
    assert error.value.code == ExitCode.USAGE
    assert "is no number of seconds" in capsys.readouterr().err
