"""Results open in the last transformers before 5, with equal ids and logits, and as llama.cpp's converter reads them.

One process with those libraries opens all folders.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loading.checkpoint import load_checkpoint, load_model
from loading.tokenizer import PROBES
from tests.bases import ROPE_THETA, train, write_published, write_v1, write_with_foreign_tokenizer
from tests.commands import run_here
from tests.merging import merge_well
from tests.models import change_json, write_conversations
from tests.older_transformers import run_older

IDS = [701, 3, 80, 200, 5, 6, 7, 8, 702, 300, 400, 500]
MESSAGES = [{"role": "user", "content": "Hi"}]

OLDER = """
import json, pathlib, sys
import gguf, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

def in_transformers(folder, texts, messages, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "ids": [tokenizer(text).input_ids for text in texts],
        "prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id,
        "stops": GenerationConfig.from_pretrained(folder).eos_token_id,
        "rope_theta": model.config.rope_theta,
        "logits": model(torch.tensor([ids])).logits[0].tolist(),
    }

def in_converter(folder, texts):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config["model_type"].upper()], config["num_hidden_layers"])
    header = (pathlib.Path(folder) / "model.safetensors").read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.vocab
    special = gguf.SpecialVocab(pathlib.Path(folder), load_merges=True)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "unknown": [n for n in header if n != "__metadata__" and names.get_name(n, (".weight", ".bias")) is None],
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "missing": [key for key in ("max_position_embeddings", "hidden_size", "intermediate_size", "rms_norm_eps",
                                    "num_attention_heads", "num_key_value_heads") if config.get(key) is None],
        "fits": max(vocabulary.values()) < config.get("vocab_size", len(vocabulary)),
        "pre_type": [tokenizer.encode(text) for text in texts],
        "added": sorted((id_, str(token), token.special) for id_, token in tokenizer.added_tokens_decoder.items()),
        "merges": len(special.merges), "special": special.special_token_ids, "template": bool(special.chat_template),
    }

answers = []
with torch.no_grad():
    for request in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        folder, texts = request["folder"], request["texts"]
        answer = in_transformers(folder, texts, request["messages"], request["ids"])
        answers.append(answer | {"converter": None if request["is_packed"] else in_converter(folder, texts)})
pathlib.Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@dataclass(frozen=True)
class Opened:
    """A result's folder, and what the older libraries read in it."""

    folder: Path
    answer: dict[str, Any]


def call(name: str, *arguments: object) -> None:
    assert run_here(importlib.import_module(name).main, name, arguments) == 0


def write_results(folder: Path) -> dict[str, Path]:
    """Write a result of every command that writes a checkpoint; return the folders by name."""
    base, v1 = write_published(folder / "base", hidden_size=64), write_v1(folder / "v1")
    train(base, folder / "adapter", "--use_lora", "--trainable_embeddings", "full", "--lora_r", "2")
    merge_well("--adapter", folder / "adapter", "--base", base, "--output", folder / "merged", "--no_verify")
    call("scripts.convert_layout", v1, folder / "converted")
    flags = ("--data_path", write_conversations(folder / "data.json"), "--samples", 8, "--format", "nf4")
    call("scripts.quantize", "--model_name_or_path", base, "--output_dir", folder / "nf4", *flags)
    foreign = write_with_foreign_tokenizer(folder / "foreign")
    rope = {"rope_theta": ROPE_THETA, "rope_type": "default"}  # all that transformers 5 writes
    change_json(base / "config.json", rope_theta=None, rope_parameters=rope)
    return {
        "full": train(base, folder / "full"),
        "full, foreign tokenizer": train(foreign, folder / "full-foreign"),
        "merged": folder / "merged",
        "converted": folder / "converted",
        "quantised": folder / "nf4",
    }


NAMES = ["full", "full, foreign tokenizer", "merged", "converted", "quantised"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    work = tmp_path_factory.mktemp("results")
    folders = write_results(work)
    common = {"texts": PROBES, "messages": MESSAGES, "ids": IDS}
    requests = [{"folder": str(path), "is_packed": path.name == "nf4", **common} for path in folders.values()]
    answers = run_older(OLDER, requests, work)
    return {name: Opened(path, answer) for (name, path), answer in zip(folders.items(), answers, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_before_5_computes_the_same(results: dict[str, Opened], name: str) -> None:
    folder, answer = results[name].folder, results[name].answer
    checkpoint = load_checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer
    assert answer["ids"] == [tokenizer(text).input_ids for text in PROBES]
    assert answer["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" or name == "converted"
    assert (answer["pad"], answer["end"], answer["stops"]) == (700, 702, [702, 700])
    with torch.no_grad():
        expected = load_model(checkpoint, torch.float32)(torch.tensor([IDS])).logits[0]
    # On a CPU bitsandbytes itself computes with rounded scales; this toolkit with those that are stored.
    tolerance = 0.1 if name == "quantised" else 1e-4
    assert (torch.tensor(answer["logits"]) - expected).abs().max() <= tolerance
    assert answer["rope_theta"] == (10000 if name == "converted" else ROPE_THETA)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quantised"])
def test_converter_of_llama_cpp_finds_what_it_reads(results: dict[str, Opened], name: str) -> None:
    """Names of tensors, keys of the config, and the vocabulary with its split (known by the ids of texts)."""
    opened = results[name]
    read = opened.answer["converter"]
    assert (read["unknown"], read["missing"], read["fits"], read["template"]) == ([], [], True, True)
    assert read["pre_type"] == opened.answer["ids"]
    assert read["special"]["eos"] == 702 and read["special"]["pad"] == 700
    stated = json.loads((opened.folder / "tokenizer.json").read_text())
    assert read["merges"] == len(stated["model"]["merges"])
    assert read["added"] == sorted([each["id"], each["content"], each["special"]] for each in stated["added_tokens"])
    assert read["rope_theta"] == (10000 if name == "converted" else ROPE_THETA)
