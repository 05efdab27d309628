"""Prompts, stop words and the decoding of answers against the original's."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from chat.families import QWEN_V1
from chat.render import encode_prompt, render_prompt, text_of
from chat.turns import Turn
from qwen_model.generation import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden

# Where no stop token ended an answer, the original lost its last token.
KEEPS_LAST_TOKEN = {
    "small": {"no stop token: last token is dropped": ["one two three", "Gen length 25"]},
    "large": {"no stop token: last token is dropped": ["one two three four", "Gen length 24"]},
}
NFD_QUERY = "NFD query: raw_text_len too long -> response loses leading characters"


def as_tuples(history: list[list[str]] | None) -> list[tuple[str, ...]] | None:
    return None if history is None else [tuple(turn) for turn in history]


def test_make_context(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = any_golden.load_json("make_context.json")["make_context"]
    good = [case for case in cases if "error" not in case]
    assert len(good) >= 13
    for case in good:
        for history in (case["history"], as_tuples(case["history"])):
            raw_text, context_tokens = make_context(tiny_tokenizer, case["query"], history, **case["kwargs"])
            assert raw_text == case["raw_text"], case["tag"]
            assert context_tokens == case["context_tokens"], case["tag"]
        assert (tiny_tokenizer.decode(context_tokens) == raw_text) == case["decode_equals_raw"], case["tag"]


def test_make_context_errors(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = [case for case in any_golden.load_json("make_context.json")["make_context"] if "error" in case]
    assert {"unknown format", "ERR history triple"} <= {case["tag"] for case in cases}
    for case in cases:
        with pytest.raises(ValueError) as caught:
            make_context(tiny_tokenizer, case["query"], case["history"], **case["kwargs"])
        if case["tag"] == "unknown format":
            assert "alpaca" in str(caught.value)


def test_get_stop_words_ids(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    recorded = any_golden.load_json("make_context.json")["get_stop_words_ids"]
    for chat_format in ("raw", "chatml"):
        assert get_stop_words_ids(chat_format, tiny_tokenizer) == recorded[chat_format]
    assert recorded["x"].startswith("NotImplementedError")
    with pytest.raises(ValueError, match="'x'"):
        get_stop_words_ids("x", tiny_tokenizer)


def test_decode_tokens(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    cases = any_golden.load_json("make_context.json")["decode_tokens"]
    better = KEEPS_LAST_TOKEN[any_golden.name]
    assert set(better) <= {case["tag"] for case in cases}
    for case in cases:
        tokens = case["context_tokens"] + case["generated"]
        for given in (tokens, torch.tensor(tokens)):
            answer = decode_tokens(
                given,
                tiny_tokenizer,
                raw_text_len=len(case["raw_text"]),
                context_length=len(case["context_tokens"]),
                chat_format=case["chat_format"],
                **case["kwargs"],
            )
            expected = better.get(case["tag"], case["out"])
            assert answer == (tuple(expected) if isinstance(expected, list) else expected), case["tag"]
    with pytest.raises(ValueError, match="alpaca"):
        decode_tokens([1], tiny_tokenizer, raw_text_len=0, context_length=0, chat_format="alpaca")


def test_an_answer_to_a_query_that_normalisation_shortens(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """The length of the typed text cuts into the answer, as recorded; that of the decoded prompt, which ``chat()``
    gives, does not."""
    cases = any_golden.load_json("make_context.json")["decode_tokens"]
    (case,) = (case for case in cases if case["tag"] == NFD_QUERY)
    context = case["context_tokens"]
    prompt = tiny_tokenizer.decode(context)
    assert len(prompt) == len(case["raw_text"]) - 2
    answer = decode_tokens(context + case["generated"], tiny_tokenizer, len(prompt), len(context), "chatml")
    assert (case["out"], answer) == ("SPONSE", "RESPONSE")


def test_stop_words_logits_processor(any_golden: Golden) -> None:
    cases = any_golden.load_json("make_context.json")["stop_words_logits_processor"]
    for case in cases:
        if "error" in case:
            with pytest.raises(ValueError):
                StopWordsLogitsProcessor(case["stop_words_ids"], eos_token_id=9)
            continue
        processor = StopWordsLogitsProcessor(case["stop_words_ids"], case["eos_token_id"])
        expected = torch.tensor(case["scores_after"])
        scores = processor(torch.tensor(case["prev_input_ids"]), torch.zeros_like(expected))
        assert scores.tolist() == expected.tolist(), case["stop_words_ids"]


def test_library_filters_logits_as_the_original_did(any_golden: Golden) -> None:
    """generate() takes top_k and top_p from the library; the original had a function of its own."""
    recorded = any_golden.load_json("make_context.json")["top_k_logits"]
    logits = torch.tensor(recorded.pop("logits"))
    assert len(recorded) >= 3
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
