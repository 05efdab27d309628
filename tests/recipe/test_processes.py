"""Runs of several processes: launchers other than torchrun, and the errors when ranks differ or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import fork_server
from tests.commands import PLAIN, TIMEOUT, environment, free_port, logged_losses, read_json, run
from tests.golden import REPO
from tests.models import TINY, write_conversations
from tests.programs import require_program

MPIRUN = ["mpirun", "--oversubscribe", "-n", "2"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def arguments(folder: Path, *more: object) -> list[str]:
    data = write_conversations(folder / "train.json")
    words = [
        "finetune.py", *PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out",
        "--use_lora", "--per_device_train_batch_size", 2, "--max_steps", 3, "--logging_steps", 1, "--save_strategy",
        "no", "--disable_tqdm", "True", *more,
    ]  # fmt: skip
    return [fork_server.python(), *map(str, words)]


def torchrun_variables(rank: int, port: int) -> dict[str, str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def srun_variables(rank: int, port: int) -> dict[str, str]:
    """Variables that srun sets for a task."""
    return {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip


@contextmanager
def started(
    folder: Path, commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes with output files ``err.0``, ``err.1``... and kill them at the end of the block."""
    processes = []
    try:
        for number, (command, more) in enumerate(zip(commands, variables, strict=True)):
            with (folder / f"err.{number}").open("w") as err:
                processes.append(
                    subprocess.Popen(
                        command, cwd=REPO, env={**environment(), **more}, stdout=err, stderr=err, text=True
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def last_line(folder: Path, number: int) -> str:
    return (folder / f"err.{number}").read_text().rstrip().splitlines()[-1]


@pytest.mark.long
def test_mpirun_and_srun_give_the_same_losses(tmp_path: Path) -> None:
    """Only rank 0 logs, and mpirun reports no crash at the end."""
    require_program("mpirun", "openmpi-bin")
    (tmp_path / "mpi").mkdir()
    (tmp_path / "slurm").mkdir()
    mpi = subprocess.run(
        [*MPIRUN, *arguments(tmp_path / "mpi")], cwd=REPO, env={**environment(), **AS_ROOT}, capture_output=True,
        text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert mpi.returncode == 0, mpi.stderr
    assert mpi.stderr.count("INFO Fine-tuning") == 1
    assert "mpirun " not in mpi.stderr + mpi.stdout
    command, port = arguments(tmp_path / "slurm"), free_port()
    with started(tmp_path, [command] * 2, [srun_variables(rank, port) for rank in range(2)]) as processes:
        assert [process.wait(TIMEOUT) for process in processes] == [0, 0], last_line(tmp_path, 0)
    assert (tmp_path / "err.1").read_text() == ""
    reports = [read_json(tmp_path / name / "out" / "data_receipt.json") for name in ("mpi", "slurm")]
    assert [report["train"]["kept"] for report in reports] == [8, 8]
    losses = logged_losses(tmp_path / "mpi" / "out")
    assert len(losses) == 3
    assert logged_losses(tmp_path / "slurm" / "out") == losses
    assert not list(Path("/tmp").glob("qwen-data-*/train/ids.npy"))


def test_single_process_does_not_import_mpi4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun started one process, and importing mpi4py fails."""
    (tmp_path / "mpi4py.py").write_text("raise SystemError('mpi4py was imported')")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import finetune; finetune.main(sys.argv[1:])"
    result = run("-c", code, *arguments(tmp_path)[2:])
    assert result.returncode == 0, result.stderr


def test_inconsistent_variables_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the command line is parsed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("finetune.py", "--no_such_flag")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "finetune.py: error: WORLD_SIZE=2 is set, but RANK is not. "
        "Start the processes with torchrun, which sets all of them, or unset it\n"
    )


def test_differing_arguments_and_broken_data_are_reported_once(tmp_path: Path) -> None:
    """Two runs at once: in one the arguments of the ranks differ, in the other the data is broken."""
    for name in ("args", "data"):
        (tmp_path / name).mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text('[{"conversations": []}]')
    command = arguments(tmp_path / "args")
    other = [*command, "--learning_rate", "1e-3"]
    faulty = [*arguments(tmp_path / "data"), "--data_path", str(broken)]
    ports = [free_port(), free_port()]
    commands = [command, other, faulty, faulty]
    variables = [torchrun_variables(number % 2, ports[number // 2]) for number in range(4)]
    with started(tmp_path, commands, variables) as processes:
        assert [process.wait(TIMEOUT) for process in processes] == [2] * 4
    outputs = [(tmp_path / f"err.{number}").read_text() for number in range(4)]
    assert outputs[0] == (
        "finetune.py [rank 0]: error: rank 1: --learning_rate 0.001, rank 0: 5e-05. "
        "Start all processes with the same command and the same installation\n"
    )
    assert outputs[1] == outputs[3] == ""
    assert outputs[2].startswith(f'finetune.py [rank 0]: error: {broken}:1 (record 1): "conversations" is empty')
    assert outputs[2].count("\n") == 1
    assert not (tmp_path / "args" / "out").exists()
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_is_reported(tmp_path: Path, stopped: int) -> None:
    """Without torchrun rank 0 hosts the store, so no message arrives while it is stopped."""
    command, port = arguments(tmp_path, "--max_steps", 100000, "--heartbeat_timeout", 5), free_port()
    log = tmp_path / "out" / "training_log.jsonl"
    with started(tmp_path, [command] * 2, [torchrun_variables(rank, port) for rank in range(2)]) as processes:
        until = time.monotonic() + TIMEOUT
        while not log.exists() or log.read_text().count("\n") < 20:
            assert time.monotonic() < until and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        os.kill(fork_server.process_of(processes[stopped].pid), signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert processes[1 - stopped].wait(TIMEOUT) == 1
        assert 4 < time.monotonic() - stopped_at < 30
    line = last_line(tmp_path, 1 - stopped)
    if stopped == 1:
        assert line.startswith("finetune.py [rank 0]: error: rank 1 has sent no heartbeat for ")
        assert "; it was last seen at step " in line
    else:
        assert line.startswith("finetune.py [rank 1]: error: no message from the other processes for ")
        assert f"rank 0, which relays them at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}, cannot be reached" in line
    assert line.endswith(". --resume_from_checkpoint auto resumes from the last checkpoint")
