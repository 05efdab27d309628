"""Torchrun's variables: ranks for decisions and messages, and the check that they are complete and consistent."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import pytest

import processes
from errors import ConfigError
from processes import check_variables, set_single_process

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables that the tests run under, and drop those that a test sets."""
    monkeypatch.setattr("os.environ", {})


def set_variables(variables: Mapping[str, str | None]) -> None:
    os.environ.update({name: value for name, value in variables.items() if value is not None})


def test_process_without_variables_is_the_only_one() -> None:
    assert (processes.count_processes(), processes.has_several_processes()) == (1, False)
    assert processes.is_first() and processes.is_first_on_host() and not processes.is_restart()
    assert processes.describe_process() == ""


def test_variables_of_one_of_several_processes() -> None:
    set_variables(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert (processes.count_processes(), processes.has_several_processes()) == (4, True)
    assert not processes.is_first() and not processes.is_first_on_host() and processes.is_restart()
    assert processes.describe_master() == "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
    assert processes.master_address() == ("10.0.0.1", 29500)


def test_rank_is_described_with_its_host_if_there_are_several_hosts() -> None:
    set_variables(TORCHRUN)
    assert processes.describe_process() == "rank 3"
    os.environ["GROUP_WORLD_SIZE"] = "2"
    assert processes.describe_process() == f"rank 3 ({socket.gethostname()})"
    assert processes.describe_process(with_host=False) == "rank 3"


def test_single_process_variables_are_complete() -> None:
    set_single_process()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    assert {name: os.environ[name] for name in TORCHRUN if name != "MASTER_PORT"} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE=4 is set, but RANK is not. Start the processes with torchrun"),
        ({"WORLD_SIZE": None}, "RANK=3 is set, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": None}, "RANK=3 is set, but LOCAL_RANK is not"),
        ({"RANK": None, "WORLD_SIZE": None}, "LOCAL_RANK=1 is set, but RANK is not"),
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number above 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number above 0"),
        ({"WORLD_SIZE": "1"}, "RANK=3 is not below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE=4 processes need MASTER_ADDR, which is not set"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE=4 processes need MASTER_PORT, which is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
    ],
)
def test_inconsistent_variable_is_reported(change: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        set_variables(TORCHRUN | change)
        check_variables()
