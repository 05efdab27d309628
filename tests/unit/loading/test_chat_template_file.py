"""``--chat_template``: the file, the template of adapters, and the files of a result."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import merge_lora
from checkpoints.base_files import read_base_files, write_files
from errors import ConfigError
from loading.chat_template_file import adapters_template, read_chat_template, replace_chat_template
from loading.checkpoint import load_checkpoint
from scripts import ask
from tests.bases import BASES, TEMPLATE
from tests.commands import finetune_here
from tests.models import TINY, write_conversations, write_later_checkpoint
from tests.own_templates import CHATML, OWN, REFUSED

BRACKETS = OWN["brackets"].replace("eos_token", "'<|endoftext|>'")
QUESTION, REPLY = "Who are you?", "I am [INST] tiny <|im_end|>"


def test_what_is_trained_is_what_is_asked_and_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, out, merged = tmp_path / "base", tmp_path / "out", tmp_path / "merged"
    write_later_checkpoint(base, "qwen2", TEMPLATE)
    (tmp_path / "own.jinja").write_text(BRACKETS)
    data = write_conversations(tmp_path / "train.json", [[("user", QUESTION), ("assistant", REPLY)]])
    finetune_here(
        "--model_name_or_path", base, "--chat_template", tmp_path / "own.jinja", "--data_path", data, "--use_lora",
        "--output_dir", out, "--lora_r", 16, "--lora_alpha", 32, "--lora_dropout", 0, "--max_steps", 60,
        "--learning_rate", 2e-2, "--save_strategy", "no",
    )  # fmt: skip
    assert (out / "chat_template.jinja").read_text() == BRACKETS
    merge_lora.main(["--adapter", str(out), "--output", str(merged)])
    assert load_checkpoint(str(merged)).family == load_checkpoint(str(base), adapters=[str(out)]).family
    [end] = load_checkpoint(str(merged)).tokenizer("<|endoftext|>").input_ids
    assert end in json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    for model in (["--model_name_or_path", base, "--adapter", out], ["--model_name_or_path", merged]):
        capfd.readouterr()
        ask.main([*map(str, model), "--max_new_tokens", "40", QUESTION])
        assert capfd.readouterr().out == f"{REPLY}\n"


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("v1", "few files")])
def test_result_has_one_template(base: str, tmp_path: Path) -> None:
    files = read_base_files(BASES[base](tmp_path / "base"))
    replace_chat_template(files, BRACKETS)
    write_files(files, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == BRACKETS


BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot read .*x.jinja: No such file"),
    "empty": (b" \n", "x.jinja is empty"),
    "not text": (b"\xff\xfe{{", "x.jinja is not UTF-8"),
    "zero byte": (b"{{ 1 }}\0", "contains a zero byte"),
    "JSON": (json.dumps({"chat_template": BRACKETS}).encode(), "is JSON, not a template"),
    "large": (b"x" * (1 << 21), "is larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_file_that_is_no_template_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--chat_template.*{message}"):
        read_chat_template(str(tmp_path / "x.jinja"))


def test_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--chat_template .* is a folder\. Give a file"):
        read_chat_template(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match=r"is a folder\. Give .*/chat_template.jinja$"):
        read_chat_template(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a named pipe"):
        read_chat_template(str(tmp_path / "pipe"))


def test_qwen_v1_takes_no_template(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match=r"^--chat_template .*: Qwen v1 has one fixed chat format"):
        load_checkpoint(str(TINY), chat_template=str(tmp_path / "x.jinja"))


def test_template_that_cannot_be_used_is_named_by_its_flag(tmp_path: Path) -> None:
    base = write_later_checkpoint(tmp_path / "base", "qwen2", TEMPLATE)
    (tmp_path / "x.jinja").write_text(REFUSED["no prompt"][0])
    with pytest.raises(ConfigError, match=r"^--chat_template \S+/x\.jinja: the chat template ignores add_generation"):
        load_checkpoint(str(base), chat_template=str(tmp_path / "x.jinja"))


def test_template_of_adapters_counts_if_it_is_another_one(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("same", "other", "third", "none")}
    for name, template in zip(folders, (TEMPLATE + "\n", BRACKETS, CHATML["trimmed"], None), strict=True):
        folders[name].mkdir()
        (folders[name] / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    same, other, third, none = map(str, folders.values())
    assert adapters_template([same, none], TEMPLATE) is None is adapters_template([same], {"default": TEMPLATE})
    assert adapters_template([none, other], TEMPLATE) == BRACKETS
    with pytest.raises(ConfigError, match=r"other and .*third were trained with different chat templates"):
        adapters_template([other, third], TEMPLATE)
