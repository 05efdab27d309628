"""Tiny bases whose files beside the weights have each of the forms that users' folders have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loading.checkpoint import load_checkpoint
from tests.commands import read_json
from tests.models import change_json, copy_checkpoint, write_later_checkpoint
from training.config.parsing import parse_args
from training.model import choose_embeddings, load_training_model
from training.run_folder.saving import save_model
from training.training_arguments import build_training_arguments

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL_TEMPLATE = TEMPLATE + "{# tools #}"
ROPE_THETA = 500_000.0


def write_published(folder: Path, model_type: str = "qwen2", hidden_size: int = 32) -> Path:
    """Write a base as published since Qwen1.5: files of transformers 4, in an indent of their own."""
    write_later_checkpoint(folder, model_type, hidden_size=hidden_size)
    config = {key: value for key, value in read_json(folder / "config.json").items() if key != "rope_parameters"}
    dtype = {"torch_dtype": config.pop("dtype"), "transformers_version": "4.43.1"}
    ids = {"rope_theta": ROPE_THETA, "bos_token_id": 3, "eos_token_id": 700, "pad_token_id": 0}
    _write(folder / "config.json", config | dtype | ids)
    fast = read_json(folder / "tokenizer.json")
    fast["model"] |= {"ignore_merges": False, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    _write(folder / "tokenizer.json", fast)
    _write(folder / "vocab.json", fast["model"]["vocab"])
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special", "content")
    tokens = {str(token["id"]): {flag: token[flag] for flag in flags} for token in fast["added_tokens"]}
    settings: dict[str, Any] = {
        "add_prefix_space": False, "added_tokens_decoder": tokens,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None, "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 512,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", settings)
    generation = {
        "bos_token_id": 700,
        "pad_token_id": 700,
        "eos_token_id": [702, 700],
        "do_sample": False,
        "top_p": 0.8,
    }
    _write(folder / "generation_config.json", generation | {"repetition_penalty": 1.05})
    return folder


def write_current(folder: Path) -> Path:
    """Write a base as transformers 5 saves it, with named chat templates in files."""
    write_later_checkpoint(folder, "qwen2", TEMPLATE)
    rope = {"rope_theta": ROPE_THETA, "rope_type": "default"}
    change_json(folder / "config.json", rope_parameters=rope, bos_token_id=1)
    change_json(folder / "generation_config.json", eos_token_id=700, pad_token_id=5, _from_model_config=True)
    change_json(
        folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"], tokenizer_class="TokenizersBackend"
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    return folder


def write_with_named_templates(folder: Path) -> Path:
    """Write a base with named chat templates in tokenizer_config.json."""
    write_published(folder)
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TOOL_TEMPLATE}]
    settings = read_json(folder / "tokenizer_config.json") | {"chat_template": named}
    _write(folder / "tokenizer_config.json", settings)
    return folder


def write_with_few_files(folder: Path) -> Path:
    """Write a base without settings of tokenizer and generation."""
    write_published(folder)
    for name in ("tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    return folder


def write_with_foreign_tokenizer(folder: Path) -> Path:
    """Write a base whose tokenizer splits numbers and lines in another way than Qwen's."""
    write_published(folder)
    fast = read_json(folder / "tokenizer.json")
    in_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    fast |= {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, in_letters]}}
    _write(folder / "tokenizer.json", fast)
    return folder


def write_v1(folder: Path) -> Path:
    """Write a Qwen v1 base as published: with code, and of the raw format."""
    copy_checkpoint(folder, chat_format="raw")
    change_json(folder / "config.json", auto_map={"AutoConfig": "configuration_qwen.QWenConfig"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]})
    (folder / "configuration_qwen.py").write_text("raise RuntimeError")
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "published": write_published,
    "current": write_current,
    "named templates": write_with_named_templates,
    "few files": write_with_few_files,
    "foreign tokenizer": write_with_foreign_tokenizer,
    "v1": write_v1,
}


def train(base: Path, output: Path, *flags: str) -> Path:
    """Save a model whose trained parameters have changed at random, as a run with these flags does at its end."""
    checkpoint, args = load_checkpoint(str(base)), parse_args(list(flags))
    policy = choose_embeddings(args.lora, checkpoint)
    model = load_training_model(checkpoint, args, build_training_arguments(args), policy)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    save_model(model, checkpoint, output, show_progress=False)
    return output


def copy_of(folder: Path, target: Path, *left_out: str) -> Path:
    """Copy a folder without some of its files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out))
    return target


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
