"""Write the files beside the weights of an exported checkpoint: config, tokenizer, generation settings, code, card."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from checkpoints.base_files import CONFIG, read_base_files, set_values, write_files
from checkpoints.companions import TOKENIZER_FILES
from export.chat import write_chat_template, write_generation_config
from export.layouts.qwen2_names import layout_of_config
from export.merging import MergePlan
from export.model_card import CardFacts, write_model_card
from export.standalone import write_code

logger = logging.getLogger(__name__)

# Files of a converted tokenizer in each layout.
_COMMON = ("tokenizer_config.json", "chat_template.jinja")
_FILES_OF_LAYOUT = {"qwen": (*_COMMON, "qwen.tiktoken", "qwen_extra.tiktoken"), "qwen2": (*_COMMON, "tokenizer.json")}


def write_companion_files(plan: MergePlan, folder: Path) -> None:
    """Write every file but the weights and the card.

    Training may have changed tokenizer and generation settings: these come from the first adapter that has them, else
    from the base.
    """
    files = read_base_files(plan.base.folder, [each.adapter.folder for each in plan.adapters])
    set_values(files, CONFIG, plan.config)
    write_files(files, folder)
    if plan.layout != layout_of_config(plan.base.config):
        convert_tokenizer(folder, plan.layout)
    write_generation_config(folder)
    write_chat_template(folder)
    if plan.layout == "qwen":
        write_code(folder)


def write_card(plan: MergePlan, name: str, verification: str, differences: Sequence[str], folder: Path) -> None:
    """Write ``README.md``.

    Args:
        name: final name of the folder.
        verification: result of the comparison with base and adapters; empty if it was skipped.
        differences: lines about what was trained and is not in the folder.
    """
    base_name = plan.adapters[0].adapter.config.get("base_model_name_or_path")
    facts = CardFacts(
        name=name,
        base=str(base_name or plan.base.folder.name),
        base_folder=plan.base.folder,
        adapters=tuple((each.adapter.folder, each.weight) for each in plan.adapters),
        layout=str(plan.config["model_type"]),
        model_type=plan.base.model_type,
        dtype=plan.dtype,
        changed=plan.summary(),
        verification=tuple(verification.splitlines()),
        differences=tuple(differences),
    )
    write_model_card(folder, facts)


def convert_tokenizer(folder: Path, layout: str) -> None:
    """Convert the tokenizer in ``folder`` to ``layout``, in place; log a warning if there is none."""
    # Imported here: the tokenizers library is not needed by a merge that keeps its layout.
    from export.layouts.tokenizer import save_fast_tokenizer, save_rank_tokenizer

    needed = "qwen.tiktoken" if layout == "qwen2" else "tokenizer.json"
    if not (folder / needed).is_file():
        logger.warning("%s is missing: no tokenizer is written", needed)
        return
    convert = save_fast_tokenizer if layout == "qwen2" else save_rank_tokenizer
    before = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    convert(folder, folder)
    for name in set(before) - set(_FILES_OF_LAYOUT[layout]):
        (folder / name).unlink()
