"""Conversations as ChatML: the only place that knows how a turn is written and which part of it is trained.

A turn is ``<|im_start|>{role}\\n{content}<|im_end|>\\n``. How answers are written is found in ``answers.py``, tools and
their calls by the family's tool form. Rendering gives segments rather than one string, because what
is a control token, what is a person's text and what is trained must never be found out again by searching the text.
One function turns segments into ids and mask together.

Training and inference render here, so the ids of a prompt are a prefix of the training ids of the same conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from chat.answers import Answers
from chat.families import IM_END, IM_START, Family
from chat.label_mask import LabelMask, _weights
from chat.turns import Message, Piece, Tool, ToolForm, Turn

EncodeText = Callable[[str], list[int]]


class Segment(NamedTuple):
    """A piece of a rendered message: one control token, or text that is tokenised on its own.

    Attributes:
        weight: of each of its ids in the loss; 0 is not trained.
        role: whose text it is, or in whose message the control token stands.
    """

    text: str
    is_control: bool
    weight: float
    role: str


class RenderedMessage(NamedTuple):
    """Segments of a message; how many turns of the conversation are written when it is; whether it was left open."""

    segments: list[Segment]
    end: int
    is_open: bool = False


def with_system(turns: Sequence[Turn], family: Family, system_message: str | None = None) -> list[Turn]:
    """The conversation with its system turn: its own, else ``system_message``, else the family's default."""
    if turns and turns[0].role == "system":
        return list(turns)
    system = family.default_system if system_message is None else system_message
    return list(turns) if system is None else [Turn("system", system), *turns]


def render(
    turns: Sequence[Turn],
    family: Family,
    system_message: str | None = None,
    label_mask: LabelMask = "assistant",
    tools: Sequence[Tool] = (),
) -> list[RenderedMessage]:
    """Render a conversation for training, message by message (the system message included).

    Args:
        turns: the conversation; a first turn of role ``system`` is its system message.
        system_message: for a conversation without one; ``None`` takes the family's default.
        label_mask: what is trained where a turn's ``weight`` does not say it. ``assistant``: each answer and its
            ``<|im_end|>\\n``; ``last``: of these the last one; ``qwen``: what the original did, also the
            ``<|im_start|>`` and ``<|im_end|>\\n`` of every message; ``all``: everything.
        tools: what the assistant may call.

    Raises:
        ValueError: tools or calls that the family cannot write; the message says what.
    """
    return _render(turns, family, system_message, label_mask, tools, is_prompt=False)


def render_prompt(
    turns: Sequence[Turn], family: Family, system_message: str | None = None, tools: Sequence[Tool] = ()
) -> list[RenderedMessage]:
    """Render a conversation that the model is to continue: its turns, then the open header of an answer.

    Where the family writes a function's result into the answer that asked for it, that answer stays open instead.
    """
    rendered = _render(turns, family, system_message, "assistant", tools, is_prompt=True)
    if turns and turns[-1].role == "assistant" and not family.continues_answers:
        return rendered
    if rendered and rendered[-1].is_open:
        return rendered
    header = Segment("assistant\n" + family.prompt_suffix, False, 0, "assistant")
    return [*rendered, RenderedMessage([Segment(IM_START, True, 0, "assistant"), header], len(turns))]


def _render(
    turns: Sequence[Turn],
    family: Family,
    system_message: str | None,
    label_mask: LabelMask,
    tools: Sequence[Tool],
    is_prompt: bool,
) -> list[RenderedMessage]:
    complete = with_system(turns, family, system_message)
    form = _form_for(complete, tools, family)
    if form is not None:
        complete = form.describe(complete, tools)
    added = len(complete) - len(turns)
    answers = Answers(complete, family)
    weights = _weights(complete, answers, family, label_mask, bool(added))
    written = answers.written()
    rendered, start = [], 0
    for message in _plain(written, weights) if form is None else form.write(written, weights, tools, is_prompt):
        given = complete[start].weight
        mark = 0.0 if label_mask not in ("qwen", "all") else 1.0 if given is None else given
        body = _body(message, family, mark if label_mask == "all" else 0.0)
        author = message.pieces[0].role
        segments = [Segment(IM_START, True, mark, author), *body]
        is_open = is_prompt and message.is_open
        if not is_open:
            end = 0.0 if message.is_open else body[-1].weight or mark
            segments += [Segment(IM_END, True, end, author), Segment("\n", False, end, author)]
        rendered.append(RenderedMessage(segments, max(0, message.end - added), is_open))
        start = message.end
    return rendered


def _form_for(turns: Sequence[Turn], tools: Sequence[Tool], family: Family) -> ToolForm | None:
    """The family's tool form where a conversation needs one."""
    if not tools and not any(turn.calls or turn.role == "tool" for turn in turns):
        return None
    if family.tool_form is None:
        raise ValueError(f"the chat format {family.name!r} cannot write tools and their calls yet")
    return family.tool_form


def _plain(turns: Sequence[Turn], weights: Sequence[float]) -> list[Message]:
    return [
        Message(turn.role, (Piece(turn.content, turn.role, weight),), index)
        for index, (turn, weight) in enumerate(zip(turns, weights, strict=True), 1)
    ]


def text_of(rendered: Iterable[RenderedMessage]) -> str:
    """The rendered conversation as one string."""
    return "".join(segment.text for message in rendered for segment in message.segments)


def encode_segment(segment: Segment, encode_text: EncodeText, control_ids: dict[str, int]) -> list[int]:
    """Ids of a segment.

    Args:
        encode_text: text -> ids; must not turn text into control tokens (``plain_encoder``).
        control_ids: ids of ``<|im_start|>`` and ``<|im_end|>``.
    """
    return [control_ids[segment.text]] if segment.is_control else encode_text(segment.text)


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


def encode_prompt(rendered: Iterable[RenderedMessage], tokenizer: Any) -> list[int]:
    """Ids of a rendered prompt."""
    encode_text, control_ids = plain_encoder(tokenizer), control_ids_of(tokenizer)
    segments = (segment for message in rendered for segment in message.segments)
    return [id_ for segment in segments for id_ in encode_segment(segment, encode_text, control_ids)]


def _body(message: Message, family: Family, header_weight: float) -> list[Segment]:
    """Header and content of a message."""
    first, *more = (Segment(piece.text, False, piece.weight, piece.role) for piece in message.pieces)
    header = f"{message.role}\n"
    if message.role == "assistant":
        # The header is what the prompt says already; at inference the model continues its ids.
        if first.text.startswith(family.prompt_suffix):
            header += family.prompt_suffix
            first = first._replace(text=first.text.removeprefix(family.prompt_suffix))
    elif family.joins_header:
        return [first._replace(text=header + first.text, weight=first.weight or header_weight), *more]
    return [Segment(header, False, header_weight, first.role), first, *more]
