"""Texts whose tokenisation could take quadratic time: finished within seconds, with the same ids."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.limited import run_limited
from qwen_model.normalization import SAFE, normalize_nfc
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import SMALL

SIZE = 300_000
MARKS = "\u0301\u0316\u0f73\u0344\u0345\u20d0\u0327"


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(SMALL / "tiny-qwen-small")


def test_cuts_are_at_characters_that_never_combine_backwards() -> None:
    safe = {chr(code) for first, last in ((0, 0x2FF), (0x3400, 0x9FFF)) for code in range(first, last + 1)}
    assert SAFE == "\x00-\u02ff\u3400-\u9fff"
    assert not any(unicodedata.combining(char) for char in safe)
    for code in range(sys.maxunicode + 1):
        decomposition = unicodedata.decomposition(chr(code))
        if decomposition and not decomposition.startswith("<"):
            assert not safe & {chr(int(part, 16)) for part in decomposition.split()[1:]}


@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.text(alphabet=MARKS + "a\u1100\u1161\u11a8\uac00가é\u09c7\u09be", max_size=40),
            st.integers(195, 260).map(lambda length: "\u0316\u0301" * length),
            st.integers(0, 2**32).map(lambda seed: "".join(random.Random(seed).choices(MARKS, k=250))),
        ),
        max_size=6,
    )
)
def test_normalisation_equals_that_of_the_standard_library(parts: list[str]) -> None:
    text = "".join(parts)
    assert normalize_nfc(text) == unicodedata.normalize("NFC", text)


LONG_TEXTS = {
    "marks in order": "a" + "\u0301" * SIZE,
    "marks in turn": "a" + "\u0301\u0316" * (SIZE // 2),
    "marks behind many letters": ("a" + "\u0301\u0316" * 150) * (SIZE // 300),
    "characters that decompose to marks": "\u0f40" + "\u0f73" * SIZE,
    "letters": "a" * SIZE,
    "letters without a pattern": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=SIZE)),
    "Chinese": "天地日月" * (SIZE // 4),
    "Hangul in parts": "\u1100\u1161\u11a8" * (SIZE // 3),
    "digits": "7" * SIZE,
    "spaces": " " * SIZE,
    "spaces before a word": " " * SIZE + "x",
    "line ends": "\n" * SIZE,
    "spaces and line ends": " \n" * (SIZE // 2),
    "line ends far apart": ("\n" + " " * 500) * (SIZE // 501) + "x",
    "runs of spaces below the limit": (" " * 800_000 + "\n") * 2,
    "line ends before spaces": "\n" * (SIZE // 2) + " " * (SIZE // 2) + "x",
    "tabs": "\t" * SIZE,
    "other blanks": "\u3000\u00a0" * (SIZE // 2),
    "punctuation": "!?" * (SIZE // 2),
    "one sign": "-" * SIZE,
    "emoji": "\U0001f468\u200d" * (SIZE // 2),
    "apostrophes": "'" * SIZE,
    "control tokens": "<|im_start|>" * (SIZE // 12),
    "starts of control tokens": "<|" * (SIZE // 2),
    "null": "\x00" * SIZE,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_long_text_is_tokenised_within_seconds(tokenizer: QWenTokenizer, text: str) -> None:
    count = run_limited(lambda: len(tokenizer.encode_plain(text)), seconds=10, memory=2**30)
    assert count > 100
