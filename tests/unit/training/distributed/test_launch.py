"""Translation of launchers' variables into torchrun's."""

from __future__ import annotations

import os
import sys

import pytest

from errors import ConfigError
from training.distributed.launch import detect_launcher, expand_node_list, expand_task_counts, slurm_port

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables that the tests run under, and drop those that a test sets."""
    monkeypatch.setattr("os.environ", {"PATH": os.environ["PATH"]})


def detected(**environment: str) -> dict[str, str]:
    """Return torchrun's variables after ``detect_launcher``."""
    os.environ.update(environment)
    detect_launcher()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_single_process_sets_nothing() -> None:
    assert detected() == {}
    assert detected(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="1") == {}
    assert detected(SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1") == {}
    assert detected(WORLD_SIZE="1") == {"WORLD_SIZE": "1"}


def test_single_process_with_local_rank_gets_an_address() -> None:
    """torch and accelerate expect a process group if LOCAL_RANK is set."""
    variables = detected(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    assert variables.keys() == set(NAMES)
    assert variables["MASTER_ADDR"] == "127.0.0.1"


def test_torchrun_takes_precedence() -> None:
    assert detected(**TORCHRUN) == TORCHRUN
    assert detected(**SRUN, **OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}) == TORCHRUN


def test_local_size_of_deepspeed_launcher() -> None:
    variables = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert detected(**variables, LOCAL_SIZE="2") == TORCHRUN


def test_srun_task() -> None:
    variables = detected(**SRUN)
    assert variables == TORCHRUN | {"MASTER_ADDR": "gpu07", "MASTER_PORT": str(slurm_port(SRUN))}
    assert slurm_port(SRUN) != slurm_port(SRUN | {"SLURM_STEP_ID": "1"})
    assert all(1024 <= slurm_port(SRUN | {"SLURM_JOB_ID": str(job)}) < 32768 for job in (0, 1, 10**6, 2**31))


def test_srun_task_keeps_a_given_address() -> None:
    assert detected(**SRUN, **ADDRESS) == TORCHRUN


def test_sbatch_script_is_a_single_process() -> None:
    script = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}
    assert detected(**script, SLURM_NTASKS="4") == {}


def test_task_that_sees_one_gpu_has_local_rank_0() -> None:
    assert detected(**SRUN, CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("hidden", ["", "-1", "0,1"])
def test_task_that_sees_all_gpus_keeps_its_local_rank(hidden: str) -> None:
    assert detected(**SRUN, CUDA_VISIBLE_DEVICES=hidden)["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("launcher", [OPEN_MPI, PMI])
def test_mpi_with_a_given_address_needs_no_mpi4py(launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    expected = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE" or launcher is OPEN_MPI}
    assert detected(**launcher, **ADDRESS) == expected


def test_mpi_takes_precedence_over_the_srun_that_started_its_daemons() -> None:
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert detected(**daemon, **OPEN_MPI, **ADDRESS) == TORCHRUN


def test_srun_that_sets_pmi_variables_needs_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert detected(**SRUN, **PMI)["MASTER_ADDR"] == "gpu07"


def test_missing_mpi4py_is_reported_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"Open MPI started 4 processes, and mpi4py, .*\. .* -m pip install mpi4py, "):
        detected(**OPEN_MPI)
    assert os.environ["RANK"] == "3"  # so that one rank reports it, not four


def test_world_size_alone_is_completed_by_the_launcher() -> None:
    """Scripts of sbatch often export WORLD_SIZE for all tasks."""
    assert detected(**SRUN, **ADDRESS, WORLD_SIZE="4") == TORCHRUN


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],other", ["node01", "node02", "node03", "node7", "other"]),
        ("a[9-11]-ib", ["a9-ib", "a10-ib", "a11-ib"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("", []),
    ],
)
def test_slurm_node_list(text: str, names: list[str]) -> None:
    assert expand_node_list(text) == names


@pytest.mark.parametrize(("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("", [])])
def test_slurm_task_counts(text: str, counts: list[int]) -> None:
    assert expand_task_counts(text) == counts
