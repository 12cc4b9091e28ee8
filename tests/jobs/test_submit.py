"""jobs/submit.py with a job server that is a fake: ids, logs, exit codes, and messages."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from job_modules import import_job

SECRET = "abc-secret-123"


class Status(str):
    """A state of a job, as Ray's `JobStatus`."""

    __slots__ = ()

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class FakeServer:
    """A job server with one log for all jobs; `errors` are raised by following the log, one a call."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.submitted: list[dict[str, Any]] = []
        self.log, self.shown_before_error = "one\ntwo\n", 4
        self.errors: list[BaseException] = []
        self.submit_error: Exception | None = None
        self.end = SimpleNamespace(status=Status("SUCCEEDED"), driver_exit_code=0, message="")

    def add(self, name: str, entrypoint: str) -> None:
        self.jobs[name] = SimpleNamespace(**vars(self.end), entrypoint=entrypoint)

    def get_job_info(self, name: str) -> SimpleNamespace:
        if name not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.jobs[name]

    def submit_job(self, **options: Any) -> str:
        if self.submit_error is not None:
            raise self.submit_error
        self.submitted.append(options)
        name = options["submission_id"] or "made-by-ray"
        self.add(name, options["entrypoint"])
        return name

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        assert name in self.jobs
        if self.errors:
            yield self.log[: self.shown_before_error]
            raise self.errors.pop(0)
        yield self.log[:6]  # the last lines are missing

    def get_job_logs(self, name: str) -> str:
        assert name in self.jobs
        return self.log


@pytest.fixture(autouse=True)
def keep_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def submit(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the program as a module, connected to the fake server."""
    module = import_job("submit")
    monkeypatch.setattr(module, "connect", lambda _: server)
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    return module


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_that_of_the_command(
    submit: ModuleType,
    server: FakeServer,
    status: str,
    code: int | None,
    expected: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.end = SimpleNamespace(status=Status(status), driver_exit_code=code, message="no such package")
    assert submit.main(["--", "featray", "refresh", "my config.yaml", "--retry-failed"]) == expected
    out, err = capsys.readouterr()
    assert out == server.log
    assert ("no such package" in err) == (code is None and status == "FAILED")
    (options,) = server.submitted
    assert options["entrypoint"] == "featray refresh 'my config.yaml' --retry-failed"
    assert options["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


def test_an_id_that_exists_is_followed_and_not_submitted(submit: ModuleType, server: FakeServer) -> None:
    server.end.driver_exit_code = 4
    server.add("nightly", "featray refresh a.yaml")
    assert submit.main(["--submission-id", "nightly", "--", "featray", "refresh", "a.yaml"]) == 4
    assert not server.submitted


def test_an_id_of_another_command_is_refused(
    submit: ModuleType, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("nightly", "featray refresh a.yaml")
    assert submit.main(["--submission-id", "nightly", "--", "featray", "refresh", "b.yaml"]) == 2
    assert "choose another --submission-id" in capsys.readouterr().err


def test_if_another_submitter_was_faster_its_job_is_followed(
    submit: ModuleType, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(**options: Any) -> str:
        server.add("nightly", options["entrypoint"])
        raise RuntimeError("Job with submission_id nightly already exists")

    monkeypatch.setattr(server, "submit_job", lose)
    assert submit.main(["--submission-id", "nightly", "--", "true"]) == 0


def test_after_a_lost_connection_the_log_continues_where_it_ended(
    submit: ModuleType, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.errors = [ConnectionError("reset"), RuntimeError("WebSocket connection closed unexpectedly")]
    assert submit.main(["--", "true"]) == 0
    assert capsys.readouterr().out == server.log


def test_a_cluster_that_stays_away_is_an_unexpected_error_that_names_the_job(
    submit: ModuleType,
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "LOST_S", -1.0)
    server.errors, server.shown_before_error = [ConnectionError("refused")], 0
    assert submit.main(["--", "true"]) == 1
    err = capsys.readouterr().err
    assert "--submission-id made-by-ray to follow it" in err
    assert "Traceback" not in err


def test_an_interrupted_submitter_leaves_the_job_and_says_so(
    submit: ModuleType, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.errors = [KeyboardInterrupt()]
    assert submit.main(["--", "true"]) == 130
    assert "job made-by-ray goes on" in capsys.readouterr().err


def test_without_waiting_only_the_id_is_printed(
    submit: ModuleType, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.end.driver_exit_code = 3
    assert submit.main(["--no-wait", "--", "true"]) == 0
    assert capsys.readouterr().out == "made-by-ray\n"


def test_variables_packages_and_claims_reach_ray_and_no_secret_is_printed(
    submit: ModuleType,
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_KEY", SECRET)
    (tmp_path / "more.txt").write_text("# comment\n\ns3fs>=2026.9\n")
    options = [
        "--env",
        "STORE_KEY",
        "--env",
        "MODE=fast=1",
        "--pip",
        "gcsfs",
        "--pip",
        str(tmp_path / "more.txt"),
    ]
    options += ["--memory", "1.5G", "--cpus", "0.5", "--grace", "30", "--working-dir", "."]
    assert submit.main([*options, "--", "true"]) == 0
    (sent,) = server.submitted
    assert sent["runtime_env"] == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30", "STORE_KEY": SECRET, "MODE": "fast=1"},
        "working_dir": ".",
        "pip": ["gcsfs", "s3fs>=2026.9"],
    }
    assert (sent["entrypoint_memory"], sent["entrypoint_num_cpus"]) == (1_500_000_000, 0.5)
    server.submit_error = RuntimeError(f"cannot make the environment {{'STORE_KEY': '{SECRET}'}}")
    assert submit.main([*options, "--", "true"]) == 2
    out, err = capsys.readouterr()
    assert "***" in err
    assert SECRET not in out + err


@pytest.mark.parametrize("option", [["--env", "NOT_SET_ANYWHERE"], ["--pip", "nowhere.txt"]])
def test_what_is_not_there_is_a_wrong_use(
    submit: ModuleType, server: FakeServer, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*option, "--", "true"]) == 2
    assert option[1] in capsys.readouterr().err
    assert not server.submitted


@pytest.mark.parametrize(("text", "expected"), [("4G", 4 * 10**9), ("100", 100), ("0.5t", 5 * 10**11)])
def test_memory_is_a_number_of_bytes_with_a_unit(submit: ModuleType, text: str, expected: int) -> None:
    assert submit.parse_bytes(text) == expected
    with pytest.raises(argparse.ArgumentTypeError, match="4G"):
        submit.parse_bytes("much")


class AuthenticationError(RuntimeError):
    """An error of the name that Ray's has, without importing Ray."""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (AuthenticationError("Missing authentication token"), "set RAY_AUTH_TOKEN"),
        (
            RuntimeError("The Ray jobs CLI & SDK require the ray[default] installation"),
            r"pip install 'ray[default]'",
        ),
        (ImportError("No module named 'aiohttp'"), r"pip install 'ray[default]'"),
        (
            ConnectionError("Failed to connect to Ray at address: http://h:1."),
            "Give the address of the dashboard",
        ),
    ],
)
def test_each_way_not_to_reach_a_cluster_is_one_message_with_advice(
    error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_job("submit")

    def fail(_: str | None) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "ray.job_submission", SimpleNamespace(JobSubmissionClient=fail))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is restored after the test
    assert module.main(["--address", "http://h:1", "--", "true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert advice in lines[0]
