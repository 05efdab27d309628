"""The preview of a run: examples as a file for other programs, and what the length leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_utils.encode import EncodeOptions, Encoder
from data_utils.files import read_records
from data_utils.formats import FORMATS
from loading.checkpoint import load_checkpoint
from scripts import preview_data
from tests.commands import read_json, run_here
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_conversations
from training.config.parsing import parse_args
from training.data import load_data

LONG = [("user", "Tell me a long story."), ("assistant", "One. " * 300), ("user", "More"), ("assistant", "Two. " * 900)]


def preview(*arguments: object) -> int:
    return run_here(preview_data.main, "preview_data", ["--model_name_or_path", TINY, *arguments])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_dumped_examples_are_those_of_the_run(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "train.json")
    records = read_json(data)
    records[3]["conversations"][1]["train"] = False
    records[4]["conversations"][1]["weight"] = 0.5
    data.write_text(json.dumps(records), encoding="utf-8")
    arguments = ["--data_path", f"{data}@x2", "--eval_data_path", data, "--eval_strategy", "epoch"]
    assert preview(*arguments, "--dump", tmp_path / "all.jsonl") == 0
    rows = read_lines(tmp_path / "all.jsonl")
    args = parse_args(["--model_name_or_path", str(TINY), *map(str, arguments)])
    sets = load_data(args, args.trainer_values(), load_checkpoint(str(TINY)))  # type: ignore[arg-type]
    for name, copies in (("train", 2), ("eval", 1)):
        dumped = [row for row in rows if row["set"] == name for _ in range(copies)]
        examples = sets[name]
        assert [(row["input_ids"], row["labels"]) for row in dumped] == [
            (example["input_ids"], example["labels"]) for example in examples
        ]
        assert [row["where"] for row in dumped] == [examples.where(index) for index in range(len(examples))]
        source = f"{data}@x2" if copies == 2 else str(data)
        assert {(row["source"], row["copies"]) for row in dumped} == {(source, copies)}

    # Labels by what the file says of its pieces, and texts by what the records say.
    for row, record in zip(rows, records * 2, strict=True):
        weights = [piece["weight"] for piece in row["pieces"] for _ in range(piece["tokens"])]
        ids = row["input_ids"]
        assert row["labels"] == [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
        trained = "".join(piece["text"] for piece in row["pieces"] if piece["weight"])
        answers = [turn for turn in record["conversations"] if turn["from"] == "assistant" and turn.get("train", True)]
        assert trained == "".join(f"{turn['value']}<|im_end|>\n" for turn in answers)
    assert {piece["weight"] for piece in rows[4]["pieces"]} == {0, 0.5}

    assert preview(*arguments, "--dump", tmp_path / "two.jsonl", "--most", 2) == 0
    assert read_lines(tmp_path / "two.jsonl") == rows[:2]
    assert [preview(*arguments, "--most", 2), preview(*arguments, "--dump", tmp_path, "--most", 0)] == [2, 2]


@pytest.mark.parametrize("truncation", ["turns", "cut", "drop"])
def test_what_the_length_leaves_out_is_a_warning(
    truncation: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the preview and in the run, with the length that keeps everything."""
    data = write_conversations(tmp_path / "train.json", [*CONVERSATIONS, LONG])
    model = copy_checkpoint(tmp_path / "model", max_position_embeddings=8192)
    flags = ["--model_name_or_path", model, "--data_path", data, "--truncation", truncation]
    assert preview(*flags, "--json", tmp_path / "report.json", "--dump", tmp_path / "short.jsonl") == 0
    [line, *_] = read_json(tmp_path / "report.json")["train"]["warnings"]
    enough = int(line.rpartition("--model_max_length ")[2].split()[0])
    assert line.startswith("1 of 9 conversations are longer than --model_max_length 2048: ")
    assert line.endswith(f" --model_max_length {enough} keeps all of them")
    assert "warning: 1 of 9 conversations are longer" in " ".join(capfd.readouterr().out.split())

    full = length_of_last(data)
    assert enough == full
    kept = {row["where"]: len(row["input_ids"]) for row in read_lines(tmp_path / "short.jsonl")}
    rest = sum(length for where, length in kept.items() if not where.endswith("(record 9)"))
    left_out = full - (sum(kept.values()) - rest)
    assert f" {left_out / (rest + full):.1%} of all tokens are left out. " in line

    flags[1] = TINY  # 2048 positions
    assert preview(*flags, "--model_max_length", 1000, "--json", tmp_path / "report.json") == 0
    [line, *_] = read_json(tmp_path / "report.json")["train"]["warnings"]
    assert line.endswith(" are left out. --model_max_length 2048 is the most that the model allows")


def length_of_last(data: Path) -> int:
    checkpoint = load_checkpoint(str(TINY))
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=100_000))
    *_, (where, record) = read_records(data)
    return len(encoder.encode_conversation(FORMATS["conversations"].parse(record, where)).input_ids)
