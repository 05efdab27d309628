"""The launchers across two hosts: they train as one host does, and stop or go on when a host is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import environment, logged_losses, names_in
from tests.golden import REPO
from tests.hosts import NOT_INSTALLED, Host, two_hosts, wait_for_line, why_no_hosts
from tests.models import TINY, write_conversations

LAUNCHER = REPO / "finetune" / "finetune_ds.sh"
STEPS, SAVE_STEPS = 24, 6
TIMEOUT = 15  # seconds: --heartbeat_timeout where a host falls silent
MASTER_PORT = 29400  # nobody else is on these hosts


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_no_hosts():
        message = f"NOT TESTED on several hosts: {reason}"
        # .ci/run installs what it may; what the kernel does not allow cannot be had.
        if os.environ.get("CI") and reason == NOT_INSTALLED and os.geteuid() == 0:
            pytest.fail(message)
        pytest.skip(message)
    with two_hosts() as both:
        yield both


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_conversations(tmp_path / "train.json")


def launch(data: Path, output: Path, *more: object) -> list[object]:
    """The command that is given on every host."""
    return [
        shutil.which("dash") or "sh", LAUNCHER, "-m", TINY, "-d", data, "-o", output, "--",
        "--gradient_accumulation_steps", 1, "--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--save_total_limit", 2,
        "--learning_rate", 1e-3, "--gradient_checkpointing", "False", "--disable_tqdm", "True",
        *more,
    ]  # fmt: skip


def start(
    host: Host, number: int, first: Host, data: Path, output: Path, *more: object, restarts: int = 0
) -> subprocess.Popen[str]:
    return host.start(
        launch(data, output, *more), log_of(host, output),
        NNODES=2, NODE_RANK=number, MASTER_ADDR=first.address, MASTER_PORT=MASTER_PORT, MAX_RESTARTS=restarts,
    )  # fmt: skip


def log_of(host: Host, output: Path) -> Path:
    return output.with_name(f"{output.name}-{host.name}.log")


def test_a_lost_host_comes_back_and_the_run_is_as_if_it_had_never_been_away(
    hosts: tuple[Host, Host], data: Path, tmp_path: Path
) -> None:
    """All processes of the second host are killed; started again by hand there, and by torchrun on the first, the run
    goes on from its last checkpoint. Its losses are those of two processes on a single host that nobody disturbed."""
    first, second = hosts
    output, undisturbed = tmp_path / "two", tmp_path / "one"
    waiting = start(first, 0, first, data, output, restarts=1)
    start(second, 1, first, data, output, restarts=1)
    wait_for_line(log_of(first, output), f"step {SAVE_STEPS + 2}/")
    second.lose_power()
    wait_for_line(log_of(first, output), "failed (exitcode: ")  # torchrun on the first host, of its process
    assert f"checkpoint-{SAVE_STEPS}" in names_in(output) and "model.safetensors" not in names_in(output)
    again = start(second, 1, first, data, output, restarts=1)
    for process, host in ((again, second), (waiting, first)):
        assert process.wait(120) == 0, log_of(host, output).read_text()

    said = log_of(first, output).read_text()
    assert f"[rank 0 ({first.name})]: error: " in said, said
    assert second.address in said or f"rank 1 ({second.name})" in said, said
    result = subprocess.run(
        [*map(str, launch(data, undisturbed))], env={**environment(), "NPROC": "2"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(logged_losses(undisturbed)) == STEPS
    assert logged_losses(output) == pytest.approx(logged_losses(undisturbed), rel=1e-6)
    assert names_in(output) == names_in(undisturbed)


def test_without_a_cable_both_hosts_stop_and_say_so(hosts: tuple[Host, Host], data: Path, tmp_path: Path) -> None:
    """Nobody is told that the other host is gone: silence is all there is."""
    first = hosts[0]
    output = tmp_path / "result"
    processes = [
        start(host, number, first, data, output, "--heartbeat_timeout", TIMEOUT) for number, host in enumerate(hosts)
    ]
    wait_for_line(log_of(first, output), "step 2/")
    first.unplug()
    unplugged = time.monotonic()
    assert processes[0].wait(4 * TIMEOUT) != 0
    # torchrun on the other host goes on asking the first one for a minute; its process has ended.
    wait_for_line(log_of(hosts[1], output), "error: ", 4 * TIMEOUT)
    assert time.monotonic() - unplugged < 4 * TIMEOUT
    for host, other in (hosts, hosts[::-1]):
        said = log_of(host, output).read_text(encoding="utf-8")
        [line] = [line for line in said.splitlines() if "finetune.py" in line and "error: " in line]
        assert f"({host.name})]: error: " in line and f"({other.name})" in line, said
