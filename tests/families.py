"""Checkpoints of the families after Qwen v1: their official chat templates, and recorded conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from chat.detect import family_of
from chat.families import Family
from chat.segments import Message
from chat.tools_hermes import Hermes
from chat.turns import Tool, ToolCall, Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from qwen_model.tokenization_qwen import SPLIT_PATTERN
from tests.encoding import check_and_encode

STYLES = {
    "qwen1_5": "chatml",
    "qwen1_5_launch": "chatml-launch",
    "qwen1_5_base": "chatml",
    "qwen2": "chatml",
    "qwen2_5": "chatml",
    "qwen2_5_coder": "chatml",
    "qwen2_5_base": "chatml",
    "qwen2_5_math": "chatml",
    "qwen2_5_launch": "chatml",
    "qwq_32b": "chatml-qwq",
    "qwq_32b_launch": "chatml-qwq-launch",
    "qwq_32b_preview": "chatml",
    "qwen3": "chatml-hybrid",
    "qwen3_launch": "chatml-hybrid",
    "qwen3_instruct_2507": "chatml",
    "qwen3_instruct_2507_launch": "chatml-hybrid",
    "qwen3_thinking_2507": "chatml-thinking",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The tokenizer and chat template of a checkpoint, and what was recorded with them.

    Attributes:
        rows: conversations with the characters and ids that the model has to generate.
        cases: conversations and prompts with their text.
    """

    name: str
    facts: dict[str, Any]
    family: Family
    tokenizer: PreTrainedTokenizerFast
    rows: list[Row]
    cases: list[Row]

    def encoder(self, **options: Any) -> Encoder:
        return Encoder(self.tokenizer, self.family, EncodeOptions(**options))

    def encode(self, turns: Sequence[Turn], tools: Sequence[Tool] = (), **options: Any) -> EncodedConversation:
        return check_and_encode(self.encoder(**options), Conversation(tuple(turns), "here", tuple(tools)))

    def template(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = (), prompt: bool = False) -> str:
        """Return the text of the official template."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        )


@cache
def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _base_tokenizer(rank_file: Path) -> str:
    converted = TikTokenConverter(str(rank_file), pattern=SPLIT_PATTERN).converted()
    converted.normalizer = normalizers.NFC()
    return converted.to_str()


@cache
def _tokenizer(shared: Path, kind: str) -> PreTrainedTokenizerFast:
    base = Tokenizer.from_str(_base_tokenizer(shared / "golden" / "tiny-qwen" / "qwen.tiktoken"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    for token in _load(shared / "families" / "families.json")["added_tokens"][kind]:
        added = AddedToken(token["content"], special=token["special"], normalized=False)
        tokenizer.add_tokens([added], special_tokens=token["special"])
        assert tokenizer.convert_tokens_to_ids(token["content"]) == token["id"]
    return tokenizer


def load_family(shared: Path, name: str) -> Checkpoint:
    """Load a checkpoint. Its tokenizer is shared, and has the template of the checkpoint that was loaded last."""
    folder = shared / "families"
    facts = _load(folder / "families.json")["families"][name]
    tokenizer = _tokenizer(shared, facts["added_tokens"])
    tokenizer.chat_template = (folder / facts["template"]).read_text(encoding="utf-8")
    recorded = [
        _load(folder / file).get(facts.get("alias_of", name), []) for file in ("expected_training.json", "cases.json")
    ]
    return Checkpoint(name, facts, family_of(tokenizer), tokenizer, *recorded)


def turns_of(row: Row) -> list[Turn]:
    """Return the messages of a row that ``left_out`` accepts."""
    return [
        Turn(
            message["role"],
            message.get("content") or "",
            tuple(
                ToolCall(call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls") or ()
            ),
            thinking=message.get("reasoning_content"),
        )
        for message in row["messages"]
    ]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Convert turns to the messages that a template takes."""
    messages = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.thinking is not None:
            message["reasoning_content"] = turn.thinking
        if turn.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.calls
            ]
        messages.append(message)
    return messages


def left_out(row: Row, checkpoint: Checkpoint) -> str:
    """Return why a training conversation cannot express a row; empty if it can."""
    if "error" in row:
        return "the template fails"
    if row["kwargs"].get("continue_final_message"):
        return "the prompt continues a started answer"
    has_modes = "enable_thinking" in str(checkpoint.tokenizer.chat_template)
    if has_modes and row["kwargs"].get("enable_thinking") is False and row["kwargs"].get("add_generation_prompt"):
        return "the prompt is not of the default mode"
    for message in row["messages"]:
        if message["role"] not in ("system", "user", "assistant", "tool"):
            return "unknown role"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return "content is not a string"
        if "reasoning" in message or "thinking" in message:
            return "reasoning_content under another name, which the formats read"
    form = checkpoint.family.tool_form
    calls = [call for turn in turns_of(row) for call in turn.calls]
    if form is None and (row["tools"] or calls or any(message["role"] == "tool" for message in row["messages"])):
        return "tools are refused, but the template ignores them"
    if isinstance(form, Hermes) and not form.keeps_strings and any(isinstance(call.arguments, str) for call in calls):
        return "string arguments are decoded, but the template writes them verbatim"
    return ""


def closed(text: str, family: Family) -> str:
    """Close the last message, which the template of Qwen1.5's launch leaves open."""
    return text if family.prompts_after_answer else text + "<|im_end|>\n"


def trained_spans(rendered: Sequence[Message]) -> list[list[int]]:
    """Return start and end of each run of trained characters in a rendered conversation."""
    position = 0
    spans: list[list[int]] = []
    for segment in (segment for message in rendered for segment in message.segments):
        end = position + len(segment.text)
        if segment.weight and spans and spans[-1][1] == position:
            spans[-1][1] = end
        elif segment.weight:
            spans.append([position, end])
        position = end
    return spans
