"""Ids and labels equal those of Qwen v1's original script on the recorded conversations of both golden sets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from chat.families import QWEN_V1
from chat.label_mask import LabelMask
from chat.render import encode_prompt, render_prompt
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.formats import FORMATS
from data_utils.schema import Conversation
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.encoding import OriginalEncoder, check_and_encode, without_weights
from tests.golden import Golden


def parse(case: dict[str, Any]) -> Conversation:
    return FORMATS["conversations"].parse({"conversations": case["conversations"]}, case["tag"])


def is_error(case: dict[str, Any]) -> bool:
    return any("error" in expected for expected in case["expected"].values())


def has_leading_system_turn(case: dict[str, Any]) -> bool:
    """Return whether the only fault of an error case is a leading system turn, which the original could not read."""
    if not is_error(case) or not case["conversations"] or case["conversations"][0].get("from") != "system":
        return False
    turns = case["conversations"]
    roles = [turn.get("from") for turn in turns[1:]]
    return set(roles) <= {"user", "assistant"} and all(isinstance(turn.get("value"), str) for turn in turns)


def encode_as_original(case: dict[str, Any], tokenizer: QWenTokenizer, **options: Any) -> EncodedConversation:
    encoder = OriginalEncoder(tokenizer, system_message=case.get("system_message"), **options)
    return check_and_encode(encoder, parse(case))


def encode(case: dict[str, Any], tokenizer: QWenTokenizer, label_mask: LabelMask = "assistant") -> EncodedConversation:
    options = EncodeOptions(100_000, case.get("system_message"), label_mask, needs_answer=False)
    return check_and_encode(Encoder(tokenizer, QWEN_V1, options), without_weights(parse(case)))


def test_ids_and_labels_equal_the_original_at_every_length(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    golden = any_golden.load_json("chatml.json")
    cases = [case for case in golden["cases"] if not is_error(case)]
    assert cases and golden["max_lens"]
    for case in cases:
        for max_length in golden["max_lens"]:
            expected = case["expected"][str(max_length)]
            encoded = encode_as_original(case, tiny_tokenizer, max_length=max_length)
            assert encoded.input_ids == expected["input_ids"], (case["tag"], max_length)
            assert encoded.labels == expected["labels"], (case["tag"], max_length)
            assert encoded.trained_tokens == expected["n_label_after_shift"], (case["tag"], max_length)


def test_error_cases_of_the_original_are_refused(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    golden = any_golden.load_json("chatml.json")
    errors = [case for case in golden["cases"] if is_error(case)]
    assert errors
    for case in errors:
        if has_leading_system_turn(case):
            continue
        with pytest.raises(DataError, match=f"^{re.escape(case['tag'])}: "):
            encode_as_original(case, tiny_tokenizer)


def test_leading_system_turn_is_the_system_message(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """The original refused it."""
    cases = [case for case in any_golden.load_json("chatml.json")["cases"] if has_leading_system_turn(case)]
    assert cases or any_golden.name == "large"
    for case in cases:
        system, *turns = case["conversations"]
        same = {"tag": "same", "conversations": turns, "system_message": system["value"]}
        encoded = encode_as_original(case, tiny_tokenizer)
        assert encoded == encode_as_original(same, tiny_tokenizer)
        assert encoded.trained_tokens > 0


def test_ids_equal_the_quantisation_script(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    records = any_golden.load_json("chatml.json")["run_gptq_preprocess"]
    assert records
    for record in records:
        encoded = encode_as_original(record, tiny_tokenizer, max_length=record["max_len"])
        assert encoded.input_ids == record["input_ids"], (record["tag"], record["max_len"])


@pytest.mark.parametrize("label_mask", ["assistant", "qwen"])
def test_prompt_ids_are_a_prefix_of_the_training_ids(
    any_golden: Golden, tiny_tokenizer: QWenTokenizer, label_mask: LabelMask
) -> None:
    prompts = 0
    for case in any_golden.load_json("chatml.json")["cases"]:
        if is_error(case) and not has_leading_system_turn(case):
            continue
        turns = parse(case).turns
        encoded = encode(case, tiny_tokenizer, label_mask)
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = turns[:index]
            prompt = encode_prompt(render_prompt(before, QWEN_V1, case["system_message"]), tiny_tokenizer)
            answer = [*tiny_tokenizer.encode_plain(turn.content), tiny_tokenizer.im_end_id]
            end = len(prompt) + len(answer)
            assert encoded.input_ids[:end] == [*prompt, *answer], (case["tag"], index)
            assert encoded.labels[len(prompt) : end] == answer, (case["tag"], index)
            prompts += 1
    assert prompts


def test_control_tokens_in_messages_stay_text(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """An intended difference: the original's ids of these cases contain control ids from the messages."""
    controls = set(tiny_tokenizer.special_tokens.values())
    differing, expected = [], []
    for case in any_golden.load_json("chatml.json")["cases"]:
        if is_error(case):
            continue
        encoded = encode(case, tiny_tokenizer)
        placed = [id_ for id_ in encoded.input_ids if id_ in controls]
        assert placed == [tiny_tokenizer.im_start_id, tiny_tokenizer.im_end_id] * (len(case["conversations"]) + 1), (
            case["tag"]
        )
        original = encode_as_original(case, tiny_tokenizer, max_length=100_000, drops_opening=False)
        if original.input_ids != encoded.input_ids:
            differing.append(case["tag"])
        texts = [case["system_message"] or "", *(turn["value"] for turn in case["conversations"])]
        if any(token in text for token in tiny_tokenizer.special_tokens for text in texts):
            expected.append(case["tag"])
    assert differing == expected
    assert expected or any_golden.name == "large"
