"""What ``benchmarks.methods`` compares: flags that finetune.py takes, and ratios within a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.methods import GROUPS, as_table, summarise
from benchmarks.step_contenders import MODES
from tests.golden import SMALL
from tests.models import TINY
from training.checks import check_args
from training.config.parsing import parse_args


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, flags in GROUPS.items() for name in flags])
def test_finetune_takes_the_flags_of_every_method(tmp_path: Path, group: str, name: str) -> None:
    if name.startswith("schedule-free"):
        pytest.importorskip("schedulefree")
    valid = ["--model_name_or_path", str(TINY), "--data_path", str(SMALL / "train.json"), "--output_dir"]
    check_args(parse_args([*valid, str(tmp_path / "out"), *MODES[group], *GROUPS[group][name]]))


def test_ratios_are_medians_within_a_round() -> None:
    def rows(*seconds: float, memory: int) -> list[dict[str, Any]]:
        return [{"seconds": each, "memory_mib": memory} for each in seconds]

    results = summarise({"plain": rows(1, 2, 10, memory=100), "other": rows(1.5, 3, 10, memory=130)})
    assert results["other"]["time_to_first"] == 1.5 and results["other"]["memory_to_first_mib"] == 30
    assert results["other"]["seconds_per_step"] == 3
    assert "| other | 3 | 1.5 | 130 | +30 |" in as_table(results)
