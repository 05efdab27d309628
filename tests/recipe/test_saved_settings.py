"""What is saved beside the weights: named chat templates, and the path of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import finetune
from tests.commands import finetune_here, names_in, read_json, run_here
from tests.models import copy_checkpoint, write_conversations, write_later_checkpoint

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def arguments(folder: Path, model: object, steps: int, *flags: object) -> list[object]:
    return [
        "--model_name_or_path", model, "--data_path", write_conversations(folder / "train.json"), "--output_dir",
        folder / "out", "--use_lora", "--max_steps", steps, "--save_strategy", "steps", "--save_steps", 1, *flags,
    ]  # fmt: skip


def test_named_chat_templates_are_kept_on_every_way_to_a_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """When a run resumes, continues after its end, and replaces its own result."""
    base = write_later_checkpoint(tmp_path / "base", "qwen2", TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = templates = {"default": TEMPLATE, "tool_use": TEMPLATE + "{# tools #}"}
    tokenizer.save_pretrained(base)
    for steps, flags in ((1, ()), (2, ("--resume_from_checkpoint", "auto")), (1, ("--overwrite_output_dir",))):
        code = run_here(finetune.main, "finetune.py", arguments(tmp_path, base, steps, "--use_cpu", "True", *flags))
        assert code == 0, capfd.readouterr().err
        for folder in (tmp_path / "out", tmp_path / "out" / f"checkpoint-{steps}"):
            assert AutoTokenizer.from_pretrained(folder).chat_template == templates
    assert "checkpoint-2" not in names_in(tmp_path / "out")


def test_an_adapter_names_its_base_by_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened from other folders, too. Names of models on a hub stay as they are."""
    copy_checkpoint(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    finetune_here(*arguments(tmp_path, "models/../models/base/", 1))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "models" / "base")
