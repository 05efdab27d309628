"""The quickstart: the tuned model gives the trained answers, word for word."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from chat.render import encode_prompt, render_prompt
from chat.turns import Turn
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests import fork_server
from tests.commands import environment, read_json
from tests.golden import REPO

IDENTITY = REPO / "examples" / "identity.json"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results in a checkout of links."""
    checkout = tmp_path_factory.mktemp("checkout")
    fork_server.link_checkout(checkout)
    return checkout / "build" / "quickstart"


@pytest.fixture(scope="module")
def quickstart(work: Path) -> subprocess.CompletedProcess[str]:
    """One run of the script. It installs nothing, because the environment is up to date."""
    return subprocess.run(
        ["bash", work.parents[1] / "scripts" / "quickstart.sh"],
        cwd=REPO, env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def questions() -> list[tuple[list[Turn], str]]:
    """Return every answer in the file, with the turns before it."""
    pairs = []
    for record in json.loads(IDENTITY.read_text(encoding="utf-8")):
        turns = [Turn(turn["from"], turn["value"]) for turn in record["conversations"]]
        pairs += [(turns[:index], turn.content) for index, turn in enumerate(turns) if turn.role == "assistant"]
    return pairs


@torch.no_grad()
def answers(model_folder: Path, adapter: Path | None, prompts: list[list[Turn]]) -> list[str]:
    """Generate greedy answers without repetition penalty, all prompts in one batch, padded on the left."""
    checkpoint = load_checkpoint(str(model_folder))
    model = load_for_inference(checkpoint, None if adapter is None else str(adapter))
    rows = [encode_prompt(render_prompt(turns, checkpoint.family), checkpoint.tokenizer) for turns in prompts]
    longest, pad = max(map(len, rows)), checkpoint.end_ids[-1]
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=120, do_sample=False,
        repetition_penalty=1.0, eos_token_id=checkpoint.end_ids, pad_token_id=pad,
    )  # fmt: skip
    return [checkpoint.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in output[:, longest:]]


def test_quickstart_prints_the_trained_answer(quickstart: subprocess.CompletedProcess[str]) -> None:
    assert quickstart.returncode == 0, quickstart.stderr
    turns = read_json(IDENTITY)[0]["conversations"]
    assert f"\nQuestion: {turns[0]['value']}\nAnswer:   {turns[1]['value']}\n" in quickstart.stdout
    last = quickstart.stdout.rstrip().splitlines()[-1]
    assert last.lstrip().startswith("sh finetune/finetune_lora_single_gpu.sh -m "), "the command for real weights"
    for command in ("finetune.py", "merge_lora.py", "-m scripts.ask"):
        assert f"\n+ python {command} " in quickstart.stderr, command


@pytest.mark.parametrize(("model", "adapter"), [("tiny-qwen", "adapter"), ("merged", None)], ids=["adapter", "merged"])
def test_trained_answers_are_generated(
    quickstart: subprocess.CompletedProcess[str], work: Path, model: str, adapter: str | None
) -> None:
    assert quickstart.returncode == 0, quickstart.stderr
    pairs = questions()
    assert len(pairs) >= 50
    generated = answers(work / model, adapter and work / adapter, [turns for turns, _ in pairs])
    wrong = [(got, expected) for (_, expected), got in zip(pairs, generated, strict=True) if got != expected]
    assert len(wrong) <= 0.05 * len(pairs), wrong


def test_untrained_model_generates_none_of_the_answers(
    quickstart: subprocess.CompletedProcess[str], work: Path
) -> None:
    """The answers come from training, not from the question."""
    assert quickstart.returncode == 0, quickstart.stderr
    pairs = questions()[:8]
    generated = answers(work / "tiny-qwen", None, [turns for turns, _ in pairs])
    assert not [got for (_, expected), got in zip(pairs, generated, strict=True) if got == expected]
