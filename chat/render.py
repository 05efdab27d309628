"""Conversations as ChatML: the only place that writes turns, for training and for inference.

Other formats are written by the checkpoint's template itself (``chat.own_template``), called from here.

A turn is ``<|im_start|>{role}\\n{content}<|im_end|>\\n``. ``chat.answers`` gives the text of answers, the family's tool
form writes tools and calls, and ``chat.label_mask`` gives the loss weights. Because training and inference share this
code, the ids of a prompt are a prefix of the training ids of the same conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from chat.answers import Answers, is_question
from chat.chatml import IM_END, IM_START
from chat.families import Family
from chat.label_mask import LabelMask, frame_weights, turn_weights
from chat.own_template import render_own
from chat.segments import Message, Segment, ToolForm
from chat.turns import TEXT, Tool, Turn

EncodeText = Callable[[str], list[int]]


def add_system_turn(turns: Sequence[Turn], family: Family, system_message: str | None = None) -> list[Turn]:
    """Return the turns, starting with a system turn: their own, else ``system_message``, else the family's default."""
    if turns and turns[0].role == "system":
        return list(turns)
    system = family.default_system if system_message is None else system_message
    return list(turns) if system is None else [Turn("system", system), *turns]


def check_turns(turns: Sequence[Turn], family: Family, tools: Sequence[Tool]) -> None:
    """Check that a family can write a conversation with its tools, calls and results.

    Raises:
        ValueError: it cannot; the message names the reason.
    """
    _checked_form(turns, family, tools)
    if family.own_template is not None and all(turn.role != TEXT for turn in turns):
        render_own(turns, family.own_template, "assistant", is_prompt=False, added=0)


def _checked_form(turns: Sequence[Turn], family: Family, tools: Sequence[Tool]) -> ToolForm | None:
    """Return the tool form that a conversation needs, after ``check_turns``."""
    form = _tool_form(turns, family, tools)
    if form is not None:
        form.check(turns, tools)
    if family.is_strict and all(turn.role != TEXT for turn in turns):
        _check_order(turns, family)
    return form


def _check_order(turns: Sequence[Turn], family: Family) -> None:
    """Check what the templates of strict families refuse, or write without its header."""
    format_ = f"the chat format {family.name!r}"
    if not any(is_question(trimmed(turn)) for turn in turns):
        raise ValueError(f"the conversation has no question of a user, which {format_} needs")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError(f"a system message is not the first turn, where {format_} needs it")
    if turns[0].role == "tool":
        raise ValueError(f"the conversation begins with the result of a call, which {format_} cannot write")


def trimmed(turn: Turn) -> Turn:
    """Return a turn without the white space around its text and its thinking."""
    return turn._replace(
        content=turn.content.strip(), thinking=None if turn.thinking is None else turn.thinking.strip()
    )


def _tool_form(turns: Sequence[Turn], family: Family, tools: Sequence[Tool]) -> ToolForm | None:
    """Return the family's tool form if the conversation needs one."""
    if not tools and not any(turn.calls or turn.role == "tool" for turn in turns):
        return None
    if family.tool_form is None:
        raise ValueError(f"the chat format {family.name!r} cannot write tools and calls")
    return family.tool_form


def render(
    turns: Sequence[Turn],
    family: Family,
    system_message: str | None = None,
    label_mask: LabelMask = "assistant",
    tools: Sequence[Tool] = (),
) -> list[Message]:
    """Render a conversation for training, including its system message.

    Args:
        turns: the conversation; a first turn of role ``system`` is its system message.
        system_message: for a conversation without one; ``None`` uses the family's default.
        label_mask: which turns are trained; see ``chat.label_mask``.
        tools: functions that the assistant may call.

    Raises:
        ValueError: turns, tools or calls that the family cannot write, as ``check_turns``.
    """
    return _render(turns, family, system_message, label_mask, tools, is_prompt=False)


def render_answer(
    turns: Sequence[Turn],
    family: Family,
    system_message: str | None = None,
    label_mask: LabelMask = "assistant",
    tools: Sequence[Tool] = (),
    trained_from: int = 0,
) -> list[Message]:
    """Render a sample of the last turn, an answer: its text is the prompt of the turns before it, then the answer.

    Args:
        trained_from: number of the first turns that other samples train, and this one does not.

    Raises:
        ValueError: as ``render``.
    """
    return _render(turns, family, system_message, label_mask, tools, is_prompt=False, trained_from=trained_from)


def render_prompt(
    turns: Sequence[Turn], family: Family, system_message: str | None = None, tools: Sequence[Tool] = ()
) -> list[Message]:
    """Render a conversation for the model to continue: its turns, then the open header of an answer.

    A family that writes tool results into the answer that asked for them leaves that answer open instead.

    Raises:
        ValueError: as ``render``.
    """
    messages = _render(turns, family, system_message, "assistant", tools, is_prompt=True)
    if turns and turns[-1].role == "assistant" and not family.prompts_after_answer:
        return messages
    if messages and messages[-1].is_open:
        return messages
    header = Segment(family.header("assistant") + family.prompt_suffix, False, 0, "assistant")
    prompt = Message("assistant", [Segment(IM_START, True, 0, "assistant"), header], len(turns), is_open=True)
    return [*messages, prompt]


def _render(
    turns: Sequence[Turn],
    family: Family,
    system_message: str | None,
    label_mask: LabelMask,
    tools: Sequence[Tool],
    is_prompt: bool,
    trained_from: int | None = None,
) -> list[Message]:
    """Render a conversation; with ``trained_from`` a sample of its last answer, see ``render_answer``."""
    form = _checked_form(turns, family, tools)
    complete = add_system_turn(turns, family, system_message)
    if family.own_template is not None:
        added = len(complete) - len(turns)
        untrained = trained_from + added if trained_from else 0
        complete = [*(turn._replace(weight=0.0) for turn in complete[:untrained]), *complete[untrained:]]
        return render_own(complete, family.own_template, label_mask, is_prompt, added)
    if family.is_strict or family.trimmed_roles:
        complete = [trimmed(turn) if family.is_trimmed(turn.role) else turn for turn in complete]
    if form is not None:
        complete = form.describe(complete, tools)
    if family.instructions or not family.writes_blank_system:
        complete = _add_instructions(complete, family)
    has_own_system = bool(turns) and turns[0].role == "system"
    added_turns = len(complete) - len(turns)
    answers = Answers(complete, family)
    if trained_from is None:
        written, promptable = answers.written_turns(), answers.promptable(has_own_system)
    else:
        if trained_from:
            others = [turn._replace(weight=0.0) for turn in complete[: trained_from + added_turns]]
            complete = [*others, *complete[len(others) :]]
        written, promptable = _answer_sample(answers, Answers(complete[:-1], family), has_own_system)
    weights = turn_weights(complete, label_mask, promptable)
    if form is not None:
        contents = form.write(written, weights, is_prompt)
    else:
        contents = [Message.from_turn(turn, weights[index], index + 1) for index, turn in enumerate(written)]

    messages = []
    start = 0  # of the message, in the turns
    for content in contents:
        is_open = content.is_open and is_prompt
        segments = _framed(content, family, complete[start].weight, label_mask, is_open)
        weighted = zip(complete[start : content.end], weights[start : content.end], strict=True)
        trained = tuple(turn for turn, weight in weighted if weight and turn.role == "assistant")
        messages.append(Message(content.role, segments, max(0, content.end - added_turns), is_open, trained))
        start = content.end
    return messages


def _answer_sample(answers: Answers, history: Answers, has_own_system: bool) -> tuple[list[Turn], set[int]]:
    """Return the turns of a sample of the last answer as they are written, and its answers that may be trained.

    Args:
        answers: of all turns.
        history: of all but the last, which are written as in a prompt.
    """
    written = [*history.written_turns(), answers.written_turns()[-1]]
    own, _ = answers.in_samples(has_own_system)
    return written, history.promptable(has_own_system) | (own & {len(written) - 1})


def _add_instructions(turns: list[Turn], family: Family) -> list[Turn]:
    """Return the turns with the family's instructions before their system message, or instead of a missing one."""
    first = turns[:1] if turns and turns[0].role == "system" else []
    text = "\n\n".join(filter(None, [family.instructions, *(turn.content for turn in first)]))
    rest = turns[len(first) :]
    if not text and (not first or not family.writes_blank_system):
        return rest
    return [first[0]._replace(content=text) if first else Turn("system", text), *rest]


def _framed(
    content: Message, family: Family, own_weight: float | None, label_mask: LabelMask, is_open: bool
) -> list[Segment]:
    """Return the segments of a message with its header and control tokens; without its end if it stays open."""
    first, *rest = content.segments
    role = first.role
    frame = frame_weights(own_weight, content.segments[-1].weight, label_mask, content.is_open)
    header = family.header(content.role)
    if content.role == "assistant":
        # The header is part of the prompt, whose ids the model continues at inference.
        if family.prompt_suffix and first.text.startswith(family.prompt_suffix):
            header += family.prompt_suffix
            first = first._replace(text=first.text.removeprefix(family.prompt_suffix))
    elif family.joins_header:
        first = Segment(header + first.text, first.is_control, first.weight or frame.header, role)
        header = ""
    headers = [Segment(header, False, frame.header, role)] if header else []
    ends = [] if is_open else [Segment(IM_END, True, frame.end, role)]
    if ends and family.turn_end:
        ends.append(Segment(family.turn_end, False, frame.end, role))
    return [Segment(IM_START, True, frame.start, role), *headers, first, *rest, *ends]


def text_of(messages: Iterable[Message]) -> str:
    """Return a rendered conversation as one string."""
    return "".join(segment.text for message in messages for segment in message.segments)


def encode_segment(segment: Segment, encode_text: EncodeText, control_ids: dict[str, int]) -> list[int]:
    """Return the ids of a segment.

    Args:
        encode_text: text -> ids; must not convert text to control tokens (see ``plain_encoder``).
        control_ids: see ``control_ids_of``.
    """
    return [control_ids[segment.text]] if segment.is_control else encode_text(segment.text)


def control_ids_of(tokenizer: Any, tokens: Iterable[str] = (IM_START, IM_END)) -> dict[str, int]:
    """Return the ids of control tokens, from a Qwen v1 or a later tokenizer.

    Args:
        tokens: ``Family.placed_tokens`` or ``Family.control_tokens``.
    """
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}


def plain_encoder(tokenizer: Any) -> EncodeText:
    """Return a function that encodes text without control tokens: ``<|im_end|>`` in a message becomes six plain ids."""
    if hasattr(tokenizer, "encode_plain"):
        encode_plain: EncodeText = tokenizer.encode_plain
        return encode_plain

    def encode(text: str) -> list[int]:
        # Tokenizers in Rust refuse lone surrogates; replace them by U+FFFD, as tiktoken does.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Quiet: it would warn of texts that are longer than the model's context, which callers check.
        ids: list[int] = tokenizer(clean, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return ids

    return encode


def encode_prompt(messages: Iterable[Message], tokenizer: Any) -> list[int]:
    """Return the ids of rendered messages."""
    segments = [segment for message in messages for segment in message.segments]
    encode_text = plain_encoder(tokenizer)
    control_ids = control_ids_of(tokenizer, {segment.text for segment in segments if segment.is_control})
    return [id_ for segment in segments for id_ in encode_segment(segment, encode_text, control_ids)]
