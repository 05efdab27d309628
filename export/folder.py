"""What lies beside the weights of a merged checkpoint: config, tokenizer, generation settings, code."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from checkpoints.files import load_json, save_json
from export.chat import write_chat_template, write_generation_config
from export.merging import Merge, layout_of
from export.model_card import CardFacts, write_model_card
from export.standalone import write_code

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer_config.json", "qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

# What a converted tokenizer consists of, besides the settings that both have.
_COMMON = ("tokenizer_config.json", "chat_template.jinja")
_KEPT = {"qwen": (*_COMMON, "qwen.tiktoken", "qwen_extra.tiktoken"), "qwen2": (*_COMMON, "tokenizer.json")}


def write_others(merge: Merge, folder: Path) -> None:
    """Write everything but the weights; what training may have changed comes from the first adapter that has it."""
    sources = [*(each.adapter.folder for each in merge.adapters), merge.base.folder]
    save_json(merge.config, folder / "config.json")
    copy_tokenizer(sources, folder)
    if merge.layout != layout_of(merge.base.config):
        convert_tokenizer(folder, merge.layout)
    copy_first("generation_config.json", sources, folder)
    write_generation_config(folder)
    write_chat_template(folder)
    if merge.layout == "qwen":
        write_code(folder)


def write_card(merge: Merge, name: str, verified: str, folder: Path) -> None:
    """Write ``README.md``.

    Args:
        name: what the folder is going to be called.
        verified: what comparing it has found; empty where it was not compared.
    """
    named = merge.adapters[0].adapter.config.get("base_model_name_or_path")
    facts = CardFacts(
        name=name,
        base=str(named or merge.base.folder.name),
        base_folder=merge.base.folder,
        adapters=tuple((each.adapter.folder, each.weight) for each in merge.adapters),
        layout=str(merge.config["model_type"]),
        model_type=merge.base.model_type,
        dtype=merge.dtype,
        changed=merge.summary(),
        verification=tuple(verified.splitlines()),
    )
    write_model_card(folder, facts)


def convert_tokenizer(folder: Path, layout: str) -> None:
    """Bring the tokenizer in a folder to what belongs to a layout; where there is none nothing is done."""
    from export.layouts.tokenizer import save_fast_tokenizer, save_rank_tokenizer

    needed = "qwen.tiktoken" if layout == "qwen2" else "tokenizer.json"
    if not (folder / needed).is_file():
        logger.warning("there is no %s: the folder gets no tokenizer", needed)
        return
    convert = save_fast_tokenizer if layout == "qwen2" else save_rank_tokenizer
    before = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    convert(folder, folder)
    for name in set(before) - set(_KEPT[layout]):
        (folder / name).unlink()


def copy_tokenizer(sources: Sequence[Path], folder: Path) -> None:
    """Copy the tokenizer's files, each from the first folder that has it: training may have changed the template."""
    for name in TOKENIZER_FILES:
        copy_first(name, sources, folder)
    config_file = folder / "tokenizer_config.json"
    if not config_file.is_file():
        return
    config = load_json(config_file)
    if extra := config.get("extra_vocab_file"):
        copy_first(Path(extra).name, sources, folder)
    if config.pop("auto_map", None):
        save_json(config, config_file)


def copy_first(name: str, sources: Sequence[Path], folder: Path) -> None:
    """Copy the first file of that name, if there is one."""
    source = next((source / name for source in sources if (source / name).is_file()), None)
    if source is not None:
        shutil.copyfile(source, folder / name)
