"""A launcher on two hosts: same losses as on one host, and a restart or an error when a host is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fork_server
from tests.commands import environment, logged_losses, names_in
from tests.hosts import NOT_INSTALLED, Host, two_hosts, wait_for_line, why_no_hosts
from tests.models import TINY, write_conversations

STEPS, SAVE_STEPS = 24, 6
TIMEOUT = 8  # seconds of --heartbeat_timeout
MASTER_PORT = 29400  # free: no other program runs on these hosts


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_no_hosts():
        message = f"NOT TESTED on several hosts: {reason}"
        # .ci/run installs the tools; a kernel without network namespaces cannot be helped.
        if os.environ.get("CI") and reason == NOT_INSTALLED and os.geteuid() == 0:
            pytest.fail(message)
        pytest.skip(message)
    with two_hosts() as both:
        yield both


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write conversations, and beside them a checkout whose processes are forked."""
    (tmp_path / "checkout").mkdir()
    fork_server.link_checkout(tmp_path / "checkout")
    return write_conversations(tmp_path / "train.json")


def launch(data: Path, output: Path, *more: object) -> list[object]:
    """Return the launcher command, the same on every host."""
    launcher = data.parent / "checkout" / "finetune" / "finetune_ds.sh"
    return [
        shutil.which("dash") or "sh", launcher, "-m", TINY, "-d", data, "-o", output, "--",
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


def test_run_resumes_after_a_host_was_lost_with_the_losses_of_an_uninterrupted_run(
    hosts: tuple[Host, Host], data: Path, tmp_path: Path
) -> None:
    """All processes of the second host are killed, then started again by hand there and by torchrun on the first host.

    The run resumes from its last checkpoint. Its losses equal those of two uninterrupted processes on one host.
    """
    first, second = hosts
    output, uninterrupted = tmp_path / "two", tmp_path / "one"
    waiting = start(first, 0, first, data, output, restarts=1)
    start(second, 1, first, data, output, restarts=1)
    wait_for_line(log_of(first, output), f"step {SAVE_STEPS + 2}/")
    second.lose_power()
    wait_for_line(log_of(first, output), "failed (exitcode: ")  # torchrun on the first host about its process
    assert f"checkpoint-{SAVE_STEPS}" in names_in(output) and "model.safetensors" not in names_in(output)
    again = start(second, 1, first, data, output, restarts=1)
    for process, host in ((again, second), (waiting, first)):
        assert process.wait(120) == 0, log_of(host, output).read_text()

    log = log_of(first, output).read_text()
    assert f"[rank 0 ({first.name})]: error: " in log, log
    assert second.address in log or f"rank 1 ({second.name})" in log, log
    result = subprocess.run(
        [*map(str, launch(data, uninterrupted))], env={**environment(), "NPROC": "2"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(logged_losses(uninterrupted)) == STEPS
    assert logged_losses(output) == pytest.approx(logged_losses(uninterrupted), rel=1e-6)
    assert names_in(output) == names_in(uninterrupted)


def test_both_hosts_abort_and_name_each_other_when_the_network_fails(
    hosts: tuple[Host, Host], data: Path, tmp_path: Path
) -> None:
    """No connection is closed: a host only stops receiving."""
    first = hosts[0]
    output = tmp_path / "result"
    processes = [
        start(host, number, first, data, output, "--heartbeat_timeout", TIMEOUT) for number, host in enumerate(hosts)
    ]
    wait_for_line(log_of(first, output), "step 2/")
    first.unplug()
    unplugged = time.monotonic()
    assert processes[0].wait(4 * TIMEOUT) != 0
    # torchrun on the other host keeps trying to reach the first one for a minute; its process has ended.
    wait_for_line(log_of(hosts[1], output), "error: ", 4 * TIMEOUT)
    assert time.monotonic() - unplugged < 4 * TIMEOUT
    for host, other in (hosts, hosts[::-1]):
        log = log_of(host, output).read_text(encoding="utf-8")
        [line] = [line for line in log.splitlines() if "finetune.py" in line and "error: " in line]
        assert f"({host.name})]: error: " in line and f"({other.name})" in line, log
