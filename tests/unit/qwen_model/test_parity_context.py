"""Prompts, stop words and decoding of answers against the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from chat.families import QWEN_V1
from chat.render import encode_prompt, render_prompt, text_of
from chat.turns import Turn
from qwen_model.generation import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden


def as_tuples(history: list[list[str]] | None) -> list[tuple[str, ...]] | None:
    return None if history is None else [tuple(turn) for turn in history]


def test_make_context(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = any_golden.load_json("make_context.json")["make_context"]
    good = [case for case in cases if "error" not in case]
    assert good
    for case in good:
        for history in (case["history"], as_tuples(case["history"])):
            raw_text, context_tokens = make_context(tiny_tokenizer, case["query"], history, **case["kwargs"])
            assert raw_text == case["raw_text"], case["tag"]
            assert context_tokens == case["context_tokens"], case["tag"]
        assert (tiny_tokenizer.decode(context_tokens) == raw_text) == case["decode_equals_raw"], case["tag"]


def test_make_context_errors(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = [case for case in any_golden.load_json("make_context.json")["make_context"] if "error" in case]
    assert cases
    for case in cases:
        with pytest.raises(ValueError) as caught:
            make_context(tiny_tokenizer, case["query"], case["history"], **case["kwargs"])
        chat_format = case["kwargs"].get("chat_format", "chatml")
        assert chat_format in ("raw", "chatml") or chat_format in str(caught.value), case["tag"]


def test_get_stop_words_ids(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    recorded = any_golden.load_json("make_context.json")["get_stop_words_ids"]
    for chat_format in ("raw", "chatml"):
        assert get_stop_words_ids(chat_format, tiny_tokenizer) == recorded[chat_format]
    assert recorded["x"].startswith("NotImplementedError")
    with pytest.raises(ValueError, match="'x'"):
        get_stop_words_ids("x", tiny_tokenizer)


def expected_answer(case: dict[str, Any], tokenizer: QWenTokenizer) -> Any:
    """Return the recorded result. Without a stop token the original dropped the last token, which is kept here."""
    stops = {tokenizer.im_start_id, tokenizer.im_end_id}
    if case["chat_format"] == "raw" or not case["generated"] or stops & set(case["generated"]):
        return tuple(case["out"]) if isinstance(case["out"], list) else case["out"]
    text = tokenizer.decode(case["context_tokens"] + case["generated"], errors=case["kwargs"].get("errors", "replace"))
    answer = text[len(case["raw_text"]) :].strip()
    recorded, *reason = case["out"] if isinstance(case["out"], list) else [case["out"]]
    assert answer.startswith(recorded), case["tag"]
    return (answer, *reason) if reason else answer


def test_decode_tokens(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = any_golden.load_json("make_context.json")["decode_tokens"]
    assert cases
    for case in cases:
        tokens = case["context_tokens"] + case["generated"]
        for ids in (tokens, torch.tensor(tokens)):
            answer = decode_tokens(
                ids,
                tiny_tokenizer,
                raw_text_len=len(case["raw_text"]),
                context_length=len(case["context_tokens"]),
                chat_format=case["chat_format"],
                **case["kwargs"],
            )
            assert answer == expected_answer(case, tiny_tokenizer), case["tag"]
    with pytest.raises(ValueError, match="alpaca"):
        decode_tokens([1], tiny_tokenizer, raw_text_len=0, context_length=0, chat_format="alpaca")


def test_answer_to_a_query_that_normalisation_shortens(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """The length of the typed text cuts off the start of the answer, as recorded. ``chat()`` therefore passes the
    length of the decoded prompt."""
    shortened = 0
    for case in any_golden.load_json("make_context.json")["decode_tokens"]:
        context, generated = case["context_tokens"], case["generated"]
        prompt = tiny_tokenizer.decode(context)
        lost = len(case["raw_text"]) - len(prompt)
        if lost <= 0 or case["chat_format"] != "chatml" or case["kwargs"] or not case["out"]:
            continue
        answer = decode_tokens(context + generated, tiny_tokenizer, len(prompt), len(context), "chatml")
        assert answer.endswith(case["out"]) and len(answer) == len(case["out"]) + lost, case["tag"]
        assert tiny_tokenizer.decode(generated).startswith(answer), case["tag"]
        shortened += 1
    assert shortened or any_golden.name == "large"


def test_stop_words_logits_processor(any_golden: Golden) -> None:
    cases = any_golden.load_json("make_context.json")["stop_words_logits_processor"]
    assert cases
    for case in cases:
        if "error" in case:
            with pytest.raises(ValueError):
                StopWordsLogitsProcessor(case["stop_words_ids"], eos_token_id=9)
            continue
        processor = StopWordsLogitsProcessor(case["stop_words_ids"], case["eos_token_id"])
        expected = torch.tensor(case["scores_after"])
        scores = processor(torch.tensor(case["prev_input_ids"]), torch.zeros_like(expected))
        assert scores.tolist() == expected.tolist(), case["stop_words_ids"]


def test_top_k_and_top_p_of_the_library_equal_the_originals(any_golden: Golden) -> None:
    """generate() uses the library's top_k and top_p; the original had its own function."""
    recorded = any_golden.load_json("make_context.json")["top_k_logits"]
    logits = torch.tensor(recorded.pop("logits"))
    assert recorded
    for key, expected in recorded.items():
        top_k, top_p = (float(part.split("=")[1]) for part in key.split(","))
        filtered = logits
        if top_k > 0:
            filtered = TopKLogitsWarper(int(top_k))(None, filtered)
        if 0.0 < top_p < 1.0:
            filtered = TopPLogitsWarper(top_p)(None, filtered)
        assert filtered.tolist() == [[float("-inf") if x is None else x for x in row] for row in expected], key


def test_make_context_equals_the_renderer_of_training(tiny_tokenizer: QWenTokenizer) -> None:
    """The model's own code renders a prompt as ``chat.render`` does."""
    history = [("Hi", "\nHello <|im_end|>"), ("", "2"), ("e\u0301 天", "")]
    for system, kept in (("Be short.", 3), ("", 0)):
        text, ids = make_context(tiny_tokenizer, "\nWhy?", history[:kept], system)
        turns = [Turn("system", system)]
        for question, answer in history[:kept]:
            turns += [Turn("user", question), Turn("assistant", answer)]
        rendered = render_prompt([*turns, Turn("user", "\nWhy?")], QWEN_V1)
        assert (text, ids) == (text_of(rendered), encode_prompt(rendered, tiny_tokenizer))
