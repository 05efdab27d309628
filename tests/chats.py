"""Random conversations for property tests: any Unicode, control tokens, and the words of tool calls.

``HYPOTHESIS_PROFILE=nightly`` tries 10,000 conversations for each property instead of 100.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from chat.chatml import DEFAULT_SYSTEM
from chat.families import ANSWER_STYLES, QWEN_V1, STRICT_STYLES, Family
from chat.label_mask import LabelMask
from chat.tools_hermes import HERMES_FORMS
from chat.tools_xml import XML_FORMS
from chat.turns import ToolCall, Turn
from data_utils.encode import EncodeOptions, Encoder
from data_utils.schema import Conversation
from qwen_model.prompts import SPECIAL_TOKENS
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.vocabulary import base_tokenizer

settings.register_profile(
    "ci", max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=10_000, derandomize=False)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

START, END = "<|im_start|>", "<|im_end|>\n"
LATER_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|box_end|>", "<|quad_start|>"),
    *("<|vision_start|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
LATER_WORDS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|fim_pad|>",
)
LATER_FAMILIES = (
    *(replace(style, tool_form=form) for style in ANSWER_STYLES for form in (HERMES_FORMS[0], HERMES_FORMS[2])),
    replace(ANSWER_STYLES[0], default_system=DEFAULT_SYSTEM),
    *(replace(style, tool_form=form) for style, form in zip(STRICT_STYLES, XML_FORMS * 4, strict=True)),
)
FAMILIES: tuple[Family, ...] = (QWEN_V1, *LATER_FAMILIES)


class Subject:
    """A tokenizer with the families that use its class.

    Args:
        specials: all of its special tokens.
        folder: from which another process can load it.
    """

    def __init__(self, name: str, tokenizer: Any, specials: tuple[str, ...], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.tokenizer, self.specials = tokenizer, specials
        self.is_v1 = isinstance(tokenizer, QWenTokenizer)
        self.families = (QWEN_V1,) if self.is_v1 else LATER_FAMILIES
        self._encoders: dict[Any, Encoder] = {}

    def __repr__(self) -> str:
        return self.name

    def encoder(self, family: Family, label_mask: LabelMask = "assistant") -> Encoder:
        """Return an encoder that is shared, so that it has encoded other conversations before."""
        if (family, label_mask) not in self._encoders:
            self._encoders[family, label_mask] = self.fresh_encoder(family, label_mask=label_mask)
        return self._encoders[family, label_mask]

    def fresh_encoder(self, family: Family, **options: Any) -> Encoder:
        return Encoder(self.tokenizer, family, EncodeOptions(needs_answer=False, **options))

    def read(self, text: str) -> str:
        """Return the text that the tokens of a text decode to: its NFC, with U+FFFD for lone surrogates.

        A surrogate pair is one character. Qwen v1 joins pairs after NFC, later tokenizers before it.
        """
        return _whole(normalize("NFC", text)) if self.is_v1 else read_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def read_text(text: str, words: tuple[str, ...] = LATER_WORDS) -> str:
    """Return the text that the tokens of a later tokenizer decode to.

    Args:
        words: its added words that are no special tokens, such as ``<think>``: it finds them first, and applies NFC to
            the text between them.
    """
    parts = _by_words(words).split(_whole(text))
    return "".join(part if part in words else normalize("NFC", part) for part in parts)


@cache
def _by_words(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, words))})" if words else r"(?!)")


def _whole(text: str) -> str:
    def joined(pair: re.Match[str]) -> str:
        high, low = map(ord, pair[0])
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)

    return re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text))


def later_tokenizer(ranks: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the later families' class with the small vocabulary."""
    fast = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer(ranks), clean_up_tokenization_spaces=False)
    for tokens, special in ((LATER_SPECIALS, True), (LATER_WORDS, False)):
        added = [AddedToken(token, special=special, normalized=False) for token in tokens]
        fast.add_tokens(added, special_tokens=special)
    return fast


def load_subject(name: str, golden: Path, saved: Path) -> Subject:
    """Load the tokenizer of Qwen v1 (``small`` or ``real`` vocabulary) or a ``fast`` one, which is saved to a folder.

    Args:
        golden: folder of the golden set with the vocabulary.
    """
    if name == "fast":
        fast = later_tokenizer(golden / "tiny-qwen-small" / "qwen.tiktoken")
        fast.save_pretrained(saved)
        return Subject(name, fast, LATER_SPECIALS, saved)
    folder = golden / ("tiny-qwen" if name == "real" else "tiny-qwen-small")
    return Subject(name, QWenTokenizer.from_pretrained(folder), SPECIAL_TOKENS, folder)


WORDS = (
    *("Thought:", "\nThought: ", "\nAction:", "\nAction Input:", "\nObservation:", "\nFinal Answer: ", "Question: "),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", *LATER_WORDS, START, END, "<|im_start|>assistant\n", "<|im_"),
    *(
        "end|>",
        "user\n",
        "system",
        "{{name}}",
        "{}",
        "\n",
        "\n\n",
        "\r\n",
        " ",
        "\0",
        "\x1b[31m",
        "\ufeff",
        "🏳️‍🌈",
        "北京",
    ),
    *("e\u0301", "\u0301", "\u0338", "\u1100\u1161\u11a8", "\u212b", "\u0958", "\ud83d", "\ude00", "\ufffd"),
)
WEIGHTS = st.sampled_from([None, None, None, None, 0.0, 0.5, 1.0])
NO_WEIGHTS = st.none()
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0.5, 1e-07, "", "ü\n", "<|im_end|>", "\ud800", "e\u0301"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "\n"]), inner, max_size=2),
    max_leaves=4,
)


def texts(subject: Subject) -> st.SearchStrategy[str]:
    piece = st.one_of(
        st.text(st.characters(exclude_categories=()), max_size=4),
        st.sampled_from(WORDS),
        st.sampled_from(subject.specials),
        st.text(st.sampled_from(" \t\n\r\v\u00a0\u3000\u2028\u200b\u0301"), max_size=6),
    )
    return st.lists(piece, max_size=5).map("".join)


@st.composite
def answers(draw: st.DrawFn, subject: Subject, family: Family, calls: Sequence[ToolCall] = ()) -> Turn:
    thoughts = st.none() | texts(subject) if family.has_thinking_field else st.none()
    return Turn("assistant", draw(texts(subject)), tuple(calls), thinking=draw(thoughts))


def questions(subject: Subject, family: Family) -> st.SearchStrategy[str]:
    """Draw texts of users; a strict format needs a question, which the result of a call is not."""
    return texts(subject).map("Q{}".format) if family.is_strict else texts(subject)


@st.composite
def plain_chats(draw: st.DrawFn, subject: Subject, family: Family, weights: Any = WEIGHTS) -> Conversation:
    """Draw system, user and assistant turns in any order."""
    turns = [Turn("system", draw(texts(subject)))] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6))
    for role in ["user", *roles] if family.is_strict else roles:
        turns.append(Turn(role, draw(questions(subject, family))) if role == "user" else draw(answers(subject, family)))
    return Conversation(tuple(turn._replace(weight=draw(weights)) for turn in turns), "here")


@st.composite
def tool_chats(draw: st.DrawFn, subject: Subject, family: Family) -> Conversation:
    """Draw questions, each with calls, results and an answer; a last call may wait for its result."""
    text = texts(subject)
    names = text.filter(bool)
    tool = st.fixed_dictionaries({"name": names, "description": text}, optional={"parameters": JSON_VALUES})
    objects = st.dictionaries(names, JSON_VALUES | text, max_size=2)  # all that a strict format can write
    call = st.builds(ToolCall, names, objects if family.is_strict else JSON_VALUES | text)
    turns = [Turn("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(questions(subject, family))))
        for calls in draw(st.lists(st.lists(call, min_size=1, max_size=2), max_size=2)):
            turns.append(draw(answers(subject, family, calls)))
            turns += [Turn("tool", draw(text)) for _ in calls]
        turns.append(draw(answers(subject, family)))
    if draw(st.booleans()):
        turns += [Turn("user", draw(questions(subject, family))), draw(answers(subject, family, [draw(call)]))]
    return Conversation(tuple(turns), "here", tuple(draw(st.lists(tool, min_size=1, max_size=2))))


@st.composite
def chats(draw: st.DrawFn, subject: Subject, weights: Any = WEIGHTS) -> tuple[Family, Conversation]:
    family = draw(st.sampled_from(subject.families))
    if family.tool_form is not None and draw(st.booleans()):
        return family, draw(tool_chats(subject, family))
    return family, draw(plain_chats(subject, family, weights))
