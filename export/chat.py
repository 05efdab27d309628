"""How an exported folder chats: the template that writes a conversation, and the settings that end an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chat.families import DEFAULT_SYSTEM, END_OF_TEXT, IM_END, IM_START
from chat.stops import end_ids_of, stopping_generation_config
from checkpoints.files import load_json, save_json, save_text
from errors import ConfigError, one_line
from qwen_model.architectures import ARCHITECTURES
from qwen_model.tokenization_qwen import QWenTokenizer

logger = logging.getLogger(__name__)

# Without any of them transformers makes up a tokenizer, whose ids are not the model's.
_VOCABULARIES = ("qwen.tiktoken", "tokenizer.json", "vocab.json")
_ADDED_TOKENS = '"added_tokens":'
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def write_chat_template(folder: Path) -> bool:
    """Write Qwen v1's template where a folder has none; Qwen2 without one is trained and asked in the same words.

    The other families bring theirs: without it there is no saying how they were trained, and nothing is written.

    Args:
        folder: with ``config.json`` and the tokenizer's files in place.

    Returns:
        Whether it was written.
    """
    config = load_json(folder / _TOKENIZER_CONFIG) if (folder / _TOKENIZER_CONFIG).is_file() else {}
    if config.get("chat_template") or any((folder / name).is_file() for name in (_TEMPLATE, "chat_template.json")):
        return False
    architecture = ARCHITECTURES.get(str(load_json(folder / "config.json").get("model_type")))
    if architecture is None or architecture.base_system is None:
        logger.warning(
            "there is no chat template: neither base nor adapter has one, and the family is not Qwen or Qwen2"
        )
        return False
    save_text(CHATML_TEMPLATE, folder / _TEMPLATE)
    return True


def write_generation_config(folder: Path) -> None:
    """Make ``generation_config.json`` end an answer at ``<|im_end|>`` and at end-of-text; it may not be there yet.

    Args:
        folder: with ``config.json`` and the tokenizer's files in place. Without a tokenizer that knows both tokens
            nothing is changed, and that is logged.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        logger.warning("generation_config.json is left as it is: there is no tokenizer to say what ends an answer")
        return
    try:
        end_ids = _end_ids(folder)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"the tokenizer in {folder} cannot be read ({one_line(error)})"
        raise ConfigError(what, "Copy its files from the base again") from error
    if not end_ids:
        logger.warning("generation_config.json is left as it is: the tokenizer has no <|im_end|>, so no ChatML")
        return
    model_type = str(load_json(folder / "config.json").get("model_type"))
    file = folder / "generation_config.json"
    config = load_json(file) if file.is_file() else {}
    save_json(stopping_generation_config(config, end_ids, model_type), file)


def _end_ids(folder: Path) -> list[int]:
    """As ``end_ids_of`` gives them; fast tokenizers, which take more memory than a merge, are not loaded for it."""
    if (folder / "qwen.tiktoken").is_file():
        return end_ids_of(QWenTokenizer.from_pretrained(folder))
    ids: dict[str, int] = {}
    if (file := folder / "tokenizer.json").is_file():
        text = file.read_text(encoding="utf-8")
        if (place := text.find(_ADDED_TOKENS)) >= 0:  # before all the rest, which is large
            added, _ = json.JSONDecoder().raw_decode(text, text.index("[", place))
        else:
            added = load_json(file).get("added_tokens", [])
        ids |= {each["content"]: int(each["id"]) for each in added}
    if (file := folder / "added_tokens.json").is_file():
        ids |= load_json(file)
    if (file := folder / _TOKENIZER_CONFIG).is_file():
        added = load_json(file).get("added_tokens_decoder", {})
        ids |= {token["content"]: int(id_) for id_, token in added.items()}
    return [ids[IM_END], ids[END_OF_TEXT]] if {IM_END, END_OF_TEXT} <= ids.keys() else []


CHATML_TEMPLATE = (
    # Qwen v1 calls functions in ReAct text; a template that dropped them in silence would look as if it knew them.
    "{%- if tools %}{{ raise_exception('the chat template of Qwen v1 knows no tools') }}{% endif %}\n"
    "{%- if not messages or messages[0]['role'] != 'system' %}\n"
    f"    {{{{- '{IM_START}system\\n{DEFAULT_SYSTEM}{IM_END}\\n' }}}}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    f"    {{{{- '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' }}}}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    f"    {{{{- '{IM_START}assistant\\n' }}}}\n"
    "{%- endif %}\n"
)
"""Content of ``chat_template.jinja``."""
