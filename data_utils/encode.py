"""Conversations to token ids and loss weights, shortened to the maximum length.

``chat.render`` writes the text and ``chat.label_mask`` decides which of it is trained; this module only tokenises.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict

from chat.answers import Answers, is_question, move_thinking
from chat.chatml import END_OF_TEXT
from chat.families import THINK, THINK_END, Family
from chat.label_mask import LabelMask, labels_from_weights
from chat.render import check_turns, control_ids_of, encode_segment, plain_encoder, render
from chat.segments import Message, Segment
from chat.turns import Tool, Turn
from data_utils.byte_pairs import FasterEncoder
from data_utils.files import Location
from data_utils.schema import Conversation, short_repr
from data_utils.shapes import Shape, build_shape, has_shape
from data_utils.special_tokens import any_of, encoder_with, find_special_tokens
from data_utils.text_file import parts_of
from errors import ConfigError, DataError

Truncation = Literal["turns", "turns_left", "cut", "drop", "error"]

# Headers, line ends and system messages repeat in every sample; the turns of a sample that is shortened repeat too.
_CACHED_TEXTS = 256
_CACHED_SHAPES = 1024


class UnweightedExample(TypedDict):
    """One sample: T ids and T labels, each label the id at its position or ``IGNORE_INDEX``. Labels are not shifted."""

    input_ids: list[int]
    labels: list[int]


class Example(UnweightedExample, total=False):
    """A sample of an ``ExampleSet``.

    Attributes:
        loss_weights: weight of each of the T labels in the loss; without them all weights are 1.
        index: position in its set.
    """

    loss_weights: list[float]
    index: int


@dataclass(frozen=True)
class EncodeOptions:
    """Options for encoding conversations.

    Attributes:
        max_length: maximum number of tokens of a sample.
        system_message: for conversations without one; ``None`` uses the family's default.
        label_mask: what is trained in turns without a weight of their own; see ``chat.label_mask``.
        truncation: for a conversation that is too long.
            ``turns``: drop whole turns from the end until the rest fits; at least one answer remains.
            ``turns_left``: drop the oldest turns after the system message instead.
            ``cut``: cut at ``max_length``, even within an answer, as Qwen v1's original script did.
            ``drop``: leave the conversation out.
            ``error``: refuse it.
        needs_answer: refuse a conversation without an assistant turn.
        allow_special_tokens: added tokens of the tokenizer that text in messages becomes.
    """

    max_length: int = 8192
    system_message: str | None = None
    label_mask: LabelMask = "assistant"
    truncation: Truncation = "turns"
    needs_answer: bool = True
    allow_special_tokens: tuple[str, ...] = ()


class Span(NamedTuple):
    """A run of neighbouring ids with the same author and the same loss weight; weight 0 is not trained."""

    length: int
    role: str
    weight: float


@dataclass(frozen=True)
class EncodedConversation:
    """A tokenised conversation.

    Attributes:
        input_ids: T ids, at most ``max_length``; empty if nothing that contains an answer fits.
        spans: authors and loss weights of the ids, in order; the lengths add up to T.
        turns_dropped: messages that are missing or, with ``truncation="cut"``, incomplete.
        full_length: ids of the whole conversation; 0 if none are missing.
    """

    input_ids: Sequence[int]
    spans: list[Span]
    turns_dropped: int = 0
    full_length: int = field(default=0, compare=False)

    @property
    def labels(self) -> list[int]:
        """The T labels."""
        return labels_from_weights(self.input_ids, ((span.length, span.weight) for span in self.spans))

    @property
    def trained_tokens(self) -> int:
        """Number of trained ids. The first id of a sample is never predicted, so it does not count."""
        first = 1 if self.spans and self.spans[0].weight > 0 else 0
        return sum([length for length, _, weight in self.spans if weight > 0]) - first


class Encoder:
    """Encodes the conversations of a run.

    Args:
        tokenizer: a ``QWenTokenizer`` or a fast tokenizer of the later families.
        family: from ``chat.detect.family_of``.

    Raises:
        ConfigError: a name in ``allow_special_tokens`` that is no added token, or a control token.
    """

    def __init__(self, tokenizer: Any, family: Family, options: EncodeOptions) -> None:
        self.family = family
        self.options = options
        self._decode = tokenizer.decode
        self._check_text = getattr(tokenizer, "check_text", None)  # only Qwen v1's tokenizer has limits
        self._special_tokens = find_special_tokens(tokenizer, options.allow_special_tokens)
        self._plain_tokens = any_of(self._special_tokens.plain)
        self._plain = FasterEncoder(tokenizer, plain_encoder(tokenizer))
        encode_text = encoder_with(self._plain, self._special_tokens.allowed)
        self._encode_uncached = encode_text
        self._encode_text = lru_cache(maxsize=_CACHED_TEXTS)(encode_text)
        self._control_ids = control_ids_of(tokenizer)
        self._shape_of = lru_cache(maxsize=_CACHED_SHAPES)(self._build_shape)
        self._end_of_text = int(tokenizer.convert_tokens_to_ids(END_OF_TEXT))

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens that rendering places, and of the allowed special tokens."""
        return frozenset([*self._control_ids.values(), self._end_of_text, *self._special_tokens.allowed.values()])

    def prepare_for_many(self) -> None:
        """Do at once what otherwise waits until it is worth its time: many conversations will be encoded."""
        self._plain.convert()

    def check_rows(self, rows: int) -> None:
        """Check that the model has a row for each allowed special token.

        Raises:
            ConfigError: it has too few.
        """
        for token, id_ in self._special_tokens.allowed.items():
            if id_ >= rows:
                what = f"--allow_special_tokens {token}: its id is {id_}, but the model's embedding has {rows} rows"
                raise ConfigError(what, "Enlarge the checkpoint's embedding for the tokens that were added")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, including control tokens."""
        return str(self._decode(list(ids), skip_special_tokens=False))

    def check_conversation(self, conversation: Conversation) -> None:
        """Check all that can be checked without rendering or tokenising.

        Raises:
            DataError: no assistant turn, a text that cannot be tokenised, or tools or thinking that the family cannot
                write.
        """
        where, turns = conversation.where, conversation.turns
        if self.options.needs_answer and not conversation.is_text and all(turn.role != "assistant" for turn in turns):
            raise DataError(where, "the conversation has no assistant turn to train", "Remove the record")
        for number, turn in enumerate(turns, 1):
            if self._check_text is not None:
                try:
                    self._check_text(turn.content)
                except ValueError as error:
                    fix = "Shorten it, or leave the record out"
                    owner = "the text" if conversation.is_text else f"turn {number}"
                    raise DataError(where, f"{owner} contains {error}", fix) from None
            if turn.thinking or (turn.role == "assistant" and (THINK in turn.content or THINK_END in turn.content)):
                self._check_thinking(turn, number, where)
        try:
            check_turns(turns, self.family, conversation.tools)
        except ValueError as error:
            raise DataError(where, str(error), "Leave the record out") from None

    def _check_thinking(self, turn: Turn, number: int, where: Location | str) -> None:
        family = self.family
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
                "Remove the field, or leave the record out",
            )

    def notes(self, conversation: Conversation) -> list[str]:
        """Return what a conversation loses in this chat format, and what may not be meant; see ``schema.Notes``."""
        family, notes = self.family, list(conversation.notes)
        format_ = f"the chat format {family.name!r}"
        if conversation.tools and family.tool_form is not None:
            lost = family.tool_form.lost_fields(conversation.tools)
            notes += (f"describe tools with {short_repr(name)}, which {format_} does not write" for name in lost)
        thinks = family.has_thinking and not conversation.is_text and not has_shape(conversation.turns, family)
        if thinks and Answers(conversation.turns, family).loses_thinking():
            notes.append(f"contain thinking that {format_} leaves out at its place")
        if self._plain_tokens is not None:
            found = {token for text in _texts(conversation) for token in self._plain_tokens.findall(text)}
            notes += (
                f"contain {short_repr(token)}, which is trained as text, not as the special token of that name "
                f"(--allow_special_tokens {short_repr(token)} changes it)"
                for token in sorted(found)
            )
        return notes

    def skip_reason(self, conversation: Conversation, encoded: EncodedConversation) -> str:
        """Return why nothing of a conversation is trained."""
        options = self.options
        if conversation.is_text:
            return "its weight is 0" if conversation.turns[0].weight == 0 else "it has a single token"
        if encoded.turns_dropped:
            if options.truncation == "drop":
                return f"longer than --model_max_length {options.max_length} (--truncation drop)"
            return f"no answer fits within --model_max_length {options.max_length}"
        if any(turn.weight == 0 for turn in conversation.turns if turn.role == "assistant"):
            return "none of its turns is to be trained"
        return f"chat format {self.family.name!r} has no inference prompt for any of its answers"

    def encode(self, conversation: Conversation) -> list[EncodedConversation]:
        """Encode what ``check_conversation`` accepts: one sample of a conversation, or the pieces of a plain text.

        Raises:
            DataError: see ``encode_conversation``.
        """
        return self._encode_pieces(conversation) if conversation.is_text else [self.encode_conversation(conversation)]

    def _encode_pieces(self, conversation: Conversation) -> list[EncodedConversation]:
        """Encode a plain text, which ends with the end of text, as pieces of at most ``max_length`` ids.

        A piece begins with the last id of the one before: so every id but the first of the text is predicted once.
        """
        [turn] = conversation.turns
        try:
            ids = [id_ for part in parts_of(turn.content) for id_ in self._encode_uncached(part)]
        except ValueError as error:
            raise DataError(conversation.where, str(error), "Shorten the text, or leave the record out") from None
        ids = ids if conversation.is_continued else [*ids, self._end_of_text]
        most, weight = self.options.max_length, 1.0 if turn.weight is None else turn.weight
        starts = range(0, max(1, len(ids) - 1), max(1, most - 1))
        pieces = (ids[start : start + most] for start in starts)
        return [EncodedConversation(piece, [Span(len(piece), turn.role, weight)]) for piece in pieces]

    def encode_conversation(self, conversation: Conversation) -> EncodedConversation:
        """Encode a conversation that ``check_conversation`` accepts, shortened if it is longer than ``max_length``.

        After turns are dropped, the rest is rendered again as a conversation of its own: some families write the last
        answer differently, and the turn that described the tools may be gone.

        Raises:
            DataError: a text that cannot be tokenised, or with ``truncation="error"`` a conversation that is too long.
        """
        options, turns, tools = self.options, conversation.turns, conversation.tools
        try:
            if not tools and has_shape(turns, self.family):
                encoded = self._encode_shape(turns)
                if len(encoded.input_ids) <= options.max_length:
                    return encoded
            messages = self._render(turns, tools)
            encoded = self._encode(messages)
            rest = messages[len(messages) - encoded.turns_dropped + 1 :] if encoded.turns_dropped else []
            rest_length = sum(len(self._segment_ids(part)) for message in rest for part in message.segments)
        except ValueError as error:
            raise DataError(conversation.where, str(error), "Shorten the text, or leave the record out") from None
        if not encoded.turns_dropped:
            return encoded
        if options.truncation == "error":
            raise DataError(
                conversation.where,
                f"the conversation has more than --model_max_length {options.max_length} tokens",
                "Raise it, shorten the conversation, or choose another --truncation",
            )
        shortened = self._shorten(turns, tools, messages, encoded)
        return replace(shortened, full_length=len(encoded.input_ids) + rest_length)

    def _build_shape(self, roles: Sequence[str], weights: Sequence[float | None]) -> Shape:
        return build_shape(
            roles, weights, lambda turns: self._render(turns, ()), self._encode_uncached, self._control_ids
        )

    def _encode_shape(self, turns: Sequence[Turn]) -> EncodedConversation:
        """Encode a whole conversation whose texts do not decide how it is written, as ``_encode`` would."""
        roles, texts, _, weights, _ = zip(*turns, strict=True)
        encode_text = self._encode_text
        ids: list[int] = []
        spans: list[Span] = []
        for role, weight, parts in self._shape_of(roles, weights):
            start = len(ids)
            for constant, before, turn in parts:
                ids += constant
                if turn is not None:
                    ids += encode_text(before + texts[turn])
            if (length := len(ids) - start) and spans and spans[-1][1:] == (role, weight):
                spans[-1] = Span(spans[-1].length + length, role, weight)
            elif length:
                spans.append(Span(length, role, weight))
        return EncodedConversation(ids, spans)

    def _shorten(
        self, turns: Sequence[Turn], tools: Sequence[Tool], messages: Sequence[Message], encoded: EncodedConversation
    ) -> EncodedConversation:
        """Return what remains of a conversation that is too long.

        Args:
            messages: all of its messages.
            encoded: their start, up to the first that does not fit.
        """
        options = self.options
        if options.truncation == "cut":
            spans = _cut(encoded.spans, options.max_length)
            return EncodedConversation(encoded.input_ids[: options.max_length], spans, encoded.turns_dropped)
        kept: list[Message] | None = None
        if options.truncation == "turns":
            kept = self._keep_oldest(turns, tools, messages[: len(messages) - encoded.turns_dropped + 1])
        elif options.truncation == "turns_left":
            kept = self._keep_newest(turns, tools)
        if kept is None:
            return EncodedConversation([], [], len(messages))
        rest = self._encode(kept)
        return EncodedConversation(rest.input_ids, rest.spans, len(messages) - len(kept))

    def _render(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Message]:
        if not self.family.has_thinking_in_text:
            turns = list(map(move_thinking, turns))
        return render(turns, self.family, self.options.system_message, self.options.label_mask, tools)

    def _segment_ids(self, segment: Segment) -> list[int]:
        return encode_segment(segment, self._encode_text, self._control_ids)

    def _encode(self, messages: Sequence[Message]) -> EncodedConversation:
        """Encode messages up to the first that exceeds ``max_length``; it and all after it count as dropped.

        Neighbouring ids of the same author and weight are one span.
        """
        ids: list[int] = []
        spans: list[Span] = []
        start, role, weight = 0, "", 0.0  # of the last span
        dropped, encode_text, control_ids = 0, self._encode_text, self._control_ids
        for number, message in enumerate(messages):
            for text, is_control, own_weight, own_role in message.segments:
                segment_ids = [control_ids[text]] if is_control else encode_text(text)
                if segment_ids and (own_role != role or own_weight != weight):
                    if len(ids) > start:
                        spans.append(Span(len(ids) - start, role, weight))
                    start, role, weight = len(ids), own_role, own_weight
                ids += segment_ids
            if len(ids) > self.options.max_length:
                dropped = len(messages) - number
                break
        if len(ids) > start:
            spans.append(Span(len(ids) - start, role, weight))
        return EncodedConversation(ids, spans, dropped)

    def _keep_oldest(
        self, turns: Sequence[Turn], tools: Sequence[Tool], messages: Sequence[Message]
    ) -> list[Message] | None:
        """Return the longest start of the conversation that fits, has an answer and, if possible, trains something.

        Reasoning families may train an answer only if it is the last one. A message's length depends on whether it is
        the last one, so the first message that did not fit may fit as the last one, and those that fitted may not.

        Args:
            messages: those that fitted, and the next one.
        """
        longest = None
        for message in reversed(messages):
            kept = turns[: message.end]
            if len(kept) == len(turns):
                continue
            if not kept or _has_answer(turns) > _has_answer(kept):
                break
            try:
                shorter = self._render(kept, tools)
            except ValueError:
                continue  # the turn that would describe the tools is gone
            encoded = self._encode(shorter)
            if encoded.turns_dropped:
                continue
            if any(span.weight for span in encoded.spans):
                return shorter
            longest = longest or shorter
        return longest

    def _keep_newest(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Message] | None:
        """Return the longest end of the conversation that fits, starts with a question and has an answer.

        The system message stays.
        """
        first = 1 if turns[0].role == "system" else 0

        def from_turn(start: int) -> list[Message]:
            return self._render([*turns[:first], *turns[start:]], tools)

        starts = [index for index in range(first + 1, len(turns)) if is_question(turns[index])]
        # The later the start, the shorter the conversation.
        longest = bisect_left(starts, True, key=lambda start: not self._encode(from_turn(start)).turns_dropped)
        if longest == len(starts) or _has_answer(turns) > _has_answer(turns[starts[longest] :]):
            return None
        return from_turn(starts[longest])


def _texts(conversation: Conversation) -> Iterator[str]:
    """Yield the texts of a conversation that reach its ids."""
    for turn in conversation.turns:
        yield turn.content
        yield turn.thinking or ""
        for call in turn.calls:
            yield call.name
            yield call.arguments_text
    yield from (json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)


def _has_answer(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "assistant" for turn in turns)


def _cut(spans: Iterable[Span], length: int) -> list[Span]:
    """Return the spans of the first ``length`` ids."""
    kept = []
    for span in spans:
        if length <= 0:
            break
        kept.append(span._replace(length=min(span.length, length)))
        length -= span.length
    return kept
