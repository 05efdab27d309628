"""What holds for any conversation, whatever its texts: any Unicode, control tokens, the words of calls.

``HYPOTHESIS_PROFILE=nightly`` tries 10,000 conversations for each property instead of 100.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from chat.families import ANSWER_STYLES, DEFAULT_SYSTEM, QWEN_V1, Family
from chat.label_mask import LabelMask
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.tools_hermes import HERMES_FORMS
from chat.turns import ToolCall, Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.formats import recognise
from data_utils.schema import Conversation
from data_utils.sources import fill_turns
from errors import DataError
from qwen_model.tokenization_qwen import SPECIAL_TOKENS, SPLIT_PATTERN, QWenTokenizer
from tests.families import trained_runs
from tests.golden import run_python

settings.register_profile(
    "ci", max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=10_000, derandomize=False)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MASKS: tuple[LabelMask, ...] = ("assistant", "qwen", "last", "all")
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
_BY_WORDS = re.compile(f"({'|'.join(map(re.escape, LATER_WORDS))})")
LATER_FAMILIES = (
    *(replace(style, tool_form=form) for style in ANSWER_STYLES for form in (HERMES_FORMS[0], HERMES_FORMS[2])),
    replace(ANSWER_STYLES[0], default_system=DEFAULT_SYSTEM),
)
FAMILIES: tuple[Family, ...] = (QWEN_V1, *LATER_FAMILIES)


class Subject:
    """A tokenizer with the families that use its kind.

    Args:
        specials: all of its special tokens.
        folder: where another process can load it from.
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
        """One that has encoded other conversations before."""
        if (family, label_mask) not in self._encoders:
            self._encoders[family, label_mask] = self.fresh_encoder(family, label_mask=label_mask)
        return self._encoders[family, label_mask]

    def fresh_encoder(self, family: Family, **options: Any) -> Encoder:
        return Encoder(self.tokenizer, family, EncodeOptions(needs_answer=False, **options))

    def read(self, text: str) -> str:
        """What the tokens of a text say: its NFC, with U+FFFD for halves of a character that stand alone.

        A half beside its other half is that character, which Qwen v1 finds after it has made the NFC, later tokenizers
        before. Those find their words (``<think>``, no special tokens) before they make the NFC of what is between.
        """
        if self.is_v1:
            return _whole(normalize("NFC", text))
        return "".join(
            part if part in LATER_WORDS else normalize("NFC", part) for part in _BY_WORDS.split(_whole(text))
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _whole(text: str) -> str:
    def joined(pair: re.Match[str]) -> str:
        high, low = map(ord, pair[0])
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)

    return re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text))


def _fast_tokenizer(ranks: Path) -> PreTrainedTokenizerFast:
    """A tokenizer as the later families have, on the small vocabulary."""
    converted = TikTokenConverter(str(ranks), pattern=SPLIT_PATTERN).converted()
    converted.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=converted, clean_up_tokenization_spaces=False)
    for tokens, special in ((LATER_SPECIALS, True), (LATER_WORDS, False)):
        added = [AddedToken(token, special=special, normalized=False) for token in tokens]
        fast.add_tokens(added, special_tokens=special)
    return fast


@pytest.fixture(scope="module", params=["small", "real", "fast"])
def subject(request: pytest.FixtureRequest, golden_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = golden_small / "tiny-qwen-small"
    if request.param == "fast":
        fast, saved = _fast_tokenizer(folder / "qwen.tiktoken"), tmp_path_factory.mktemp("fast")
        fast.save_pretrained(saved)
        return Subject("fast", fast, LATER_SPECIALS, saved)
    if request.param == "real":
        folder = request.getfixturevalue("golden_large") / "tiny-qwen"
    return Subject(request.param, QWenTokenizer.from_pretrained(folder), SPECIAL_TOKENS, folder)


V1 = pytest.mark.parametrize("subject", ["small", "real"], indirect=True)


# -------------------------------------------------------------------------------------------------------- conversations


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
    thoughts = st.none() | texts(subject) if family.thinking == "block" else st.none()
    return Turn("assistant", draw(texts(subject)), tuple(calls), thinking=draw(thoughts))


@st.composite
def plain_chats(draw: st.DrawFn, subject: Subject, family: Family, weights: Any = WEIGHTS) -> Conversation:
    """System, user and assistant in any order."""
    turns = [Turn("system", draw(texts(subject)))] if draw(st.booleans()) else []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6)):
        turns.append(Turn(role, draw(texts(subject))) if role == "user" else draw(answers(subject, family)))
    return Conversation(tuple(turn._replace(weight=draw(weights)) for turn in turns), "here")


@st.composite
def tool_chats(draw: st.DrawFn, subject: Subject, family: Family) -> Conversation:
    """Questions, each with calls and their results, and an answer; a last call may wait for its result."""
    text = texts(subject)
    names = text.filter(bool)
    tool = st.fixed_dictionaries({"name": names, "description": text}, optional={"parameters": JSON_VALUES})
    call = st.builds(ToolCall, names, JSON_VALUES | text)
    turns = [Turn("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(text)))
        for calls in draw(st.lists(st.lists(call, min_size=1, max_size=2), max_size=2)):
            turns.append(draw(answers(subject, family, calls)))
            turns += [Turn("tool", draw(text)) for _ in calls]
        turns.append(draw(answers(subject, family)))
    if draw(st.booleans()):
        turns += [Turn("user", draw(text)), draw(answers(subject, family, [draw(call)]))]
    return Conversation(tuple(turns), "here", tuple(draw(st.lists(tool, min_size=1, max_size=2))))


@st.composite
def chats(draw: st.DrawFn, subject: Subject, weights: Any = WEIGHTS) -> tuple[Family, Conversation]:
    family = draw(st.sampled_from(subject.families))
    if family.tool_form is not None and draw(st.booleans()):
        return family, draw(tool_chats(subject, family))
    return family, draw(plain_chats(subject, family, weights))


def trained_texts(subject: Subject, encoded: EncodedConversation) -> list[str]:
    return [subject.decode(encoded.input_ids[start:end]) for start, end in trained_runs(encoded)]


# ----------------------------------------------------------------------------------------------------------- properties


@PROFILE
@given(st.data())
def test_the_ids_are_the_text_and_the_labels_are_ids(subject: Subject, data: st.DataObject) -> None:
    """Segments are tokenised apart, and so is the NFC of each. It is that of the whole text all the same: where one
    ends, a control token, a newline or a colon stands, which no mark at the start of the next one joins."""
    family, conversation = data.draw(chats(subject))
    mask = data.draw(st.sampled_from(MASKS))
    encoded = subject.encoder(family, mask).encode_conversation(conversation)
    rendered = render(conversation.turns, family, None, mask, conversation.tools)
    segments = [segment.text for message in rendered for segment in message.segments]
    assert subject.decode(encoded.input_ids) == "".join(map(subject.read, segments)) == subject.read(text_of(rendered))
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.weights)
    for id_, label, weight in zip(encoded.input_ids, encoded.labels, encoded.weights, strict=True):
        assert label == (id_ if weight > 0 else -100)
    assert encoded.trained_tokens == sum(label != -100 for label in encoded.labels[1:])


@V1
@PROFILE
@given(st.data())
def test_what_is_trained_are_the_answers(subject: Subject, data: st.DataObject) -> None:
    turns = data.draw(plain_chats(subject, QWEN_V1)).turns
    mask = data.draw(st.sampled_from(MASKS[::2]))
    encoded = subject.encoder(QWEN_V1, mask).encode_conversation(Conversation(turns, "here"))
    indices = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    masked = indices if mask == "assistant" else indices[-1:]
    weights = [float(index in masked) if turn.weight is None else turn.weight for index, turn in enumerate(turns)]
    expected = [
        (subject.read(turn.content) + END, weight) for turn, weight in zip(turns, weights, strict=True) if weight
    ]
    assert trained_texts(subject, encoded) == [text for text, _ in expected]
    assert [set(encoded.weights[start:end]) for start, end in trained_runs(encoded)] == [{each} for _, each in expected]


@PROFILE
@given(st.data())
def test_the_mask_all_trains_everything_but_turns_without_weight(subject: Subject, data: st.DataObject) -> None:
    family, conversation = data.draw(chats(subject))
    encoder = subject.encoder(family, "all")

    def trained(weight: float | None) -> list[bool]:
        system = () if conversation.turns[0].role == "system" else (Turn("system", "x"),)
        turns = tuple(turn._replace(weight=weight) for turn in (*system, *conversation.turns))
        return encoder.encode_conversation(replace(conversation, turns=turns)).trained

    assert not any(trained(0.0))
    # The end of an answer that waits for a result is not what Qwen v1 writes there.
    waits = 2 if conversation.turns[-1].calls and family == QWEN_V1 else 0
    everything = trained(None)
    assert everything == [True] * (len(everything) - waits) + [False] * waits


@V1
@PROFILE
@given(st.data())
def test_of_calls_only_what_the_model_writes_is_trained(subject: Subject, data: st.DataObject) -> None:
    conversation = data.draw(tool_chats(subject, QWEN_V1))
    encoded = subject.encoder(QWEN_V1).encode_conversation(conversation)
    said: dict[str, list[str]] = {"tool": [], "assistant": []}
    start = 0
    for length, role, weight in encoded.spans:
        text = subject.decode(encoded.input_ids[start : start + length])
        assert weight == 0 or role == "assistant"
        if role == "tool" or weight:
            said[role].append(text)
        start += length
    results = [turn.content for turn in conversation.turns if turn.role == "tool"]
    assert said["tool"] == [subject.read(f" {_bare(result)}\nThought:") for result in results]
    expected: list[str] = []
    for turn in conversation.turns:
        if turn.role == "assistant" and not turn.calls:
            expected.append(subject.read(f" I now know the final answer.\nFinal Answer: {_bare(turn.content)}") + END)
        for call in turn.calls:
            arguments = call.arguments_text.strip()
            expected.append(subject.read(f"\nAction: {call.name}\nAction Input: {arguments}\nObservation:"))
    assert [text[-len(end) :] for text, end in zip(said["assistant"], expected, strict=True)] == expected


def _bare(text: str) -> str:
    return text.lstrip("\n").rstrip()


@PROFILE
@given(st.data())
def test_prompts_start_the_training_ids_and_end_where_answers_begin(subject: Subject, data: st.DataObject) -> None:
    """An answer is trained, to its end, exactly where the prompt for it is what stands before it.

    A weight of its own also trains one that no prompt of its family leads to, so here are none.
    """
    family, conversation = data.draw(chats(subject, NO_WEIGHTS))
    turns, tools = conversation.turns, conversation.tools
    encoded = subject.encoder(family).encode_conversation(conversation)
    start_id, end_id = subject.tokenizer.convert_tokens_to_ids([START, END.strip()])
    begins, ends = [], []
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and _asks_for(index, turns, family):
            prompt = encode_prompt(render_prompt(turns[:index], family, None, tools), subject.tokenizer)
            if encoded.input_ids[: len(prompt)] == prompt:
                ends.append(len(prompt))
            else:
                assert family.has_thinking, index
    for start, end in trained_runs(encoded):
        begins.append(start)
        ids = encoded.input_ids[start:end]
        assert start_id not in ids and ids.count(end_id) == ids[-2:].count(end_id) <= 1
        assert subject.decode(ids).endswith((END, "\nObservation:") if family == QWEN_V1 else END)
    if family == QWEN_V1 and any(len(turn.calls) > 1 for turn in turns):
        assert set(ends) <= set(begins)  # calls that are made at once stand one behind the other
    else:
        assert begins == ends


def _asks_for(index: int, turns: Sequence[Turn], family: Family) -> bool:
    """Whether the family has a prompt for an answer there."""
    if index == 0 or (index == 1 and turns[0].role == "system" and family.default_system is None):
        return family.trains_opening or index == 1
    return family.continues_answers or turns[index - 1].role != "assistant"


@PROFILE
@given(st.data())
def test_of_what_is_too_long_the_most_turns_that_fit_are_kept(subject: Subject, data: st.DataObject) -> None:
    """And nothing else: what is left is encoded as if it were the whole conversation, and no answer lacks its end."""
    family, conversation = data.draw(chats(subject))
    way = data.draw(st.sampled_from(["turns", "turns_left"]))
    encode = subject.encoder(family).encode_conversation
    left = [encode(replace(conversation, turns=turns)) for turns in _shortened(conversation, family, way)]
    most = data.draw(st.integers(1, len(left[0].input_ids)))
    encoded = subject.fresh_encoder(family, max_length=most, truncation=way).encode_conversation(conversation)
    expected = next((each for each in left if len(each.input_ids) <= most), EncodedConversation([], []))
    if way == "turns" and expected is not left[0] and not expected.trained_tokens:
        # A start in which something is trained is worth more than one that is longer.
        trained = [each for each in left[1:] if len(each.input_ids) <= most and each.trained_tokens]
        expected = trained[0] if trained else expected
    assert (encoded.input_ids, encoded.spans) == (expected.input_ids, expected.spans)
    assert (encoded.turns_dropped == 0) == (encoded == left[0])
    text = subject.decode(encoded.input_ids)
    assert text.endswith(END) or not text
    assert all(run.endswith((END, "\nObservation:")) for run in trained_texts(subject, encoded))
    if text and way == "turns_left" and encoded.turns_dropped and family == QWEN_V1:
        system = render(conversation.turns[:1] if conversation.turns[0].role == "system" else (), family)
        assert text.startswith(subject.read(text_of(system)) + f"{START}user\n")


def _shortened(conversation: Conversation, family: Family, way: str) -> Iterator[tuple[Turn, ...]]:
    """The turns, then less and less of them, cut between messages, as long as there is an answer, if there is one."""
    turns, roles = conversation.turns, [turn.role for turn in conversation.turns]
    first = 1 if roles[0] == "system" else 0
    yield turns
    if way == "turns":
        # Qwen v1 writes calls, results and the answer behind them in one message, later families neighbouring results.
        joined = ("assistant", "tool") if family == QWEN_V1 else ("tool",)
        inside = joined if conversation.tools else ()
        ends = [end for end in range(len(turns) - 1, 0, -1) if roles[end] not in inside or roles[end - 1] not in inside]
        shorter = [turns[:end] for end in ends]
    else:
        starts = [start for start in range(first + 1, len(turns)) if roles[start] == "user"]
        shorter = [(*turns[:first], *turns[start:]) for start in starts]
    for kept in shorter:
        if "assistant" not in roles or any(turn.role == "assistant" for turn in kept):
            yield kept


@pytest.mark.parametrize("way", ["turns", "turns_left"])
@V1
def test_an_answer_before_the_question_that_describes_the_tools(subject: Subject, way: str) -> None:
    """It is cut as any other, or refused."""
    turns = (Turn("assistant", "Hello!"), Turn("user", "Hi"), Turn("assistant", "You are back."))
    conversation = Conversation(turns, "here", ({"name": "f"},))
    for most in range(1, 300):
        encoder = subject.fresh_encoder(QWEN_V1, max_length=most, truncation=way)
        with suppress(DataError):
            assert len(encoder.encode_conversation(conversation).input_ids) <= most


@PROFILE
@given(st.data())
def test_an_encoding_does_not_depend_on_what_was_encoded_before(subject: Subject, data: st.DataObject) -> None:
    batch = data.draw(st.lists(chats(subject), min_size=1, max_size=3))
    together = [subject.encoder(family).encode_conversation(conversation) for family, conversation in batch]
    apart = [subject.fresh_encoder(family).encode_conversation(conversation) for family, conversation in batch]
    again = [subject.encoder(family).encode_conversation(conversation) for family, conversation in reversed(batch)]
    assert together == apart == again[::-1]


IN_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from data_utils.encode import EncodeOptions, Encoder
from data_utils.schema import Conversation
from qwen_model.tokenization_qwen import QWenTokenizer
from chat.turns import ToolCall, Turn
from tests.unit.data_utils.test_properties import FAMILIES

kind, folder, given, out = sys.argv[1:]
tokenizer = (QWenTokenizer if kind == "v1" else PreTrainedTokenizerFast).from_pretrained(folder)
results = []
for family, given_turns, tools in json.loads(Path(given).read_text()):
    turns = (Turn(*turn) for turn in given_turns)
    turns = tuple(turn._replace(calls=tuple(ToolCall(*call) for call in turn.calls)) for turn in turns)
    encoder = Encoder(tokenizer, FAMILIES[family], EncodeOptions(needs_answer=False))
    encoded = encoder.encode_conversation(Conversation(turns, "here", tuple(tools)))
    results.append([encoded.input_ids, encoded.weights])
Path(out).write_text(json.dumps(results))
"""


def test_another_process_encodes_the_same(subject: Subject, tmp_path: Path) -> None:
    examples: list[tuple[Any, list[Any]]] = []

    @PROFILE
    @given(chats(subject))
    def collect(example: tuple[Family, Conversation]) -> None:
        family, conversation = example
        encoded = subject.encoder(family).encode_conversation(conversation)
        asked = (FAMILIES.index(family), conversation.turns, conversation.tools)
        examples.append((asked, [encoded.input_ids, encoded.weights]))

    collect()
    asked, out = tmp_path / "asked.json", tmp_path / "out.json"
    asked.write_text(json.dumps([example for example, _ in examples]))
    kind = "v1" if subject.is_v1 else "fast"
    ended = run_python(["-c", IN_ANOTHER_PROCESS, kind, str(subject.folder), str(asked), str(out)])
    assert ended.returncode == 0, ended.stderr
    assert json.loads(out.read_text()) == [encoded for _, encoded in examples]


# ------------------------------------------------------------------------------------------------------- control tokens


MARK, HALVES = "QX17", ("first half", "other half")


def _tool(**fields: Any) -> dict[str, Any]:
    return {"name": "f", "description": "d", "parameters": {}, **fields}


def _said(call: Any, result: str = "r") -> list[dict[str, str]]:
    pairs = [("human", "u"), ("function_call", json.dumps(call)), ("observation", result), ("gpt", "a")]
    return [{"from": author, "value": text} for author, text in pairs]


def _asked(call: Any, result: Any = "r", **fields: Any) -> list[dict[str, Any]]:
    called = {"role": "assistant", "content": "t", "tool_calls": [{"function": call}], **fields}
    answer = {"role": "assistant", "content": "a"}
    return [{"role": "user", "content": "u"}, called, {"role": "tool", "content": result}, answer]


def _messages(user: Any = "u", answer: str = "a", **fields: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **fields}]


FIELDS: dict[str, dict[str, Any]] = {
    "conversations user": {"conversations": [{"from": "user", "value": MARK}, {"from": "assistant", "value": "a"}]},
    "conversations answer": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": MARK}]},
    "conversations system": {"conversations": [{"from": "system", "value": MARK}, {"from": "gpt", "value": "a"}]},
    "conversations system field": {"system": MARK, "conversations": [{"from": "gpt", "value": "a"}]},
    "messages user": {"messages": _messages(MARK)},
    "messages answer": {"messages": _messages("u", MARK)},
    "messages part": {"messages": _messages([{"type": "text", "text": "x"}, {"type": "text", "text": MARK}])},
    "messages parts": {"messages": _messages([{"type": "text", "text": half} for half in HALVES])},
    "messages system": {"messages": [{"role": "developer", "content": MARK}, *_messages()]},
    "messages system field": {"messages": _messages(), "system": MARK},
    **{
        f"alpaca {name}": {"instruction": "i", "input": "i", "output": "o", name: MARK}
        for name in ("instruction", "input", "output", "system")
    },
    "alpaca history question": {"instruction": "i", "output": "o", "history": [[MARK, "a"]]},
    "alpaca history answer": {"instruction": "i", "output": "o", "history": [["q", MARK]]},
    **{f"pairs {name}": {"question": "q", "answer": "a", name: MARK} for name in ("question", "answer", "system")},
    "pairs history": {"prompt": "q", "response": "a", "history": [[MARK, MARK]]},
    "fill": {"prompt": "{{name}}", "response": "a {{name}}{{name}}"},
    **{
        f"tools {name}": {"messages": _messages(), "tools": [_tool(**{name: MARK})]}
        for name in ("name", "description", "parameters", "name_for_human", "name_for_model", "description_for_model")
    },
    "tools parameter name": {"messages": _messages(), "tools": [_tool(parameters={"properties": {MARK: {"a": "b"}}})]},
    "tools as text": {"conversations": _said({"name": "f"}), "tools": json.dumps([_tool(description=MARK)])},
    "tools of alpaca": {
        "instruction": "i",
        "output": "o",
        "tools": [{"type": "function", "function": _tool(name=MARK)}],
    },
    "tools and question": {"messages": _messages(MARK), "tools": [_tool()]},
    "conversations call name": {"conversations": _said({"name": MARK, "arguments": {}})},
    "conversations arguments": {"conversations": _said({"name": "f", "arguments": {"a": [MARK], MARK: 1}})},
    "conversations arguments as text": {"conversations": _said({"name": "f", "arguments": MARK})},
    "conversations result": {"conversations": _said({"name": "f"}, MARK)},
    "messages call name": {"messages": _asked({"name": MARK, "arguments": "{}"})},
    "messages arguments": {"messages": _asked({"name": "f", "arguments": {MARK: MARK}})},
    "messages arguments as text": {"messages": _asked({"name": "f", "arguments": MARK})},
    "messages result": {"messages": _asked({"name": "f"}, MARK)},
    "messages result part": {"messages": _asked({"name": "f"}, [{"type": "text", "text": MARK}])},
    "messages beside calls": {"messages": _asked({"name": "f"}, content=MARK)},
}
THOUGHT = {"messages": _messages(reasoning_content=MARK)}
THINKING_FAMILIES = [family for family in LATER_FAMILIES if family.has_thinking and family.thinking != "all"]


@pytest.mark.parametrize("name", FIELDS)
def test_special_tokens_in_any_field_stay_text(subject: Subject, name: str) -> None:
    _check_special_tokens(subject, subject.families[0], json.dumps(FIELDS[name]))


@pytest.mark.parametrize("subject", ["fast"], indirect=True)
@pytest.mark.parametrize("family", THINKING_FAMILIES, ids=lambda family: f"{family.name} {family.tool_form}")
def test_special_tokens_in_thinking_stay_text(subject: Subject, family: Family) -> None:
    _check_special_tokens(subject, family, json.dumps(THOUGHT))


def _check_special_tokens(subject: Subject, family: Family, record: str) -> None:
    """The ids say the same as with a harmless word in their place, and no control token is among them but for those
    that were there before."""
    specials = set(subject.tokenizer.convert_tokens_to_ids(list(subject.specials)))
    harmless = _encoded(subject, family, record, MARK)
    text = subject.decode(harmless.input_ids)
    placed = [id_ for id_ in harmless.input_ids if id_ in specials]
    assert MARK in text and placed == subject.tokenizer.convert_tokens_to_ids([START, END.strip()]) * (len(placed) // 2)
    for special in subject.specials:
        encoded = _encoded(subject, family, record, special)
        assert [id_ for id_ in encoded.input_ids if id_ in specials] == placed, special
        assert subject.decode(encoded.input_ids) == text.replace(MARK, special)
        assert [span[1:] for span in encoded.spans] == [span[1:] for span in harmless.spans]


def _encoded(subject: Subject, family: Family, record: str, text: str) -> EncodedConversation:
    """The record with a text in the place of the mark, in its fields or by ``--fill``."""
    for mark, part in ((MARK, text), (HALVES[0], text[:4]), (HALVES[1], text[4:])):
        record = record.replace(mark, part)
    value = json.loads(record)
    parsed = recognise(value, "here").parse(value, "here")
    turns, _ = fill_turns(parsed.turns, {"name": text})
    return subject.encoder(family).encode_conversation(replace(parsed, turns=turns))
