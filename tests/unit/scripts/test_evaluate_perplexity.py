"""``scripts.evaluate --perplexity``: variants and lengths, continued runs, adapters, a line for each fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chat.template import CHATML_TEMPLATE
from evaluation.losses import window_losses
from evaluation.perplexity import read_ids
from evaluation.variants import Variants, use_variant
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from scripts.evaluate import main
from tests.commands import finetune_here, read_json, restored_log_handlers, run_here
from tests.models import TINY, copy_checkpoint, write_conversations, write_later_checkpoint

TEXT = "".join(f"Line {number}: day {number % 7} of the week follows day {(number - 1) % 7}.\n" for number in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and an adapter."""
    folder = tmp_path_factory.mktemp("perplexity")
    (folder / "text.txt").write_text(TEXT)
    data = write_conversations(folder / "data.json")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "adapter", "--use_lora",
        "--num_train_epochs", 2, "--learning_rate", 0.05,
    )  # fmt: skip
    return folder


def evaluate(folder: Path, output: Path, *flags: object) -> int:
    with restored_log_handlers():
        return main([str(each) for each in (
            "--model_name_or_path", TINY, "--perplexity", folder / "text.txt", "--output", output,
            "--lengths", "128,32", *flags,
        )])  # fmt: skip


def test_base_and_adapter_read_the_same_windows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, tmp_path / "out", "--adapter", folder / "adapter", "--variants", "plain,ntk+logn") == 0
    report = read_json(tmp_path / "out" / "perplexity.json")
    checkpoint = load_checkpoint(str(TINY))
    ids = torch.tensor(read_ids(checkpoint, folder / "text.txt"))
    used = len(ids) // 128 * 128
    assert (report["lengths"], report["tokens"], report["used"]) == ([32, 128], len(ids), used)
    assert [(row["model"], row["variant"]) for row in report["rows"]] == [
        ("base", "plain"), ("base", "ntk+logn"), ("adapter", "plain"), ("adapter", "ntk+logn"),
    ]  # fmt: skip
    for row in report["rows"]:
        adapter = str(folder / "adapter") if row["model"] == "adapter" else None
        model = load_for_inference(checkpoint, adapter)
        model = model.get_base_model() if adapter else model
        use_variant(model, Variants(TINY).config(row["variant"]))
        for cell in row["cells"]:
            windows = ids[:used].view(-1, cell["length"])
            with torch.no_grad():
                loss = model(input_ids=windows, labels=windows).loss.item()
            assert (cell["windows"], cell["perplexity"]) == (len(windows), pytest.approx(math.exp(loss), rel=1e-5))
            assert math.fsum(window_losses(model, windows)) / (windows.numel() - len(windows)) == pytest.approx(loss)
    short = [row["cells"][0]["perplexity"] for row in report["rows"]]
    assert short[0] == short[1] and short[2] == short[3] != short[0]  # 32 tokens are within seq_length
    assert (
        report["rows"][1]["cells"][0]["difference"]["value"]
        == 0
        != report["rows"][1]["cells"][1]["difference"]["value"]
    )
    assert report["models"][0]["variants"]["plain"] == {
        "seq_length": 64, "rotary_emb_base": 10000, "use_dynamic_ntk": False, "use_logn_attn": False,
    }  # fmt: skip
    page = (tmp_path / "out" / "perplexity.html").read_text(encoding="utf-8")
    assert "128 tokens" in page and "use_dynamic_ntk: true" in page and "://" not in page
    assert f"perplexity of {folder / 'text.txt'}: {used:,} of {len(ids):,} tokens\n" in capsys.readouterr().out


def test_the_same_command_continues_and_can_have_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr("evaluation.perplexity.TOKENS", 96)
    evaluate(folder, whole)
    lines = (whole / "windows.jsonl").read_text().splitlines(keepends=True)
    cut.mkdir()
    (cut / "windows.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    evaluate(folder, cut, "--variants", "plain", "--lengths", "32")
    evaluate(folder, cut)
    for name in ("perplexity.json", "perplexity.html"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    monkeypatch.setattr("evaluation.evaluating.load_for_inference", None)  # nothing is missing, so nothing is loaded
    evaluate(folder, cut, "--variants", "logn", "--limit", 1)
    report = read_json(cut / "perplexity.json")
    assert [cell["windows"] for cell in report["rows"][0]["cells"]] == [4, 1]
    assert "low" not in report["rows"][0]["cells"][0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_does_not_suffice_names_the_lengths(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def losses(model: Any, ids: torch.Tensor) -> list[float]:
        if ids.shape[1] == 128:
            raise error
        return window_losses(model, ids)

    monkeypatch.setattr("evaluation.perplexity.window_losses", losses)
    flags = ["--perplexity", folder / "text.txt", "--lengths", "128,32", "--variants", "plain"]
    command = ["--model_name_or_path", TINY, *flags, "--output", tmp_path / "out"]
    assert run_here(main, "scripts.evaluate", command) == 1
    fix = "Leave out the longest of --lengths: what has been measured is kept"
    assert capsys.readouterr().err.splitlines()[-1] == f"scripts.evaluate: error: out of memory ({error}). {fix}"
    lengths = [json.loads(line)["length"] for line in (tmp_path / "out" / "windows.jsonl").read_text().splitlines()[1:]]
    assert set(lengths) == {32}


NO_FACTOR = "--variants yarn needs a factor. Give --rope_scaling yarn --rope_factor, such as 4"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variants", "plain,nkt"), "'nkt' is none of plain, ntk, logn, ntk+logn, yarn"),
        (("--variants", "window"), "window: the code of Qwen v1 was published without window attention"),
        (("--variants", "yarn"), "has no yarn. Its variants are plain, ntk, logn, ntk+logn"),
        (("--variants", "logn", "--model_name_or_path", "{qwen2}"), "Qwen2 ({qwen2}) has no logn. Its variants"),
        (("--variants", "yarn", "--model_name_or_path", "{qwen2}"), NO_FACTOR),
        (("--rope_scaling", "yarn", "--rope_factor", 4), "--rope_scaling yarn: Qwen v1 extends its positions itself"),
        (("--rope_scaling", "yarn"), "--rope_scaling yarn needs a factor"),
        (("--rope_factor", 4), "--rope_factor 4 has no effect without --rope_scaling"),
        (("--lengths", "32,1"), "'32,1': lengths are whole numbers from 2 to"),
        (("--lengths", "32,"), "'32,': lengths are whole numbers"),
        (("--lengths", "100000"), "text.txt has {tokens:,} tokens. Give lengths up to {tokens}, or a longer text"),
        (("--limit", 0), "--limit 0 is out of range"),
        (("--perplexity", "{folder}/none.txt"), "--perplexity {folder}/none.txt: no such file"),
        (("--perplexity", "{empty}"), "empty.txt:1: the text is empty. Leave the file out"),
        (("--perplexity", "{latin}"), "latin.txt:2: is not UTF-8 (byte 0xe9). Save the file as UTF-8"),
        (("--perplexity", "{folder}/data.json"), 'the record has no "text"'),
        (("--data_path", "{folder}/data.json"), "give one of --data_path, --tasks, --tool_use, --perplexity"),
        (("--max_new_tokens", 5), "--max_new_tokens has no effect with --perplexity"),
        (("--against", "{qwen2}", "--variants", "ntk+logn"), "has no ntk+logn"),
        (("--against", "{v1_no_length}"), "config.json: seq_length is missing"),
        (("--output", "{folder}/text.txt"), "--output"),
        (("--perplexity", ""), "--perplexity '' names nothing"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("One\ncaf\u00e9\n".encode("latin-1"))
    names = {
        "folder": folder, "empty": tmp_path / "empty.txt", "latin": tmp_path / "latin.txt",
        "qwen2": tmp_path / "qwen2", "v1_no_length": tmp_path / "v1", "tokens": 0,
    }  # fmt: skip
    if "{qwen2}" in flags:
        write_later_checkpoint(tmp_path / "qwen2", "qwen2", CHATML_TEMPLATE)
    if "{v1_no_length}" in flags:
        copy_checkpoint(tmp_path / "v1", seq_length=None, use_dynamic_ntk=False, use_logn_attn=False)
    if "{tokens" in message:
        names["tokens"] = len(read_ids(load_checkpoint(str(TINY)), folder / "text.txt"))
    command = ["--model_name_or_path", TINY, "--perplexity", folder / "text.txt", "--output", tmp_path / "out"]
    capsys.readouterr()
    code = run_here(main, "scripts.evaluate", [*command, *(str(each).format(**names) for each in flags)])
    error = capsys.readouterr().err
    assert code == 2 and message.format(**names) in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists() and error.count("\n") == 1


def test_lengths_without_a_text_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model_name_or_path", TINY, "--data_path", folder / "data.json", "--output", tmp_path / "out"]
    assert run_here(main, "scripts.evaluate", [*command, "--lengths", "32"]) == 2
    assert "--lengths has no effect without --perplexity" in capsys.readouterr().err
