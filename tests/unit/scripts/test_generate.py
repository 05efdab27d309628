"""``python -m scripts.generate`` answers a file in its order, goes on where it was killed, and overwrites nothing."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import EncodeOptions, Encoder
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS
from errors import ConfigError, DataError, RunError
from loading.checkpoint import load_checkpoint
from loading.prompt_modes import prompt_families
from scripts import generate
from serving.engine import Engine
from serving.requests import Answer, Request, RequestError, Sampling
from serving.ticket import Ticket
from tests import fork_server
from tests.adapters import LINEAR, make_adapter
from tests.commands import environment, limited_file_size, restored_log_handlers, run_here
from tests.data import reader
from tests.golden import REPO
from tests.models import CONVERSATIONS, TINY, change_json, write_conversations, write_later_checkpoint
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
            cut = {"train": False} if answer.finish_reason == "length" else {}
            assert line["messages"][-1] == {"role": "assistant", "content": answer.text, **cut}
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


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_process_that_was_stopped_goes_on_with_the_same_answers(tmp_path: Path, number: int) -> None:
    data, output = tmp_path / "q.txt.gz", tmp_path / "a.jsonl"
    data.write_bytes(gzip.compress("".join(f"{'word ' * (i % 7)}{i}\n" for i in range(100)).encode()))
    # One at a time: with others a step rounds by the rows that it has, which depend on the moment of the signal.
    flags = ("--temperature", "1.2", "--max_new_tokens", "16", "--seed", "3", "--max_concurrency", "1")
    run(data, tmp_path / "whole.jsonl", *flags)
    arguments = ["--model_name_or_path", TINY, "--data_path", data, "--output", output, *flags]
    command = [fork_server.python(), "-m", "scripts.generate", *map(str, arguments)]
    with subprocess.Popen(command, cwd=REPO, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
    assert 0 < len(output.read_text(encoding="utf-8").split("\n")) - 1 < 100, errors
    if number != signal.SIGKILL:
        assert process.returncode == (130 if number == signal.SIGINT else 143)
        assert "of 100 answers are written; the same command goes on" in errors
    run(data, output, *flags)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_full_disk_is_named_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    data.write_text("".join(f"{number}\n" for number in range(20)))
    run(data, tmp_path / "whole.jsonl", *GREEDY)
    arguments = ["--model_name_or_path", TINY, "--data_path", data, "--output", output, *GREEDY]
    with limited_file_size((tmp_path / "whole.jsonl").stat().st_size // 2):
        assert run_here(generate.main, "scripts.generate", arguments) == 1
    assert f"cannot write {output}" in capsys.readouterr().err
    assert run_here(generate.main, "scripts.generate", arguments) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_call_that_no_record_can_hold_stays_text(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (shared / "families" / "templates" / "qwen2_5.jinja").read_text()
    model = write_later_checkpoint(tmp_path / "model", "qwen2", template)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [{"role": "user", "content": "Hi"}]
    data = write_lines(tmp_path / "q.jsonl", [{"messages": messages, "tools": tools}])
    calls = ['<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
             '<tool_call>\n{"name": "f\\"", "arguments": {}}\n</tool_call>',
             '<tool_call>\n{"name": "f", "arguments": "no JSON"}\n</tool_call>']  # fmt: skip
    answer, texts = Ticket.answer, iter(calls)
    monkeypatch.setattr(Ticket, "answer", lambda ticket: replace(answer(ticket), text=next(texts)))
    output = tmp_path / "a.jsonl"
    lines = run(data, output, *GREEDY, "--n", "3", "--model_name_or_path", str(model))
    assert [line["messages"][-1]["content"] for line in lines] == ["", *calls[1:]]
    assert "tool_calls" in lines[0]["messages"][-1] and [line["answer"] for line in lines] == calls
    for where, record in read_records(output):
        FORMATS["messages"].parse(record, where)


@pytest.mark.parametrize(
    ("model_type", "template", "opening"),
    [("qwen2", "qwen2_5", None), ("qwen3", "qwen3", "<think>\n"), ("qwen3", "qwen3_thinking_2507", "")],
)
def test_answers_of_a_model_are_data_for_it(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    model_type: str, template: str, opening: str | None,
) -> None:  # fmt: skip
    """Whole answers are trained, and those that are cut off or lack the thinking that the model needs are not."""
    text = (shared / "families" / "templates" / f"{template}.jinja").read_text()
    model = write_later_checkpoint(tmp_path / "model", model_type, text)
    earlier = {"role": "assistant", "content": "Earlier", "reasoning_content": "Hm"}
    messages = [{"role": "user", "content": "Hi"}, earlier, {"role": "user", "content": "Again"}]
    data, output = write_lines(tmp_path / "q.jsonl", [{"messages": messages}]), tmp_path / "a.jsonl"
    thought = "" if opening is None else f"{opening}A thought\n</think>\n\n"
    answers = [(f"{thought}Whole", "stop"), (f"{thought}Cut", "length")]
    answers.append(("\n</think>\n\nPlain" if opening == "" else "Plain", "stop"))
    if opening is not None:
        answers.append((f"{opening}Half a thought", "length"))
    answer, given = Ticket.answer, iter(answers)

    def written(ticket: Ticket) -> Answer:
        text, reason = next(given)
        return replace(answer(ticket), text=text, finish_reason=reason)

    flags = (*GREEDY, "--n", str(len(answers)), "--model_name_or_path", str(model))
    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "answer", written)
        if opening is None:
            run(data, output, *flags)
            assert '1 of them are cut off ("finish_reason": "length"), and are not trained' in capsys.readouterr().out
        else:
            with pytest.raises(RunError, match=r"1 of them are cut off .*\. 1 ended within their thinking: give a"):
                run(data, output, *flags)
            [error] = lines_of(tmp_path / "a.jsonl.errors")
            assert error["error"] == "--max_new_tokens ended the answer within its thinking, after 8 tokens"
    lines = lines_of(output)
    is_trained = [line["messages"][-1].get("train", True) for line in lines]
    assert is_trained == [True, False, opening != ""]
    assert ("reasoning_content" in lines[0]["messages"][1]) == (opening is not None)
    checkpoint = load_checkpoint(str(model))
    family, plain = prompt_families(checkpoint, "auto", {})
    encoder = Encoder(checkpoint.tokenizer, family, EncodeOptions(thinking="auto", split_turns="auto"), plain)
    trained = [
        encoder.decode([label for label in kept.encoded.labels if label != IGNORE_INDEX])
        for kept in reader(encoder, output).read()
    ]
    texts = "".join(trained)
    assert ("Whole<|im_end|>" in texts, "Cut" in texts, "Plain<|im_end|>" in texts) == (True, False, opening != "")
    if opening is None:  # the file is continued, though it lacks the thinking of its prompts
        run(data, output, *flags)
        assert "is complete; 1 of them are cut off" in capsys.readouterr().out


def test_adapter_answers_and_belongs_to_the_run(tmp_path: Path) -> None:
    model = write_later_checkpoint(tmp_path / "model", "qwen2")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=LINEAR)
    (tmp_path / "q.txt").write_text("Hi\nHello\n")
    flags = (*GREEDY, "--model_name_or_path", str(model))
    plain = run(tmp_path / "q.txt", tmp_path / "a.jsonl", *flags)
    flags = (*flags, "--adapter", str(adapter))
    adapted = run(tmp_path / "q.txt", tmp_path / "b.jsonl", *flags)
    assert [line["answer"] for line in plain] != [line["answer"] for line in adapted]
    with pytest.raises(ConfigError, match="a run with --adapter None"):
        run(tmp_path / "q.txt", tmp_path / "a.jsonl", *flags)
    change_json(adapter / "adapter_config.json", lora_alpha=48)
    with pytest.raises(ConfigError, match="other settings than --adapter has now"):
        run(tmp_path / "q.txt", tmp_path / "b.jsonl", *flags)


def test_thinking_that_cannot_be_left_out_is_refused(tmp_path: Path, shared: Path) -> None:
    template = (shared / "families" / "templates" / "qwen3_thinking_2507.jinja").read_text()
    model = write_later_checkpoint(tmp_path / "model", "qwen3", template)
    (tmp_path / "q.txt").write_text("Hi\n")
    with pytest.raises(ConfigError, match=r"--thinking off: this model always thinks"):
        run(tmp_path / "q.txt", tmp_path / "a.jsonl", "--no_thinking", "--model_name_or_path", str(model))
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    data, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    data.write_text("Hi\n")
    run(data, output, *GREEDY)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=r"a run with --temperature 0.0, not 1.0"):
        run(data, output, "--temperature", "1", "--max_new_tokens", "8")
    data.write_text("Hello\n")
    with pytest.raises(ConfigError, match="the answers to other prompts"):
        run(data, output, *GREEDY)
    (tmp_path / "a.jsonl.run").unlink()
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
    shutil.copy(TINY / "model.safetensors", model / "model.safetensors")
    run(data, output, *flags)
    change_json(model / "generation_config.json", repetition_penalty=1.2)
    with pytest.raises(ConfigError, match="has answers of other settings than --model_name_or_path has now"):
        run(data, output, *flags)


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


def test_prompt_that_is_too_long_is_listed_and_tried_again(tmp_path: Path) -> None:
    """Each start says that answers are missing; the output has no line that cannot be trained on."""
    data, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    data.write_text("Hi\n" + "word " * 3000 + "\nHello\n")
    for _ in range(2):
        with pytest.raises(RunError, match=r"has 2 of 3 answers, and .*a\.jsonl\.errors why the others failed"):
            run(data, output, *GREEDY)
        assert [line["index"] for line in lines_of(output)] == [0, 2]
        [error] = lines_of(tmp_path / "a.jsonl.errors")
        assert "context" in error["error"] and error["where"] == f"{data}:2"
        assert [error["index"], error["choice"]] == [1, 0]
    records = [FORMATS["messages"].parse(record, where) for where, record in read_records(output)]
    assert [record.turns[0].content for record in records] == ["Hi", "Hello"]
    assert data_files(tmp_path) == [output]  # the other two are no data; texts beside data are left out


def test_answer_that_failed_is_written_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = write_conversations(tmp_path / "q.json"), tmp_path / "a.jsonl"
    run(data, tmp_path / "whole.jsonl", *GREEDY, "--n", "2")
    submit, fails = Engine.submit, {3, 8}
    numbers = count()

    def submit_or_fail(engine: Engine, request: Request) -> Any:
        if next(numbers) in fails:
            raise RequestError("memory", "there is none")
        return submit(engine, request)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit", submit_or_fail)
        with pytest.raises(RunError, match=f"has {2 * len(CONVERSATIONS) - 2} of"):
            run(data, output, *GREEDY, "--n", "2")
    assert (tmp_path / "a.jsonl.errors").read_text().count("there is none") == 2
    run(data, output, *GREEDY, "--n", "2")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.errors").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--n", "0"], "--n 0 is out of range"),
        (["--n", "1000000000"], "--n 1000000000 is out of range; give 1 to 10000"),
        (["--n", "10000", "--max_new_tokens", "1001"], "10010000 tokens for a prompt, more than 10000000; lower one"),
        (["--max_new_tokens", "2000000"], "--max_new_tokens 2000000"),
        (["--max_concurrency", "100000"], "--max_concurrency 100000"),
        (["--any_base"], "--any_base needs"),
        (["--temperature", "-1"], "--temperature"),
        (["--data_format", "csv"], "--data_format csv"),
    ],
)
def test_wrong_flag_is_refused(tmp_path: Path, flags: list[str], match: str) -> None:
    (tmp_path / "q.txt").write_text("Hi\n")
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "q.txt", tmp_path / "a.jsonl", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]
