"""The engine that a command line selects, and the conflicts that are refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from console import pip_command
from errors import ConfigError
from tests.golden import REPO, SMALL
from tests.models import TINY, write_later_checkpoint
from training.config.args import RunArguments
from training.config.engines import find_engine
from training.config.parsing import parse_args
from training.engine_checks import check_engine

DATA = SMALL / "train.json"
CONFIGS = REPO / "finetune"


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def parse(*flags: object) -> RunArguments:
    good = ["--model_name_or_path", TINY, "--data_path", DATA, "--output_dir", "out"]
    return parse_args([str(flag) for flag in (*good, *flags)])


def faults(*flags: object) -> list[str]:
    """Return the conflicts, without the one that DeepSpeed is not installed: its config is checked anyway."""
    messages = [str(fault) for fault in check_engine(parse(*flags))]
    return [fault for fault in messages if "DeepSpeed is not installed" not in fault]


def write_config(folder: Path, **values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **values}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("flags", "name", "title"),
    [
        ((), "ddp", "DDP"),
        (("--deepspeed", CONFIGS / "ds_config_zero2.json"), "zero2", "DeepSpeed ZeRO-2"),
        (("--deepspeed", CONFIGS / "ds_config_zero3.json"), "zero3", "DeepSpeed ZeRO-3"),
        (("--deepspeed", CONFIGS / "ds_config_zero2_offload.json"), "zero2", "DeepSpeed ZeRO-2 with offloading"),
        (("--deepspeed", CONFIGS / "ds_config_zero3_offload.json"), "zero3", "DeepSpeed ZeRO-3 with offloading"),
        (("--deepspeed", '{"zero_optimization": {"stage": 1}}'), "zero1", "DeepSpeed ZeRO-1"),
        (("--fsdp",), "fsdp2", "FSDP2"),
        (("--fsdp", "--fsdp_config", CONFIGS / "fsdp_config.json"), "fsdp2", "FSDP2"),
    ],
)
def test_engine_of_a_command_line(flags: tuple[object, ...], name: str, title: str) -> None:
    engine = find_engine(parse(*flags).trainer)
    assert (engine.name, engine.title) == (name, title)
    assert engine.shards_parameters == (name in ("zero3", "fsdp2"))
    assert faults(*flags) == []
    for mode in (("--use_lora",), ("--use_lora", "--trainable_embeddings", "full")):
        assert faults(*flags, *mode) == []


def test_one_process_has_no_engine_and_no_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    assert find_engine(parse().trainer).name == "none"
    [fault] = faults("--fsdp")
    assert fault == "--fsdp needs several processes to shard the model over. Start it with torchrun"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no such file or directory"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4"),
        ('{"zero_optimization": 3}', "zero_optimization.stage is null"),
    ],
)
def test_unusable_config_is_refused(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    [fault] = faults("--deepspeed", path)
    assert fault.startswith(f"--deepspeed {path}: {what}")
    with pytest.raises(ConfigError):
        find_engine(parse("--deepspeed", path).trainer)


def test_every_key_that_contradicts_a_flag_is_named(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        train_micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=2,
        train_batch_size=16,
        gradient_clipping="auto",
        bf16={"enabled": True},
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto"}},
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    )
    where = f"--deepspeed {path}: "
    flags = ("--per_device_train_batch_size", 4, "--learning_rate", 3e-4, "--lr_scheduler_type", "cosine")
    assert [fault.removeprefix(where).partition(". ")[0] for fault in faults("--deepspeed", path, *flags)] == [
        "gradient_accumulation_steps is 2, --gradient_accumulation_steps is 16",
        "train_batch_size is 16, --per_device_train_batch_size x --gradient_accumulation_steps x 2 processes is 128",
        "bf16.enabled is True, --bf16 is False",
        "optimizer.params.lr is 0.001, --learning_rate is 0.0003",
        "scheduler.type is WarmupLR, --lr_scheduler_type is cosine",
    ]
    agreeing = (
        "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--bf16", "--learning_rate", 1e-3,
        "--lr_scheduler_type", "constant_with_warmup",
    )  # fmt: skip
    assert faults("--deepspeed", path, *agreeing) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--deepspeed", CONFIGS / "ds_config_zero2.json", "--fsdp"), "--deepspeed and --fsdp are two engines"),
        (("--fsdp_config", CONFIGS / "fsdp_config.json"), "--fsdp_config needs --fsdp"),
        (("--fsdp", "--fsdp_config", '{"fsdp_version": 1}'), "version 1 is not supported"),
        (("--fsdp", "--fp16"), "--fsdp does not support --fp16"),
        (("--fsdp", "--fsdp_config", '{"cpu_offload": true}'), "cpu_offload needs a GPU"),
        (
            ("--fsdp", "--gradient_checkpointing", "--fsdp_config", '{"activation_checkpointing": true}'),
            "activation_checkpointing and --gradient_checkpointing (on by default) do the same",
        ),
        (("--fsdp", "--use_lora", "--q_lora"), "--q_lora: quantised weights cannot be sharded by FSDP2"),
        (
            ("--deepspeed", CONFIGS / "ds_config_zero3.json", "--use_lora", "--q_lora"),
            "--q_lora: quantised weights cannot be sharded by DeepSpeed ZeRO-3",
        ),
        (("--deepspeed", CONFIGS / "ds_config_zero2.json", "--pure_bf16"), "--deepspeed does not support --pure_bf16"),
    ],
)
def test_unsupported_combination_is_refused(flags: tuple[object, ...], message: str) -> None:
    [fault] = faults(*flags)
    assert message in fault


def test_fsdp_refuses_trained_rows_of_a_tied_embedding(tmp_path: Path) -> None:
    model = write_later_checkpoint(tmp_path, "qwen2", tied=True)
    flags = ("--model_name_or_path", model, "--use_lora", "--trainable_embeddings", "chatml_tokens")
    [fault] = faults("--fsdp", *flags)
    assert "rows of an embedding tied to the head" in fault
    assert faults("--deepspeed", CONFIGS / "ds_config_zero3.json", *flags) == []


def test_missing_deepspeed_is_refused_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [fault] = (str(each) for each in check_engine(parse("--deepspeed", CONFIGS / "ds_config_zero2.json")))
    assert f"DeepSpeed is not installed. {pip_command('requirements_distributed.txt')}" in fault
