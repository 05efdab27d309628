"""``python -m scripts.generate`` answers a file in its order, goes on where it was killed, and overwrites nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from data_utils.formats import FORMATS
from errors import ConfigError, DataError, RunError
from scripts import generate
from serving.requests import Request, Sampling
from tests.commands import restored_log_handlers
from tests.models import CONVERSATIONS, TINY, write_conversations
from tests.serving import load_engine

GREEDY = ("--temperature", "0", "--max_new_tokens", "8")


def run(data: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    arguments = ["--model_name_or_path", str(TINY), "--data_path", str(data), "--output", str(output)]
    with restored_log_handlers():
        generate.main([*arguments, "--max_concurrency", "4", *flags])
    return lines_of(output)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_last_answer_is_written_anew_in_the_order_of_the_input(tmp_path: Path) -> None:
    lines = run(write_conversations(tmp_path / "q.json"), tmp_path / "a.jsonl", *GREEDY)
    assert [line["index"] for line in lines] == list(range(len(CONVERSATIONS)))
    with load_engine(TINY) as engine:
        for line, conversation in zip(lines, CONVERSATIONS, strict=True):
            messages = [{"role": role, "content": text} for role, text in conversation[:-1]]
            assert line["messages"][:-1] == messages
            sampling = Sampling(temperature=0.0, max_tokens=8)
            answer = engine.submit(Request(engine.render(messages), sampling)).answer()
            assert line["messages"][-1] == {"role": "assistant", "content": answer.text}
            assert (line["answer"], line["finish_reason"]) == (answer.text, answer.finish_reason)
            assert line["usage"]["completion_tokens"] == answer.usage.completion_tokens
            FORMATS["messages"].parse(line, "here")  # what is written can be trained on


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    data = tmp_path / "q.txt"
    data.write_text("Hi\n\n你好\n", encoding="utf-8")
    lines = run(data, tmp_path / "a.jsonl", *GREEDY, "--n", "2", "--system_message", "Be short.")
    assert [(line["index"], line["choice"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line["messages"][0]["content"] for line in lines] == ["Hi", "Hi", "你好", "你好"]
    assert lines[0]["answer"] == lines[1]["answer"]


def test_plain_text_is_continued(tmp_path: Path) -> None:
    lines = run(write_lines(tmp_path / "q.jsonl", [{"text": "Once upon"}]), tmp_path / "a.jsonl", *GREEDY)
    assert lines[0]["text"] == "Once upon" + lines[0]["answer"]


def test_killed_run_goes_on_with_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = write_conversations(tmp_path / "q.json"), tmp_path / "a.jsonl"
    flags = ("--temperature", "1.2", "--max_new_tokens", "8", "--n", "2", "--seed", "3")
    run(data, output, *flags)
    whole = output.read_bytes()
    assert len({line["answer"] for line in lines_of(output)}) > len(CONVERSATIONS)
    output.write_bytes(whole[: len(whole) // 2])
    assert b"\n" in whole[: len(whole) // 2] and not output.read_bytes().endswith(b"\n")
    run(data, output, *flags)
    assert output.read_bytes() == whole
    capsys.readouterr()
    run(data, output, *flags)
    assert "is complete" in capsys.readouterr().out and output.read_bytes() == whole


def test_answers_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    data, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    data.write_text("Hi\n")
    run(data, output, *GREEDY)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=r"a run with --temperature 0.0, not 1.0"):
        run(data, output, "--temperature", "1", "--max_new_tokens", "8")
    data.write_text("Hello\n")
    with pytest.raises(ConfigError, match="other data"):
        run(data, output, *GREEDY)
    (tmp_path / "a.jsonl.run.json").unlink()
    with pytest.raises(ConfigError, match="was not written by this command"):
        run(data, output, *GREEDY)
    assert output.read_bytes() == before
    with pytest.raises(ConfigError, match="--output"):
        run(data, data, *GREEDY)


def test_answers_of_weights_that_have_changed_are_not_continued(tmp_path: Path) -> None:
    """As after training again into the same folder."""
    data, output, model = tmp_path / "q.txt", tmp_path / "a.jsonl", tmp_path / "model"
    data.write_text("Hi\n")
    shutil.copytree(TINY, model)
    flags = (*GREEDY, "--model_name_or_path", str(model))
    run(data, output, *flags)
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="has answers of other weights than --model_name_or_path has now"):
        run(data, output, *flags)


def test_file_that_is_being_written_is_refused(tmp_path: Path) -> None:
    with (
        generate.AnswerFile(tmp_path / "a.jsonl", {}),
        pytest.raises(ConfigError, match="another process"),
        generate.AnswerFile(tmp_path / "a.jsonl", {}),
    ):
        pass


def test_faults_of_the_data_are_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": 5}, {"messages": [{"role": "user"}]}]
    data = write_lines(tmp_path / "q.jsonl", records)
    with pytest.raises(DataError, match="2 faults, nothing is answered") as caught:
        generate.main(["--model_name_or_path", "nowhere", "--data_path", str(data), "--output", str(tmp_path / "a")])
    assert "q.jsonl:2" in str(caught.value) and "q.jsonl:3" in str(caught.value)
    assert not (tmp_path / "a").exists()
    data = write_lines(data, [{"messages": [{"role": "assistant", "content": "Hi"}]}])
    with pytest.raises(DataError, match="nothing to answer"):
        run(data, tmp_path / "a", *GREEDY)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    data, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    data.write_text("\n\n")
    with pytest.raises(DataError, match=r"q\.txt: contains no prompt"):
        run(data, output, *GREEDY)
    assert not output.exists()


def test_prompt_that_is_too_long_has_an_error(tmp_path: Path) -> None:
    data = tmp_path / "q.txt"
    data.write_text("Hi\n" + "word " * 3000 + "\nHello\n")
    with pytest.raises(RunError, match="1 of them failed"):
        run(data, tmp_path / "a.jsonl", *GREEDY)
    lines = lines_of(tmp_path / "a.jsonl")
    assert "context" in lines[1]["error"] and [line["index"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--n", "0"], "--n 0"),
        (["--any_base"], "--any_base needs"),
        (["--temperature", "-1"], "--temperature"),
        (["--data_format", "csv"], "--data_format csv"),
    ],
)
def test_wrong_flag_is_refused(tmp_path: Path, flags: list[str], match: str) -> None:
    (tmp_path / "q.txt").write_text("Hi\n")
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "q.txt", tmp_path / "a.jsonl", *flags)
