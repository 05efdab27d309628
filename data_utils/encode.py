"""Conversations to token ids and loss weights, shortened to the maximum length.

``chat.render`` writes the text and ``chat.label_mask`` decides which of it is trained; this module only tokenises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict

from chat.answers import has_thinking
from chat.chatml import END_OF_TEXT
from chat.families import Family
from chat.label_mask import LabelMask, labels_from_weights
from chat.render import check_turns, control_ids_of, encode_segment, plain_encoder, render, render_answer
from chat.samples import Sample, SampleRules, SplitTurns, Thinking
from chat.segments import Message, Segment
from chat.turns import Tool, Turn
from data_utils.byte_pairs import FasterEncoder
from data_utils.conversation_checks import (
    check_has_answer,
    check_texts,
    check_writable,
    lost_parts,
    plain_token_notes,
)
from data_utils.schema import Conversation
from data_utils.shapes import Shape, build_shape, has_shape
from data_utils.shortening import keep_newest, keep_oldest
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
            A sample of one answer keeps it: ``turns`` leaves the sample out, ``turns_left`` shortens its prompt.
        thinking: which prompts are trained, and ``split_turns``: what a sample is; see ``chat.samples.SampleRules``.
        needs_answer: refuse a conversation without an assistant turn.
        allow_special_tokens: added tokens of the tokenizer that text in messages becomes.
    """

    max_length: int = 8192
    system_message: str | None = None
    label_mask: LabelMask = "assistant"
    truncation: Truncation = "turns"
    needs_answer: bool = True
    allow_special_tokens: tuple[str, ...] = ()
    thinking: Thinking = "on"
    split_turns: SplitTurns = "never"


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
        answers: number of trained answers; ``with_thinking`` of them bring thinking.
    """

    input_ids: Sequence[int]
    spans: list[Span]
    turns_dropped: int = 0
    full_length: int = field(default=0, compare=False)
    answers: int = 0
    with_thinking: int = 0

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
        plain: the family behind prompts that ask for no thinking, if they differ.

    Raises:
        ConfigError: a name in ``allow_special_tokens`` that is no added token, or a control token.
    """

    def __init__(self, tokenizer: Any, family: Family, options: EncodeOptions, plain: Family | None = None) -> None:
        self.family = family
        self.options = options
        self.rules = SampleRules(family, plain or family, options.thinking, options.split_turns, options.label_mask)
        self._decode = tokenizer.decode
        self._check_text = getattr(tokenizer, "check_text", None)  # only Qwen v1's tokenizer has limits
        self._special_tokens = find_special_tokens(tokenizer, options.allow_special_tokens, family.control_tokens)
        self._plain_tokens = any_of(self._special_tokens.plain)
        self._plain = FasterEncoder(tokenizer, plain_encoder(tokenizer))
        encode_text = encoder_with(self._plain, self._special_tokens.allowed)
        self._encode_uncached = encode_text
        self._encode_text = lru_cache(maxsize=_CACHED_TEXTS)(encode_text)
        self._control_ids = control_ids_of(tokenizer, family.placed_tokens)
        self._shape_of = lru_cache(maxsize=_CACHED_SHAPES)(self._build_shape)
        self._plan_of = lru_cache(maxsize=_CACHED_SHAPES)(self._plan_shape)
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
        if self.options.needs_answer:
            check_has_answer(conversation)
        if self._check_text is not None:
            check_texts(conversation, self._check_text)
        check_writable(conversation, self.rules)

    def notes(self, conversation: Conversation) -> list[str]:
        """Return what a conversation loses in this chat format, and what may not be meant; see ``schema.Notes``."""
        notes = [*conversation.notes, *lost_parts(conversation, self.rules)]
        if self._plain_tokens is not None:
            notes += plain_token_notes(conversation, self._plain_tokens)
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
        """Encode what ``check_conversation`` accepts: the samples of a conversation, or the pieces of a plain text.

        There is at least one. Of what has been left out because it is too long, only the longest has a
        ``full_length``.

        Raises:
            DataError: see ``encode_conversation``.
        """
        if conversation.is_text:
            return self._encode_pieces(conversation)
        if self.rules.is_trivial:
            return [self.encode_conversation(conversation)]
        turns = self.rules.read(conversation.turns)
        if turns is not conversation.turns:
            conversation = replace(conversation, turns=tuple(turns))
        return [self.encode_conversation(conversation, sample) for sample in self._plan(conversation)]

    def _plan(self, conversation: Conversation) -> list[Sample]:
        """Return the samples of a conversation that the family can write."""
        turns, tools = conversation.turns, conversation.tools
        if not tools and has_shape(turns, self.family):
            roles, _, _, weights, _ = zip(*turns, strict=True)
            plan = self._plan_of(roles, weights)
        else:
            plan = self.rules.plan(turns)
        if plan[0].trained_from is None:
            return plan
        samples: list[Sample] = []
        unwritten: int | None = None  # the first turn of a sample that cannot be written; the next one trains it
        for sample in plan:
            if unwritten is not None:
                sample = sample._replace(trained_from=unwritten)
            try:
                check_turns(turns[: sample.end], self.family, tools)
            except ValueError:
                unwritten = sample.trained_from
                continue
            samples.append(sample)
            unwritten = None
        return samples or [Sample(True, len(turns))]

    def _plan_shape(self, roles: Sequence[str], weights: Sequence[float | None]) -> list[Sample]:
        turns = [Turn(role, "", (), weight) for role, weight in zip(roles, weights, strict=True)]
        return self.rules.plan(turns)

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

    def encode_conversation(self, conversation: Conversation, sample: Sample | None = None) -> EncodedConversation:
        """Encode a sample of a conversation, by default all of it, shortened if it is longer than ``max_length``.

        After turns are dropped, the rest is rendered again as a conversation of its own: some families write the last
        answer differently, and the turn that described the tools may be gone.

        Raises:
            DataError: a text that cannot be tokenised, or with ``truncation="error"`` a conversation that is too long.
        """
        options, turns, tools = self.options, conversation.turns, conversation.tools
        sample = sample or Sample(True, len(turns))
        others = turns[sample.end :]
        turns = turns[: sample.end]
        try:
            if not tools and has_shape(turns, self.family):
                encoded = self._encode_shape(turns, sample)
                if len(encoded.input_ids) <= options.max_length:
                    return encoded
            messages = self._render(turns, tools, sample)
            encoded = self._encode(messages)
            is_longest = all(turn.role != "assistant" for turn in others)
            rest = messages[len(messages) - encoded.turns_dropped + 1 :] if encoded.turns_dropped and is_longest else []
            rest_length = sum(len(self._segment_ids(part)) for message in rest for part in message.segments)
        except ValueError as error:
            raise DataError(conversation.where, str(error), "Shorten the text, or leave the record out") from None
        if not encoded.turns_dropped:
            return encoded
        if options.truncation == "error":
            raise DataError(
                conversation.where,
                f"the conversation has {'' if is_longest else 'at least '}{len(encoded.input_ids) + rest_length} "
                f"tokens, more than --model_max_length {options.max_length}",
                "Raise it, shorten the conversation, or choose another --truncation",
            )
        shortened = self._shorten(turns, tools, sample, messages, encoded)
        return replace(shortened, full_length=len(encoded.input_ids) + rest_length)

    def _build_shape(self, roles: Sequence[str], weights: Sequence[float | None], sample: Sample) -> Shape:
        return build_shape(
            roles, weights, lambda turns: self._render(turns, (), sample), self._encode_uncached, self._control_ids
        )

    def _encode_shape(self, turns: Sequence[Turn], sample: Sample) -> EncodedConversation:
        """Encode a sample of a conversation whose texts do not decide how it is written, as ``_encode`` would."""
        roles, texts, _, weights, _ = zip(*turns, strict=True)
        encode_text = self._encode_text
        ids: list[int] = []
        spans: list[Span] = []
        shape = self._shape_of(roles, weights, sample)
        for role, weight, parts in shape.spans:
            start = len(ids)
            for constant, before, turn in parts:
                ids += constant
                if turn is not None:
                    ids += encode_text(before + texts[turn])
            if (length := len(ids) - start) and spans and spans[-1][1:] == (role, weight):
                spans[-1] = Span(spans[-1].length + length, role, weight)
            elif length:
                spans.append(Span(length, role, weight))
        return EncodedConversation(ids, spans, answers=shape.answers)

    def _shorten(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool],
        sample: Sample,
        messages: Sequence[Message],
        encoded: EncodedConversation,
    ) -> EncodedConversation:
        """Return what remains of a sample that is too long.

        Args:
            messages: all of its messages.
            encoded: their start, up to the first that does not fit.
        """
        options = self.options
        if options.truncation == "cut":
            return _cut(encoded, options.max_length)
        kept: list[Message] | None = None
        if options.truncation == "turns" and sample.trained_from is None:
            fitting = messages[: len(messages) - encoded.turns_dropped + 1]
            kept = keep_oldest(turns, fitting, lambda part: self._render(part, tools, sample), self._encode)
        elif options.truncation == "turns_left":

            def render_newest(part: Sequence[Turn]) -> list[Message]:
                start = sample.trained_from and max(0, sample.trained_from - len(turns) + len(part))
                return self._render(part, tools, sample._replace(trained_from=start))

            kept = keep_newest(turns, render_newest, self._encode)
        if kept is None:
            return EncodedConversation([], [], len(messages))
        return replace(self._encode(kept), turns_dropped=len(messages) - len(kept))

    def _render(self, turns: Sequence[Turn], tools: Sequence[Tool], sample: Sample) -> list[Message]:
        family, options = self.rules.family_of(sample), self.options
        if sample.trained_from is None:
            return render(turns, family, options.system_message, options.label_mask, tools)
        return render_answer(turns, family, options.system_message, options.label_mask, tools, sample.trained_from)

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
        trained: list[Turn] = []
        for number, message in enumerate(messages):
            trained += message.trained
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
        thinking = sum(has_thinking(turn, self.family) for turn in trained) if self.family.has_thinking else 0
        return EncodedConversation(ids, spans, dropped, answers=len(trained), with_thinking=thinking)


def _cut(encoded: EncodedConversation, length: int) -> EncodedConversation:
    """Return the first ``length`` ids; the last answer counts if some of it is left to train."""
    spans, left = list[Span](), length
    for span in encoded.spans:
        if left > 0:
            spans.append(span._replace(length=min(span.length, left)))
            left -= span.length
    lost = 0 if spans and spans[-1].weight else 1
    answers = max(0, encoded.answers - lost)
    return replace(
        encoded,
        input_ids=encoded.input_ids[:length],
        spans=spans,
        answers=answers,
        with_thinking=min(encoded.with_thinking, answers),
    )
