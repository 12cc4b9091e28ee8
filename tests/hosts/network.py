"""Several hosts on one machine: network namespaces that a switch joins. Needs Linux, root and iproute2.

Each host has an address and a loopback of its own, so processes of different hosts reach each other only
through the network. They share the files of the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SUBNET = "10.213.7"
"""The first three bytes of all addresses. They exist inside of the namespaces only."""
_SWITCH = "switch"


class Network:
    """Hosts that are joined by one switch; leaving the `with` block ends their processes and removes them.

    Args:
        names: Names of the hosts.
        prefix: Short text with which the names of the namespaces begin. Objects with equal names and prefix
            stand for the same hosts; one of them makes the hosts in its `with` block.

    Raises:
        PermissionError: This process must not make namespaces. The text names the cause.
    """

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self._addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        self.prefix = prefix

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get_address(self, host: str) -> str:
        """Return the IP address of a host."""
        return self._addresses[host]

    def make_command(self, host: str, command: Sequence[str | Path]) -> list[str]:
        """Return a command that runs `command` on a host, as the same process."""
        return ["ip", "netns", "exec", self._name(host), *map(str, command)]

    def start(
        self, host: str, command: Sequence[str | Path], log: Path, env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process on a host, with its output in a file."""
        with log.open("ab") as stream:
            return subprocess.Popen(self.make_command(host, command), stdout=stream, stderr=stream, env=env)

    def cut(self, host: str) -> None:
        """Take the cable of a host out of the switch: its processes go on, and reach nobody."""
        _run("ip", "-n", self._name(_SWITCH), "link", "set", f"to-{host}", "down")

    def list_processes(self, host: str) -> list[int]:
        """Return the ids of the processes that run on a host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._name(host)).split()]

    def close(self) -> None:
        """Kill all processes on the hosts, and remove the hosts."""
        existing = _run("ip", "netns", "list").split()
        for host in [*self._addresses, _SWITCH]:
            if self._name(host) not in existing:
                continue
            for pid in self.list_processes(host):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has ended in the meantime
            _run("ip", "netns", "delete", self._name(host))

    def _make(self) -> None:
        switch = self._name(_SWITCH)
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, address in self._addresses.items():
            name, port = self._name(host), f"to-{host}"
            _run("ip", "netns", "add", name)
            _run(
                "ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name
            )
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")

    def _name(self, host: str) -> str:
        return f"{self.prefix}-{host}"


def find_obstacle() -> str | None:
    """Return why no hosts can be made here; None if they can."""
    if not shutil.which("ip"):
        return "iproute2 is not installed, so there are no network namespaces"
    try:
        with Network(["probe"], f"featray-{os.getpid()}"):
            return None
    except PermissionError as error:
        return f"network namespaces are not allowed here: {error}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
