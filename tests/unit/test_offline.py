"""No command uses the network for a folder on disk, even without Hugging Face's offline variables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.golden import REPO, SMALL, offline_environment

# Runs before the code under test. Libraries may catch connection errors, so attempts are recorded.
NO_NETWORK = """
import atexit, os, socket

attempts = []

def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("the network is off")

def report():
    if attempts:
        print("NETWORK", attempts, flush=True)
        os._exit(77)

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
atexit.register(report)
"""

LOAD_AND_SAVE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from qwen_model.register import register_qwen

source, target = sys.argv[1:]
register_qwen()
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
logits = model(**tokenizer("hello library", return_tensors="pt")).logits
assert torch.isfinite(logits).all()
tokenizer.save_pretrained(target)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(target)
AutoModelForCausalLM.from_pretrained(target)
print("DONE", tuple(logits.shape))
"""

FINETUNE_MERGE_ASK = """
import sys
import finetune, merge_lora
from scripts import ask

source, data, target = sys.argv[1:]
finetune.main(["--model_name_or_path", source, "--data_path", data, "--output_dir", target + "/adapter", "--use_lora",
               "--trainable_embeddings", "full", "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1"])
merge_lora.main(["--adapter", target + "/adapter", "--output", target + "/merged"])
ask.main(["--model_name_or_path", source, "--adapter", target + "/adapter", "--max_new_tokens", "2", "hello"])
ask.main(["--model_name_or_path", target + "/merged", "--max_new_tokens", "2", "hello"])
print("DONE")
"""


def run_without_network(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = offline_environment()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        del environment[variable]
    return subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code, *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_loading_and_saving_need_no_network(tmp_path: Path) -> None:
    result = run_without_network(LOAD_AND_SAVE, str(SMALL / "tiny-qwen-small"), str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "DONE (1, 4, 960)" in result.stdout
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "qwen.tiktoken").is_file()


def test_training_merging_and_asking_need_no_network(tmp_path: Path) -> None:
    source, data = str(SMALL / "tiny-qwen-small"), str(REPO / "examples" / "identity.json")
    result = run_without_network(FINETUNE_MERGE_ASK, source, data, str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "DONE"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_caught_connection_errors_are_detected() -> None:
    code = "import socket\ntry:\n    socket.create_connection(('localhost', 9))\nexcept OSError:\n    pass\n"
    result = run_without_network(code)
    assert result.returncode == 77 and "NETWORK" in result.stdout
