"""Ids and labels of the original script, bit for bit, from the recorded conversations of both golden sets."""

from __future__ import annotations

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

# Number of cases that give ids, that were errors in the original, and lengths that they were cut at.
SIZES = {"small": (26, 4, 2), "large": (54, 7, 3)}

# Conversations whose messages or system message hold the text of a special token.
SPECIAL_TEXT = {
    "small": [
        "special in user",
        "special in assistant",
        "endoftext inside (mask is 0 there, label is kept in the answer)",
        "system own, with special text",
    ],
    "large": [
        "special in user",
        "special in assistant",
        "endoftext in assistant (labels + mask)",
        "endoftext at end",
        "extra token",
        "system special",
    ],
}

SYSTEM_FIRST = "ERR system role first"


def parse(case: dict[str, Any]) -> Conversation:
    return FORMATS["conversations"].parse({"conversations": case["conversations"]}, case["tag"])


def is_error(case: dict[str, Any]) -> bool:
    return any("error" in expected for expected in case["expected"].values())


def encode_as_original(case: dict[str, Any], tokenizer: QWenTokenizer, **options: Any) -> EncodedConversation:
    encoder = OriginalEncoder(tokenizer, system_message=case.get("system_message"), **options)
    return check_and_encode(encoder, parse(case))


def encode(case: dict[str, Any], tokenizer: QWenTokenizer, label_mask: LabelMask = "assistant") -> EncodedConversation:
    options = EncodeOptions(100_000, case.get("system_message"), label_mask, needs_answer=False)
    return check_and_encode(Encoder(tokenizer, QWEN_V1, options), without_weights(parse(case)))


def test_ids_and_labels_of_every_case_at_every_length(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    golden = any_golden.load_json("chatml.json")
    compared = 0
    for case in golden["cases"]:
        if is_error(case):
            continue
        for max_length in golden["max_lens"]:
            expected = case["expected"][str(max_length)]
            encoded = encode_as_original(case, tiny_tokenizer, max_length=max_length)
            assert encoded.input_ids == expected["input_ids"], (case["tag"], max_length)
            assert encoded.labels == expected["labels"], (case["tag"], max_length)
            assert encoded.trained_tokens == expected["n_label_after_shift"], (case["tag"], max_length)
            compared += 1
    cases, _, lengths = SIZES[any_golden.name]
    assert compared == cases * lengths


def test_error_cases_of_the_original(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    golden = any_golden.load_json("chatml.json")
    errors = [case for case in golden["cases"] if is_error(case)]
    assert len(errors) == SIZES[any_golden.name][1]
    for case in errors:
        if case["tag"] == SYSTEM_FIRST:
            continue
        with pytest.raises(DataError, match=f"^{case['tag']}: "):
            encode_as_original(case, tiny_tokenizer)


def test_system_turn_first_now_works(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    golden = any_golden.load_json("chatml.json")
    case = next(case for case in golden["cases"] if case["tag"] == SYSTEM_FIRST)
    assert case["conversations"][0] == {"from": "system", "value": "s"}
    same = {"tag": "same", "conversations": case["conversations"][1:], "system_message": "s"}
    encoded = encode_as_original(case, tiny_tokenizer)
    assert encoded == encode_as_original(same, tiny_tokenizer)
    assert encoded.trained_tokens > 0


def test_ids_of_the_quantisation_script(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    records = any_golden.load_json("chatml.json")["run_gptq_preprocess"]
    assert len(records) == {"small": 6, "large": 48}[any_golden.name]
    for record in records:
        encoded = encode_as_original(record, tiny_tokenizer, max_length=record["max_len"])
        assert encoded.input_ids == record["input_ids"], (record["tag"], record["max_len"])


@pytest.mark.parametrize("label_mask", ["assistant", "qwen"])
def test_prompt_ids_are_a_prefix_of_the_training_ids(
    any_golden: Golden, tiny_tokenizer: QWenTokenizer, label_mask: LabelMask
) -> None:
    prompts = 0
    for case in any_golden.load_json("chatml.json")["cases"]:
        if is_error(case) and case["tag"] != SYSTEM_FIRST:
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
    assert prompts == {"small": 41, "large": 99}[any_golden.name]


def test_messages_never_become_control_tokens(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """The difference from the original that is wanted: its ids of these cases hold control ids from the messages."""
    controls = set(tiny_tokenizer.special_tokens.values())
    differing = []
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
    assert differing == SPECIAL_TEXT[any_golden.name]
