"""Properties of encoding that hold for every conversation, whatever its texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.families import QWEN_V1, Family
from chat.label_mask import LabelMask
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.turns import Turn
from data_utils.encode import EncodedConversation
from data_utils.schema import Conversation
from errors import DataError
from tests.chats import END, FAMILIES, NO_WEIGHTS, PROFILE, START, Subject, chats, plain_chats, tool_chats
from tests.encoding import trained_of, trained_runs, weights_of
from tests.families import STRICT, Checkpoint, load_family, messages_of
from tests.golden import run_python

MASKS: tuple[LabelMask, ...] = ("assistant", "qwen", "last", "all")
V1 = pytest.mark.parametrize("subject", ["small", "real"], indirect=True)


def trained_texts(subject: Subject, encoded: EncodedConversation) -> list[str]:
    return [subject.decode(encoded.input_ids[start:end]) for start, end in trained_runs(encoded)]


@PROFILE
@given(st.data())
def test_ids_decode_to_the_text_and_labels_are_ids(subject: Subject, data: st.DataObject) -> None:
    """NFC is applied to each segment apart, which gives the NFC of the whole text: a segment ends with a control token,
    a newline or a colon, and no combining mark at the start of the next segment composes with these."""
    family, conversation = data.draw(chats(subject))
    mask = data.draw(st.sampled_from(MASKS))
    encoded = subject.encoder(family, mask).encode_conversation(conversation)
    weights = weights_of(encoded)
    rendered = render(conversation.turns, family, None, mask, conversation.tools)
    segments = [segment.text for message in rendered for segment in message.segments]
    assert subject.decode(encoded.input_ids) == "".join(map(subject.read, segments)) == subject.read(text_of(rendered))
    assert len(encoded.input_ids) == len(encoded.labels) == len(weights)
    for id_, label, weight in zip(encoded.input_ids, encoded.labels, weights, strict=True):
        assert label == (id_ if weight > 0 else -100)
    assert encoded.trained_tokens == sum(label != -100 for label in encoded.labels[1:])


@pytest.fixture(scope="module")
def strict_checkpoints(shared: Path) -> list[Checkpoint]:
    modes: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in STRICT]
    modes += [("qwen3_6", {"preserve_thinking": True}), ("qwen3_8", {"enable_thinking": False})]
    return [load_family(shared, name, mode) for name, mode in modes]


@pytest.mark.parametrize("subject", ["fast"], indirect=True)
@PROFILE
@given(st.data())
def test_ids_of_strict_formats_decode_to_the_official_template_s_text(
    subject: Subject, strict_checkpoints: list[Checkpoint], data: st.DataObject
) -> None:
    """Texts are trimmed and tools described as there, and only the frames of messages are control tokens."""
    checkpoint = data.draw(st.sampled_from(strict_checkpoints))
    family = checkpoint.family
    conversation = data.draw(tool_chats(subject, family) | plain_chats(subject, family))
    encoded = subject.encoder(family).encode_conversation(conversation)
    text = checkpoint.template(messages_of(conversation.turns), conversation.tools)
    assert subject.decode(encoded.input_ids) == subject.read(text)
    start, end, *others = subject.tokenizer.convert_tokens_to_ids([START, END.strip(), *subject.specials])
    messages = len(render(conversation.turns, family, tools=conversation.tools))
    assert [id_ for id_ in encoded.input_ids if id_ in (start, end, *others)] == [start, end] * messages


@V1
@PROFILE
@given(st.data())
def test_trained_text_is_the_answers(subject: Subject, data: st.DataObject) -> None:
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
    assert [set(weights_of(encoded)[start:end]) for start, end in trained_runs(encoded)] == [
        {each} for _, each in expected
    ]


@PROFILE
@given(st.data())
def test_mask_all_trains_everything_except_turns_of_weight_0(subject: Subject, data: st.DataObject) -> None:
    family, conversation = data.draw(chats(subject))
    encoder = subject.encoder(family, "all")

    def trained(weight: float | None) -> list[bool]:
        system = () if conversation.turns[0].role == "system" else (Turn("system", "x"),)
        turns = tuple(turn._replace(weight=weight) for turn in (*system, *conversation.turns))
        return trained_of(encoder.encode_conversation(replace(conversation, turns=turns)))

    assert not any(trained(0.0))
    # Qwen v1 does not write the end of a message that waits for a result.
    untrained = 2 if conversation.turns[-1].calls and family == QWEN_V1 else 0
    everything = trained(None)
    assert everything == [True] * (len(everything) - untrained) + [False] * untrained


@V1
@PROFILE
@given(st.data())
def test_only_the_models_part_of_calls_is_trained(subject: Subject, data: st.DataObject) -> None:
    conversation = data.draw(tool_chats(subject, QWEN_V1))
    encoded = subject.encoder(QWEN_V1).encode_conversation(conversation)
    texts: dict[str, list[str]] = {"tool": [], "assistant": []}
    start = 0
    for length, role, weight in encoded.spans:
        text = subject.decode(encoded.input_ids[start : start + length])
        assert weight == 0 or role == "assistant"
        if role == "tool" or weight:
            texts[role].append(text)
        start += length
    results = [turn.content for turn in conversation.turns if turn.role == "tool"]
    assert texts["tool"] == [subject.read(f" {_stripped(result)}\nThought:") for result in results]
    expected: list[str] = []
    for turn in conversation.turns:
        if turn.role == "assistant" and not turn.calls:
            expected.append(
                subject.read(f" I now know the final answer.\nFinal Answer: {_stripped(turn.content)}") + END
            )
        for call in turn.calls:
            arguments = call.arguments_text.strip()
            expected.append(subject.read(f"\nAction: {call.name}\nAction Input: {arguments}\nObservation:"))
    assert [text[-len(end) :] for text, end in zip(texts["assistant"], expected, strict=True)] == expected


def _stripped(text: str) -> str:
    return text.lstrip("\n").rstrip()


@PROFILE
@given(st.data())
def test_answers_are_trained_exactly_if_their_prompt_is_a_prefix(subject: Subject, data: st.DataObject) -> None:
    """An answer is trained, to its end, exactly if its inference prompt equals the ids before it.

    Turns have no weights of their own here, because these also train answers without a prompt.
    """
    family, conversation = data.draw(chats(subject, NO_WEIGHTS))
    turns, tools = conversation.turns, conversation.tools
    encoded = subject.encoder(family).encode_conversation(conversation)
    start_id, end_id = subject.tokenizer.convert_tokens_to_ids([START, END.strip()])
    answer_starts, prompt_ends = [], []
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and _has_prompt(index, turns, family):
            prompt = encode_prompt(render_prompt(turns[:index], family, None, tools), subject.tokenizer)
            if encoded.input_ids[: len(prompt)] == prompt:
                prompt_ends.append(len(prompt))
            else:
                assert family.has_thinking, index
    for start, end in trained_runs(encoded):
        answer_starts.append(start)
        ids = encoded.input_ids[start:end]
        assert start_id not in ids and ids.count(end_id) == ids[-2:].count(end_id) <= 1
        assert subject.decode(ids).endswith((END, "\nObservation:") if family == QWEN_V1 else END)
    if family == QWEN_V1 and any(len(turn.calls) > 1 for turn in turns):
        assert set(prompt_ends) <= set(answer_starts)  # calls made at once are written one after the other
    else:
        assert answer_starts == prompt_ends


def _has_prompt(index: int, turns: Sequence[Turn], family: Family) -> bool:
    """Check that the family has a prompt for an answer at an index."""
    if index == 0 or (index == 1 and turns[0].role == "system" and family.default_system is None):
        return family.prompts_opening_answer or index == 1
    return family.prompts_after_answer or turns[index - 1].role != "assistant"


@PROFILE
@given(st.data())
def test_truncation_keeps_the_most_turns_that_fit(subject: Subject, data: st.DataObject) -> None:
    """The rest is encoded as a conversation of its own, and no answer is trained without its end."""
    family, conversation = data.draw(chats(subject))
    truncation = data.draw(st.sampled_from(["turns", "turns_left"]))
    encode = subject.encoder(family).encode_conversation
    candidates = [encode(replace(conversation, turns=turns)) for turns in _shortened(conversation, family, truncation)]
    most = data.draw(st.integers(1, len(candidates[0].input_ids)))
    encoded = subject.fresh_encoder(family, max_length=most, truncation=truncation).encode_conversation(conversation)
    expected = next((each for each in candidates if len(each.input_ids) <= most), EncodedConversation([], []))
    if truncation == "turns" and expected is not candidates[0] and not expected.trained_tokens:
        # A start that trains something is preferred to a longer one that does not.
        trained = [each for each in candidates[1:] if len(each.input_ids) <= most and each.trained_tokens]
        expected = trained[0] if trained else expected
    assert (encoded.input_ids, encoded.spans) == (expected.input_ids, expected.spans)
    assert (encoded.turns_dropped == 0) == (encoded == candidates[0])
    text = subject.decode(encoded.input_ids)
    assert text.endswith(END) or not text
    assert all(run.endswith((END, "\nObservation:")) for run in trained_texts(subject, encoded))
    if text and truncation == "turns_left" and encoded.turns_dropped and family == QWEN_V1:
        system = conversation.turns[:1] if conversation.turns[0].role == "system" else ()
        stripped = [turn._replace(content=turn.content.lstrip("\n").rstrip()) for turn in system]  # as ReAct text is
        starts = [subject.read(text_of(render(turns, family))) + f"{START}user\n" for turns in (system, stripped)]
        assert text.startswith(tuple(starts))


def _shortened(conversation: Conversation, family: Family, truncation: str) -> Iterator[tuple[Turn, ...]]:
    """Yield the turns, then fewer and fewer of them, split between messages, while an answer is left."""
    turns, roles = conversation.turns, [turn.role for turn in conversation.turns]
    first = 1 if roles[0] == "system" else 0
    yield turns
    if truncation == "turns":
        # Qwen v1 writes calls, results and the following answer in one message; later families, neighbouring results.
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


@pytest.mark.parametrize("truncation", ["turns", "turns_left"])
@V1
def test_opening_answer_with_tools_is_truncated_or_refused(subject: Subject, truncation: str) -> None:
    """The question after it describes the tools."""
    turns = (Turn("assistant", "Hello!"), Turn("user", "Hi"), Turn("assistant", "You are back."))
    conversation = Conversation(turns, "here", ({"name": "f"},))
    for most in range(1, 300):
        encoder = subject.fresh_encoder(QWEN_V1, max_length=most, truncation=truncation)
        with suppress(DataError):
            assert len(encoder.encode_conversation(conversation).input_ids) <= most


@PROFILE
@given(st.data())
def test_encoding_does_not_depend_on_previous_conversations(subject: Subject, data: st.DataObject) -> None:
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
from tests.chats import FAMILIES
from tests.encoding import weights_of

tokenizer_class, folder, requests, out = sys.argv[1:]
tokenizer = (QWenTokenizer if tokenizer_class == "v1" else PreTrainedTokenizerFast).from_pretrained(folder)
results = []
for family, turns, tools in json.loads(Path(requests).read_text()):
    turns = (Turn(*turn) for turn in turns)
    turns = tuple(turn._replace(calls=tuple(ToolCall(*call) for call in turn.calls)) for turn in turns)
    encoder = Encoder(tokenizer, FAMILIES[family], EncodeOptions(needs_answer=False))
    encoded = encoder.encode_conversation(Conversation(turns, "here", tuple(tools)))
    results.append([encoded.input_ids, weights_of(encoded)])
Path(out).write_text(json.dumps(results))
"""


def test_encoding_is_the_same_in_another_process(subject: Subject, tmp_path: Path) -> None:
    examples: list[tuple[Any, list[Any]]] = []

    @PROFILE
    @given(chats(subject))
    def collect(example: tuple[Family, Conversation]) -> None:
        family, conversation = example
        encoded = subject.encoder(family).encode_conversation(conversation)
        request = (FAMILIES.index(family), conversation.turns, conversation.tools)
        examples.append((request, [encoded.input_ids, weights_of(encoded)]))

    collect()
    requests, out = tmp_path / "requests.json", tmp_path / "out.json"
    requests.write_text(json.dumps([example for example, _ in examples]))
    tokenizer_class = "v1" if subject.is_v1 else "fast"
    ended = run_python(["-c", IN_ANOTHER_PROCESS, tokenizer_class, str(subject.folder), str(requests), str(out)])
    assert ended.returncode == 0, ended.stderr
    assert json.loads(out.read_text()) == [encoded for _, encoded in examples]
