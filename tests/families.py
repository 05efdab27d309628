"""Checkpoints of the families after Qwen v1: their official chat templates, and recorded conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerFast

from chat.detect import family_of
from chat.families import Family
from chat.segments import Message
from chat.tools_hermes import Hermes
from chat.tools_xml import XmlCalls
from chat.turns import Tool, ToolCall, Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from tests.encoding import check_and_encode
from tests.vocabulary import base_tokenizer

Row = dict[str, Any]

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
STRICT = {
    "qwen3_5_think": "chatml-3.5",
    "qwen3_5_nothink": "chatml-3.5",
    "qwen3_6": "chatml-3.5",
    "qwen3_8": "chatml-3.8",
}

_SWITCH: tuple[Row, ...] = ({"enable_thinking": True}, {"enable_thinking": False})
_KEPT: tuple[Row, ...] = ({"preserve_thinking": True}, {"preserve_thinking": False})
_DROPPED_WITHOUT_THINKING: Row = {"preserve_thinking": False, "enable_thinking": False}
_EFFORTS: tuple[Row, ...] = tuple({"reasoning_effort": effort} for effort in ("low", "medium", "xhigh"))
# Arguments of the chat templates, beside none.
MODES: dict[str, tuple[Row, ...]] = {
    **dict.fromkeys(
        ("qwen3", "qwen3_launch", "qwen3_instruct_2507_launch", "qwen3_5_think", "qwen3_5_nothink"), _SWITCH
    ),
    "qwen3_6": (*_SWITCH, *_KEPT),
    "qwen3_8": (*_SWITCH, *_KEPT, *_EFFORTS, _DROPPED_WITHOUT_THINKING),
}
CHECKPOINTS = [(name, mode) for name in (*STYLES, *STRICT) for mode in ({}, *MODES.get(name, ()))]


@dataclass(frozen=True)
class Checkpoint:
    """The tokenizer and chat template of a checkpoint, and what was recorded with them.

    Attributes:
        rows: conversations with the characters that the model has to generate, if the vocabulary is here with the ids.
        cases: conversations and prompts with their text.
        mode: arguments of the chat template, with which ``family`` was detected and rows and cases were recorded.
    """

    name: str
    facts: dict[str, Any]
    chat_template: str
    family: Family
    tokenizer: PreTrainedTokenizerFast
    rows: list[Row]
    cases: list[Row]
    mode: Row = field(default_factory=dict)

    def encoder(self, **options: Any) -> Encoder:
        return Encoder(self.tokenizer, self.family, EncodeOptions(**options))

    def encode(self, turns: Sequence[Turn], tools: Sequence[Tool] = (), **options: Any) -> EncodedConversation:
        return check_and_encode(self.encoder(**options), Conversation(tuple(turns), "here", tuple(tools)))

    def template(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = (), prompt: bool = False) -> str:
        """Return the text of the official template."""
        options: dict[str, Any] = {"add_generation_prompt": prompt, "chat_template": self.chat_template, **self.mode}
        options["tools"] = list(tools) or None
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


@cache
def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _tokenizer(shared: Path, kind: str) -> PreTrainedTokenizerFast:
    return family_tokenizer(shared, kind, shared / "golden" / "tiny-qwen" / "qwen.tiktoken")


def family_tokenizer(shared: Path, kind: str, rank_file: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits texts as those of a family do, and has their added tokens.

    Args:
        kind: key of ``added_tokens`` in families.json.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer(rank_file, kind == "qwen3_5"))
    tokens = _load(shared / "families" / "families.json")["added_tokens"][kind]
    # Other vocabularies are smaller than that of Qwen3.5; the order of added tokens is the same.
    offset = tokens[0]["id"] - len(tokenizer)
    for token in tokens:
        added = AddedToken(token["content"], special=token["special"], normalized=False)
        tokenizer.add_tokens([added], special_tokens=token["special"])
        assert tokenizer.convert_tokens_to_ids(token["content"]) == token["id"] - offset
    return tokenizer


def load_family(shared: Path, name: str, mode: Row | None = None) -> Checkpoint:
    """Load a checkpoint. Its tokenizer is shared, and has the template of the checkpoint that was loaded last."""
    folder, mode = shared / "families", mode or {}
    facts = _load(folder / "families.json")["families"][name]
    tokenizer = _tokenizer(shared, facts["added_tokens"])
    template = (folder / facts["template"]).read_text(encoding="utf-8")
    tokenizer.chat_template = template
    key = facts.get("alias_of", name)
    # By their text: 0 equals False, and is another argument to a template.
    cases = [case for case in _load(folder / "cases.json").get(key, []) if repr(_mode_of(case, template)) == repr(mode)]
    rows = [
        row
        for recorded in _load(folder / "expected_training.json").get(key, [])
        for row in (recorded, *_other_prompts(recorded))
        if repr(_mode_of(row, template)) == repr(mode)
    ]
    return Checkpoint(name, facts, template, family_of(tokenizer, **mode), tokenizer, rows, cases, mode)


def _mode_of(row: Row, template: str) -> Row:
    """Return the arguments of a row that its template knows."""
    prompts = ("add_generation_prompt", "continue_final_message")
    return {key: value for key, value in row["kwargs"].items() if key not in prompts and key in template}


def _other_prompts(row: Row) -> Iterator[Row]:
    """Yield a row as it is behind the prompts of the other mode, if that changes the prompts alone."""
    for spans, is_thinking in (("spans_no_thinking", False), ("spans_thinking", True)):
        if spans in row:
            changed = {key: value for key, value in row.items() if key not in ("ids", "token_spans")}
            yield {**changed, "kwargs": {**row["kwargs"], "enable_thinking": is_thinking}, "spans": row[spans]}


def turns_of(row: Row) -> list[Turn]:
    """Return the messages of a row that ``left_out`` accepts."""
    return [
        Turn(
            message["role"],
            message.get("content") or "",
            tuple(
                ToolCall(call["function"]["name"], call["function"].get("arguments", {}))
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
    if not row["messages"]:
        return "there is no message"
    for message in row["messages"]:
        if message["role"] not in ("system", "user", "assistant", "tool"):
            return "unknown role"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return "content is not a string"
        if isinstance(message.get("tool_calls"), dict):
            return "calls are not a list"
        if not isinstance(message.get("reasoning_content", ""), str):
            return "thinking is not a string"
        if "reasoning" in message or "thinking" in message:
            return "reasoning_content under another name, which the formats read"
    if checkpoint.family.is_strict and row["messages"][0]["role"] == "tool":
        return "the template writes a result without its header, which is refused"
    form = checkpoint.family.tool_form
    calls = [call for turn in turns_of(row) for call in turn.calls]
    if form is None and (row["tools"] or calls or any(message["role"] == "tool" for message in row["messages"])):
        return "tools are refused, but the template ignores them"
    if (
        isinstance(form, Hermes | XmlCalls)
        and not form.keeps_strings
        and any(isinstance(call.arguments, str) for call in calls)
    ):
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
