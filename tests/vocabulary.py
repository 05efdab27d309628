"""Tokenizers of the later families' kind with the vocabularies of the recordings."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_utils.byte_pairs import QWEN3_5_PATTERN, QWEN_PATTERN
from export.layouts.tokenizer import _letters, _merges


def base_tokenizer(rank_file: Path, is_qwen3_5: bool = False) -> Tokenizer:
    """Return a tokenizer of a rank file, which splits texts as Qwen2's or as Qwen3.5's do; it has no added tokens."""
    return Tokenizer.from_str(_stated(rank_file, QWEN3_5_PATTERN if is_qwen3_5 else QWEN_PATTERN))


@cache
def _stated(rank_file: Path, pattern: str) -> str:
    lines = (line.split() for line in rank_file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    tokenizer = Tokenizer(models.BPE({_letters(token): rank for token, rank in ranks.items()}, _merges(ranks)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())
