"""Hints for names and values of other toolkits."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import ConfigError
from training.config.args import GROUPS
from training.config.command_line import parse_command_line
from training.config.flags import flags_of
from training.config.old_flags import OLD_FLAGS
from training.config.parsing import parse_args
from training.config.synonyms import _EXPLAINED, _FLAG_OF
from training.config.trainer_flags import trainer_flags, transformers_flags

KNOWN = {name for group in GROUPS.values() for name in flags_of(group)} | set(trainer_flags())


def test_every_hint_names_a_flag_and_hides_none() -> None:
    assert set(_FLAG_OF.values()) - KNOWN == set()
    known = {*KNOWN, *OLD_FLAGS, *transformers_flags(), "config", "help", "help_all"}
    assert (_FLAG_OF.keys() | _EXPLAINED.keys()) & known == set()
    assert _FLAG_OF.keys() & _EXPLAINED.keys() == set()


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("lora_rank", "lora_r"), ("cutoff_len", "model_max_length"), ("max_seq_length", "model_max_length"),
        ("max_length", "model_max_length"), ("dataset", "data_path"), ("model", "model_name_or_path"),
        ("lora_target", "lora_target_modules"), ("batch_size", "per_device_train_batch_size"), ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"), ("adapter_name_or_path", "lora_weight_path"), ("val_size", "eval_split"),
        ("LORA-RANK", "lora_r"), ("neat_packing", "packing"),
    ],
)  # fmt: skip
def test_names_of_other_toolkits_lead_to_the_flag(name: str, flag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"unknown flag --\w+ \(did you mean --{flag}\?\)"):
        parse_args([f"--{name}", "8"])
    (tmp_path / "run.yaml").write_text(f"seed: 1\n{name}: 8\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml:2: unknown flag \w+ \(did you mean {flag}\?\)"):
        parse_args([str(tmp_path / "run.yaml")])


def test_what_is_no_flag_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --template \(the chat format is read from the checkpoint\)"):
        parse_args(["--template=qwen"])


@pytest.mark.parametrize(
    "words", [["--fsdp", "full_shard auto_wrap"], ["--fsdp", "full_shard", "auto_wrap"], ["--fsdp", "shard_grad_op"]]
)
def test_words_of_fsdp1_are_explained(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"true or false \(FSDP2 needs no words such as full_shard or auto_wrap; "):
        parse_args(words)


def test_a_left_over_word_is_explained_by_the_flag_before_it() -> None:
    with pytest.raises(ConfigError, match="command line: 9 is left over: --lora_r takes one value, a whole number"):
        parse_args(["--lora_r", "8", "9", "--seed", "1"])


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_help_follows_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ours = {title: flags_of(group) for title, group in GROUPS.items()}
    with pytest.raises(SystemExit):
        parse_command_line(["--help"], ours, trainer_flags(), {})
    help = capsys.readouterr().out.splitlines()
    prose = [line for line in help if not line.lstrip().startswith("-") and "{" not in line]
    assert max(map(len, prose)) <= columns
    assert columns < 100 or max(map(len, prose)) > 90
