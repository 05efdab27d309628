"""Two simulated hosts: network namespaces with their own addresses and host names, connected by a virtual cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import environment
from tests.golden import REPO

NOT_INSTALLED = "ip is not installed (Debian: apt-get install iproute2)"
_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True)
class Host:
    """A simulated host.

    Attributes:
        namespace: its network namespace.
        name: host name that programs on it see.
        interface, address: its end of the cable.
        started: processes started on it.
    """

    namespace: str
    name: str
    interface: str
    address: str
    started: list[subprocess.Popen[str]] = field(default_factory=list, compare=False)

    def start(self, command: Sequence[object], log: Path, **variables: object) -> subprocess.Popen[str]:
        """Start a command in the repository's root and append its output to ``log``."""
        set_name = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", set_name, self.name]
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*inside, *map(str, command)],
                cwd=REPO, env={**environment(), **{name: str(value) for name, value in variables.items()}},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def lose_power(self) -> None:
        """Kill every process of this host at once, so that none can send or close anything."""
        deadline = time.monotonic() + _TIMEOUT
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes {pids} do not die"
            time.sleep(0.05)
        for process in self.started:
            process.wait(_TIMEOUT)

    def unplug(self) -> None:
        """Unplug the cable: nothing arrives any more in either direction, and no connection is closed."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Create two hosts that reach each other and nothing else; kill their processes at the end.

    Raises:
        OSError: this machine does not allow network namespaces.
    """
    first, second = (
        Host(f"qwen-{os.getpid()}-{number}", f"host-{number}", f"qw{os.getpid()}n{number}", f"192.0.2.{number + 1}")
        for number in range(2)
    )
    with contextlib.ExitStack() as stack:
        for host in (first, second):
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)  # and the cable
            stack.callback(host.lose_power)
        _ip("link", "add", first.interface, "netns", first.namespace, "type", "veth",
            "peer", "name", second.interface, "netns", second.namespace)  # fmt: skip
        for host in (first, second):
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield first, second


def why_no_hosts() -> str:
    """Return why ``two_hosts`` cannot work on this machine; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return NOT_INSTALLED
    try:
        with two_hosts():
            return ""
    except OSError as error:
        return f"no network namespaces: {error}"


def wait_for_line(log: Path, text: str, seconds: float = _TIMEOUT) -> None:
    """Wait until ``log`` contains ``text``."""
    deadline = time.monotonic() + seconds
    while text not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, f"{text!r} was not logged within {seconds:g} s:\n{log.read_text()}"
        time.sleep(0.02)


def _ip(*arguments: str) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout
