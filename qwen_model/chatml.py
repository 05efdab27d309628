"""Conversations as ChatML: the only place that knows how a turn is written and which part of it is trained.

A turn is ``<|im_start|>{role}\\n{content}<|im_end|>\\n``. Rendering gives segments rather than one string, because what
is a control token, what is a person's text and what is trained must never be found out again by searching the text.
One function turns segments into ids and mask together.

Training and inference render here, so the ids of a prompt are a prefix of the training ids of the same conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from qwen_model.families import IM_END, IM_START, Family, Turn

IGNORE_INDEX = -100
"""The label of an id that is not learnt, torch's and transformers' convention."""

LabelMask = Literal["assistant", "qwen"]
EncodeText = Callable[[str], list[int]]


class Segment(NamedTuple):
    """A piece of a rendered turn: one control token, or text that is tokenised on its own."""

    text: str
    is_control: bool
    is_trained: bool


RenderedTurn = list[Segment]


def with_system(turns: Sequence[Turn], family: Family, system_message: str | None = None) -> list[Turn]:
    """The conversation with its system turn: its own, else ``system_message``, else the family's default."""
    if turns and turns[0].role == "system":
        return list(turns)
    system = family.default_system if system_message is None else system_message
    return list(turns) if system is None else [Turn("system", system), *turns]


def render(
    turns: Sequence[Turn], family: Family, system_message: str | None = None, label_mask: LabelMask = "assistant"
) -> list[RenderedTurn]:
    """Render a conversation for training, one list of segments per turn (the system turn included).

    Args:
        turns: the conversation; a first turn of role ``system`` is its system message.
        system_message: for a conversation without one; ``None`` takes the family's default.
        label_mask: ``assistant`` trains each answer and its ``<|im_end|>\\n``; ``qwen`` trains what the original did:
            the ``<|im_start|>`` and ``<|im_end|>\\n`` of every turn as well.
    """
    brings_system = bool(turns) and turns[0].role == "system"
    turns = with_system(turns, family, system_message)
    first = 1 if turns and turns[0].role == "system" else 0
    rendered = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            is_last = index == len(turns) - 1
            body = _answer_segments(turn.content, family, is_last, is_last and _asks(turns))
            opens = index == first and not brings_system and not family.trains_opening
            if opens or not _prompt_holds(turns[:index], family):
                body = [segment._replace(is_trained=False) for segment in body]
        else:
            body = _message_segments(turn, family)
        marks = label_mask == "qwen"
        ends = marks or body[-1].is_trained
        rendered.append(
            [Segment(IM_START, True, marks), *body, Segment(IM_END, True, ends), Segment("\n", False, ends)]
        )
    return rendered


def render_prompt(turns: Sequence[Turn], family: Family, system_message: str | None = None) -> list[RenderedTurn]:
    """Render a conversation that the model is to continue: its turns, then the open header of an answer."""
    rendered = render(turns, family, system_message)
    if turns and turns[-1].role == "assistant" and not family.continues_answers:
        return rendered
    return [*rendered, [Segment(IM_START, True, False), Segment("assistant\n" + family.prompt_suffix, False, False)]]


def text_of(rendered: Iterable[RenderedTurn]) -> str:
    """The rendered conversation as one string."""
    return "".join(segment.text for turn in rendered for segment in turn)


def encode_turn(
    turn: RenderedTurn, encode_text: EncodeText, control_ids: dict[str, int]
) -> tuple[list[int], list[bool]]:
    """Ids of one rendered turn, and for each id whether it is trained.

    Args:
        encode_text: text -> ids; must not turn text into control tokens (``plain_encoder``).
        control_ids: ids of ``<|im_start|>`` and ``<|im_end|>``.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for segment in turn:
        piece = [control_ids[segment.text]] if segment.is_control else encode_text(segment.text)
        ids += piece
        trained += [segment.is_trained] * len(piece)
    return ids, trained


def control_ids_of(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that the renderer places, from a Qwen v1 or a later tokenizer."""
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in (IM_START, IM_END)}


def plain_encoder(tokenizer: Any) -> EncodeText:
    """A function that encodes text as plain text: ``<|im_end|>`` in a message stays six harmless tokens."""
    if hasattr(tokenizer, "encode_plain"):
        encode_plain: EncodeText = tokenizer.encode_plain
        return encode_plain

    def encode(text: str) -> list[int]:
        # Tokenizers in Rust refuse lone surrogates; like tiktoken, read them as U+FFFD.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = tokenizer(clean, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    return encode


def encode_prompt(rendered: Iterable[RenderedTurn], tokenizer: Any) -> list[int]:
    """Ids of a rendered prompt."""
    encode_text, control_ids = plain_encoder(tokenizer), control_ids_of(tokenizer)
    return [id_ for turn in rendered for id_ in encode_turn(turn, encode_text, control_ids)[0]]


def _message_segments(turn: Turn, family: Family) -> list[Segment]:
    header = f"{turn.role}\n"
    if family.joins_header:
        return [Segment(header + turn.content, False, False)]
    return [Segment(header, False, False), Segment(turn.content, False, False)]


def _asks(turns: Sequence[Turn]) -> bool:
    """Whether a user speaks at all: the later templates open a last answer only then."""
    return any(turn.role == "user" for turn in turns)


def _prompt_holds(before: Sequence[Turn], family: Family) -> bool:
    """Whether the prompt for an answer after ``before`` is what stands before it in the whole conversation.

    It is not where an answer follows an answer and the former would be written differently as the last one.
    """
    if not before or before[-1].role != "assistant":
        return True
    previous = before[-1].content
    as_last = _answer_segments(previous, family, True, _asks(before))
    in_between = _answer_segments(previous, family, False, False)
    return family.continues_answers and as_last == in_between


def _answer_segments(content: str, family: Family, is_last: bool, is_opened: bool) -> list[Segment]:
    """Header and answer. What the generation prompt already says is not trained; an answer that does not start as the
    prompt does could never be generated, and is not trained at all."""
    opening = family.opens_last_answer if is_opened else ""
    strips = {"none": False, "opened": bool(opening), "history": not is_last, "all": True}[family.strips_answers]
    answer = opening + (content.lstrip("\n") if strips else content)
    follows_prompt = answer.startswith(family.prompt_suffix)
    header = "assistant\n"
    if follows_prompt:
        header += family.prompt_suffix
        answer = answer[len(family.prompt_suffix) :]
    return [Segment(header, False, False), Segment(answer, False, follows_prompt)]
