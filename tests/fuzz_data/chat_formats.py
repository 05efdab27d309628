"""The chat formats that data is encoded in, and a second way to write it: the official templates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chat.arguments import parse_exactly
from chat.detect import family_of
from chat.families import QWEN_V1, Family, thought_block
from chat.samples import Sample, SplitTurns, Thinking
from chat.template_arguments import reads_argument
from chat.turns import Tool, ToolCall, Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from loading.prompt_modes import prompt_families
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.chats import read_text
from tests.encoding import trained_runs
from tests.families import MODES, STRICT, STYLES, closed, family_tokenizer, messages_of

REPO = Path(__file__).parents[2]
TOKENIZER = REPO / "tests" / "references" / "qwen_v1_small" / "tiny-qwen-small"
FAMILIES = Path(os.environ.get("QWEN_SHARED") or REPO.parent / "shared").resolve()
# Those that differ most come first: a short run takes them only.
NAMES = tuple(dict.fromkeys([*STRICT, "qwen3", "qwen3_thinking_2507", "qwq_32b", "qwen2_5", *STYLES]))
_SWITCH = "enable_thinking"
_ALWAYS_THINKS = ("qwq_32b", "qwq_32b_launch", "qwen3_thinking_2507")
_HEADER, _END = "<|im_start|>assistant\n", "<|im_end|>\n"
_CONTROL = re.compile(r"<\|im_(start|end)\|>")
# A template takes seconds for texts that are longer, and fails for values that are deeper.
_MOST_TEXT, _MOST_DEPTH = 30_000, 100


@dataclass(frozen=True)
class ChatFormat:
    """A checkpoint's chat format, and how its samples are made; by default Qwen v1's.

    Attributes:
        arguments: of the template, without ``enable_thinking``.
    """

    checkpoint: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    thinking: Thinking = "on"
    split_turns: SplitTurns = "never"

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.arguments]
        words += [f"thinking={self.thinking}", f"split_turns={self.split_turns}"]
        return " ".join([self.checkpoint, *words]) if self.checkpoint else "qwen"


QWEN = ChatFormat()


@cache
def chat_formats(checkpoint: str) -> list[ChatFormat]:
    """Return all formats of a checkpoint."""
    modes = [mode for mode in ({}, *MODES.get(checkpoint, ())) if _SWITCH not in mode]
    if checkpoint in _ALWAYS_THINKS:
        kinds: tuple[Thinking, ...] = ("auto", "on", "mixed")
    else:
        kinds = ("auto", "on", "off", "mixed") if checkpoint in MODES else ("auto", "off", "mixed")
    splits: tuple[SplitTurns, ...] = ("auto", "always", "never")
    return [
        ChatFormat(checkpoint, tuple(mode.items()), kind, split) for mode in modes for kind in kinds for split in splits
    ]


@cache
def encoder_of(chat: ChatFormat) -> Encoder:
    """Return the encoder that a run with these settings has."""
    if chat == QWEN:
        return Encoder(QWenTokenizer.from_pretrained(TOKENIZER), QWEN_V1, EncodeOptions())
    family, plain = _families(chat.checkpoint, chat.arguments, chat.thinking)
    options = EncodeOptions(thinking=chat.thinking, split_turns=chat.split_turns)
    return Encoder(_tokenizer(chat.checkpoint), family, options, plain)


@cache
def _tokenizer(checkpoint: str) -> Any:
    facts = json.loads((FAMILIES / "families" / "families.json").read_text(encoding="utf-8"))["families"][checkpoint]
    tokenizer = family_tokenizer(FAMILIES, facts["added_tokens"], TOKENIZER / "qwen.tiktoken")
    tokenizer.chat_template = (FAMILIES / "families" / facts["template"]).read_text(encoding="utf-8")
    return tokenizer


@cache
def _families(checkpoint: str, arguments: tuple[tuple[str, Any], ...], thinking: Thinking) -> tuple[Family, Family]:
    tokenizer = _tokenizer(checkpoint)
    opened: Any = SimpleNamespace(model_type="qwen3", tokenizer=tokenizer, family=family_of(tokenizer))
    return prompt_families(opened, thinking, dict(arguments))


def differences(chat: ChatFormat, conversation: Conversation, samples: Sequence[EncodedConversation]) -> Iterator[str]:
    """Yield in what the samples of a conversation differ from what the official template writes."""
    if chat == QWEN or _is_large(conversation):
        return
    official, rules = _Official(chat), encoder_of(chat).rules
    if conversation.is_text:
        if len(samples) == 1:
            yield from official.ids_differ(samples[0], conversation.turns[0].content + "<|endoftext|>", 1)
        return
    plan = [Sample(True, len(conversation.turns))]
    if not rules.is_trivial:
        conversation = replace(conversation, turns=tuple(rules.read(conversation.turns)))
        plan = encoder_of(chat)._plan(conversation)
    if len(plan) != len(samples):
        yield f"{len(samples)} samples, not {len(plan)}"
    for sample, encoded in zip(plan, samples, strict=False):
        if not encoded.turns_dropped:
            written = conversation.turns[: sample.end]
            compare = official.whole if sample.trained_from is None else official.answer
            try:
                yield from compare(written, conversation.tools, sample, encoded)
            except Exception as error:  # the template's
                yield f"the template fails where the data is accepted: {type(error).__name__}: {error}"


def _is_large(conversation: Conversation) -> bool:
    values = [(call.arguments, 0) for turn in conversation.turns for call in turn.calls]
    values += [(tool, 0) for tool in conversation.tools]
    values += [(text, 0) for turn in conversation.turns for text in (turn.content, turn.thinking)]
    size = 0
    while values:
        value, depth = values.pop()
        if depth > _MOST_DEPTH:
            return True
        items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        values += [(item, depth + 1) for item in items]
        size += len(value) if isinstance(value, str) else 1
    return size > _MOST_TEXT


class _Official:
    """What a checkpoint's official template writes."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat, self._encoder = chat, encoder_of(chat)
        self._tokenizer = _tokenizer(chat.checkpoint)
        added = self._tokenizer.added_tokens_decoder
        self._words = tuple(str(token) for token in added.values() if not token.special)
        self._specials = {id_ for id_, token in added.items() if token.special}

    def whole(
        self, turns: Sequence[Turn], tools: Sequence[Tool], sample: Sample, encoded: EncodedConversation
    ) -> Iterator[str]:
        """Compare a sample of a whole conversation: its text, and the answers that their prompts lead to."""
        text, safe = self._texts(turns, tools, sample)
        yield from self.ids_differ(encoded, text, len(_CONTROL.findall(safe)))
        if any(turn.weight is not None for turn in turns):
            return
        expected = []
        for index, turn in enumerate(turns):
            prompt = self._prompt(turns[:index], tools, sample) if turn.role == "assistant" else None
            if prompt is not None and safe.startswith(prompt[1]):
                expected.append(text[len(prompt[1]) : safe.index(_END, len(prompt[1])) + len(_END)])
        if (trained := self._trained(encoded)) != [read_text(each, self._words) for each in expected]:
            yield f"trains {_short(trained)}, not {_short(expected)}"

    def answer(
        self, turns: Sequence[Turn], tools: Sequence[Tool], sample: Sample, encoded: EncodedConversation
    ) -> Iterator[str]:
        """Compare a sample of one answer: the prompt that leads to it, and what the template writes behind that."""
        prompt = self._prompt(turns[:-1], tools, sample)
        if prompt is None:
            if encoded.trained_tokens:
                yield "trains an answer that has no prompt"
            return
        text, safe = self._texts(turns, tools, sample)
        opening = prompt[1].rpartition(_HEADER)[2]
        written = text[safe.rindex(_HEADER) + len(_HEADER) :]
        if not written.startswith(opening):
            if encoded.trained_tokens and turns[-1].weight is None:  # an answer's own weight trains it in any case
                yield "trains an answer that its prompt does not lead to"
            return
        behind = written.removeprefix(opening)
        count = len(_CONTROL.findall(prompt[1])) + 1
        yield from self.ids_differ(encoded, prompt[0] + behind, count)
        if (trained := self._trained(encoded)[-1:]) != [read_text(behind, self._words)]:
            yield f"trains {_short(trained)}, not {_short([behind])}"

    def ids_differ(self, encoded: EncodedConversation, text: str, control_tokens: int) -> Iterator[str]:
        """Compare the text of ids, and the number of special tokens: text of users has none."""
        decoded, expected = self._tokenizer.decode(encoded.input_ids), read_text(text, self._words)
        if decoded != expected:
            same = next((n for n, pair in enumerate(zip(decoded, expected, strict=False)) if pair[0] != pair[1]), 0)
            start = max(0, same - 20)
            yield f"ids of {decoded[start : start + 60]!r}, not of {expected[start : start + 60]!r}"
        count = sum(id_ in self._specials for id_ in encoded.input_ids)
        if count != control_tokens:
            yield f"{count} control tokens, not {control_tokens}"

    def _trained(self, encoded: EncodedConversation) -> list[str]:
        return [self._tokenizer.decode(encoded.input_ids[start:end]) for start, end in trained_runs(encoded)]

    def _prompt(self, turns: Sequence[Turn], tools: Sequence[Tool], sample: Sample) -> tuple[str, str] | None:
        """Return the prompt behind some turns, and the same without control tokens in texts; ``None`` if there is none.

        A template refuses a prompt of no question, and that of Qwen1.5's launch opens no second answer.
        """
        if not turns or (turns[-1].role == "assistant" and not self._encoder.family.prompts_after_answer):
            return None
        try:
            return self._texts(turns, tools, sample, is_prompt=True)
        except Exception:  # the template's
            return None

    def _texts(
        self, turns: Sequence[Turn], tools: Sequence[Tool], sample: Sample, is_prompt: bool = False
    ) -> tuple[str, str]:
        """Return the text of some turns, and the same without control tokens in texts, of the same length."""
        family = self._encoder.rules.family_of(sample)
        arguments = dict(self._chat.arguments)
        if reads_argument(self._tokenizer.chat_template, _SWITCH):
            arguments[_SWITCH] = sample.thinks and self._chat.thinking != "off"
        messages = messages_of([_as_template_reads(turn, family) for turn in turns])
        texts = []
        for each, described in ((messages, list(tools)), (_without_control(messages), _without_control(list(tools)))):
            options = {"tools": described or None, "add_generation_prompt": is_prompt, **arguments}
            text = str(self._tokenizer.apply_chat_template(each, tokenize=False, **options))
            texts.append(text if is_prompt else closed(text, family))
        return texts[0], texts[1]


def _as_template_reads(turn: Turn, family: Family) -> Turn:
    """Return a turn with thinking where the template reads it, and arguments as it takes them."""
    if turn.thinking is not None and not family.has_thinking_field:
        thought = thought_block(turn.thinking) if turn.thinking else ""
        turn = turn._replace(content=thought + turn.content, thinking=None)
    form: Any = family.tool_form
    if turn.calls and not form.keeps_strings:
        turn = turn._replace(calls=tuple(ToolCall(call.name, _decoded(call.arguments)) for call in turn.calls))
    return turn


def _decoded(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_exactly(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _without_control(value: Any) -> Any:
    if isinstance(value, str):
        return _CONTROL.sub(r"<|im-\1|>", value)
    if isinstance(value, dict):
        return {_without_control(key): _without_control(item) for key, item in value.items()}
    return [_without_control(item) for item in value] if isinstance(value, list) else value


def _short(texts: Sequence[str]) -> str:
    return repr(texts)[:200]
