"""Convert Qwen v1's tokenizer to a fast one (``tokenizer.json``) and back, with the same ids for every text.

A rank file lists the tokens in the order in which they are merged; ``tokenizer.json`` lists the pairs that are merged.
A token's pair is what its bytes become after all merges of lower rank. Wherever a text becomes this token, no earlier
merge has crossed the token's boundaries, so the merges inside are the same as for the token alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat.chatml import END_OF_TEXT, IM_END, IM_START
from chat.template import CHATML_TEMPLATE
from checkpoints.files import load_json, save_json, save_text
from checkpoints.names import TEMPLATES_FOLDER
from errors import ConfigError, one_line
from loading.opening import library_errors
from qwen_model.prompts import SPECIAL_TOKENS
from qwen_model.tokenization_qwen import SPLIT_PATTERN, QWenTokenizer

CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
TEMPLATE_FILE = "chat_template.jinja"
_LETTERS: dict[int, str] = bytes_to_unicode()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


def save_fast_tokenizer(folder_in: Path, folder_out: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` for Qwen v1's rank files.

    As in Qwen2's tokenizers only three control tokens are recognised in a text: the 205 ``<|extra_N|>`` keep their ids,
    but no text is encoded to them. Header and content of a message are tokenised together, where Qwen v1 splits them:
    the ids of a message that begins with a line break differ.

    Args:
        folder_in: contains ``qwen.tiktoken`` and the other files of Qwen v1's tokenizer.
        folder_out: may be the same folder.

    Raises:
        ConfigError: a rank file that is missing or broken.
    """
    tokenizer = _load(folder_in)
    templates = {"default": CHATML_TEMPLATE} | _find_templates(folder_in)
    ranks = tokenizer.mergeable_ranks
    vocabulary = {_letters(token): rank for token, rank in ranks.items()} | tokenizer.special_tokens
    # ignore_merges: a piece that equals a token becomes that token even if no merges form it (added ranks need this).
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(ranks), ignore_merges=True))
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    in_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, in_letters])
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    save_text(fast.to_str(pretty=True) + "\n", folder_out / "tokenizer.json")
    _save_templates(templates, folder_out)
    settings = {
        # Reads tokenizer.json unchanged; Qwen2Tokenizer rebuilds it without ignore_merges.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    save_json(settings, folder_out / "tokenizer_config.json")


def save_rank_tokenizer(folder_in: Path, folder_out: Path) -> None:
    """Write ``qwen.tiktoken`` (and ``qwen_extra.tiktoken`` if needed) and Qwen v1's settings for a fast tokenizer.

    Args:
        folder_in: contains ``tokenizer.json``.
        folder_out: may be the same folder.

    Raises:
        ConfigError: a tokenizer that is missing, or that a rank file cannot express.
    """
    path = folder_in / "tokenizer.json"
    fast = load_json(path)
    try:
        model, added = fast["model"], {each["content"]: int(each["id"]) for each in fast["added_tokens"]}
        _check_pipeline(fast, path)
        ids: dict[str, int] = model["vocab"] | added
        first = ids[END_OF_TEXT]
        specials = {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}
        moved = [token for token in (*added, *CONTROL_TOKENS) if specials.get(token) != ids[token]]
        if moved:
            what = f"{path}: {moved[0]} has the id {ids[moved[0]]}; in Qwen v1's tokenizer it has another or none"
            raise ConfigError(what, "Keep the layout of Qwen2")
        ranks = {_token(letters): rank for letters, rank in model["vocab"].items() if letters not in specials}
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"{path} is not a byte-level BPE with Qwen's tokens ({type(error).__name__}: {one_line(error)})"
        raise ConfigError(what, "Copy it again from the original checkpoint") from error
    if pairs != _merges(ranks):
        what = f"{path}: its merges differ from those implied by the order of its tokens"
        raise ConfigError(what, "Keep the layout of Qwen2")
    _save_ranks({token: rank for token, rank in ranks.items() if rank < first}, folder_out / "qwen.tiktoken")
    if extra := {token: rank for token, rank in ranks.items() if rank >= first}:
        _save_ranks(extra, folder_out / "qwen_extra.tiktoken")
    _save_templates(_find_templates(folder_in), folder_out)
    settings = {"tokenizer_class": "QWenTokenizer"}
    save_json(settings | _model_max_length(folder_in), folder_out / "tokenizer_config.json")
    _load(folder_out)


def _load(folder: Path) -> QWenTokenizer:
    fix = "Copy qwen.tiktoken and tokenizer_config.json from the original checkpoint"
    with library_errors(f"{folder}: the tokenizer cannot be read", fix):
        tokenizer: QWenTokenizer = QWenTokenizer.from_pretrained(folder)
    return tokenizer


def _find_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a tokenizer's folder by name; ``default`` is the one that is used without tools.

    Files are preferred to the templates in tokenizer_config.json, as in transformers.
    """
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    config = folder / "tokenizer_config.json"
    template = load_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, str):
        return {"default": template}
    return template if isinstance(template, dict) else {each["name"]: each["template"] for each in template or ()}


def _save_templates(templates: Mapping[str, str], folder: Path) -> None:
    for name, template in templates.items():
        if name == "default":
            save_text(template, folder / TEMPLATE_FILE)
        else:
            (folder / TEMPLATES_FOLDER).mkdir(exist_ok=True)
            save_text(template, folder / TEMPLATES_FOLDER / f"{name}.jinja")


def _model_max_length(folder: Path) -> dict[str, int]:
    config = folder / "tokenizer_config.json"
    length = load_json(config).get("model_max_length") if config.is_file() else None
    return {"model_max_length": length} if isinstance(length, int) else {}


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Return the merged pairs in the order of their ranks."""
    by_rank = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [(_letters(left), _letters(right)) for token in by_rank for left, right in _pairs(token, ranks)]


def _pairs(token: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pairs that are merged into a token.

    That is one pair; or, if lower ranks do not merge the token's bytes into two parts, every pair of tokens that joins
    to it.
    """
    parts, rank = [bytes((byte,)) for byte in token], ranks[token]
    while len(parts) > 2:
        merged = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(merged)
        if lowest >= rank:
            break
        index = merged.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    if len(parts) == 2:
        yield parts[0], parts[1]
        return
    for cut in range(1, len(token)):
        if token[:cut] in ranks and token[cut:] in ranks:
            yield token[:cut], token[cut:]


def _letters(token: bytes) -> str:
    """Write bytes in the alphabet of byte-level BPE: one printable letter per byte."""
    return "".join(_LETTERS[byte] for byte in token)


def _token(letters: str) -> bytes:
    return bytes(_BYTES[letter] for letter in letters)


def _check_pipeline(fast: Mapping[str, Any], path: Path) -> None:
    """Check that a text is normalised and split as in Qwen v1's tokenizer."""
    patterns = [
        step["pattern"].get("Regex") for step in fast["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"
    ]
    if (
        fast["model"].get("type", "BPE") != "BPE"
        or fast["normalizer"] != {"type": "NFC"}
        or patterns != [SPLIT_PATTERN]
    ):
        settings = json.dumps({"normalizer": fast["normalizer"], "patterns": patterns}, ensure_ascii=False)
        what = f"{path} splits texts differently from Qwen v1's tokenizer ({settings})"
        raise ConfigError(what, "Keep the layout of Qwen2")


def _save_ranks(ranks: Mapping[bytes, int], path: Path) -> None:
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda i: i[1])
    ]
    save_text("".join(lines), path)
