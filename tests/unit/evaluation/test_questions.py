"""Questions that are read from tokenised examples are the prompts that inference writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from chat.detect import family_of
from chat.families import ANSWER_STYLES, EMPTY_THOUGHT, QWEN_V1, STRICT_STYLES, Family
from chat.label_mask import LabelMask
from chat.render import encode_prompt, render_prompt
from chat.tools_hermes import HERMES_FORMS
from chat.turns import ToolCall, Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.location import Location
from data_utils.schema import Conversation
from evaluation.answering import Answerer, Written
from evaluation.questions import Question, QuestionFinder, draw_questions
from tests.chats import Subject, load_subject
from tests.encoding import check_and_encode
from tests.golden import SMALL
from tests.own_templates import CHATML, OWN, tokenizer_with

TOOL = {"type": "function", "function": {"name": "find", "description": "", "parameters": {"type": "object"}}}
CALL = Turn("assistant", "I look.", (ToolCall("find", {"q": "天"}),))
ASKED = Turn("user", "Where is 天?")
CHATS: dict[str, Sequence[Turn]] = {
    "plain": [Turn("user", "Hi"), Turn("assistant", "Hello <|im_end|> 你好"), ASKED, Turn("assistant", "Up.")],
    "empty": [ASKED, Turn("assistant", "")],
    "call": [ASKED, CALL],
    "after_result": [ASKED, CALL, Turn("tool", "above"), Turn("assistant", "Above.")],
}
STYLES = [QWEN_V1, *(replace(style, tool_form=HERMES_FORMS[0]) for style in (*ANSWER_STYLES, *STRICT_STYLES))]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Subject]:
    folder = tmp_path_factory.mktemp("fast")
    return {is_v1: load_subject("small" if is_v1 else "fast", SMALL, folder) for is_v1 in (True, False)}


def found(encoded: EncodedConversation, finder: QuestionFinder, labels: list[int] | None = None) -> Question | None:
    return finder.find({"input_ids": list(encoded.input_ids), "labels": labels or encoded.labels}, "a:1")


def finder(subject: Subject) -> QuestionFinder:
    return QuestionFinder([STYLES[1]], subject.tokenizer)


def answerer_of(subject: Subject, family: Family) -> Answerer:
    checkpoint: Any = SimpleNamespace(
        family=family, tokenizer=subject.tokenizer, config=SimpleNamespace(max_position_embeddings=512),
        generation_config=GenerationConfig(), end_ids=[1, 2], model_type="qwen2",
    )  # fmt: skip
    return Answerer(checkpoint, 64)


class Examples(list[Any]):
    """What drawing needs of an example set."""

    def __init__(self, source_sizes: list[int], examples: list[Any]) -> None:
        super().__init__(examples)
        self.source_sizes = source_sizes

    def where(self, index: int) -> str:
        return f"a:{index}"


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("number", range(len(STYLES)))
def test_question_is_the_prompt_of_the_last_answer(subjects: dict[bool, Subject], number: int, chat: str) -> None:
    family: Family = STYLES[number]
    subject, turns = subjects[family is QWEN_V1], CHATS[chat]
    if family.prompt_suffix and family.has_thinking:  # an answer that its prompt can lead to
        turns = [*turns[:-1], turns[-1]._replace(thinking="" if "\n\n" in family.prompt_suffix else "So.")]
    tools = (TOOL,) if any(turn.calls for turn in turns) else ()
    encoded = check_and_encode(subject.fresh_encoder(family), Conversation(tuple(turns), Location("a", 1), tools))
    question = found(encoded, QuestionFinder([family], subject.tokenizer))
    if family.thinking == "stripped":  # no answer of the data can follow its prompt, and none is trained
        assert question is None
        return
    assert question is not None
    assert list(question.prompt_ids) == encode_prompt(render_prompt(turns[:-1], family, tools=tools), subject.tokenizer)
    answerer = answerer_of(subject, family)
    expected = answerer.expected(question)
    assert (expected.text, [call.name for call in expected.calls]) == (
        turns[-1].content, [call.name for call in turns[-1].calls],
    )  # fmt: skip
    # An answer in the words of the expected one has all scores; a file's thinking is no part of them.
    ids = question.expected_ids
    written = Written(answerer.text(ids, answerer._stops), len(ids) + 1, True)
    scores = answerer.scores(question, written)
    assert {scores.pop("answer_tokens"), *scores.values()} == {len(ids) + 1.0, 1.0}
    assert ("above" if chat == "after_result" and family is not QWEN_V1 else ASKED.content) in answerer.asked(question)


@pytest.mark.parametrize("template", [*CHATML.values(), *OWN.values()], ids=[*CHATML, *OWN])
def test_question_of_a_template_of_the_users(template: str) -> None:
    tokenizer = tokenizer_with(template)
    family, turns = family_of(tokenizer), (Turn("user", "1+1?"), Turn("assistant", "Two."))
    encoded = check_and_encode(Encoder(tokenizer, family, EncodeOptions()), Conversation(turns, "a"))
    question = found(encoded, QuestionFinder([family], tokenizer))
    assert question is not None
    assert list(question.prompt_ids) == encode_prompt(render_prompt(turns[:-1], family), tokenizer)
    assert tokenizer.decode(question.expected_ids).strip() == "Two."


@pytest.mark.parametrize("label_mask", ["assistant", "all"])
@pytest.mark.parametrize("thought", ["", "So."])
def test_prompts_with_and_without_thinking_are_told_apart(
    subjects: dict[bool, Subject], thought: str, label_mask: LabelMask
) -> None:
    """The families of a model that can think: their prompts differ in what opens the answer."""
    subject, families = subjects[False], [style for style in STYLES if style.name == "chatml-3.5"][:2]
    assert families[0].prompt_suffix == "<think>\n" and families[1].prompt_suffix == EMPTY_THOUGHT
    turns = (ASKED, Turn("assistant", "Up.", thinking=thought))
    family = families[not thought]
    encoded = check_and_encode(subject.fresh_encoder(family, label_mask=label_mask), Conversation(turns, "a"))
    question = found(encoded, QuestionFinder(families, subject.tokenizer))
    assert question is not None and question.opening == family.prompt_suffix
    assert list(question.prompt_ids) == encode_prompt(render_prompt(turns[:-1], family), subject.tokenizer)
    assert answerer_of(subject, families[0]).expected(question).text == "Up."


@pytest.mark.parametrize("label_mask", ["assistant", "last", "qwen", "all"])
def test_every_mask_finds_the_whole_answer(subjects: dict[bool, Subject], label_mask: LabelMask) -> None:
    subject, turns = subjects[False], CHATS["plain"]
    encoder = subject.fresh_encoder(STYLES[1], label_mask=label_mask)
    question = found(encoder.encode_conversation(Conversation(tuple(turns), Location("a", 1))), finder(subject))
    assert question is not None and subject.decode(question.expected_ids) == "Up."


def test_answers_that_are_not_trained_or_not_complete_are_not_asked_for(subjects: dict[bool, Subject]) -> None:
    subject, turns = subjects[False], CHATS["plain"]

    def expected(*turns: Turn, cut: int | None = None) -> str | None:
        encoded = subject.encoder(STYLES[1]).encode_conversation(Conversation(turns, Location("a", 1)))
        question = found(replace(encoded, input_ids=encoded.input_ids[:cut]), finder(subject), encoded.labels[:cut])
        return None if question is None else subject.decode(question.expected_ids)

    assert expected(*turns) == "Up."
    assert expected(*turns, cut=-2) == expected(*turns[:3], turns[3]._replace(weight=0.0)) == turns[1].content
    assert expected(turns[0], turns[1]._replace(weight=0.0)) is None
    encoder = subject.fresh_encoder(STYLES[1], label_mask="qwen")  # which trains the ends of all messages
    untrained = Conversation((turns[0], turns[1]._replace(weight=0.0)), Location("a", 1))
    assert found(encoder.encode_conversation(untrained), finder(subject)) is None
    [piece] = subject.encoder(STYLES[1]).encode(Conversation((Turn("text", "Hi <|im_start|>"),), Location("a", 1)))
    assert found(piece, finder(subject)) is None


def test_questions_are_drawn_equally_from_sources_without_copies(subjects: dict[bool, Subject]) -> None:
    """The set is three sources: 10 conversations, 2, and 6 of which 3 are copies."""
    sizes, names = [10, 2, 6], [*"abcdefghij", *"kl", *"mnomno"]
    encoder = subjects[False].encoder(STYLES[1])
    encoded = [
        encoder.encode_conversation(Conversation((ASKED, Turn("assistant", name)), Location(name, 1))) for name in names
    ]
    examples = Examples(sizes, [{"input_ids": list(each.input_ids), "labels": each.labels} for each in encoded])

    def drawn(count: int, seed: int = 1) -> list[tuple[str, int]]:
        questions = draw_questions(examples, finder(subjects[False]), count, seed)
        return [(subjects[False].decode(each.expected_ids), each.source) for each in questions]

    for count, counts in ((3, [1, 1, 1]), (4, [2, 1, 1]), (8, [3, 2, 3]), (99, [10, 2, 3])):
        got = drawn(count)
        assert [sum(source == each for _, source in got) for each in range(3)] == counts
        assert len(set(got)) == len(got) and [source for _, source in got] == sorted(source for _, source in got)
    assert drawn(8) == drawn(8) != drawn(8, seed=2)
