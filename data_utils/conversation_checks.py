"""What a chat format cannot write of a conversation, and what it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from chat.answers import Answers
from chat.families import THINK, THINK_END, Family
from chat.render import check_turns
from chat.samples import SampleRules
from chat.turns import Turn
from data_utils.files import Location
from data_utils.schema import Conversation, short_repr
from data_utils.shapes import has_shape
from errors import DataError


def check_has_answer(conversation: Conversation) -> None:
    """Check that a conversation has an answer to train.

    Raises:
        DataError: it has none.
    """
    if not conversation.is_text and all(turn.role != "assistant" for turn in conversation.turns):
        raise DataError(conversation.where, "the conversation has no assistant turn to train", "Remove the record")


def check_texts(conversation: Conversation, check_text: Callable[[str], None]) -> None:
    """Check that the tokenizer takes every text.

    Args:
        check_text: raises ``ValueError`` for one that it does not take.

    Raises:
        DataError: names the turn.
    """
    for number, turn in enumerate(conversation.turns, 1):
        try:
            check_text(turn.content)
        except ValueError as error:
            fix = "Shorten it, or leave the record out"
            owner = "the text" if conversation.is_text else f"turn {number}"
            raise DataError(conversation.where, f"{owner} contains {error}", fix) from None


def check_writable(conversation: Conversation, rules: SampleRules) -> None:
    """Check that the family can write a conversation.

    Raises:
        DataError: tools, thinking or an order of turns that it cannot write, or no thinking where it needs some.
    """
    where, turns, family = conversation.where, conversation.turns, rules.family
    if rules.thinking != "off":
        for number, turn in enumerate(turns, 1):
            if turn.thinking or (turn.role == "assistant" and (THINK in turn.content or THINK_END in turn.content)):
                _check_thinking(turn, number, where, family)
    try:
        check_turns(turns, family, conversation.tools)
    except ValueError as error:
        raise DataError(where, str(error), "Leave the record out") from None
    if rules.always_thinks and rules.lacks_thinking(turns):
        raise DataError(
            where,
            f"no answer brings thinking, with which every answer of the chat format {family.name!r} begins",
            "Add it as reasoning_content, or leave the record out"
            + (", or train an empty one with --thinking on" if family.has_thinking_field else ""),
        )


def _check_thinking(turn: Turn, number: int, where: Location | str, family: Family) -> None:
    if not family.knows_thinking:
        raise DataError(
            where,
            f"turn {number} contains thinking, which the checkpoint's chat template writes in an unknown way",
            "Restore the official chat template of the checkpoint, or remove the thinking",
        )
    if turn.thinking and not family.has_thinking:
        raise DataError(
            where,
            f"turn {number} has a field with thinking, which the chat format {family.name!r} does not support",
            "Remove the field, leave the record out, or remove all thinking with --thinking off",
        )


def lost_parts(conversation: Conversation, rules: SampleRules) -> Iterator[str]:
    """Yield what a conversation loses in its chat format; sentences as ``schema.Notes``."""
    family = rules.family
    if conversation.tools and family.tool_form is not None:
        lost = family.tool_form.lost_fields(conversation.tools)
        yield from (f"describe tools with {short_repr(name)}, which {_named(family)} does not write" for name in lost)
    if conversation.is_text:
        return
    yield from _opening_notes(conversation, rules)
    if rules.thinking != "off" and not family.has_thinking:
        return
    if has_shape(conversation.turns, family) and not rules.always_thinks:
        return
    if any(_opens_thinking_only(turn) for turn in conversation.turns):
        yield "have answers that open thinking and do not end it, which are trained as answers without thinking"
    turns = rules.read(conversation.turns)
    if rules.thinking == "off":
        if turns != conversation.turns:
            yield "contain thinking, which is removed (--thinking off)"
    elif turns != conversation.turns and rules.family.has_thinking_in_text:
        yield f"have answers without the thinking that {_named(family)} needs, which are not trained"
    elif len(rules.plan(turns)) == 1 and Answers(turns, family).loses_thinking():
        yield f"contain thinking that {_named(family)} leaves out at its place"


def _opening_notes(conversation: Conversation, rules: SampleRules) -> Iterator[str]:
    """Yield a sentence for what a template of its own writes at the start of answers."""
    if rules.family.own_template is None:
        return
    templates = [rules.family_of(sample).own_template for sample in rules.plan(rules.read(conversation.turns))]
    for opening in sorted({template.opening for template in templates if template and template.opening}):
        yield (
            f"are written with {short_repr(opening)} before answers, which is trained with them, because the chat "
            "template's prompts do not end with it"
        )


def _opens_thinking_only(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.thinking is None and THINK in turn.content.rpartition(THINK_END)[2]


def plain_token_notes(conversation: Conversation, plain_tokens: re.Pattern[str]) -> Iterator[str]:
    """Yield a sentence for each special token whose text a conversation contains."""
    found = {token for text in _texts(conversation) for token in plain_tokens.findall(text)}
    for token in sorted(found):
        yield (
            f"contain {short_repr(token)}, which is trained as text, not as the special token of that name "
            f"(--allow_special_tokens {short_repr(token)} changes it)"
        )


def _named(family: Family) -> str:
    return f"the chat format {family.name!r}"


def _texts(conversation: Conversation) -> Iterator[str]:
    """Yield the texts of a conversation that reach its ids."""
    for turn in conversation.turns:
        yield turn.content
        yield turn.thinking or ""
        for call in turn.calls:
            yield call.name
            yield call.arguments_text
    yield from (json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
