"""python -m scripts.convert_data: keeps everything that the target can store, and logs what it cannot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from chat.turns import ToolCall, Turn
from data_utils.files import read_records
from data_utils.formats import recognise
from data_utils.schema import Conversation
from scripts.convert_data import main
from tests.commands import limited_file_size, names_in, read_json, run_here, run_well
from tests.records import ANSWER, ARGUMENTS, ASK, EVERY_FORMAT, HELLO, HI, TOOL, called, openai_call, result, two_calls

TARGETS = ["messages", "conversations"]


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path) -> list[Conversation]:
    """Return the conversations of a file, all in the format of the first, without locations."""
    records = [record for _, record in read_records(path)]
    format_ = recognise(records[0], path.name)
    return [format_.parse(record, "") for record in records]


def with_text(conversations: list[Conversation]) -> list[Conversation]:
    """Encode the arguments of calls as text, because formats differ in whether they are text or a value."""
    return [
        Conversation(
            tuple(
                turn._replace(calls=tuple(ToolCall(call.name, call.arguments_text) for call in turn.calls))
                for turn in conversation.turns
            ),
            "",
            conversation.tools,
        )
        for conversation in conversations
    ]


def convert(*arguments: object) -> None:
    assert run_here(main, "scripts.convert_data", arguments) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert run_here(main, "scripts.convert_data", arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("scripts.convert_data: error: ").rstrip("\n")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# -------------------------------------------------------------------------------------------------------------- kept


def has_calls(conversations: list[Conversation]) -> bool:
    return any(turn.calls for conversation in conversations for turn in conversation.turns)


def real_files(shared: Path) -> list[Path]:
    paths = sorted((shared / "corpora").glob("*.json"))
    assert paths
    return paths


@pytest.mark.parametrize("target", TARGETS)
def test_round_trip_of_real_files(tmp_path: Path, shared: Path, caplog: pytest.LogCaptureFixture, target: str) -> None:
    converted_path, back, again = tmp_path / "converted.jsonl.gz", tmp_path / "back.json", tmp_path / "again.jsonl"
    other = next(other for other in TARGETS if other != target)
    for source in real_files(shared):
        caplog.clear()
        convert(source, converted_path, "--to", target, "--overwrite")
        convert(converted_path, back, "--to", other, "--overwrite")
        convert(back, again, "--to", target, "--overwrite")
        assert converted_path.read_bytes()[:2] == b"\x1f\x8b"
        original, converted = load(source), load(converted_path)
        assert with_text(original) == with_text(converted) == with_text(load(back)), source.name
        assert converted == load(again), source.name
        assert gzip.decompress(converted_path.read_bytes()) == again.read_bytes(), source.name
        # `conversations` has no ids of calls, which is the only difference to `messages`.
        expected = {"ids of calls are not kept"} if has_calls(original) else set()
        assert {message.partition(":")[0] for message in warnings(caplog)} <= expected, source.name


def test_round_trip_of_real_files_with_calls_is_exact(tmp_path: Path, shared: Path) -> None:
    originals = {path: load(path) for path in real_files(shared)}
    with_calls = [path for path, conversations in originals.items() if has_calls(conversations)]
    assert with_calls
    for source in with_calls:
        convert(source, tmp_path / "there.json", "--to", "messages", "--overwrite")
        convert(tmp_path / "there.json", tmp_path / "back.json", "--to", "conversations", "--overwrite")
        assert load(tmp_path / "back.json") == originals[source], source.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".JSONL.GZ"])
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_to_every_ending(tmp_path: Path, name: str, ending: str, target: str) -> None:
    records = [{"id": number, **EVERY_FORMAT[name], "tag": None} for number in range(3)]
    source, output = write_records(tmp_path / "in.jsonl", *records), tmp_path / f"out{ending}"
    convert(source, output, "--to", target)
    assert load(output) == load(source)
    written: list[Any] = [record for _, record in read_records(output)]
    turns = EVERY_FORMAT[target][target]
    assert written == [{"id": number, "tag": None, target: turns} for number in range(3)]
    assert names_in(tmp_path) == ["in.jsonl", output.name]


def test_messages_are_the_default_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_records(tmp_path / "in.jsonl", EVERY_FORMAT["alpaca"])
    convert(source, tmp_path / "out.json")
    assert capsys.readouterr().out.startswith(f"1 conversation as messages: {tmp_path}/out.json\nnext: ")
    assert (tmp_path / "out.json").read_text() == "[\n" + json.dumps(EVERY_FORMAT["messages"]) + "\n]\n"


FULL: dict[str, Any] = {
    "id": "ü\u2028",
    "conversations": [
        {**HI, "train": False},
        called({"name": "f", "arguments": ARGUMENTS}, {"name": "g", "arguments": []}, weight=0.25),
        {"from": "tool", "value": "\0"},
        {"from": "tool", "value": "", "loss": True},
        HELLO,
    ],
    "system": "Be brief.",
    "tools": json.dumps([TOOL]),
    "meta": {"b": [1e-07, 1.0, None], "a": 12345678901234567890123},
}


@pytest.mark.parametrize("target", TARGETS)
def test_everything_in_a_record_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str) -> None:
    convert(write_records(tmp_path / "in.jsonl", FULL), tmp_path / "out.jsonl", "--to", target)
    convert(tmp_path / "out.jsonl", tmp_path / "back.jsonl", "--to", "conversations")
    [conversation] = load(tmp_path / "back.jsonl")
    assert conversation.turns == (
        Turn("system", "Be brief."),
        Turn("user", "Hi", (), 0.0),
        Turn("assistant", "", (ToolCall("f", ARGUMENTS), ToolCall("g", [])), 0.25),
        Turn("tool", "\0"),
        Turn("tool", "", (), 1.0),
        Turn("assistant", "Hello!"),
    )
    assert conversation.turns[2].calls[0].arguments_text == json.dumps(ARGUMENTS, ensure_ascii=False)
    assert conversation.tools == (TOOL,)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert {name: record[name] for name in ("id", "meta")} == {name: FULL[name] for name in ("id", "meta")}
    assert json.dumps(record["meta"]) == json.dumps(FULL["meta"])
    assert warnings(caplog) == (
        [] if target == "conversations" else [f"ids of calls are not kept: 1 record, {tmp_path}/out.jsonl:1"]
    )


def test_lone_surrogates_are_written_as_escapes(tmp_path: Path) -> None:
    record = {"id": "é", "prompt": "\ud800", "response": "é\udfff"}
    convert(write_records(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl")
    assert load(tmp_path / "out.jsonl")[0].turns == (Turn("user", "\ud800"), Turn("assistant", "é\udfff"))
    assert r"\ud800" in (tmp_path / "out.jsonl").read_text("ascii")


def test_folder_of_several_formats(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, record in EVERY_FORMAT.items():
        write_records(folder / f"{name}.jsonl", record, {**record, "id": name})
    convert(folder, tmp_path / "out.jsonl")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record.get("id") for record in records] == [
        None, "alpaca", None, "conversations", None, "messages", None, "pairs",
    ]  # fmt: skip
    assert all(record["messages"] == [ASK, ANSWER] for record in records)


def test_parquet_table(tmp_path: Path) -> None:
    rows = [
        {"messages": [{**ASK, "weight": None}, {**ANSWER, "weight": 0.5}], "score": float("nan"), "raw": b"x"},
        {"messages": [ASK, ANSWER], "score": 1.0, "raw": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    convert(tmp_path / "in.parquet", tmp_path / "out.json")
    assert read_json(tmp_path / "out.json") == [
        {"messages": [ASK, {**ANSWER, "weight": 0.5}]},
        {"score": 1.0, "messages": [ASK, ANSWER]},
    ]


# ------------------------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize(
    ("record", "target", "kinds"),
    [
        ({**FULL, "messages": None}, "messages", []),
        ({**EVERY_FORMAT["pairs"], "messages": "x", "label": "y"}, "messages", ["the field 'messages' is not kept"]),
        ({**EVERY_FORMAT["alpaca"], "conversations": 3}, "messages", ["the field 'conversations' is not kept"]),
        (
            {"conversations": [{**HI, "id": 3, "time": None, "x": []}, {**HELLO, "id": 0}]},
            "conversations",
            ["the field 'id' of turns is not kept"],
        ),
        (
            {"conversations": [called({"name": "f", "thought": "hm", "arguments": {"thought": 1}})]},
            "messages",
            ["the field 'thought' of turns is not kept"],
        ),
        (
            {"conversations": [called({"name": "f", "arguments": '{"a": 1}'})]},
            "conversations",
            ["arguments that are a JSON string are read as encoded arguments"],
        ),
        ({"conversations": [called({"name": "f", "arguments": "[1,2]"})]}, "conversations", []),
        (
            {"conversations": [called({"name": "f", "arguments": "[1,2]"})]},
            "messages",
            ["arguments that are a JSON string are read as encoded arguments"],
        ),
        (
            {"messages": [{**ASK, "name": "Ann", "content": [{"type": "text", "text": "Hi", "cache": 1}]}, ANSWER]},
            "messages",
            ["the field 'content.cache' of turns is not kept", "the field 'name' of turns is not kept"],
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{**openai_call("f", "{}", "x"), "index": 0}]}, result("", "x")]},
            "conversations",
            [
                "ids of calls are not kept",
                "the field 'tool_calls.index' of turns is not kept",
                "the text of a turn with calls becomes a separate turn",
            ],
        ),
        (two_calls(result("B", "2"), result("A", "1")), "messages", ["ids of calls are replaced by numbers"]),
        ({"messages": [{**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}]}, "messages", []),
        (
            {"messages": [ASK, ANSWER], "tools": [{**TOOL, "strict": None}]},
            "messages",
            ["null fields in tools or arguments are not kept"],
        ),
        (
            {"prompt": [{**ASK, "name": "Ann"}], "completion": [ANSWER]},
            "conversations",
            ["the field 'name' of turns is not kept"],
        ),
    ],
)
def test_changes_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record: dict[str, Any], target: str, kinds: list[str]
) -> None:
    source = write_records(tmp_path / "in.jsonl", record)
    convert(source, tmp_path / "out.jsonl", "--to", target)
    assert sorted(warnings(caplog)) == [f"{kind}: 1 record, {source}:1" for kind in kinds]


def test_text_of_a_turn_with_calls_becomes_a_separate_turn(tmp_path: Path) -> None:
    record = {"messages": [ASK, {**ANSWER, "tool_calls": [openai_call("f", "{}")], "train": True}]}
    convert(write_records(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl", "--to", "conversations")
    assert load(tmp_path / "out.jsonl")[0].turns == (
        Turn("user", "Hi"),
        Turn("assistant", "Hello!", (), 1.0),
        Turn("assistant", "", (ToolCall("f", {}),), 1.0),
    )


def test_changes_are_counted_with_their_first_locations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{**EVERY_FORMAT["pairs"], "messages": number} for number in range(7)]
    source = write_records(tmp_path / "in.jsonl", EVERY_FORMAT["pairs"], *records)
    convert(source, tmp_path / "out.jsonl")
    locations = ", ".join(f"{source}:{line}" for line in range(2, 7))
    assert warnings(caplog) == [f"the field 'messages' is not kept: 7 records, {locations}, ..."]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_nothing_is_written_if_a_record_is_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_records(tmp_path / "in.jsonl", EVERY_FORMAT["pairs"], {"prompt": 1, "response": ""})
    output = tmp_path / "out.jsonl"
    assert refusal(capsys, source, output) == (
        f'{source}:2: "prompt" must be a string, not 1 (read as pairs). '
        'Write the text as a string; a list of turns belongs in "messages"'
    )
    with source.open("a") as file:
        file.write('{"prompt": \n' + json.dumps(EVERY_FORMAT["alpaca"]) + "\n")
    first, *others = refusal(capsys, source, output).splitlines()
    assert first == f"{source}: 3 faults, nothing is written:"
    starts = [f"  1. {source}:2: ", f"  2. {source}:3:", f"  3. {source}:4: "]
    assert [line[: len(start)] for line, start in zip(others, starts, strict=True)] == starts
    assert names_in(tmp_path) == ["in.jsonl"]


def test_first_20_faults_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_records(folder / "a.jsonl", EVERY_FORMAT["pairs"], *range(15))
    for number in range(10):  # without a known format
        write_records(folder / f"b{number}.jsonl", {"body": "a"}, {"body": "b"})
    first, *others = refusal(capsys, folder, tmp_path / "out.jsonl").splitlines()
    assert first == "11 files: the first 20 faults, nothing is written:" and len(others) == 20
    assert others[14].startswith(f"  15. {folder}/a.jsonl:16: a record must be an object, not 14 (read as pairs).")
    assert others[15].startswith(f"  16. {folder}/b0.jsonl:1: the record has no known format: {{'body': 'a'}}. Looked")
    assert others[16].startswith(f"  17. {folder}/b1.jsonl:1: ")


def test_format_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {**EVERY_FORMAT["pairs"], "instruction": "Add.", "output": "3"}
    source = write_records(tmp_path / "in.jsonl", record)
    convert(source, tmp_path / "auto.jsonl")
    convert(source, tmp_path / "pairs.jsonl", "--data_format", "pairs")
    assert load(tmp_path / "auto.jsonl")[0].turns[0] == Turn("user", "Add.")
    assert load(tmp_path / "pairs.jsonl")[0].turns[0] == Turn("user", "Hi")
    capsys.readouterr()
    message = refusal(capsys, source, tmp_path / "x.jsonl", "--data_format", "messages")
    assert message.startswith(f'{source}:1: the record has no "messages", its fields are [')


def test_refused_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_records(folder / "in.jsonl", EVERY_FORMAT["pairs"])
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "same.jsonl").hardlink_to(source)
    there = write_records(tmp_path / "there.jsonl", 1)

    def message(output: Path, *flags: str, source: Path = source) -> str:
        return refusal(capsys, source, output, *flags).splitlines()[-1]

    endings = ".json, .jsonl, .json.gz, .jsonl.gz"
    assert (
        message(tmp_path / "x.csv") == f"OUT {tmp_path}/x.csv has another ending than {endings}. Give it one of these"
    )
    assert (
        message(tmp_path / "no" / "x.json")
        == f"OUT {tmp_path}/no/x.json: there is no folder {tmp_path}/no. Create it first, or name another one"
    )
    assert message(there) == f"OUT {there} exists. Give another name, or --overwrite to replace it"
    assert message(source, "--overwrite") == f"OUT {source} is the file of IN. Give another name"
    assert message(source, "--overwrite", source=folder) == (
        f"OUT {source} is inside the folder of IN. Give a name outside of it"
    )
    assert message(tmp_path / "link.jsonl", "--overwrite").endswith(
        "/link.jsonl is a symbolic link. Give the name of a file"
    )
    assert "/same.jsonl is the file of IN" in message(tmp_path / "same.jsonl", "--overwrite")
    assert message(folder / "x.jsonl", source=folder) == (
        f"OUT {folder}/x.jsonl is inside the folder of IN. Give a name outside of it"
    )
    (tmp_path / "folder.json").mkdir()
    assert message(tmp_path / "folder.json") == f"OUT {tmp_path}/folder.json is a folder. Give the name of a file"
    assert message(tmp_path / "x.jsonl", source=tmp_path / "none.json") == (
        f"{tmp_path}/none.json: no such file. Check the path"
    )
    assert "--to" in message(tmp_path / "x.jsonl", "--to", "alpaca")
    assert source.read_bytes() == before and there.read_text() == "1\n"
    assert names_in(tmp_path) == ["folder.json", "in", "link.jsonl", "same.jsonl", "there.jsonl"] and names_in(
        folder
    ) == ["in.jsonl"]


def test_overwriting_replaces_the_file_only_by_a_complete_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_records(tmp_path / "in.jsonl", *[EVERY_FORMAT["pairs"]] * 1000)
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    with limited_file_size(20_000):
        assert "cannot write" in refusal(capsys, source, output, "--overwrite", code=1)
    assert output.read_text() == "old" and names_in(tmp_path) == ["in.jsonl", "out.jsonl"]
    convert(source, output, "--overwrite")
    assert len(load(output)) == 1000 and names_in(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_command(tmp_path: Path) -> None:
    source = write_records(tmp_path / "in.jsonl", EVERY_FORMAT["alpaca"], {**EVERY_FORMAT["alpaca"], "messages": "x"})
    result = run_well("-m", "scripts.convert_data", source, tmp_path / "out.jsonl.gz", "--to", "conversations")
    assert result.stdout.startswith(f"2 conversations as conversations: {tmp_path}/out.jsonl.gz\nnext: ")
    assert result.stderr == f"WARNING: the field 'messages' is not kept: 1 record, {source}:2\n"
    assert (
        gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()
        == [json.dumps(EVERY_FORMAT["conversations"]).encode()] * 2
    )
