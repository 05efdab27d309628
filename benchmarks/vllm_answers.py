"""Greedy answers of vLLM to one model, compared with transformers' logits token by token, and with what was taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.taught_facts import Fact
from benchmarks.vllm_models import TOOL, calls, facts
from benchmarks.vllm_servers import Server, together

TIE = 1e-2
TOKENS, CLIENTS = 48, 8
OTHERS = (
    "What is the capital of France?", "Write a sentence about the sea.", "How many days does a week have?",
    "Name three colours.", "Why is the sky blue?", "Give me a tip for a good night's sleep.",
    "What do bees make?", "Tell me a short joke.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A request for one answer.

    Attributes:
        expected: the taught answer, a text or the town of a call; ``None`` if none was taught.
        kind: ``taught`` (a trained question), ``call``, ``result`` (the answer after a trained call) or ``other``.
    """

    messages: tuple[dict[str, Any], ...]
    kind: str
    expected: str | None = None

    @property
    def has_tools(self) -> bool:
        return self.kind in ("call", "result")

    def fields(self) -> dict[str, Any]:
        return {"tools": [TOOL]} if self.has_tools else {}


def questions(with_calls: bool) -> list[Question]:
    """Return what every model is asked."""

    def plain(text: str, kind: str, expected: str | None = None) -> Question:
        return Question(({"role": "user", "content": text},), kind, expected)

    def of_fact(fact: Fact) -> list[Question]:
        return [plain(fact.wordings[0], "taught", fact.answer), *(plain(text, "other") for text in fact.paraphrases)]

    asked = [question for fact in facts() for question in of_fact(fact)]
    asked += [plain(text, "other") for text in OTHERS]
    for question, (call, result, answer) in calls() if with_calls else ():
        town = json.loads(call["tool_calls"][0]["function"]["arguments"])["town"]
        asked.append(Question(tuple(question), "call", town))
        asked.append(Question((*question, call, result), "result", answer["content"]))
    return asked


def compare(
    server: Server, asked: Sequence[Question], folder: Path, adapter: Path | None, is_quantised: bool
) -> dict[str, Any]:
    """Ask a vLLM server, and return the figures of a row.

    Args:
        folder: the checkpoint that it serves.
        adapter: the adapter with which it answers.
    """
    import torch

    from loading.checkpoint import load_checkpoint
    from serving.rendering import parse_messages, render_turns

    responses = together(
        lambda question: server.ask(question.messages, TOKENS, return_token_ids=True, **question.fields()),
        asked, CLIENTS,
    )  # fmt: skip
    checkpoint = load_checkpoint(str(folder))
    model, same_prompts, different = load_reference(folder, adapter, is_quantised), 0, []
    for question, response in zip(asked, responses, strict=True):
        prompt, answer = response["prompt_token_ids"], response["choices"][0]["token_ids"]
        tools = question.fields().get("tools", ())
        ours = render_turns(
            parse_messages(question.messages, checkpoint.family), tools, checkpoint.family, checkpoint.tokenizer
        )
        same_prompts += list(ours) == prompt
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        if difference := first_difference(logits, answer, checkpoint.tokenizer):
            different.append({"question": question.messages[0]["content"], **difference})
    ties = sum(each["margin"] < TIE for each in different)
    return {
        "questions": len(asked), "same_prompt_ids": same_prompts, "equal_answers": len(asked) - len(different),
        "ties": ties, "other_answers": len(different) - ties, "different": different,
        **{name: correct(asked, responses, name) for name in ("taught", "call", "result")},
        "ended": sum(response["choices"][0]["finish_reason"] != "length" for response in responses),
    }  # fmt: skip


def first_difference(logits: Any, answer: Sequence[int], tokenizer: Any) -> dict[str, Any] | None:
    """Return where an answer leaves the greedy one, and by which difference of logits; ``None`` if it does not.

    Args:
        logits: those before each token of the answer; equal tokens so far make them the greedy answer's own.
    """
    for number, (row, token) in enumerate(zip(logits, answer, strict=True), 1):
        if (best := int(row.argmax())) != token:
            return {
                "token": number, "transformers": tokenizer.decode([best]), "vllm": tokenizer.decode([token]),
                "margin": round(float(row[best] - row[token]), 5),
            }  # fmt: skip
    return None


def correct(asked: Sequence[Question], responses: Sequence[dict[str, Any]], kind: str) -> str | None:
    """Return how many answers of a kind are those that were taught; ``None`` if nothing of it was asked."""
    pairs = [(each, response) for each, response in zip(asked, responses, strict=True) if each.kind == kind]
    equal = sum(_content(response) == question.expected for question, response in pairs)
    return f"{equal} of {len(pairs)}" if pairs else None


def _content(response: dict[str, Any]) -> str | None:
    """Return the text of an answer, or the town of its call, as vLLM's parser read it."""
    message = response["choices"][0]["message"]
    if called := message.get("tool_calls"):
        function = called[0]["function"]
        is_one = len(called) == 1 and function["name"] == TOOL["function"]["name"]  # type: ignore[index]
        return str(json.loads(function["arguments"]).get("town")) if is_one else None
    return (message["content"] or "").strip()


def load_reference(folder: Path, adapter: Path | None, is_quantised: bool) -> Any:
    """Load a model in float32: transformers' class, and peft for an adapter; quantised weights as this toolkit does."""
    import torch

    if is_quantised:
        from loading.checkpoint import load_checkpoint
        from loading.inference import load_for_inference

        return load_for_inference(load_checkpoint(str(folder)))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
