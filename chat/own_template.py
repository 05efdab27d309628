"""Chat formats that no family expresses: conversations are written by the checkpoint's own chat template.

The template renders each conversation twice: with its texts, and with marks in their place. The second rendering says
which characters are the template's and which are a text, so that control tokens are those that the template writes and
never those of a text. The first one must be the second one with the texts put in: a template that changes a text, or
writes something else because of it, is refused for that conversation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from chat.label_mask import LabelMask, turn_weights
from chat.limited import LimitedProcess, LimitExceeded
from chat.segments import Message, Segment
from chat.turns import Turn
from errors import one_line

# Private characters, which templates neither trim nor split at.
_MARK = re.compile("\ue000([0-9]+)\ue001")
_SPACES = " \n"
MOST_TEXT = 1_000_000  # characters that a template may write beside the texts, a few times over
_CACHED = 512

Request = tuple[Sequence[tuple[str, str]], bool]
"""Roles and texts of messages, and whether a prompt for an answer follows them."""


class Failure(NamedTuple):
    """What a template raised."""

    reason: str


@dataclass(frozen=True)
class OwnTemplate:
    """A chat template that conversations are written with.

    Attributes:
        source: its text.
        arguments: the values that it gets beside messages, as a JSON object.
        tokens: all special tokens of the tokenizer; those of them that it writes are control tokens.
        used_tokens: those that it writes in plain conversations.
        stop: the token that it writes behind an answer.
        trimmed_roles: roles whose texts it writes without the white space around them.
        opening: what it writes before the text of an answer, and its prompts do not end with; empty if white space.
    """

    source: str
    arguments: str
    tokens: tuple[str, ...]
    used_tokens: tuple[str, ...] = ()
    stop: str = ""
    trimmed_roles: tuple[str, ...] = ()
    opening: str = ""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Return what finds its tokens, the longest first."""
        return _any_of(self.tokens)


class _Outline(NamedTuple):
    """What the template writes for the roles of a conversation, with marks in the place of texts.

    Attributes:
        text: the whole.
        spans: of the answers that can be trained, by their turns: from the end of their prompt to their own end.
        prompts: of the same answers.
        unwritten: the first turn that is left out; ``None`` if there is none.
        reason: why the last answer cannot be trained, of those that cannot; empty if all can.
    """

    text: str
    spans: dict[int, tuple[int, int]]
    prompts: dict[int, str]
    unwritten: int | None
    reason: str


# --------------------------------------------------------------------------------------------------------- rendering


def examine_template(own: OwnTemplate) -> OwnTemplate:
    """Return a template with the attributes that its rendering shows: tokens, stop, trimmed roles, opening.

    Raises:
        ValueError: answers cannot be told from what precedes them, or have no end; prompts lack their header; or it
            takes too much time, memory or text. The message names the reason.
    """
    [text] = _texts(own, [([("user", "u"), ("assistant", "b")], False)])
    if isinstance(text, Failure):
        raise ValueError(f"the chat template fails for a question and an answer: {text.reason}")
    outline = _outline(own, ("user", "assistant"), False)
    if outline.unwritten is not None:
        what = ("a question", "an answer")[outline.unwritten]
        raise ValueError(f"the chat template does not write the text of {what}")
    if outline.reason:
        raise ValueError(outline.reason)
    opening = _opening(own, outline)
    texts = [outline.text, *outline.prompts.values()]
    for roles in (("user", "assistant") * 2, ("system", "user", "assistant")):
        try:
            texts.append(_outline(own, roles, False).text)
        except ValueError:
            continue  # conversations of this kind are refused when they come
    used = {token for text in texts for token in own.pattern.findall(text)}
    end = outline.text.index(_mark(1))
    found = own.pattern.search(outline.text, end)
    assert found is not None, "an answer that can be trained has an end"
    trimmed = tuple(role for role in ("system", "user", "assistant") if _trims(own, role))
    return replace(own, used_tokens=tuple(sorted(used)), stop=found[0], trimmed_roles=trimmed, opening=opening)


def _opening(own: OwnTemplate, outline: _Outline) -> str:
    """Return ``OwnTemplate.opening``, by the outline of a question and an answer.

    Raises:
        ValueError: it is the header of answers, because the template ignores that a prompt is asked for.
    """
    opening = outline.text[outline.spans[1][0] : outline.text.index(_mark(1))]
    if not opening.strip():
        return ""
    prompt, no_prompt = _texts(own, [([("user", _mark(0))], is_prompt) for is_prompt in (True, False)])
    if prompt == no_prompt:
        end = f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"
        what = f"its prompts lack {opening!r}, which it writes before each answer"
        raise ValueError(f"the chat template ignores add_generation_prompt: {what}. At its end it needs {end}")
    return opening


def _trims(own: OwnTemplate, role: str) -> bool:
    roles = ["user", "assistant"] if role != "system" else ["system", "user", "assistant"]
    messages = [(each, f"{_SPACES}({each}){_SPACES}" if each == role else each) for each in roles]
    [text] = _texts(own, [(messages, False)])
    return isinstance(text, str) and f"{_SPACES}({role})" not in text and f"({role}){_SPACES}" not in text


def render_own(
    turns: Sequence[Turn], own: OwnTemplate, label_mask: LabelMask, is_prompt: bool, added: int
) -> list[Message]:
    """Write a conversation, or the prompt for its next answer, as the template does.

    A message is what leads to an answer, or an answer with its end. Text between two control tokens is tokenised
    together, but for the start of an answer.

    Args:
        added: turns at the start that are not of the conversation.

    Raises:
        ValueError: the template refuses the conversation, or changes its texts; the message names the reason.
    """
    roles = tuple(turn.role for turn in turns)
    outline = _outline(own, roles, is_prompt)
    if outline.unwritten is not None:
        raise ValueError(f"the chat template leaves out {_named(outline.unwritten, roles, added)}")
    texts = [turn.content.strip() if turn.role in own.trimmed_roles else turn.content for turn in turns]
    _check_written(turns, texts, own, outline, is_prompt, added)
    promptable = {index for index in outline.spans if index > added}
    weights = turn_weights(turns, label_mask, promptable)
    if outline.reason and not promptable and not is_prompt:
        raise ValueError(outline.reason)
    return list(_messages(turns, texts, own, outline, weights, label_mask, is_prompt, added))


def _check_written(
    turns: Sequence[Turn], texts: Sequence[str], own: OwnTemplate, outline: _Outline, is_prompt: bool, added: int
) -> None:
    """Check that the template writes the outline, with the texts, and each answer's prompt as the answer's beginning.

    Raises:
        ValueError: it does not.
    """
    messages = [(turn.role, turn.content) for turn in turns]
    requests: list[Request] = [(messages, is_prompt), *((messages[:index], True) for index in outline.prompts)]
    expected = [outline.text, *outline.prompts.values()]
    for written, marked in zip(_texts(own, requests), expected, strict=True):
        if isinstance(written, Failure):
            raise ValueError(f"the chat template fails for this conversation: {written.reason}")
        if written != _filled(marked, texts):
            turn = _first_changed(written, marked, texts)
            what = f"the chat template changes {_named(turn, [each.role for each in turns], added)}"
            raise ValueError(f"{what}, or what it writes around it, so its words cannot be told from the template's")


def _first_changed(written: str, marked: str, texts: Sequence[str]) -> int:
    """Return the turn at whose text, or before it, a rendering first differs from the outline."""
    turn = 0
    for found in _MARK.finditer(marked):
        turn = int(found[1])
        if not written.startswith(_filled(marked[: found.end()], texts)):
            break
    return turn


def _named(index: int, roles: Sequence[str], added: int) -> str:
    return f"turn {index - added + 1} ({roles[index]})" if index >= added else "the system message"


def _filled(marked: str, texts: Sequence[str]) -> str:
    return _MARK.sub(lambda found: texts[int(found[1])], marked)


@lru_cache(maxsize=_CACHED)
def _outline(own: OwnTemplate, roles: tuple[str, ...], is_prompt: bool) -> _Outline:
    """Return the outline of conversations with these roles.

    Raises:
        ValueError: the template refuses them.
    """
    messages = [(role, _mark(index)) for index, role in enumerate(roles)]
    answers = [index for index, role in enumerate(roles) if role == "assistant" and index]
    before: list[Request] = [(messages[:index], True) for index in answers]
    closed: list[Request] = [(messages[: index + 1], False) for index in answers]
    whole, *others = _texts(own, [(messages, is_prompt), *before, *closed])
    if isinstance(whole, Failure):
        raise ValueError(f"the chat template fails for this conversation: {whole.reason}")
    outline = _Outline(whole, {}, {}, next((i for i in range(len(roles)) if _mark(i) not in whole), None), "")
    end = 0
    for index, prompt, text in zip(answers, others[: len(answers)], others[len(answers) :], strict=True):
        span = _span(own, whole, prompt, text, index)
        if not isinstance(span, str) and span[0] < end:
            span = "the chat template's prompt for an answer ends within the answer before it"
        if isinstance(span, str):
            outline = outline._replace(reason=span)
        else:
            outline.spans[index], end = span, span[1]
            outline.prompts[index] = str(prompt)
    return outline


def _span(
    own: OwnTemplate, whole: str, prompt: str | Failure, closed: str | Failure, index: int
) -> tuple[int, int] | str:
    """Return where an answer starts and ends in the whole text, or why it cannot be trained.

    Args:
        prompt: the prompt for it.
        closed: the conversation up to it.
    """
    if isinstance(prompt, Failure) or isinstance(closed, Failure):
        reason = prompt.reason if isinstance(prompt, Failure) else closed.reason if isinstance(closed, Failure) else ""
        return f"the chat template writes no prompt for an answer: {reason}"
    if closed.count(_mark(index)) != 1:
        return "the chat template does not write an answer once"
    if not closed.startswith(prompt):
        return "the chat template's prompt for an answer is not how it begins to write that answer"
    found = own.pattern.search(closed, closed.index(_mark(index)))
    if found is None:
        return "the chat template writes no special token of the tokenizer behind an answer, so nothing would end it"
    if own.stop and found[0] != own.stop:
        return f"the chat template writes {found[0]} behind an answer, and {own.stop} behind others"
    if not whole.startswith(closed[: found.end()]):
        return "the chat template writes an answer in another way when turns follow it"
    # Text behind the stop token belongs to the answer if no token can cross its end.
    ends_apart = len(closed) == len(whole) or own.pattern.match(whole, len(closed)) is not None
    return len(prompt), len(closed) if whole.startswith(closed) and ends_apart else found.end()


# ---------------------------------------------------------------------------------------------------------- messages


class _Writer(NamedTuple):
    """What the parts of a rendering have in common."""

    turns: Sequence[Turn]
    texts: Sequence[str]
    weights: Sequence[float]
    pattern: re.Pattern[str]
    label_mask: LabelMask


class _Piece(NamedTuple):
    """A text of a turn, or something that the template writes: a control token, or the text between two.

    Attributes:
        turn: that it belongs to.
    """

    text: str
    is_control: bool
    is_of_turn: bool
    turn: int


def _messages(
    turns: Sequence[Turn], texts: Sequence[str], own: OwnTemplate, outline: _Outline, weights: Sequence[float],
    label_mask: LabelMask, is_prompt: bool, added: int,
) -> Iterator[Message]:  # fmt: skip
    writer = _Writer(turns, texts, weights, re.compile(f"{_MARK.pattern}|{own.pattern.pattern}"), label_mask)
    position = 0
    for index, (start, end) in outline.spans.items():
        if segments := _segments(writer, outline.text[position:start], index):
            yield Message(turns[index - 1].role, segments, max(0, index - added))
        segments, trained = _segments(writer, outline.text[start:end], index, True), weights[index] > 0
        yield Message("assistant", segments, max(0, index + 1 - added), trained=(turns[index],) if trained else ())
        position = end
    last = len(turns) - 1
    if segments := _segments(writer, outline.text[position:], last):
        yield Message(turns[last].role, segments, max(0, len(turns) - added), is_prompt)


def _segments(writer: _Writer, text: str, following: int, is_answer: bool = False) -> list[Segment]:
    """Return a part of an outline as segments: control tokens, and the texts between them as far as weights are equal.

    Args:
        following: the turn whose text is next after this part, or which all of it belongs to.
    """
    segments: list[Segment] = []
    has_turn = False  # whether the last segment has a turn's text
    for piece in _pieces(writer, text, following):
        turn = following if is_answer else piece.turn
        role = "assistant" if is_answer else writer.turns[turn].role
        weight = writer.weights[turn] if is_answer or piece.is_of_turn else _frame_weight(writer, piece)
        last = segments[-1] if segments else None
        if last is None or piece.is_control or last.is_control or last.weight != weight:
            segments.append(Segment(piece.text, piece.is_control, weight, role))
            has_turn = piece.is_of_turn
            continue
        role = role if piece.is_of_turn or not has_turn else last.role
        segments[-1] = last._replace(text=last.text + piece.text, role=role)
        has_turn = has_turn or piece.is_of_turn
    return segments


def _pieces(writer: _Writer, text: str, following: int) -> Iterator[_Piece]:
    """Yield the pieces of a part of an outline.

    What the template writes belongs to the text before it, up to the first control token and white space behind that,
    then to the next one.

    Args:
        following: the turn whose text is next after this part.
    """
    found = list(writer.pattern.finditer(text))
    following_turns = [int(each[1]) if each[1] else -1 for each in found] + [following]
    start, before, is_closed = 0, -1, True  # the turn of the last text, and whether a control token has followed it
    for number, each in enumerate(found):
        next_turn = next(turn for turn in following_turns[number:] if turn >= 0)
        between = text[start : each.start()]
        owner = before if not is_closed or (before >= 0 and between.isspace()) else next_turn
        if between:
            yield _Piece(between, False, False, owner)
        if each[1]:
            before, is_closed = int(each[1]), False
            if writer.texts[before]:
                yield _Piece(writer.texts[before], False, True, before)
        else:
            yield _Piece(each[0], True, False, next_turn if is_closed else before)
            before, is_closed = before if not is_closed else -1, True
        start = each.end()
    if between := text[start:]:
        yield _Piece(
            between, False, False, before if not is_closed or (before >= 0 and between.isspace()) else following
        )


def _frame_weight(writer: _Writer, piece: _Piece) -> float:
    """Return the weight of what the template writes, as that of a frame of ChatML (``chat.label_mask``)."""
    if not (writer.label_mask == "all" or (writer.label_mask == "qwen" and piece.is_control)):
        return 0.0
    own_weight = writer.turns[piece.turn].weight
    return 1.0 if own_weight is None else own_weight


# ------------------------------------------------------------------------------------------- the template's process


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _texts(own: OwnTemplate, requests: Sequence[Request]) -> list[str | Failure]:
    """Return what the template writes for each request.

    Raises:
        ValueError: it takes too much time, memory or text.
    """
    try:
        texts: list[str | Failure] = _process(os.getpid(), own.source, own.arguments)(requests)
    except LimitExceeded as error:
        raise ValueError(f"the chat template {error}") from None
    return texts


@lru_cache(maxsize=16)
def _process(pid: int, source: str, arguments: str) -> LimitedProcess:
    """Return the process that renders a template: each process has its own, also one that is forked later."""
    values: dict[str, Any] = json.loads(arguments)
    return LimitedProcess(lambda requests: [_render(source, values, *request) for request in requests])


def _render(source: str, values: dict[str, Any], messages: Sequence[tuple[str, str]], is_prompt: bool) -> str | Failure:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        rendered: Any = render_jinja_template(
            [conversation], chat_template=source, add_generation_prompt=is_prompt, **values
        )
    except MemoryError:
        raise
    except Exception as error:
        line = f" (line {number})" if (number := getattr(error, "lineno", None)) else ""
        return Failure(f"{type(error).__name__}: {one_line(error)}{line}")
    text = str(rendered[0][0])
    if len(text) > MOST_TEXT + 8 * sum(len(content) for _, content in messages):
        raise LimitExceeded(f"writes more than {MOST_TEXT:,} characters for a conversation of a few words")
    return text
