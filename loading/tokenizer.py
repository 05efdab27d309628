"""A folder's tokenizer, with the ids that its own ``tokenizer.json`` gives.

transformers 5 builds the tokenizer of some values of ``model_type``, qwen2 among them, with a class of its own that
takes only vocabulary and merges from ``tokenizer.json``. A tokenizer that normalises or splits texts in another way
then gives other ids than those that the model was trained with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from checkpoints.files import load_json_or_empty, open_regular
from loading.opening import library_errors
from qwen_model.register import register_qwen

logger = logging.getLogger(__name__)

# Ways to split and normalise that are in use differ on one of these at least.
PROBES = (
    "In 1984, 12345678 and 3.14 of 007", "  two  spaces\tand a tab ", "one\n\n  two\r\n\n\nthree \n",
    "It's WE'LL they'd", "x=[1,2];f(x)!=None...", "学而时习之，不亦说乎？１２３", " leading",
    "\U0001f469\u200d\U0001f680 caf\u00e9 cafe\u0301 \u1112\u1161\u11ab \ufb01 \u2167", "हिन्दी ไทย עברית",
)  # fmt: skip

_MODEL_OPTIONS = (
    "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges",
)  # fmt: skip
_VOCABULARY, _BLOCK, _MOST_HEAD = b'"vocab":', 1 << 16, 1 << 22
_TOKEN_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized")


def load_tokenizer(folder: Path, place: str) -> Any:
    """Load the tokenizer of a checkpoint or an adapter.

    Args:
        place: what an error message begins with.

    Raises:
        ConfigError: it is missing or broken.
    """
    register_qwen()
    with library_errors(place, "Copy the tokenizer's files from the original checkpoint into the folder", path=folder):
        if is_rebuilt_otherwise(folder, load_json_or_empty(folder / "config.json")):
            tokenizer: Any = Qwen2Tokenizer()  # without the vocabulary: large files are read once
            stated = PreTrainedTokenizerFast.from_pretrained(str(folder))
            other_ids = _ids_if_split_as(tokenizer.backend_tokenizer, stated.backend_tokenizer)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            file = folder / "tokenizer.json"
            if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast or not file.is_file():
                return tokenizer
            if _is_built_as_stated(tokenizer.backend_tokenizer, _without_vocabulary(file)):
                return tokenizer
            stated = PreTrainedTokenizerFast.from_pretrained(str(folder))
            other_ids = [tokenizer(text).input_ids for text in PROBES]
    for name in ("eos_token", "pad_token"):  # the other class has defaults for them
        default = getattr(tokenizer, name)
        if getattr(stated, name) is None and stated.backend_tokenizer.token_to_id(str(default)) is not None:
            setattr(stated, name, default)
    different = [text for text, ids in zip(PROBES, other_ids, strict=True) if ids != stated(text).input_ids]
    if different:
        logger.warning(
            "transformers opens the tokenizer in %s as %s, which gives other ids than its tokenizer.json for %d of %d "
            "texts, such as %r. Those of tokenizer.json are used here; other programs with this transformers get the "
            "others",
            folder, type(tokenizer).__name__, len(different), len(PROBES), different[0],
        )  # fmt: skip
    return stated


def is_rebuilt_otherwise(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether transformers 5 normalises or splits texts otherwise than a folder's ``tokenizer.json`` states.

    Nothing large is loaded.

    Args:
        config: config.json of the folder.
    """
    file = folder / "tokenizer.json"
    if config.get("model_type") != "qwen2" or not file.is_file():
        return False
    return not _splits_as_stated(Qwen2Tokenizer().backend_tokenizer, _without_vocabulary(file))


def _ids_if_split_as(other: Any, backend: Any) -> list[list[int]]:
    """Return the ids of the probes if ``backend`` normalised and split texts as another tokenizer does."""
    own = backend.normalizer, backend.pre_tokenizer
    backend.normalizer, backend.pre_tokenizer = other.normalizer, other.pre_tokenizer
    try:
        return [backend.encode(text).ids for text in PROBES]
    finally:
        backend.normalizer, backend.pre_tokenizer = own


def _splits_as_stated(built: Any, stated: dict[str, Any]) -> bool:
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(built, name)
        if _of_ids(None if part is None else json.loads(part.__getstate__())) != _of_ids(stated.get(name)):
            return False
    return True


def _is_built_as_stated(built: Any, stated: dict[str, Any]) -> bool:
    """Return whether a loaded tokenizer of the tokenizers library splits and merges texts as its file states.

    Vocabulary and merges are the file's in any case.
    """
    if not _splits_as_stated(built, stated):
        return False
    options = stated.get("model") or {}
    if any((getattr(built.model, name, None) or None) != (options.get(name) or None) for name in _MODEL_OPTIONS):
        return False
    added = built.get_added_tokens_decoder()
    return all(
        token["id"] in added and all(getattr(added[token["id"]], name) == token[name] for name in _TOKEN_OPTIONS)
        for token in stated.get("added_tokens") or ()
    )


def _of_ids(part: Any) -> Any:
    """Return a part of a tokenizer without the option that changes offsets only."""
    if isinstance(part, list):
        return [_of_ids(each) for each in part]
    if isinstance(part, dict):
        return {key: _of_ids(value) for key, value in part.items() if key != "trim_offsets"}
    return part


def _without_vocabulary(file: Path) -> dict[str, Any]:
    """Parse ``tokenizer.json`` up to the vocabulary, which is megabytes and comes last, but for the merges."""
    head = b""
    with open_regular(file) as stream:
        while _VOCABULARY not in head and len(head) < _MOST_HEAD and (block := stream.read(_BLOCK)):
            head += block
    try:
        value: dict[str, Any] = json.loads(head[: head.find(_VOCABULARY)].rstrip().removesuffix(b",") + b"}}")
    except ValueError:  # in another order
        value = json.loads(file.read_bytes())
    return value
