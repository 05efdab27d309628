"""Conversations of one shape are encoded as each of them would be by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.families import ANSWER_STYLES, QWEN_V1, STRICT_STYLES, Family
from chat.render import check_turns
from chat.samples import Sample
from chat.turns import ToolCall, Turn
from data_utils.encode import EncodeOptions, Encoder
from data_utils.schema import Conversation
from data_utils.shapes import has_shape
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.chats import PROFILE
from tests.models import TINY

TEXTS = st.sampled_from(
    ["", "Hi", "\nHi", "Hello!\n", "é", "<think>", "a </think>\n\nb", "<tool_response>x</tool_response>"]
)
TURNS = st.builds(
    Turn,
    st.sampled_from(["user", "assistant", "system"]),
    TEXTS | st.text(max_size=5).filter(lambda text: text.isascii()),
    st.just(()),
    st.sampled_from([None, None, 0.0, 1.0]),
)


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(TINY)


EFFORT = replace(STRICT_STYLES[-1], instructions="Think briefly.")


@pytest.mark.parametrize("family", [QWEN_V1, *ANSWER_STYLES, *STRICT_STYLES, EFFORT], ids=lambda family: family.name)
@PROFILE
@given(
    turns=st.lists(TURNS, min_size=1, max_size=5).map(tuple), mask=st.sampled_from(["assistant", "qwen", "last", "all"])
)
def test_a_shape_gives_what_rendering_gives(
    family: Family, tokenizer: QWenTokenizer, turns: tuple[Turn, ...], mask: str
) -> None:
    encoder = Encoder(tokenizer, family, EncodeOptions(label_mask=mask))  # type: ignore[arg-type]
    if not has_shape(turns, family):
        return
    samples = [Sample(True, len(turns))]
    if turns[-1].role == "assistant":
        samples.append(Sample(True, len(turns), len(turns) // 2))
    for sample in samples:
        try:
            check_turns(turns, family, ())
        except ValueError:
            continue  # a strict format has no question, or a late system message
        assert encoder._encode_shape(turns, sample) == encoder._encode(encoder._render(turns, (), sample))


def test_texts_that_decide_how_they_are_written_have_no_shape() -> None:
    hybrid = ANSWER_STYLES[2]
    for text in ("<think>a</think>b", "</think>", "\nHi", "<tool_response>x"):
        assert not has_shape([Turn("assistant", text)], hybrid)
        assert has_shape([Turn("assistant", text)], QWEN_V1)
    for turn in (Turn("tool", "x"), Turn("assistant", "", (ToolCall("f", {}),)), Turn("assistant", "a", thinking="b")):
        assert not has_shape([turn], QWEN_V1)


def test_a_blank_system_message_has_no_shape_where_none_is_written(tokenizer: QWenTokenizer) -> None:
    """Qwen3.8 leaves it out; behind a reasoning effort there are no line ends for it."""
    turns = (Turn("system", ""), Turn("user", "a"), Turn("assistant", "b"))
    for family in (STRICT_STYLES[-1], EFFORT):
        assert not has_shape(turns, family) and has_shape(turns[1:], family)
        encoder = Encoder(tokenizer, family, EncodeOptions())
        without = encoder.encode_conversation(Conversation(turns[1:], "here"))
        assert encoder.encode_conversation(Conversation(turns, "here")).input_ids == without.input_ids
    assert has_shape(turns, STRICT_STYLES[0])


def test_long_conversations_and_rare_weights_have_no_shape() -> None:
    assert has_shape([Turn("user", "a"), Turn("assistant", "b", weight=1.0)], QWEN_V1)
    assert not has_shape([Turn("user", "a"), Turn("assistant", "b", weight=0.7)], QWEN_V1)
    assert not has_shape([Turn("user", "a")] * 33, QWEN_V1)


def test_a_shape_is_rendered_once(tokenizer: QWenTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rendered = Encoder(tokenizer, QWEN_V1, EncodeOptions()), list[int]()
    render = encoder._render
    monkeypatch.setattr(encoder, "_render", lambda *arguments: rendered.append(1) or render(*arguments))
    for number in range(9):
        encoder._encode_shape((Turn("user", f"{number}"), Turn("assistant", "Hello!")), Sample(True, 2))
    assert len(rendered) == 1
