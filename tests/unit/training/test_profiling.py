"""--profile_steps: a trace and a table of the requested steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from errors import ConfigError
from tests.commands import finetune_here, names_in
from tests.models import TINY, write_conversations
from training.config.args import parse_profile_steps


def run(tmp_path: Path, steps: str) -> Path:
    output = tmp_path / "out"
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json"), "--output_dir",
        output, "--max_steps", 4, "--per_device_train_batch_size", 2, "--profile_steps", steps, "--save_strategy", "no",
    )  # fmt: skip
    return output / "profile"


def steps_in(folder: Path) -> int:
    """Return the number of optimizer steps in a trace."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


def test_both_ends_are_profiled_and_operators_are_sorted_by_time(tmp_path: Path) -> None:
    folder = run(tmp_path, "2:3")
    assert names_in(folder) == ["operators.txt", "trace.json"]
    assert steps_in(folder) == 2
    table = (folder / "operators.txt").read_text(encoding="utf-8")
    assert "aten::mm" in table and "Self CPU time total" in table
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if "%" in line]
    shares = [float(row[header.index("Self CPU %")].rstrip("%")) for row in rows]
    assert len(shares) > 10 and shares == sorted(shares, reverse=True)


def test_profile_is_saved_if_the_run_ends_early(tmp_path: Path) -> None:
    assert steps_in(run(tmp_path, "4:9")) == 1


def test_steps_that_were_not_reached_are_warned_about(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "5:8")
    assert not folder.exists()
    assert "WARNING --profile_steps 5:8: nothing was profiled, the run ended at step 4\n" in capfd.readouterr().err


def test_range_of_steps() -> None:
    assert parse_profile_steps("5:8") == (5, 8)
    assert parse_profile_steps("3:3") == (3, 3)


@pytest.mark.parametrize(
    "value", ["", "5", "5:", ":8", "8:5", "0:3", "-1:3", "5:8:2", "5-8", "a:b", " 5:8", "5:8\n", "٥:٨"]
)
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_profile_steps(value)
    assert str(refused.value) == (
        f"--profile_steps {value} is not a range of optimizer steps. "
        "Give FIRST:LAST, both included and counted from 1, such as 5:8"
    )
