"""Chat files of an exported folder: the chat template, and the generation settings that end an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chat.chatml import END_OF_TEXT, IM_END
from chat.stops import end_ids_of, stopping_generation_config
from chat.template import CHATML_TEMPLATE
from checkpoints.base_files import update_json
from checkpoints.companions import has_tokenizer
from checkpoints.files import load_json, save_text
from loading.opening import library_errors
from qwen_model.architectures import ARCHITECTURES
from qwen_model.tokenization_qwen import QWenTokenizer

logger = logging.getLogger(__name__)

_ADDED_TOKENS = '"added_tokens":'
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def write_chat_template(folder: Path) -> bool:
    """Write Qwen v1's chat template if a folder of Qwen v1 or Qwen2 has none.

    Qwen2 without a template is trained and prompted in the same format. The format of other families is unknown
    without a template: a warning is logged and nothing is written.

    Args:
        folder: contains ``config.json`` and the tokenizer's files.

    Returns:
        Whether the template was written.
    """
    config = load_json(folder / _TOKENIZER_CONFIG) if (folder / _TOKENIZER_CONFIG).is_file() else {}
    if config.get("chat_template") or any((folder / name).is_file() for name in (_TEMPLATE, "chat_template.json")):
        return False
    architecture = ARCHITECTURES.get(str(load_json(folder / "config.json").get("model_type")))
    if architecture is None or architecture.base_system is None:
        logger.warning("no chat template is written: base and adapter have none, and the family is not Qwen or Qwen2")
        return False
    save_text(CHATML_TEMPLATE, folder / _TEMPLATE)
    return True


def write_generation_config(folder: Path) -> None:
    """Write or update ``generation_config.json`` so that answers end at ``<|im_end|>`` and at end-of-text.

    Without a tokenizer that has both tokens a warning is logged and nothing is changed.

    Args:
        folder: contains ``config.json`` and the tokenizer's files.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not has_tokenizer(folder):
        logger.warning(
            "generation_config.json is unchanged: there is no tokenizer, so the ids that end an answer are unknown"
        )
        return
    with library_errors(f"the tokenizer in {folder} cannot be read", "Copy its files from the base again"):
        end_ids = _end_ids(folder)
    if not end_ids:
        logger.warning("generation_config.json is unchanged: the tokenizer has no <|im_end|>, so no ChatML")
        return
    model_type = str(load_json(folder / "config.json").get("model_type"))
    file = folder / "generation_config.json"
    config = load_json(file) if file.is_file() else {}
    update_json(file, stopping_generation_config(config, end_ids, model_type))


def _end_ids(folder: Path) -> list[int]:
    """Return what ``end_ids_of`` would; fast tokenizers are not loaded, which would take more memory than a merge."""
    if (folder / "qwen.tiktoken").is_file():
        return end_ids_of(QWenTokenizer.from_pretrained(folder))
    ids: dict[str, int] = {}
    if (file := folder / "tokenizer.json").is_file():
        text = file.read_text(encoding="utf-8")
        if (start := text.find(_ADDED_TOKENS)) >= 0:  # parse this list only: the rest is large
            added, _ = json.JSONDecoder().raw_decode(text, text.index("[", start))
        else:
            added = load_json(file).get("added_tokens", [])
        ids |= {token["content"]: int(token["id"]) for token in added}
    if (file := folder / "added_tokens.json").is_file():
        ids |= load_json(file)
    if (file := folder / _TOKENIZER_CONFIG).is_file():
        added = load_json(file).get("added_tokens_decoder", {})
        ids |= {token["content"]: int(id_) for id_, token in added.items()}
    return [ids[IM_END], ids[END_OF_TEXT]] if {IM_END, END_OF_TEXT} <= ids.keys() else []
