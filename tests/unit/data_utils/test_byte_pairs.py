"""tiktoken gives the ids of a tokenizer of the tokenizers library, or is not used."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from chat.render import plain_encoder
from data_utils import byte_pairs
from data_utils.byte_pairs import QWEN3_5_PATTERN, QWEN_PATTERN, FasterEncoder
from tests.models import CONVERSATIONS

TEXTS = [text for turns in CONVERSATIONS for _, text in turns] * 3 + [
    "It's WE'LL they'd, 12345 naïve café",
    "\n\n \r\n x",
]


PATTERNS = {"gpt2": None, "qwen": QWEN_PATTERN, "qwen3_5": QWEN3_5_PATTERN}
ADDED = [
    "<tool_call>",
    "<think>",
    "</think>",
    "\n",
    "<|im_start|>",
    "<|im_end|>",
    "x<|",
    "|im",
    "t><th",
    "\u212b",
    "e\u0301",
]


def build(pattern: str | None, *, normalizer: Any = None) -> Any:
    """Train a tokenizer with added tokens, special and plain, some within others, and without some bytes."""
    tokenizer = Tokenizer(models.BPE())
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = levels
    if pattern is not None:
        from tokenizers import Regex

        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    tokenizer.normalizer = normalizer
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character != "ċ"]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|im_start|>"])
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens(["<tool_call>", "\u212b"])  # looked for in normalised text
    plain, special = ["<think>", "<think>\n", "e\u0301", "x<|"], ["<|im_end|>", "|im", "t><th"]
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    return fast


@cache
def subject(name: str) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]]]:
    """Return the encoder by tiktoken and that of the tokenizers library."""
    from tokenizers import normalizers

    pattern = PATTERNS[name]
    tokenizer = build(pattern, normalizer=None if pattern is None else normalizers.NFC())
    plain = plain_encoder(tokenizer)
    fast = byte_pairs._by_tiktoken(tokenizer.backend_tokenizer, plain)
    assert fast is not None
    return fast, plain


def classes() -> Iterator[str]:
    """Yield characters from all parts of Unicode: where the category changes, and some in between."""
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for _, run in groupby(characters, key=unicodedata.category):
        members = list(run)
        yield from {members[0], members[len(members) // 2], members[-1]}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_kind_of_character_is_split_alike(name: str) -> None:
    fast, plain = subject(name)
    for char in classes():
        text = f"a{char}a1{char}1 {char}{char}\n{char} '{char}{char}."
        assert fast(text) == plain(text), hex(ord(char))


@pytest.mark.parametrize("name", PATTERNS)
@given(
    text=st.one_of(
        st.text(),
        st.text("ab 'sS1\n\rtÀ\u0301\u093e你<|>"),
        st.lists(st.sampled_from(TEXTS)).map("".join),
        st.lists(st.sampled_from([*ADDED, "a", " ", "<", "\u0301", "\u0338"])).map("".join),
    )
)
def test_every_text_has_the_same_ids(name: str, text: str) -> None:
    fast, plain = subject(name)
    assert fast(text) == plain(text)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{}</tool_call>",
        "<think>\nso\n</think>\n\n<think>x<|im_end|>",
        "t><think>",  # the special token takes the start of the other
        "A\u030a \u212b e\u0301 \u00e9",
        "<|im_start|>user",
        "\ud800",
        "\x0b",
        "\U000f0000\U00100000",
        "",
        "e\u0301",
        " " * 5000,
    ],
)
def test_added_tokens_and_what_tiktoken_has_no_ids_for(text: str) -> None:
    for name in PATTERNS:
        fast, plain = subject(name)
        assert fast(f"before {text} after") == plain(f"before {text} after")
        assert fast(text) == plain(text)


def _changed(change: Callable[[dict[str, Any]], object]) -> Any:
    stated = json.loads(build(None).backend_tokenizer.to_str())
    change(stated)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stated)))


@pytest.mark.parametrize(
    "change",
    [
        lambda stated: stated["model"].update(dropout=0.5),
        lambda stated: stated["model"].update(end_of_word_suffix="</w>"),
        lambda stated: stated.update(normalizer={"type": "Lowercase"}),
        lambda stated: stated.update(pre_tokenizer={"type": "Whitespace"}),
        lambda stated: stated["pre_tokenizer"].update(add_prefix_space=True),
        lambda stated: stated["model"]["merges"].reverse(),
        lambda stated: stated["model"]["merges"].pop(0),
        lambda stated: stated["added_tokens"][-4].update(lstrip=True),
    ],
)
def test_other_tokenizers_are_left_to_the_library(change: Callable[[dict[str, Any]], object]) -> None:
    tokenizer = _changed(change)
    assert byte_pairs._by_tiktoken(tokenizer.backend_tokenizer, plain_encoder(tokenizer)) is None


def test_a_vocabulary_is_not_read_where_the_pattern_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _changed(lambda stated: stated.update(pre_tokenizer={"type": "Whitespace"}))
    monkeypatch.setattr(byte_pairs, "_ranks", lambda *arguments: pytest.fail("it takes as long as a thousand texts"))
    assert byte_pairs._by_tiktoken(tokenizer.backend_tokenizer, plain_encoder(tokenizer)) is None


def test_first_texts_are_not_worth_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(byte_pairs, "_by_tiktoken", lambda *arguments: built.append(1))
    tokenizer = build(None)
    plain = plain_encoder(tokenizer)
    encode = FasterEncoder(tokenizer, plain, texts_before=3)
    assert [encode(text) for text in TEXTS[:3]] == [plain(text) for text in TEXTS[:3]]
    assert built == []
    assert [encode(text) for text in TEXTS] == [plain(text) for text in TEXTS]
    assert built == [1]


def test_a_long_text_is_worth_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(byte_pairs, "_by_tiktoken", lambda *arguments: built.append(1))
    tokenizer = build(None)
    encode = FasterEncoder(tokenizer, plain_encoder(tokenizer), texts_before=3)
    encode("a" * 256)
    assert built == []
    encode("a" * 512)
    assert built == [1]


def test_patterns_are_those_of_the_tokenizers() -> None:
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    from qwen_model.tokenization_qwen import SPLIT_PATTERN

    assert QWEN_PATTERN == SPLIT_PATTERN
    assert QWEN3_5_PATTERN == PRETOKENIZE_REGEX
