"""Conversations to token ids and labels, and what happens to one that is too long.

How a turn is written and what of it is trained is ``chat.render``'s business; here its segments become numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from chat.families import QWEN_V1, THINK, THINK_END, Family, thought_block
from chat.label_mask import IGNORE_INDEX, LabelMask
from chat.render import RenderedMessage, control_ids_of, encode_segment, plain_encoder, render
from chat.turns import Tool, Turn
from data_utils.schema import Conversation
from errors import DataError

if TYPE_CHECKING:
    from data_utils.files import Location

Truncation = Literal["turns", "turns_left", "cut", "drop", "error"]

# Headers, line ends and system messages come back in every sample; so do the turns of a sample that is rendered again.
_CACHED_TEXTS = 256


class UnweightedExample(TypedDict):
    """One sample: T ids, and in the same places the id where it is to be learnt, else ``IGNORE_INDEX``. No shift."""

    input_ids: list[int]
    labels: list[int]


class Example(UnweightedExample, total=False):
    """A sample whose T ``loss_weights`` say how much each label counts; without them all count the same.

    ``index`` is its place in its set.
    """

    loss_weights: list[float]
    index: int


@dataclass(frozen=True)
class EncodeOptions:
    """How conversations are encoded.

    Attributes:
        max_length: most tokens of a sample.
        system_message: for conversations that bring none; ``None`` takes the family's default.
        label_mask: what is trained where a turn does not say it itself; see ``chat.render.render``.
        truncation: of what is too long, ``turns`` drops whole turns from the end, ``turns_left`` the oldest ones behind
            the system message, until the rest fits and still holds an answer; ``cut`` cuts at ``max_length`` as the
            original did, also inside of an answer; ``drop`` leaves the conversation out, ``error`` refuses it.
        allow_special: read control tokens in the text of messages as such. Only to compare with the original (Qwen v1).
        drop_leading: drop an answer that opens the conversation, as the original did.
        needs_answer: whether a conversation without an assistant turn is an error.
        turn_weights: whether what a turn says of its own weight counts; the original knew no such thing.
    """

    max_length: int = 8192
    system_message: str | None = None
    label_mask: LabelMask = "assistant"
    truncation: Truncation = "turns"
    allow_special: bool = False
    drop_leading: bool = False
    needs_answer: bool = True
    turn_weights: bool = True


ORIGINAL = EncodeOptions(
    label_mask="qwen",
    truncation="cut",
    allow_special=True,
    drop_leading=True,
    needs_answer=False,
    turn_weights=False,
)
"""What the original Qwen v1 script did, at its default length: the base for comparing with it."""


class Span(NamedTuple):
    """A run of ids: whose text they are, and how much each counts in the loss (0: not trained)."""

    length: int
    role: str
    weight: float


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as numbers.

    Attributes:
        input_ids: T ids, at most ``max_length``; none when nothing that holds an answer fits.
        spans: what the ids are, in order; their lengths add up to T.
        turns_dropped: messages that are missing, or with ``truncation="cut"`` not whole.
    """

    input_ids: list[int]
    spans: list[Span]
    turns_dropped: int = 0

    @property
    def weights(self) -> list[float]:
        """How much each of the T ids counts in the loss."""
        return [span.weight for span in self.spans for _ in range(span.length)]

    @property
    def trained(self) -> list[bool]:
        """For each of the T ids whether it is to be learnt."""
        return [weight > 0 for weight in self.weights]

    @property
    def labels(self) -> list[int]:
        """T labels, as in ``Example``."""
        return [id_ if trained else IGNORE_INDEX for id_, trained in zip(self.input_ids, self.trained, strict=True)]

    @property
    def trained_tokens(self) -> int:
        """How many ids are learnt. The first id of a sample is never predicted, whatever its label."""
        first = 1 if self.spans and self.spans[0].weight > 0 else 0
        return sum(span.length for span in self.spans if span.weight > 0) - first


class Encoder:
    """Encodes the conversations of a run: one tokenizer, one family, one set of options.

    Args:
        tokenizer: a ``QWenTokenizer`` or a fast tokenizer of the later families.
        family: from ``chat.detect.family_of``.
    """

    def __init__(self, tokenizer: Any, family: Family, options: EncodeOptions) -> None:
        encode_text = plain_encoder(tokenizer)
        if options.allow_special:
            assert family == QWEN_V1, "control tokens in messages are only ever read as such to compare with Qwen v1"

            def encode_text(text: str) -> list[int]:
                ids: list[int] = tokenizer.encode(text, allowed_special="all")
                return ids

        self.family = family
        self.options = options
        self._decode = tokenizer.decode
        self._check_text = getattr(tokenizer, "check_text", None)  # Qwen v1's knows texts that it cannot take
        self._encode_text = lru_cache(maxsize=_CACHED_TEXTS)(encode_text)
        self._control_ids = control_ids_of(tokenizer)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that only the renderer places."""
        return frozenset(self._control_ids.values())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, control tokens included."""
        return str(self._decode(ids, skip_special_tokens=False))

    def check_conversation(self, conversation: Conversation) -> None:
        """Check what can be known before anything is tokenised.

        Raises:
            DataError: no assistant turn, a text that cannot be tokenised, or tools or thinking that the family cannot
                write.
        """
        where, turns = conversation.where, conversation.turns
        if self.options.needs_answer and all(turn.role != "assistant" for turn in turns):
            raise DataError(where, "no turn is from the assistant, so there is nothing to learn", "Remove the record")
        for number, turn in enumerate(turns, 1):
            if self._check_text is not None:
                try:
                    self._check_text(turn.content)
                except ValueError as error:
                    fix = "Shorten it, or leave the record out"
                    raise DataError(where, f"turn {number} holds {error}", fix) from None
            if turn.thinking or (turn.role == "assistant" and (THINK in turn.content or THINK_END in turn.content)):
                self._check_thinking(turn, number, where)
        if conversation.tools or any(turn.calls for turn in turns):
            try:
                render(turns, self.family, self.options.system_message, self.options.label_mask, conversation.tools)
            except ValueError as error:
                raise DataError(where, str(error), "Leave the record out") from None

    def _check_thinking(self, turn: Turn, number: int, where: Location | str) -> None:
        family = self.family
        if not family.knows_thinking:
            raise DataError(
                where,
                f"turn {number} holds thinking, which the checkpoint's chat template writes in no known way",
                "Restore the official chat template of the checkpoint, or remove the thinking",
            )
        if turn.thinking and not family.has_thinking:
            raise DataError(
                where,
                f"turn {number} holds thinking, and the chat format {family.name!r} has no place for it",
                "Remove the field with the thinking, or leave the record out",
            )

    def encode_conversation(self, conversation: Conversation) -> EncodedConversation:
        """Ids and labels of a conversation, shortened to ``max_length`` where it must be.

        What remains of one that is shortened by turns is rendered as a conversation of its own: some families write the
        last answer differently, and the tools are described in a turn that may be gone.

        Raises:
            DataError: as ``check_conversation``; a text that cannot be tokenised; with ``truncation="error"`` a
                conversation that is too long.
        """
        self.check_conversation(conversation)
        turns, tools = conversation.turns, conversation.tools
        if self.options.drop_leading and turns[0].role == "assistant":
            turns = turns[1:]
        if not self.options.turn_weights:
            turns = tuple(turn._replace(weight=None) for turn in turns)
        if self.family.thinking in ("history", "all"):
            turns = tuple(_with_thinking_as_text(turn) for turn in turns)
        try:
            sample = self._encode(turns, tools)
        except ValueError as error:
            raise DataError(conversation.where, str(error), "Shorten the text, or leave the record out") from None
        if sample.fits:
            return EncodedConversation(sample.ids, sample.spans)
        if self.options.truncation == "error":
            raise DataError(
                conversation.where,
                f"the conversation has more than --model_max_length {self.options.max_length} tokens",
                "Raise it, shorten the conversation, or choose another --truncation",
            )
        if self.options.truncation == "cut":
            most = self.options.max_length
            return EncodedConversation(sample.ids[:most], _cut(sample.spans, most), sample.total - len(sample.ends))
        if self.options.truncation == "drop":
            return EncodedConversation([], [], sample.total)
        if self.options.truncation == "turns":
            kept = self._keep_oldest(turns, tools, sample)
        else:
            kept = self._keep_newest(turns, tools)
        if kept is None:
            return EncodedConversation([], [], sample.total)
        return EncodedConversation(kept.ids, kept.spans, sample.total - kept.total)

    def _render(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[RenderedMessage]:
        return render(turns, self.family, self.options.system_message, self.options.label_mask, tools)

    def _encode(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> _Sample:
        """Ids and spans of a conversation; what lies behind ``max_length`` is not encoded."""
        rendered = self._render(turns, tools)
        ids: list[int] = []
        spans: list[Span] = []
        ends: list[int] = []
        for message in rendered:
            for segment in message.segments:
                piece = encode_segment(segment, self._encode_text, self._control_ids)
                ids += piece
                spans.append(Span(len(piece), segment.role, segment.weight))
            if len(ids) > self.options.max_length:
                break
            ends.append(message.end)
        return _Sample(ids, list(_merged(spans)), ends, len(rendered))

    def _keep_oldest(self, turns: Sequence[Turn], tools: Sequence[Tool], sample: _Sample) -> _Sample | None:
        """The longest start of the conversation that fits, holds an answer and, if possible, trains something: families
        that think may only train an answer as the last one.

        A message is longer or shorter as the last one than in between, so the first one that did not fit may do so as
        the last one, and those that did may not.
        """
        longest = None
        for message in reversed(self._render(turns, tools)[: len(sample.ends) + 1]):
            kept = turns[: message.end]
            if len(kept) == len(turns):
                continue
            if not kept or _has_answer(turns) > _has_answer(kept):
                break
            try:
                shorter = self._encode(kept, tools)
            except ValueError:
                continue  # the tools are described in a turn that is gone
            if shorter.fits and shorter.is_trained:
                return shorter
            longest = longest or (shorter if shorter.fits else None)
        return longest

    def _keep_newest(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> _Sample | None:
        """The longest end of the conversation that fits, starts with a question and holds an answer; the system message
        stays."""
        first = 1 if turns[0].role == "system" else 0

        def kept_from(start: int) -> list[Turn]:
            return [*turns[:first], *turns[start:]]

        starts = [index for index in range(first + 1, len(turns)) if turns[index].role == "user"]
        # The later it starts, the shorter it is.
        shortest = bisect_left(starts, True, key=lambda start: self._encode(kept_from(start), tools).fits)
        if shortest == len(starts) or _has_answer(turns) > _has_answer(kept_from(starts[shortest])):
            return None
        return self._encode(kept_from(starts[shortest]), tools)


def _with_thinking_as_text(turn: Turn) -> Turn:
    """For families whose templates only know thinking within the text of an answer."""
    if turn.thinking is None:
        return turn
    text = thought_block(turn.thinking) + turn.content if turn.thinking else turn.content
    return turn._replace(content=text, thinking=None)


def _has_answer(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "assistant" for turn in turns)


class _Sample(NamedTuple):
    """A conversation as far as it was encoded: ``ends`` of the messages that lie within the length, of ``total``."""

    ids: list[int]
    spans: list[Span]
    ends: list[int]
    total: int

    @property
    def fits(self) -> bool:
        return len(self.ends) == self.total

    @property
    def is_trained(self) -> bool:
        return any(span.weight for span in self.spans)


def _merged(spans: Iterable[Span]) -> Iterable[Span]:
    """The same with neighbours of one kind made one, and without empty ones."""
    last: Span | None = None
    for span in spans:
        if last is not None and span[1:] == last[1:]:
            last = last._replace(length=last.length + span.length)
        elif span.length:
            if last is not None:
                yield last
            last = span
    if last is not None:
        yield last


def _cut(spans: Iterable[Span], length: int) -> list[Span]:
    kept = []
    for span in spans:
        if length <= 0:
            break
        kept.append(span._replace(length=min(span.length, length)))
        length -= span.length
    return kept
