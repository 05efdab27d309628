"""Names and values with control characters: no command passes them to the terminal or lets them forge a line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.commands import run_here
from tests.models import TINY

EVIL = "a\x1b]0;owned\x07\x1b[31m\nfinetune.py: error: forged\r\u202ecod.exe \x9b2J"
ANSWERED = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"Hello! {EVIL}"}]}
OTHER = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
CONTROL = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F))]

# Each has {x}, a path or value with control characters that does not exist.
REFUSED = {
    "finetune, flag": ("finetune", ["--{x}"]),
    "finetune, value": ("finetune", ["--lora_r", "{x}"]),
    "finetune, data": ("finetune", ["--model_name_or_path", TINY, "--data_path", "{x}", "--output_dir", "{tmp}/out"]),
    "finetune, model": ("finetune", ["--model_name_or_path", "{x}", "--data_path", "{data}"]),
    "finetune, config": ("finetune", ["--config", "{x}.yaml"]),
    "preview": ("scripts.preview_data", ["--model_name_or_path", TINY, "--data_path", "{x}"]),
    "merge": ("merge_lora", ["--adapter", "{x}", "--output", "{tmp}/out"]),
    "ask": ("scripts.ask", ["--model_name_or_path", "{x}", "Hi"]),
    "ask, flag": ("scripts.ask", ["--model_name_or_path", TINY, "Hi", "--{x}"]),
    "convert_data": ("scripts.convert_data", ["{x}", "{tmp}/out.json"]),
    "convert_layout": ("scripts.convert_layout", ["{x}", "{tmp}/out"]),
    "quantize": ("scripts.quantize", ["--model_name_or_path", "{x}", "--data_path", "{x}", "--output_dir", "{tmp}/o"]),
    "plot_runs": ("scripts.plot_runs", ["{x}"]),
    "draw_masks": ("scripts.draw_masks", ["--label_mask", "{x}"]),
    "make_tiny_qwen": ("scripts.make_tiny_qwen", ["--seed", "{x}", "--output", "{tmp}/out"]),
}


def assert_harmless(text: str) -> None:
    assert not [character for character in CONTROL if character in text], ascii(text)
    assert not [line for line in text.splitlines() if line.startswith("finetune.py: error: forged")]


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_show_names_on_one_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, arguments = REFUSED[case]
    (tmp_path / "data.jsonl").write_text(json.dumps(ANSWERED))
    values = {"{x}": EVIL, "{tmp}": str(tmp_path), "{data}": str(tmp_path / "data.jsonl")}
    words = []
    for word in map(str, arguments):
        for name, value in values.items():
            word = word.replace(name, value)
        words.append(word)
    assert run_here(importlib.import_module(module).main, module, words) in (1, 2)
    out, err = capfd.readouterr()
    assert_harmless(out + err)
    assert err.splitlines()[-1].startswith(f"{module}: error: ") and "unexpected" not in err


def test_reports_and_logs_show_names_and_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from scripts import convert_data, preview_data

    data = tmp_path / (EVIL.replace("/", "") + ".jsonl")
    data.write_text("\n".join(map(json.dumps, [ANSWERED, {"messages": EVIL}, OTHER])))
    words = ["--model_name_or_path", TINY, "--data_path", data, "--on_bad_record", "skip", "--disable_tqdm", "True"]
    assert run_here(preview_data.main, "preview_data", [*words, "--fill", f"{EVIL}=x", "--system_message", EVIL]) == 0
    out, err = capfd.readouterr()
    assert "Sample 1 of 2" in out and "Skipped: " in err
    assert_harmless(out + err)
    data.write_text(json.dumps(ANSWERED))
    assert run_here(convert_data.main, "convert_data", [data, tmp_path / f"{EVIL}.json"]) == 0
    assert_harmless("".join(capfd.readouterr()))


def test_a_name_in_another_encoding_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from scripts import preview_data

    data = tmp_path / "对话".encode("gbk").decode("utf-8", "surrogateescape")
    data.write_text(json.dumps(ANSWERED))
    dump = tmp_path / "dump.jsonl"
    words = ["--model_name_or_path", TINY, "--data_path", data, "--json", tmp_path / "a.json", "--dump", dump]
    assert run_here(preview_data.main, "preview_data", [*words, "--html", tmp_path / "a.html"]) == 0
    assert "\\udcb6" in capfd.readouterr().out
    assert json.loads(dump.read_text(encoding="utf-8"))["where"] == f"{data}:1"
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["train"]["kept"] == 1
