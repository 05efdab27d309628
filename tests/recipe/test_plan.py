"""``scripts.plan`` and ``finetune.py --plan``: the table, its file, and one line about what cannot be planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import finetune
from scripts import plan
from tests.commands import read_json, run_here
from tests.models import TINY, change_json, copy_checkpoint, write_conversations

LORA = ("--use_lora", "--trainable_embeddings", "none", "--model_max_length", 64, "--use_cpu")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    return folder


def planned(*words: object) -> int:
    return run_here(plan.main, "scripts.plan", words)


def test_a_config_is_enough(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert planned("--model_name_or_path", config, *LORA, "--json", file) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  peak +[\d.]+ MiB of [\d.]+ GiB: fits", shown, re.MULTILINE)
    assert "trained embeddings: none" in shown
    assert re.search(r"^  step +[\d.]+ .?FLOP per device: 8 x ", shown, re.MULTILINE)
    values = read_json(file)
    run = values["run"]
    assert run["fits"] and sum(run["components"].values()) == run["peak_bytes"] > 0
    assert run["batch"] == {"lengths": [64, 64], "targets": 2 * 63}
    assert list(config.iterdir()) == [config / "config.json"]


def test_finetune_plans_the_longest_batch_of_its_data_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = copy_checkpoint(tmp_path / "model"), write_conversations(tmp_path / "data.json")
    words = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "output", *LORA, "--plan"]
    assert run_here(finetune.main, "finetune.py", [*words, "--no_data_cache"]) == 0
    tokens = int(re.search(r"micro-batch +2 samples: (\d+) tokens", capsys.readouterr().out).group(1))  # type: ignore[union-attr]
    assert 64 < tokens < 128 and not (tmp_path / "output").exists()


def test_a_run_that_does_not_fit_exits_with_1_and_names_what_fits(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 GiB is left for Python; a megabyte is not enough for anything."""
    assert planned("--model_name_or_path", config, *LORA, "--gpu_memory", 1.001) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "No change makes it fit into 1.001 GiB: the least is " in shown.splitlines()[-1]


FAULTS = {
    "no model": (("--model_name_or_path", "nowhere"), "nowhere"),
    "no memory": (("--gpu_memory", 0), "--gpu_memory 0"),
    "memory with a unit": (("--gpu_memory", "80GB"), "--gpu_memory 80GB is not valid; give the GiB of a device"),
    "endless memory": (("--gpu_memory", "1e400"), "--gpu_memory 1e400 is not valid"),
    "no gpu": (("--gpus", 0), "--gpus 0"),
    "half a gpu": (("--gpus", 1.5), "--gpus 1.5 is not valid; give 1 to 100000"),
    "too many processes": (("--gpus", 10**5, "--hosts", 2), "give fewer of either"),
    "no host": (("--hosts", 0), "--hosts 0"),
    "no rate": (("--share", 0), "--share 0"),
    "unknown device": (("--device", "H9000"), "--device H9000"),
    "no data": (("--data_path", "missing.json"), "missing.json"),
    "refused flag": (("--use_liger_kernel", "True"), "--use_liger_kernel"),
    "unknown flag": (("--gpu_memori", 80), "--gpu_memori"),
    "no folder for the file": (("--json", "nowhere/plan.json"), "nowhere"),
    "no rows": (("--per_device_train_batch_size", 0), "--per_device_train_batch_size 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_exit_code_2(config: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = FAULTS[fault]
    assert planned("--model_name_or_path", config, *LORA, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and named in lines[0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "many"}}, "bits"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_planned_is_one_line(
    config: Path, values: dict[str, object], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(config / "config.json", **values)
    assert planned("--model_name_or_path", config, *LORA, "--q_lora") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and named in lines[0]
