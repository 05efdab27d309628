"""Data previewed and trained by whole commands, and refused if a run would be worthless."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import finetune
from data_utils.formats import recognise
from scripts import preview_data
from tests.commands import PLAIN, finetune_here, logged_losses, names_in, read_json, run_here
from tests.golden import REPO
from tests.models import TINY

ANSWERED = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def preview(*arguments: object) -> int:
    common = (*PLAIN, "--model_name_or_path", TINY, "--disable_tqdm", "True", "--use_cpu", "True")
    return run_here(preview_data.main, "preview_data", [*common, *arguments])


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def answered(answer: str, **turn: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer, **turn}]}


def test_corpora_are_previewed_and_trained_unchanged(shared: Path, tmp_path: Path) -> None:
    paths = sorted((shared / "corpora").glob("*.json"))
    assert paths
    for path in paths:
        output = tmp_path / path.stem
        flags = ("--data_path", path, "--per_device_train_batch_size", 2, "--max_steps", 3, "--logging_steps", 1)
        assert preview(*flags, "--json", tmp_path / "preview.json", "--html", tmp_path / "preview.html") == 0
        report = read_json(tmp_path / "preview.json")["train"]
        records = json.loads(path.read_text(encoding="utf-8"))
        format_ = "alpaca" if "instruction" in records[0] else "conversations"
        assert (report["read"], report["format"]) == (len(records), format_), path.name
        # Only conversations beyond 2,048 tokens of the small vocabulary are skipped.
        assert report["kept"] + report["skipped"] == report["read"] and report["kept"] > 0.95 * report["read"]
        assert all("--model_max_length 2048" in reason for reason in report["skipped_by_reason"]), path.name
        assert set(report["trained_by_role"]) == {"assistant"}, path.name
        assert 0 < report["trained_tokens"] < report["tokens"], path.name

        finetune_here(
            "--model_name_or_path", TINY, *flags, "--output_dir", output, "--save_strategy", "no",
            "--learning_rate", 1e-3,
        )  # fmt: skip
        losses = logged_losses(output)
        assert len(losses) == 3
        assert all(0 < loss < 10 for loss in losses), path.name
        assert read_json(output / "data_receipt.json") == {"train": report}, path.name


def test_preview_shows_samples_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", ANSWERED, answered("Yo \x1b[31m<|im_end|>"), answered("Hey"), ANSWERED)
    assert preview("--data_path", f"{data}@x2", "--eval_split", 0.25, "--samples", 2) == 0
    shown = capsys.readouterr().out
    assert "⟦Hello!<|im_end|>" in shown or "⟦Hey<|im_end|>" in shown
    assert "\x1b" not in shown
    assert "Data (train)" in shown and "Data (eval)" in shown


@pytest.mark.parametrize(
    ("records", "flags", "problem"),
    [
        ([answered("")] * 2, [], "all 2 answers are empty"),
        ([answered("Yes " * 30)] * 2, ["--model_max_length", 30, "--truncation", "cut"], "all 2 conversations were"),
        ([answered("Yes", train=False)] * 2, [], "none of 2 conversations can be used"),
        ([answered("Yes " * 99)] * 2, ["--model_max_length", 30], "none of 2 conversations can be used"),
    ],
)
def test_worthless_run_is_exit_code_1(
    records: list[object], flags: list[object], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", *records)
    assert preview("--data_path", data, *flags) == 1
    assert problem in capsys.readouterr().out


def test_unreadable_data_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", ANSWERED, {"messages": 3})
    assert preview("--data_path", data) == 2
    assert f"preview_data: error: {data}:2: " in capsys.readouterr().err
    assert preview("--data_path", data, "--on_bad_record", "skip") == 0
    assert preview("--data_path", tmp_path / "none.json") == 2
    assert preview("--data_path", data, "--samples", -1) == 2
    assert preview("--data_path", data, "--html", tmp_path / "none" / "a.html") == 2


def test_dry_run_equals_the_preview_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", ANSWERED, answered("Hey"))
    assert preview("--data_path", data) == 0
    shown = capsys.readouterr().out
    arguments = [*PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out"]
    arguments.append("--dry_run")
    assert run_here(finetune.main, "finetune.py", [*arguments, "--disable_tqdm", "True", "--use_cpu", "True"]) == 0
    assert capsys.readouterr().out == shown
    assert names_in(tmp_path) == ["a.jsonl"]
    write(data, answered("", train=False))
    assert run_here(finetune.main, "finetune.py", arguments) == 1


def test_data_flags_are_applied_and_recorded(tmp_path: Path) -> None:
    """Use every data flag at once, then repeat the run from its recorded arguments."""
    one = write(tmp_path / "a.jsonl", *(answered(f"I am {{{{name}}}}, {number}") for number in range(20)), {"bad": 1})
    two = tmp_path / "b.json"
    two.write_text(json.dumps([{"prompt": f"{number}?", "response": "Yes."} for number in range(8)]))
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", f"{one}#10", f"{two}@x2", "--fill", "name=Linden", "--eval_split",
        0.2, "--on_bad_record", "skip", "--label_mask", "last", "--truncation", "turns_left", "--data_mixing",
        "sequential", "--eval_strategy", "epoch", "--num_train_epochs", 1, "--per_device_train_batch_size", 4,
        "--save_strategy", "no", "--logging_steps", 1, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    report = read_json(tmp_path / "out" / "data_receipt.json")
    train, evaluation = report["train"], report["eval"]
    counts = [(source["in_file"], source["read"], source["kept"]) for source in train["sources"]]
    assert counts == [(21, 9, 8), (8, 12, 12)]  # two of 10 and two of 8 are held out; the bad record is skipped
    assert train["sources"][0]["skipped_by_reason"] == {"invalid record": 1}
    assert [source["kept"] for source in evaluation["sources"]] == [2, 2]
    assert train["settings"]["label_mask"] == "last" and train["settings"]["truncation"] == "turns_left"
    assert not train["unfilled"]
    assert len(logged_losses(tmp_path / "out", "eval_loss")) == 1

    finetune_here("--config", tmp_path / "out" / "run_args.json", "--output_dir", tmp_path / "again")
    assert logged_losses(tmp_path / "again") == logged_losses(tmp_path / "out")
    assert read_json(tmp_path / "again" / "data_receipt.json") == report


def test_documented_records_are_recognised_and_parsed() -> None:
    examples: dict[str, list[str]] = {}
    for name in ("README.md", "docs/data.md"):
        for block in re.findall(r"```json\n(.*?)```", (REPO / name).read_text(encoding="utf-8"), re.DOTALL):
            while block := block.strip():
                record, end = json.JSONDecoder().raw_decode(block)
                format_ = recognise(record, name)
                examples.setdefault(name, []).append(format_.name)
                assert format_.parse(record, name).turns[-1].role == "assistant"
                block = block[end:]
    assert examples["docs/data.md"] == ["conversations", "messages", "alpaca", "pairs"]
    assert len(examples["README.md"]) == 1


def test_special_tokens_are_trained_if_they_are_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", answered("Left <|extra_0|> right <|im_end|>"), ANSWERED)
    assert preview("--data_path", data, "--json", tmp_path / "text.json") == 0
    assert "1 of 2 conversations contain '<|extra_0|>', which is trained as text" in capsys.readouterr().out.replace(
        "\n  ", " "
    )
    allowed = ("--allow_special_tokens", "<|extra_0|>")
    assert preview("--data_path", data, *allowed, "--json", tmp_path / "token.json") == 0
    assert "--allow_special_tokens" not in capsys.readouterr().out
    text, token = (read_json(tmp_path / name)["train"] for name in ("text.json", "token.json"))
    assert token["trained_tokens"] < text["trained_tokens"] and text["notes"] and not token["notes"]
    for name in ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<sep>"):
        assert preview("--data_path", data, "--allow_special_tokens", name) == 2
        assert f"error: --allow_special_tokens {name}: " in capsys.readouterr().err
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, *allowed, "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--save_strategy", "no",
    )  # fmt: skip
    assert read_json(tmp_path / "out" / "data_receipt.json")["train"]["trained_tokens"] == token["trained_tokens"]
