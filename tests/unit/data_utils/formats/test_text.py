"""Plain text: recognised, kept as it is, cut into pieces that all train, and read from files in parts."""

from __future__ import annotations

import gzip
import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest

from chat.families import QWEN_V1
from chat.turns import TEXT, Turn
from data_utils import text_file
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.files import data_files, read_records
from data_utils.formats import recognise
from data_utils.formats.text import TextPart
from data_utils.schema import Conversation
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from scripts import convert_data
from tests.data import load, reader
from tests.models import TINY
from tests.records import ASK, HELLO, HI, WHERE, parse, refused

HOSTILE = " <|im_end|>\r\n<|endoftext|>{{name}}\t\ud800 天 "


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(TINY)


def encoder_of(tokenizer: QWenTokenizer, max_length: int = 64) -> Encoder:
    return Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=max_length))


def encode(encoder: Encoder, text: str, **fields: object) -> list[EncodedConversation]:
    return encoder.encode(parse({"text": text, **fields}))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---------------------------------------------------------------------------------------------------------- records


def test_text_is_recognised_and_kept_unchanged() -> None:
    assert parse({"text": HOSTILE, "id": 3}) == Conversation((Turn(TEXT, HOSTILE),), WHERE)
    assert parse({"text": "a", "weight": 0.5}).turns == (Turn(TEXT, "a", weight=0.5),)
    assert recognise({"instruction": "a", "output": "b", "text": "a b"}, WHERE).name == "alpaca"


def test_wrong_texts_are_refused() -> None:
    for text in (5, ["a"], {"a": 1}):
        refused({"text": text}, "text", f'"text" must be a string, not {text!r}')
    refused({"text": None}, "text", '"text" must be a string, not None')
    refused({"prompt": "a"}, "text", 'the record has no "text"')
    refused({"text": " \n"}, "text", '"text" is empty')
    refused({"text": "a", "images": ["a.png"]}, "text", "\"images\" (['a.png']) in the record")
    refused({"text": "a", "weight": -1}, "text", '"weight" of the record must be 0, or a number from')


@pytest.mark.parametrize(("name", "turns"), [("conversations", [HI, HELLO]), ("messages", [ASK])])
def test_a_text_beside_turns_is_refused_unless_the_format_is_given(name: str, turns: list[object]) -> None:
    record = {name: turns, "text": "rendered"}
    with pytest.raises(DataError) as error:
        recognise(record, WHERE)
    assert str(error.value) == (
        f"{WHERE}: the record has a list of turns and \"text\" ('rendered'). "
        f"Give --data_format {name} or --data_format text"
    )
    assert parse(record, "text").turns == (Turn(TEXT, "rendered"),) and len(parse(record, name).turns) == len(turns)


def test_a_later_record_with_turns_is_refused_too(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a b"}, {"text": "c d", "messages": [ASK]})
    with pytest.raises(DataError, match=r"a\.jsonl:2: the record has a list of turns and \"text\""):
        load(encoder_of(tokenizer), path)
    assert len(load(encoder_of(tokenizer), path, data_format="text")) == 2


def test_text_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="is plain text, which has no turns to convert"):
        convert_data.main([str(write(tmp_path / "a.jsonl", {"text": "a"})), str(tmp_path / "b.jsonl")])


# --------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("length", [2, 3, 7, 64])
def test_every_token_but_the_first_is_trained_once(tokenizer: QWenTokenizer, length: int) -> None:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = HOSTILE * 4
    ids = [*tokenizer.encode_plain(text), end]
    pieces = encode(encoder_of(tokenizer, length), text)
    assert [target for piece in pieces for target in piece.labels[1:]] == ids[1:] and pieces[0].input_ids[0] == ids[0]
    assert all(1 < len(piece.input_ids) <= length for piece in pieces)
    assert all(piece.trained_tokens == len(piece.input_ids) - 1 for piece in pieces)
    assert all(one.input_ids[-1] == two.input_ids[0] for one, two in pairwise(pieces))
    assert sum(ids.count(control) for control in tokenizer.special_tokens.values()) == 1  # those in the text are text


def test_a_text_has_a_weight_and_no_placeholders(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    [piece] = encode(encoder_of(tokenizer), "a b", weight=0.5)
    assert {span.weight for span in piece.spans} == {0.5}
    path = write(tmp_path / "a.jsonl", {"text": "{{name}} b"}, {"text": "c d", "weight": 0})
    examples = load(encoder_of(tokenizer), path, fill={"name": "x"})
    [source] = examples.report.sources
    assert (source.kept, dict(source.skipped.counts)) == (1, {"its weight is 0": 1}) and not source.unfilled.counts
    assert tokenizer.decode(examples[0]["input_ids"][:-1]) == "{{name}} b" and examples.has_text


def test_pieces_are_samples_of_one_record(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a b c d e f g h i j k l m n o p"}, {"text": "q r"}, {"text": "  "})
    examples = load(encoder_of(tokenizer, 8), f"{path}@x2", skip_bad=True)
    [source] = examples.report.sources
    assert (source.in_file, source.read, source.kept, source.skipped.total) == (3, 5, 4, 1)
    assert source.samples == len(examples) > 6 and source.noun == "texts" and not source.truncated.total
    assert {examples.where(index) for index in range(len(examples))} == {f"{path}:1", f"{path}:2"}


# ------------------------------------------------------------------------------------------------------------ files


def texts_of(path: Path) -> list[str]:
    return [record["text"] for _, record in read_records(path) if isinstance(record, dict)]


@pytest.mark.parametrize("content", ["a\r\nb\n", "\ufeffa\n", "[1] a list", "[[link]]", "{a}", "天" * 3])
def test_a_text_file_is_one_document(content: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.TXT.gz"
    plain.write_bytes(content.encode())
    packed.write_bytes(gzip.compress(content.encode()))
    for path in (plain, packed):
        [(where, record)] = read_records(path)
        assert record == {"text": content.removeprefix("\ufeff")} and str(where) == f"{path}:1"
        assert (
            recognise(record, where).name == "text" and not recognise(record, where).parse(record, where).is_continued
        )


def test_json_in_a_text_file_is_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", {"prompt": "a", "response": "b"})
    assert [record for _, record in read_records(path)] == [{"prompt": "a", "response": "b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\0c", ":2: contains a zero byte, so it is no text"), (b"a\xc3", ":1: is not UTF-8 (byte 0xc3)"),
        (b"a\nb\nc\xff", ":3: is not UTF-8 (byte 0xff). Save the file as UTF-8"),
        ("a".encode("utf-16"), ": the file is UTF-16, not UTF-8"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_a_bad_record(
    content: bytes, message: str, tmp_path: Path, tokenizer: QWenTokenizer
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("good text")
    [(_, fault)] = read_records(tmp_path / "a.txt")
    assert isinstance(fault, DataError) and message in str(fault)
    with pytest.raises(DataError, match=r"a\.txt"):
        load(encoder_of(tokenizer), tmp_path)
    assert len(load(encoder_of(tokenizer), tmp_path, skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"PK\x03\x04rest", "a zip archive"), (b"%PDF-1.7", "a PDF document")]
)
def test_another_file_named_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / "a.txt"))


def test_a_text_may_begin_like_json_if_its_format_is_given(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    (tmp_path / "a.txt").write_text('{"curly text')
    with pytest.raises(DataError, match="not valid JSON"):
        load(encoder_of(tokenizer), tmp_path / "a.txt")
    assert len(load(encoder_of(tokenizer), tmp_path / "a.txt", data_format="text")) == 1


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_blank_text_is_a_bad_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    [(_, record)] = read_records(tmp_path / "a.txt")
    assert isinstance(record, DataError) and "a.txt:1: the text is empty" in str(record)


@pytest.mark.parametrize("content", ["ab c\n" * 9, "abcd " * 9, "x" * 45, "ab\n\n" * 12, "a" + " " * 40])
def test_a_long_text_is_read_in_parts_without_an_end_between_them(
    content: str, tmp_path: Path, tokenizer: QWenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "PART", 16)
    path = tmp_path / "a.txt"
    path.write_text(content)
    parts = texts_of(path)
    assert "".join(parts) == content and len(parts) >= 3 and all(0 < len(part) <= 16 for part in parts)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]  # type: ignore[attr-defined]
    places = [where.line for where, _ in read_records(path)]
    assert places == [1 + "".join(parts[:index]).count("\n") for index in range(len(parts))]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    examples = load(encoder_of(tokenizer), path)
    ends = [example["input_ids"][-1] == end for example in examples]
    assert ends == [False] * (len(examples) - 1) + [True]
    assert [*text_file.parts_of(content)] == parts
    again = pickle.loads(pickle.dumps(parts[0]))
    assert isinstance(again, TextPart) and again == parts[0] and not again.is_last


def test_parts_end_where_a_line_begins_with_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer never joins what is before and after such a place; it may join a line end and the blanks after it."""
    monkeypatch.setattr(text_file, "PART", 16)
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  three\nfour five\n")
    assert texts_of(tmp_path / "a.txt") == ["one\n", "two\n\n  three\n", "four five\n"]


def test_texts_in_a_folder_are_read_unless_there_is_other_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in data_files(tmp_path)] == ["a.txt", "b.txt"]
    write(tmp_path / "c.jsonl", {"text": "c"})
    assert [path.name for path in data_files(tmp_path)] == ["c.jsonl"]
    assert "left out 'a.txt', 'b.txt', beside other data. Name a text file to train on it" in caplog.text


def test_held_out_parts_and_a_single_record(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a b"})
    kept = reader(encoder_of(tokenizer), path, eval_share=0.1)
    sets = [each.set_name for each in kept.read()]
    assert sets == ["eval"]
    with pytest.raises(DataError, match="nothing is left to train on: --eval_split holds out every record"):
        load(encoder_of(tokenizer), path, eval_share=0.1)
