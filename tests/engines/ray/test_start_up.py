"""A Ray that cannot start or be joined is one message with exit code 2; ways out are taken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from kill.harness import RayCluster

from featray.config import LimitsConfig, RunConfig
from featray.engines.ray import cluster, start_up
from featray.errors import ConfigError, ExitCode


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look as if it had no Ray and no variables of Ray."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.parametrize(
    "address", ["junk", "http://127.0.0.1:8265", "host:99999", "host:port", "ray://", "a b:1", "host:6379/x"]
)
@pytest.mark.parametrize("source", ["run.address", "RAY_ADDRESS"])
def test_an_address_that_is_none_is_refused_with_the_forms_that_are_valid(
    address: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    run = RunConfig(address=address if source == "run.address" else None)
    with pytest.raises(ConfigError, match=rf"^{source}: .* is no address of a Ray cluster; give HOST:PORT"):
        cluster.connect(run, LimitsConfig())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nohost.invalid:6379"])
def test_an_address_at_which_nothing_answers_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.address: nothing answers at"):
        cluster.connect(RunConfig(address=address), LimitsConfig())


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"", b"abc"])
def test_a_server_that_is_not_ray_is_refused_at_once(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        threads.submit(serve)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"what answers at {address} is no Ray cluster"):
            cluster.connect(RunConfig(address=address), LimitsConfig())


@pytest.mark.ray
def test_the_head_node_of_a_cluster_is_recognized() -> None:
    head = RayCluster()
    try:
        host, _, port = head.address.rpartition(":")
        assert cluster._speaks_grpc(host, int(port))
    finally:
        head.close()


@pytest.mark.parametrize("address", ["local", ""])
def test_the_address_local_means_a_ray_on_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.named_address(RunConfig()) is None


@pytest.mark.parametrize("error", [Exception("timed out\nduring startup"), OSError(28, "No space left")])
def test_each_error_at_the_start_of_ray_is_a_message_that_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ConfigError) as raised:
        cluster.connect(RunConfig(), LimitsConfig())
    message = str(raised.value)
    assert raised.value.exit_code == ExitCode.USAGE
    assert message.startswith("run.engine: Ray cannot start on this machine (")
    assert " ".join(str(error).split()) in message
    assert "run.engine: inline" in message
    assert "\n" not in message


def test_a_cluster_that_refuses_this_machine_is_a_message_that_names_versions_and_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("Version mismatch: Ray 2.1")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ConfigError, match=rf"Version mismatch: Ray 2.1.*RAY_AUTH_TOKEN.*{ray.__version__}"):
        cluster.connect(RunConfig(address="auto"), LimitsConfig())


def test_a_temporary_folder_with_a_long_path_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    assert start_up.make_local_options()["_temp_dir"] == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert "_temp_dir" not in start_up.make_local_options()


def test_the_longest_temporary_folder_that_is_kept_gives_valid_sockets() -> None:
    from ray._private.utils import validate_socket_filepath

    folder = "/" + "x" * (start_up.MAX_TEMP_BYTES - 1)
    session = "session_2026-11-28_19-22-25_834440_4194304"
    validate_socket_filepath(f"{folder}/ray/{session}/sockets/plasma_store")


@pytest.mark.parametrize("home", ["/proc/nohome", "a file/home"])
def test_without_a_writable_home_the_token_is_kept_in_memory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is restored after the test
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    start_up.make_local_options()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_with_a_writable_home_ray_keeps_its_token_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start_up.make_local_options()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_reaction_to_sigterm_is_kept_although_native_code_replaces_it() -> None:
    code = (
        "import ctypes, os, signal\nfrom featray.engines.ray.start_up import keep_sigterm_action\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        "with keep_sigterm_action(lambda: None):\n"
        "    ctypes.CDLL(None).signal(signal.SIGTERM, None)\n"  # to the default
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "while True: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 7


@pytest.mark.parametrize("change", ["install_native_handlers", "remove_native_handlers"])
def test_ray_cannot_replace_the_reaction_to_sigterm_while_it_starts_or_ends(change: str) -> None:
    code = (
        "import os, signal\nfrom featray.engines.ray import start_up\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        "start_up.install_native_handlers()\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        f"with start_up.keep_sigterm_action(start_up.{change}):\n"
        f"    start_up.{change}()\n"  # as Ray does
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while True: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("changes", "has_trace"),
    [(["install_native_handlers"], True), (["install_native_handlers", "remove_native_handlers"], False)],
)
def test_native_code_of_ray_replaces_the_reaction_where_it_is_not_kept(
    changes: list[str], has_trace: bool
) -> None:
    calls = "".join(f"start_up.{change}()\n" for change in changes)
    code = (
        "import os, signal\nfrom featray.engines.ray import start_up\n"
        f"signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n{calls}"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "while True: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True)
    assert done.returncode < 0
    assert (b"SIGTERM received" in done.stderr) == has_trace


def test_sigterm_kills_where_the_reaction_is_not_kept() -> None:
    code = (
        "import ctypes, os, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        "ctypes.CDLL(None).signal(signal.SIGTERM, None)\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize(("cores", "min_cpus", "expected"), [(1, 1, 1), (1, 2, 2), (3, 2, 3)])
def test_a_local_ray_has_the_cores_that_the_process_may_use(
    cores: int, min_cpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_up, "count_usable_cores", lambda: cores)
    assert start_up.make_local_options(min_cpus)["num_cpus"] == expected
