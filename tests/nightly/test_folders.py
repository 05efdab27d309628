"""Folders made of the real small model, whose tokenizer is not one of Qwen: ids, and logits in transformers 4.57."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from loading.checkpoint import load_checkpoint, load_model
from loading.tokenizer import PROBES
from tests.merging import merge_well
from tests.models import CONVERSATIONS
from tests.older_transformers import run_older

TEXTS = [*PROBES, *(text for conversation in CONVERSATIONS for _, text in conversation)]
IDS = [1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198]

OLDER = """
import json, pathlib, sys
import torch
from transformers import AutoModelForCausalLM

[request] = json.loads(pathlib.Path(sys.argv[1]).read_text())
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    answer = {"last": model(torch.tensor([request["ids"]])).logits[0, -1].tolist(), "theta": model.config.rope_theta}
pathlib.Path(sys.argv[2]).write_text(json.dumps(answer))
"""


def test_ids_are_those_of_the_models_own_file(small_model: Path) -> None:
    stated = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    tokenizer = load_checkpoint(str(small_model)).tokenizer
    assert [tokenizer(text).input_ids for text in TEXTS] == [stated.encode(text).ids for text in TEXTS]


def test_merged_model_computes_the_same_before_transformers_5(small_model: Path, tuned: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_well("--adapter", tuned, "--base", small_model, "--output", merged, "--no_verify")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (small_model / name).read_bytes(), name
    answer = run_older(OLDER, [{"folder": str(merged), "ids": IDS}], tmp_path)
    assert answer["theta"] == 100_000
    with torch.no_grad():
        expected = load_model(load_checkpoint(str(merged)), torch.float32)(torch.tensor([IDS])).logits[0, -1]
    assert (torch.tensor(answer["last"]) - expected).abs().max() <= 1e-3
