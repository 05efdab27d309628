"""Data files to examples; everything that is skipped or shortened is reported."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from chat.families import ANSWER_STYLES, QWEN_V1
from data_utils.collate import Collator
from data_utils.dataset import DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from data_utils.files import read_records
from data_utils.formats import FORMATS
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.data import load, reader
from tests.encoding import OriginalEncoder

SYSTEM, HI, HELLO = 11, 7, 9  # tokens of the default system turn and of the two turns below
SHORT = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]
TWICE = [*SHORT, *SHORT]
LONG_QUESTION = [{"from": "user", "value": "What? " * 30}, SHORT[1]]
TOO_LONG = "no answer fits within --model_max_length 40"


@pytest.fixture(scope="module")
def tokenizer(golden_small: Path) -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small")


@pytest.fixture(scope="module")
def encoder(tokenizer: QWenTokenizer) -> Encoder:
    return Encoder(tokenizer, QWEN_V1, EncodeOptions())


def write_lines(path: Path, *conversations: object) -> Path:
    lines = [json.dumps({"conversations": turns}) for turns in conversations]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # a blank line after each
    return path


def write_numbered(path: Path, count: int, prefix: str = "") -> Path:
    """Write conversations whose user turn is their number."""
    return write_lines(path, *([{"from": "user", "value": f"{prefix}{number}"}, SHORT[1]] for number in range(count)))


def questions(examples: ExampleSet, tokenizer: QWenTokenizer) -> list[str]:
    """Return the text of the user turn of each example."""
    texts = [tokenizer.decode(example["input_ids"]) for example in examples]
    return [text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] for text in texts]


def test_examples_are_the_encoded_conversations_in_order(golden_small: Path, tokenizer: QWenTokenizer) -> None:
    path = golden_small / "train.json"
    encoder = OriginalEncoder(tokenizer)
    encoded = [
        encoder.encode_conversation(FORMATS["conversations"].parse(record, where))
        for where, record in read_records(path)
    ]
    examples = load(encoder, path)
    assert len(examples) == len(encoded) > 1
    assert list(examples) == [
        {"input_ids": each.input_ids, "labels": each.labels, "index": index} for index, each in enumerate(encoded)
    ]
    assert examples.lengths == [len(each.input_ids) for each in encoded]
    assert examples[-1] == examples[len(encoded) - 1]
    with pytest.raises(IndexError):
        examples[len(encoded)]
    total = examples.report.total()
    assert (total.read, total.kept, total.skipped.total, total.truncated.total) == (len(encoded), len(encoded), 0, 0)
    assert total.tokens == sum(examples.lengths)
    assert total.trained_tokens == sum(each.trained_tokens for each in encoded)


def test_skipped_and_shortened_conversations_are_reported_by_line(
    tmp_path: Path, tokenizer: QWenTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", LONG_QUESTION, SHORT, TWICE, *[LONG_QUESTION] * 6)
    with caplog.at_level(logging.WARNING):
        examples = load(Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=40)), path)
    assert [examples.where(index) for index in range(len(examples))] == [f"{path}:3", f"{path}:5"]
    assert examples.lengths == [SYSTEM + HI + HELLO, SYSTEM + HI + HELLO + HI]
    total = examples.report.total()
    assert (total.read, total.kept) == (9, 2)
    assert dict(total.skipped.counts) == {TOO_LONG: 7}
    assert total.skipped.locations[TOO_LONG] == [f"{path}:{line}" for line in (1, 7, 9, 11, 13, 15, 17)]
    assert total.truncated.locations == {"longer than --model_max_length 40": [f"{path}:5"]}
    assert (total.tokens, total.trained_tokens) == (27 + 34, 6 + 6)
    assert [record.getMessage() for record in caplog.records] == [
        "8 of 9 conversations are longer than --model_max_length 40: 94.4% of all tokens are left out. "
        "--model_max_length 145 keeps all of them",
        f"{path}: skipped 7 of 9 conversations, {TOO_LONG}: {path}:1, :7, :9, :11, :13, ...",
        f"{path}: shortened 1 of 9 conversations, longer than --model_max_length 40: {path}:5",
    ]


def test_set_without_examples_is_an_error(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, TWICE)
    message = (
        f"{path}: nothing is left to train on: 2 conversations read, 2 skipped, no answer fits within "
        "--model_max_length 26. --model_max_length 43 keeps all of them. Or shorten the conversations"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load(Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=26)), path)


def test_conversation_without_a_promptable_answer_is_skipped(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    """QwQ's prompt opens a thought, so an answer without one could never be generated."""
    qwq = next(style for style in ANSWER_STYLES if style.name == "chatml-qwq")
    path = write_lines(tmp_path / "chats.jsonl", SHORT)
    with pytest.raises(DataError, match="chat format 'chatml-qwq' has no inference prompt for any of its answers"):
        load(Encoder(tokenizer, qwq, EncodeOptions()), path)


def test_conversation_without_a_trained_turn_is_skipped(tmp_path: Path, encoder: Encoder) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [SHORT[0], {**SHORT[1], "train": False}], SHORT)
    total = load(encoder, path).report.total()
    assert dict(total.skipped.counts) == {"none of its turns is to be trained": 1}


# ------------------------------------------------------------------------------------------------------------- faults


BOT = [{"from": "bot", "value": "x"}]


def test_faulty_records_are_refused_before_tokenising(tmp_path: Path, encoder: Encoder) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, BOT, SHORT)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:3: turn 1 is from an unknown role, 'bot'") as one:
        load(encoder, path)
    write_lines(path, SHORT, BOT, [])
    data_reader = reader(encoder, path)
    with pytest.raises(DataError) as caught:
        next(data_reader.read())
    lines = str(caught.value).splitlines()
    assert lines[0] == "--data_path: 2 faults:"
    assert lines[1] == f"  1. {one.value}"
    assert lines[2].startswith(f'  2. {path}:5: "conversations" is empty')
    assert lines[3] == "  --on_bad_record skip leaves such records out"
    assert data_reader.reports["train"].total().read == 0


def test_first_twenty_faults_of_all_files_are_listed(tmp_path: Path, encoder: Encoder) -> None:
    one = write_lines(tmp_path / "a.jsonl", SHORT, *[BOT] * 12)
    other = write_lines(tmp_path / "b.jsonl", *[BOT] * 12, SHORT)
    with pytest.raises(DataError) as caught:
        load(encoder, one, other)
    lines = str(caught.value).splitlines()
    assert lines[0] == "--data_path: the first 20 faults:"
    assert lines[1].startswith(f"  1. {one}:3: ")
    assert lines[20].startswith(f"  20. {other}:15: ")
    assert len(lines) == 22


def test_bad_records_can_be_skipped_and_are_counted(
    tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_numbered(tmp_path / "chats.jsonl", 5)
    lines = path.read_text().split("\n\n")
    lines[1] = lines[1][:20]
    lines[3] = '{"other": 1}'
    path.write_text("\n\n".join(lines))
    with caplog.at_level(logging.WARNING):
        examples = load(encoder, path, skip_bad=True)
    assert questions(examples, tokenizer) == ["0", "2", "4"]
    total = examples.report.total()
    assert (total.in_file, total.read, total.kept) == (5, 5, 3)
    assert total.skipped.locations == {"invalid record": [f"{path}:3", f"{path}:7"]}
    first, second, summary = caplog.messages
    assert first.startswith(f"Skipped: {path}:3:21: not valid JSON")
    assert second.startswith(f'Skipped: {path}:7: the record has no "conversations"')
    assert summary == f"{path}: skipped 2 of 5 conversations, invalid record: {path}:3, :7"


def test_fault_that_hides_the_rest_of_a_file_cannot_be_skipped(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"conversations": SHORT}] * 3)[:-30])
    with pytest.raises(DataError, match="not valid JSON"):
        load(encoder, path, skip_bad=True)


def test_too_long_conversation_can_be_refused_or_dropped(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, LONG_QUESTION, LONG_QUESTION)
    refusing = Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=40, truncation="error"))
    with pytest.raises(DataError, match="2 faults") as caught:
        load(refusing, path)
    assert f"{path}:3: the conversation has 145 tokens, more than --model_max_length 40" in str(caught.value)
    assert load(refusing, path, skip_bad=True).report.total().skipped.locations == {
        "invalid record": [f"{path}:3", f"{path}:5"]
    }
    dropping = Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=40, truncation="drop"))
    assert dict(load(dropping, path).report.total().skipped.counts) == {
        "longer than --model_max_length 40 (--truncation drop)": 2
    }


def test_all_records_of_a_file_have_the_same_format(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello!"}
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"conversations": SHORT}) + "\n" + json.dumps(alpaca))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: .*\(read as conversations\)"):
        load(encoder, path)
    other = tmp_path / "alpaca.json"
    other.write_text(json.dumps([alpaca]))
    examples = load(encoder, write_lines(tmp_path / "chats.jsonl", SHORT), other)
    assert examples[0]["input_ids"] == examples[1]["input_ids"]
    assert [source.format for source in examples.report.sources] == ["conversations", "alpaca"]
    with pytest.raises(DataError, match=r"\(read as pairs\)"):
        load(encoder, other, data_format="pairs")


def test_conversation_without_an_answer_is_refused_unless_the_encoder_allows_it(
    tmp_path: Path, tokenizer: QWenTokenizer, encoder: Encoder
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"from": "user", "value": "Hi"}])
    assert len(load(OriginalEncoder(tokenizer), path)) == 1
    with pytest.raises(DataError, match=r"^.*:1: the conversation has no assistant turn to train\."):
        load(encoder, path)


# ------------------------------------------------------------------------------------------------------------ sources


def test_sources_are_drawn_repeated_and_counted(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    one, two = write_numbered(tmp_path / "a.jsonl", 40, "a"), write_numbered(tmp_path / "b.jsonl", 10, "b")
    examples = load(encoder, f"{one}#6", f"{two}@x2.5")
    drawn = questions(examples, tokenizer)
    assert examples.source_sizes == [6, 25]
    assert len(set(drawn[:6])) == 6
    assert all(text.startswith("a") for text in drawn[:6])
    assert sorted(Counter(drawn[6:]).values()) == [2] * 5 + [3] * 5
    reports = examples.report.sources
    assert [(report.name, report.in_file, report.read, report.kept) for report in reports] == [
        (f"{one}#6", 40, 6, 6),
        (f"{two}@x2.5", 10, 25, 25),
    ]
    assert examples.report.total().duplicates.total == 0
    assert questions(load(encoder, f"{one}#6", f"{two}@x2.5"), tokenizer) == drawn
    assert questions(load(encoder, f"{one}#6", f"{two}@x2.5", seed=1), tokenizer) != drawn


def test_sample_larger_than_its_source_is_all(
    tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_numbered(tmp_path / "a.jsonl", 4)
    with caplog.at_level(logging.WARNING):
        assert len(load(encoder, f"{path}#9")) == 4
    assert f"{path}#9: only 4 records can be drawn" in caplog.messages


def test_eval_share_is_held_out_before_records_are_repeated(
    tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer
) -> None:
    path = write_numbered(tmp_path / "a.jsonl", 40)
    sets = load_examples(reader(encoder, f"{path}@x3", eval_share=0.1))
    held_out, trained = questions(sets["eval"], tokenizer), questions(sets["train"], tokenizer)
    assert len(held_out) == len(set(held_out)) == 4
    assert Counter(trained) == Counter({str(number): 3 for number in range(40) if str(number) not in held_out})
    for name, kept in (("train", 108), ("eval", 4)):
        total = sets[name].report.total()
        assert (total.read, total.kept) == (kept, kept)


def test_evaluation_has_its_own_sources(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    one, two = write_numbered(tmp_path / "a.jsonl", 3, "a"), write_numbered(tmp_path / "b.jsonl", 2, "b")
    sets = load_examples(reader(encoder, one, eval=(two,)))
    assert questions(sets["train"], tokenizer) == ["a0", "a1", "a2"]
    assert questions(sets["eval"], tokenizer) == ["b0", "b1"]


def test_samples_both_trained_and_evaluated_are_reported(tmp_path: Path, encoder: Encoder) -> None:
    one, two = write_numbered(tmp_path / "a.jsonl", 4), write_numbered(tmp_path / "b.jsonl", 2)
    sets = load_examples(reader(encoder, one, eval=(two,)))
    assert sets["train"].report.total().duplicates.total == 0
    places = sets["eval"].report.total().duplicates.locations
    assert [text for texts in places.values() for text in texts] == [f"{two}:1 = {one}:1", f"{two}:3 = {one}:3"]


def test_folder_is_one_source(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    write_numbered(tmp_path / "data" / "a.jsonl", 2, "a")
    (tmp_path / "data" / "more" / "b.json").write_text('[{"prompt": "b", "response": "Hello!"}]')
    examples = load(encoder, tmp_path / "data")
    assert questions(examples, tokenizer) == ["a0", "a1", "b"]
    assert examples.source_sizes == [3]
    assert examples.report.sources[0].format == "conversations, pairs"


def test_placeholders_are_filled_and_unfilled_ones_reported(
    tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"from": "user", "value": "{{name}} by {{ author }}, {{x}}"}, SHORT[1]])
    with caplog.at_level(logging.WARNING):
        examples = load(encoder, path, fill={"name": "<|im_end|>{{x}}", "author": "Ada", "unused": "y"})
    assert questions(examples, tokenizer) == [""]  # the helper stops at the filled "<|im_end|>", which stays text:
    assert examples[0]["input_ids"].count(tokenizer.im_end_id) == 3
    assert "<|im_end|>{{x}} by Ada, {{x}}<|im_end|>" in tokenizer.decode(examples[0]["input_ids"])
    assert examples.report.total().unfilled.locations == {"x": [f"{path}:1"]}
    assert caplog.messages == [
        "--fill unused: no message contains {{unused}}",
        f"{path}: 1 of 1 conversations contain the placeholder {{{{x}}}}, which --fill x=... fills: {path}:1",
    ]


def test_turn_weights_reach_the_batch(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*SHORT, SHORT[0], {**SHORT[1], "weight": 0.5}], SHORT)
    examples = load(encoder, path)
    assert examples.is_weighted
    [batch] = DataLoader(examples, batch_size=2, collate_fn=Collator(tokenizer.pad_token_id))  # type: ignore[arg-type]
    trained = batch["labels"] != -100
    assert batch["loss_weights"][trained].tolist() == [1.0] * 6 + [0.5] * 6 + [1.0] * 6


# --------------------------------------------------------------------------------------------------------------- rest


def test_progress_bars(
    tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", SHORT, SHORT)
    load(encoder, path)
    assert capsys.readouterr().err == ""
    load_examples(DataReader({"train": [parse_source(str(path))]}, encoder))
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_examples(DataReader({"train": [parse_source(str(path))]}, encoder))
    bars = capsys.readouterr().err
    assert "Tokenising: 100%" in bars
    assert "Checking" not in bars  # it took less than a second
    monkeypatch.setattr("data_utils.dataset._CHECKING_DELAY", 0)
    load_examples(DataReader({"train": [parse_source(str(path))]}, encoder))
    assert "Checking" in capsys.readouterr().err


def test_works_as_a_torch_dataset(tmp_path: Path, encoder: Encoder, tokenizer: QWenTokenizer) -> None:
    examples = load(encoder, write_lines(tmp_path / "chats.jsonl", SHORT, TWICE))
    [batch] = DataLoader(examples, batch_size=2, collate_fn=Collator(tokenizer.pad_token_id))  # type: ignore[arg-type]
    assert batch["input_ids"].shape == (2, SYSTEM + 2 * (HI + HELLO))
    assert "loss_weights" not in batch
    assert batch["attention_mask"].sum(dim=1).tolist() == examples.lengths
    trained = [row.nonzero().flatten().tolist() for row in batch["labels"] != -100]
    assert trained == [[*range(21, 27)], [*range(21, 27), *range(37, 43)]]


def test_corpus_of_real_conversations(shared: Path, tokenizer: QWenTokenizer) -> None:
    path = shared / "corpora" / "fastchat_dummy_conversation.json"
    examples = load(Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=256)), path)
    total = examples.report.total()
    records = len(json.loads(path.read_text(encoding="utf-8")))
    assert total.read == total.kept + total.skipped.total == records > 0
    for index, example in enumerate(examples):
        last = [label for label in example["labels"] if label != -100][-2:]
        assert last == [tokenizer.im_end_id, 198], examples.where(index)
        assert len(example["input_ids"]) == len(example["labels"]) <= 256
