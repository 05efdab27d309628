"""End of a command: exit code, error message, log lines."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from commands import importing, run_command
from errors import ConfigError, DataError, RunError
from tests.golden import REPO


def run_failing_command(error: BaseException, *arguments: str) -> int:
    """Return the exit code of a command that raises ``error``."""

    def main(argv: Sequence[str]) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.argv", ["tune.py", *arguments])
        run_command(main, "tune.py")
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("--lora_r 0 is not possible", "Give 1 or more"), 2, "--lora_r 0 is not possible. Give 1 or more"),
        (DataError("a.jsonl:3", "no turns", "Remove it"), 2, "a.jsonl:3: no turns. Remove it"),
        (RunError("step 7: the loss is NaN", "Lower it"), 1, "step 7: the loss is NaN. Lower it"),
        (KeyError("wte"), 1, "unexpected KeyError: 'wte'. --debug shows the traceback"),
        (ZeroDivisionError(), 1, "unexpected ZeroDivisionError. --debug shows the traceback"),
        (ValueError("two\n  lines"), 1, "unexpected ValueError: two lines. --debug shows the traceback"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/run_summary.json"),
            1,
            "cannot write out/run_summary.json (No space left on device). Free some space",
        ),
    ],
)
def test_failure_is_one_line(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing_command(error) == code
    assert capsys.readouterr() == ("", f"tune.py: error: {line}\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_lists_flags_that_reduce_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing_command(error) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"tune.py: error: out of memory ({error}). Lower --per_device_train_batch_size (and raise ")
    assert ", lower --model_max_length, train an adapter with --use_lora, or see what fits with " in line
    assert line.count("\n") == 1


def test_out_of_memory_on_cpu_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert run_failing_command(caught.value) == 1
    assert capsys.readouterr().err.startswith("tune.py: error: out of memory (")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt(), 130, "interrupted"), (KeyboardInterrupt("Resume so"), 130, "interrupted. Resume so")],
)
def test_interruption_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing_command(error) == code
    assert capsys.readouterr() == ("", f"tune.py: {line}\n")


@pytest.mark.parametrize("error", [ConfigError("--x 1"), RunError("step 1"), KeyError("x")])
def test_debug_prints_traceback_before_the_error_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    run_failing_command(error, "--lora_r", "8", "--debug")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("raise error" in line for line in lines)
    assert lines[-1].startswith("tune.py: error: ")


def test_error_line_does_not_continue_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    bar = tqdm(total=2)
    bar.update()
    run_failing_command(RunError("step 1: it broke"))
    assert capfd.readouterr().err.splitlines()[-1] == "tune.py: error: step 1: it broke"


COMMAND = """
import sys, time
from commands import run_command
def main(argv):
    try:
        print("started", flush=True)
        {body}
    finally:
        print("cleaned up", flush=True)
if __name__ == "__main__":
    run_command(main, "tune.py")
"""


def start(folder: Path, body: str = "time.sleep(60)", **environment: str) -> subprocess.Popen[str]:
    script = folder / "tune.py"
    script.write_text(COMMAND.format(body=body))
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 143, "terminated")],
)
def test_signal_runs_finally_blocks(tmp_path: Path, number: int, code: int, line: str) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("cleaned up\n", f"tune.py: {line}\n")
    assert process.returncode == code


def test_second_sigterm_does_not_interrupt_cleanup(tmp_path: Path) -> None:
    process = start(tmp_path, "\n        ".join(["try: time.sleep(60)", "finally: time.sleep(1)"]))
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(3):
        process.terminate()
        time.sleep(0.2)
    assert process.communicate(timeout=30)[0] == "cleaned up\n"
    assert process.returncode == 143


def test_first_rank_of_a_host_reports_refusals(tmp_path: Path) -> None:
    """torchrun terminates the other ranks after rank 0 has ended. An error of another rank alone is reported by it."""
    body = 'from errors import ConfigError; raise ConfigError("--x 1")'
    first, second = (start(tmp_path, body, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1"))
    assert first.communicate(timeout=30)[1] == "tune.py: error: --x 1\n"
    assert second.stdout is not None
    second.stdout.readline()
    second.terminate()
    assert second.communicate(timeout=30)[1] == ""
    assert (first.returncode, second.returncode) == (2, 143)
    alone = start(tmp_path, body.replace("ConfigError", "RunError"), RANK="1", LOCAL_RANK="1")
    assert alone.communicate(timeout=30)[1] == "tune.py [rank 1]: error: --x 1\n"
    assert alone.returncode == 1


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "tune.py [rank 0]"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "tune.py [rank 1]"),
        ({"RANK": "3", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, f"tune.py [rank 3 ({socket.gethostname()})]"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "tune.py"),
        ({"WORLD_SIZE": "2"}, "tune.py"),
    ],
)
def test_failure_of_several_processes_names_its_rank(environment: dict[str, str], name: str, tmp_path: Path) -> None:
    done = start(tmp_path, 'raise KeyError("wte")', **environment)
    assert done.communicate(timeout=30)[1].startswith(f"{name}: error: unexpected KeyError: 'wte'. ")
    assert done.returncode == 1


@pytest.mark.parametrize("fault", ["ConfigError", "RunError"])
def test_other_ranks_are_notified_of_a_failure(tmp_path: Path, fault: str) -> None:
    lines = (
        "import commands, errors",
        "commands.notify_on_failure('rank 1 (b)', print)",
        f"raise errors.{fault}('--x 1')",
    )
    body = "\n        ".join(lines)
    process = start(tmp_path, body, RANK="1", WORLD_SIZE="2", LOCAL_RANK="0")
    out, err = process.communicate(timeout=30)
    assert out == "started\ncleaned up\n--x 1\n"
    assert err == "tune.py [rank 1 (b)]: error: --x 1\n"
    assert process.returncode == (2 if fault == "ConfigError" else 1)


def test_notification_has_a_timeout(tmp_path: Path) -> None:
    """The process that hosts the store may be gone."""
    lines = (
        "import commands, errors",
        "commands.notify_on_failure('rank 1', lambda message: time.sleep(60))",
        "raise KeyError",
    )
    process = start(tmp_path, "\n        ".join(lines), RANK="1", WORLD_SIZE="2")
    started = time.monotonic()
    assert "unexpected KeyError" in process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 20


def test_shared_error_is_reported_by_rank_0_only(tmp_path: Path) -> None:
    """Local rank 0 of another host does not report it either."""
    body = 'import commands, errors; raise errors.shared(errors.ConfigError("--x 1"))'
    first, second = (
        start(tmp_path, body.replace("raise", "commands._WAIT_FOR_FIRST = 0.1; raise"), RANK=rank, WORLD_SIZE="2")
        for rank in ("0", "1")
    )
    assert first.communicate(timeout=30)[1] == "tune.py [rank 0]: error: --x 1\n"
    assert second.communicate(timeout=30)[1] == ""
    assert (first.returncode, second.returncode) == (2, 2)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234",
            "another process of the run died",
        ),
        ("Broken pipe", "another process of the run died"),
        ("NCCL error: remote process exited or there was a network error", "another process of the run died"),
        (
            "[../gloo/transport/tcp/unbound_buffer.cc:119] Timed out waiting 1800000ms for recv",
            "or raise --ddp_timeout",
        ),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "or raise --ddp_timeout"),
    ],
)
def test_lost_process_is_explained(
    message: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_failing_command(RuntimeError(message)) == 1
    assert "unexpected RuntimeError" in capsys.readouterr().err  # a single process cannot lose another
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setattr("commands._exit_without_teardown", sys.exit)  # it would end the tests
    assert run_failing_command(RuntimeError(message)) == 1
    line = capsys.readouterr().err
    assert words in line
    assert message in line
    assert "--resume_from_checkpoint auto" in line


def test_one_of_several_processes_exits_without_interpreter_teardown(tmp_path: Path) -> None:
    """gloo's threads may abort the teardown. Functions registered with atexit still run."""
    lines = (
        "import atexit, ctypes, torch.distributed",
        "atexit.register(print, 'closed')",
        "main.alive = type('Tensor', (), {'__del__': lambda tensor: ctypes.CDLL(None).abort()})()",
        "return 3",
    )
    processes = [start(tmp_path, "\n        ".join(lines), WORLD_SIZE=size) for size in ("1", "2")]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["started\ncleaned up\nclosed\n"] * 2
    assert [process.returncode for process in processes] == [-signal.SIGABRT, 3]


LOG = """
import logging, os
os.environ["RANK"] = os.environ["RANK_OF_TEST"]
from commands import set_up_logging
set_up_logging()
for name in ("finetune", "loading.checkpoint", "quantize.gptq", "scripts.ask", "some_library"):
    logging.getLogger(name).info("%s, info", name)
    logging.getLogger(name).warning("%s, warning", name)
"""


@pytest.mark.parametrize(("rank", "shown"), [("0", "info warning"), ("1", "warning")])
def test_every_package_logs_on_rank_0_and_only_warnings_on_others(rank: str, shown: str) -> None:
    environment = {**os.environ, "RANK_OF_TEST": rank, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", LOG]
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    prefix = "" if rank == "0" else "[rank 1] "
    names = ("finetune", "loading.checkpoint", "quantize.gptq", "scripts.ask")
    expected = [f"{level.upper()} {prefix}{name}, {level}" for name in names for level in shown.split()]
    lines = [line.partition(" ")[2] for line in result.stderr.splitlines()]
    assert lines == [*expected, f"WARNING {prefix}some_library, warning"]


def test_what_is_imported_is_not_collected() -> None:
    """The collector rests while the block imports, also one that fails, and never looks at its objects again."""
    made: list[list[object]] = []
    try:
        with pytest.raises(ImportError), importing():
            made.append([made])
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.is_tracked(made[0])
        assert not any(each is made[0] for each in gc.get_objects())
    finally:
        gc.unfreeze()
