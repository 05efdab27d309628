"""A file becomes examples, and nothing is left out without being told."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_utils.collate import Collator
from data_utils.dataset import load_examples
from data_utils.encode import ORIGINAL, EncodeOptions, Encoder
from data_utils.schema import parse_conversation, read_records
from errors import DataError
from qwen_model.families import ANSWER_STYLES, QWEN_V1
from qwen_model.tokenization_qwen import QWenTokenizer

SYSTEM, HI, HELLO = 11, 7, 9  # tokens of the default system turn and of the two turns below
SHORT = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]
TWICE = [*SHORT, *SHORT]
LONG_QUESTION = [{"from": "user", "value": "What? " * 30}, SHORT[1]]


@pytest.fixture(scope="module")
def tokenizer(golden_small: Path) -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small")


def write_lines(path: Path, *conversations: object) -> Path:
    lines = [json.dumps({"conversations": turns}) for turns in conversations]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # a blank line behind each
    return path


def test_examples_are_the_encoded_conversations_in_order(golden_small: Path, tokenizer: QWenTokenizer) -> None:
    path = golden_small / "train.json"
    encoder = Encoder(tokenizer, QWEN_V1, ORIGINAL)
    encoded = [
        encoder.encode_conversation(parse_conversation(record, where, needs_answer=False))
        for where, record in read_records(path)
    ]
    examples = load_examples(path, encoder, show_progress=False)
    assert len(examples) == 32
    assert list(examples) == [
        {"input_ids": each.input_ids, "labels": each.labels, "index": index} for index, each in enumerate(encoded)
    ]
    assert examples.lengths == [len(each.input_ids) for each in encoded]
    assert examples[-1] == examples[31]
    with pytest.raises(IndexError):
        examples[32]
    report = examples.report
    assert (report.read, report.kept, report.skipped, report.truncated) == (32, 32, [], [])
    assert report.tokens == sum(examples.lengths)
    assert report.trained_tokens == sum(each.trained_tokens for each in encoded)


def test_skipped_and_shortened_conversations_are_reported_by_line(
    tmp_path: Path, tokenizer: QWenTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", LONG_QUESTION, SHORT, TWICE, *[LONG_QUESTION] * 6)
    encoder = Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=40))
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, encoder, show_progress=False)
    report = examples.report
    assert [examples.where(index) for index in range(len(examples))] == [f"{path}:3", f"{path}:5"]
    assert examples.lengths == [SYSTEM + HI + HELLO, SYSTEM + HI + HELLO + HI]
    assert report.read == 9
    assert report.kept == 2
    reason = "no answer fits within --model_max_length 40"
    assert report.skipped == [(f"{path}:{line}", reason) for line in (1, 7, 9, 11, 13, 15, 17)]
    assert report.truncated == [f"{path}:5"]
    assert (report.tokens, report.trained_tokens) == (27 + 34, 6 + 6)
    places = ", ".join(f"{path}:{line}" for line in (1, 7, 9, 11, 13))
    warnings = [
        f"{path}: skipped 7 of 9 conversations, {reason}: {places}, ...",
        f"{path}: shortened 1 of 9 conversations: {path}:5",
    ]
    assert [record.getMessage() for record in caplog.records] == warnings
    assert report.lines() == [f"{path}: 2 of 9 conversations kept, 61 tokens, 12 trained", *warnings]


def test_report_as_json(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, *[LONG_QUESTION] * 150, TWICE)
    report = load_examples(path, Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=40)), show_progress=False).report
    recorded = json.loads(json.dumps(report.as_dict()))
    places = recorded.pop("skipped_at")
    assert len(places) == 100
    assert places[0] == {"where": f"{path}:3", "reason": "no answer fits within --model_max_length 40"}
    assert recorded == {
        "path": str(path),
        "read": 152,
        "kept": 2,
        "skipped": 150,
        "truncated": 1,
        "tokens": 61,
        "trained_tokens": 12,
        "truncated_at": [f"{path}:303"],
    }
    assert report.read == report.kept + len(report.skipped)


def test_a_file_with_nothing_left_is_an_error(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, TWICE)
    message = (
        f"{path}: nothing is left to train on: 2 conversations read, 2 skipped, no answer fits within "
        "--model_max_length 26. Raise --model_max_length, or shorten the conversations"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_examples(path, Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=26)), show_progress=False)


def test_answers_that_no_prompt_asks_for_are_not_trained(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    """QwQ's prompt opens a thought, so an answer without one could never be generated."""
    qwq = next(style for style in ANSWER_STYLES if style.name == "chatml-qwq")
    path = write_lines(tmp_path / "chats.jsonl", SHORT)
    with pytest.raises(DataError, match="its answers are none that a prompt of the chat format 'chatml-qwq'"):
        load_examples(path, Encoder(tokenizer, qwq, EncodeOptions()), show_progress=False)


def test_faulty_records_end_it_before_anything_is_encoded(
    tmp_path: Path, tokenizer: QWenTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder(tokenizer, QWEN_V1, EncodeOptions())
    path = write_lines(tmp_path / "chats.jsonl", SHORT, [{"from": "bot", "value": "x"}], SHORT)
    robot = f"{path}:3: turn 1 is from an unknown role, 'bot'. Known roles are user, human, assistant, gpt, system"
    with pytest.raises(DataError, match=f"^{re.escape(robot)}$"):
        load_examples(path, encoder)
    write_lines(path, SHORT, [{"from": "bot", "value": "x"}], [])
    empty = f'{path}:5: "conversations" is empty. Give it at least one turn, or remove the record'
    with pytest.raises(DataError) as caught:
        load_examples(path, encoder)
    assert str(caught.value) == f"{path}: 2 faults:\n  1. {robot}\n  2. {empty}"
    assert capsys.readouterr().err == ""


def test_a_conversation_without_an_answer_is_for_the_originals_mask_only(
    tmp_path: Path, tokenizer: QWenTokenizer
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"from": "user", "value": "Hi"}])
    assert len(load_examples(path, Encoder(tokenizer, QWEN_V1, ORIGINAL), show_progress=False)) == 1
    with pytest.raises(DataError, match=r"^.*:1: no turn is from the assistant, so there is nothing to learn\."):
        load_examples(path, Encoder(tokenizer, QWEN_V1, EncodeOptions()), show_progress=False)


def test_progress_bar(tmp_path: Path, tokenizer: QWenTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, SHORT)
    encoder = Encoder(tokenizer, QWEN_V1, EncodeOptions())
    load_examples(path, encoder, show_progress=False)
    assert capsys.readouterr().err == ""
    load_examples(path, encoder)
    bar = capsys.readouterr().err
    assert "Tokenising chats.jsonl: 100%" in bar
    assert "2/2" in bar


def test_works_as_a_torch_dataset(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, TWICE)
    examples = load_examples(path, Encoder(tokenizer, QWEN_V1, EncodeOptions()), show_progress=False)
    [batch] = DataLoader(examples, batch_size=2, collate_fn=Collator(tokenizer.pad_token_id))  # type: ignore[arg-type]
    assert batch["input_ids"].shape == (2, SYSTEM + 2 * (HI + HELLO))
    assert batch["attention_mask"].sum(dim=1).tolist() == examples.lengths
    trained = [row.nonzero().flatten().tolist() for row in batch["labels"] != -100]
    assert trained == [[*range(21, 27)], [*range(21, 27), *range(37, 43)]]


def test_real_conversations(shared: Path, tokenizer: QWenTokenizer) -> None:
    path = shared / "corpora" / "fastchat_dummy_conversation.json"
    examples = load_examples(path, Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=256)), show_progress=False)
    assert examples.report.read == 500
    assert examples.report.kept + len(examples.report.skipped) == 500
    for index, example in enumerate(examples):
        last = [label for label in example["labels"] if label != -100][-2:]
        assert last == [tokenizer.im_end_id, 198], examples.where(index)
        assert len(example["input_ids"]) == len(example["labels"]) <= 256
