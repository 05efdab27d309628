"""``scripts.evaluate``: figures of models on the same questions, continued runs, bounds, a line for each fault."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from scripts.evaluate import main
from tests.commands import finetune_here, read_json, restored_log_handlers, run_here
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_conversations

HOSTILE = '<script>alert(1)</script> & "quoted" \u202e 你好'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with held-out data and an adapter that was trained on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_conversations(folder / "data.json", [*CONVERSATIONS, [("user", HOSTILE), ("assistant", HOSTILE)]])
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "adapter", "--use_lora",
        "--num_train_epochs", 40, "--learning_rate", 0.02, "--lora_dropout", 0, "--lora_r", 32,
        "--per_device_train_batch_size", 9, "--lora_alpha", 32,
    )  # fmt: skip
    return folder


def evaluate(folder: Path, output: Path, *flags: object) -> int:
    with restored_log_handlers():
        return main([str(each) for each in (
            "--model_name_or_path", TINY, "--data_path", folder / "data.json", "--output", output,
            "--max_new_tokens", 40, *flags,
        )])  # fmt: skip


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_adapter_is_compared_with_its_base(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, other = tmp_path / "out", copy_checkpoint(tmp_path / "same")
    code = evaluate(folder, output, "--adapter", folder / "adapter", "--against", other, "--min_stopped", 0.5)
    report = read_json(output / "report.json")
    assert list(report["sets"]) == ["held_out", "general"] and report["sets"]["general"]["questions"] == 40
    held_out = report["sets"]["held_out"]
    assert held_out["questions"] == 9
    figures, differences = held_out["figures"], held_out["differences"]
    assert figures["same"] == figures["base"]
    assert {each["verdict"] for each in differences["same"].values()} == {"not shown"}
    assert differences["adapter"]["loss"]["verdict"] == "better"
    assert differences["adapter"]["loss"]["high"] < 0 < differences["adapter"]["chrf"]["low"]
    assert figures["base"]["perplexity"]["value"] == pytest.approx(math.exp(figures["base"]["loss"]["value"]))
    assert [turn["answers"] for turn in held_out["turns"]["base"]] == [9, 3, 1]
    assert code == (0 if figures["adapter"]["stopped"]["value"] >= 0.5 else 1)

    page = (output / "report.html").read_text(encoding="utf-8")
    assert "script" not in Page(page).tags and {"svg", "circle", "table"} <= set(Page(page).tags)
    assert "<script>alert(1)</script>" in Page(page).text and "src=" not in page and "://" not in page
    printed = capsys.readouterr().out
    assert "held_out: 9 questions\n" in printed and "\ngeneral: 40 questions\n" in printed


def test_loss_is_that_of_the_whole_logits(folder: Path, tmp_path: Path) -> None:
    evaluate(folder, tmp_path / "out", "--adapter", folder / "adapter", "--no_general")
    checkpoint = load_checkpoint(str(TINY))
    model = load_for_inference(checkpoint, str(folder / "adapter"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    [row] = [row for row in rows if row["model"] == "adapter" and row["question"] == "Hi"]
    ids = checkpoint.tokenizer.encode
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompt, answer = ids(text, allowed_special="all"), ids("Hello!<|im_end|>\n", allowed_special="all")
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    right = int((logits.argmax(-1) == torch.tensor(answer)).sum())
    assert row["losses"] == [[len(answer), pytest.approx(loss, rel=1e-4), right]]


def test_the_same_command_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bits that are those of the whole run, because losses are computed in the same batches."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr("evaluation.evaluating._PART", 2)
    evaluate(folder, whole, "--no_general")
    shutil.copytree(whole, cut)
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    evaluate(folder, cut, "--no_general")
    for name in ("report.json", "report.html"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted((cut / "answers.jsonl").read_text().splitlines()) == sorted(line[:-1] for line in lines)
    monkeypatch.setattr("evaluation.evaluating.load_for_inference", None)  # nothing is missing, so nothing is loaded
    evaluate(folder, cut, "--no_general")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adapter", "{data}"), "holds no adapter_config.json"),
        (("--against", "/none"), "--against /none: there is no such folder. Give a checkpoint or an adapter"),
        (("--data_path", "/none.jsonl"), "--data_path /none.jsonl: there is no such file"),
        (("--data_path", "{empty}"), "empty.jsonl"),
        (("--data_path", "{text}"), "has no answer that can be expected. Give conversations that end with an answer"),
        (("--min_chrf", 2), "--min_chrf 2 is out of range; give 0 to 1"),
        (
            ("--min_call_name", 0.5),
            "--min_call_name 0.5: none of the 9 expected answers has call_name. Give a bound of",
        ),
        (("--limit", 0), "--limit 0 is out of range; give 1 or more"),
        (("--max_new_tokens", 0), "--max_new_tokens 0 is out of range"),
        (("--model_name_or_path", "{other}", "--adapter", "{adapter}"), "--adapter"),
        (("--output", "{data}"), "--output"),
        (("--thinking", "on"), "--thinking on: the chat format 'qwen' has no thinking. Leave it out"),
        (
            ("--reasoning_effort", "low"),
            "--reasoning_effort low: the checkpoint's chat template has no",
        ),
        (("--chat_template", "{data}"), "Qwen v1 has one fixed chat format"),
    ],
)
def test_a_fault_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.txt").write_text("A plain text.\n")
    names = {
        "data": folder / "data.json", "empty": tmp_path / "empty.jsonl", "text": tmp_path / "text.txt",
        "adapter": folder / "adapter", "other": tmp_path / "other",
    }  # fmt: skip
    if "{other}" in flags:
        torch.manual_seed(1)
        model: Any = load_for_inference(load_checkpoint(str(copy_checkpoint(tmp_path / "source"))))
        torch.nn.init.normal_(model.lm_head.weight)
        shutil.copytree(tmp_path / "source", names["other"])
        model.save_pretrained(names["other"])
    command = ["--model_name_or_path", TINY, "--data_path", folder / "data.json", "--output", tmp_path / "out"]
    code = run_here(main, "scripts.evaluate", [*command, *(str(each).format(**names) for each in flags)])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_bounds_that_are_not_reached_are_the_exit_code(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, tmp_path / "out", "--no_general", "--limit", 2, "--min_exact_match", 0.9) == 1
    report = read_json(tmp_path / "out" / "report.json")
    assert report["failed"] == ["base: exact_match is 0, less than 0.9"]
    assert report["sets"]["held_out"]["questions"] == 2
