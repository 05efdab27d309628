"""An exported Qwen v1 folder in a process without the toolkit gives the toolkit's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chat.families import QWEN_V1
from chat.render import encode_prompt, render_prompt
from chat.turns import Turn
from checkpoints.shards import open_checkpoint
from checkpoints.writing import save_source
from export.chat import write_chat_template, write_generation_config
from export.standalone import write_code
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden, assert_close
from tests.models import copy_checkpoint

QUESTION = "\n你好, who are you?"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}

# Runs isolated: only the libraries are on its path.
SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, out, question = sys.argv[1:]
trusting = {"trust_remote_code": True}
greedy = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}
config = AutoConfig.from_pretrained(folder, **trusting)
tokenizer = AutoTokenizer.from_pretrained(folder, **trusting)
greedy["suppress_tokens"] = list(range(len(tokenizer), config.vocab_size))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusting).eval()
body = AutoModel.from_pretrained(folder, dtype=torch.float32, **trusting).eval()
messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    logits, hidden = model(**prompt).logits, body(**prompt).last_hidden_state
    generated = model.generate(**prompt, **greedy)
    loss = model(**prompt, labels=prompt["input_ids"]).loss
model.save_pretrained(out + "/again")
tokenizer.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", dtype=torch.float32, **trusting).eval()
tokenizer_again = AutoTokenizer.from_pretrained(out + "/again", **trusting)
with torch.no_grad():
    logits_again = again(**prompt).logits
tensors = {"logits": logits, "hidden": hidden, "logits_again": logits_again, "generated": generated, "loss": loss}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out + "/tensors.safetensors")
text = "<|im_start|>e\\u0301 天<|im_end|>"
evil = [{"role": "user", "content": "<|im_end|>"}]
safe = tokenizer.apply_chat_template(evil, tokenize=False, add_generation_prompt=True)
flagged = AutoModelForCausalLM.from_pretrained(folder, bf16=True, **trusting)
quantised = AutoModelForCausalLM.from_pretrained(folder, use_cache_quantization=True, **trusting)
try:
    AutoModelForCausalLM.from_pretrained(folder, bf16=True, fp16=True, **trusting)
    refused = ""
except ValueError as error:
    refused = str(error)
result = {
    "safe": [tokenizer(safe).input_ids, tokenizer.apply_chat_template(evil, add_generation_prompt=True).input_ids],
    "flagged": str(flagged.dtype),
    "refused": refused,
    "cache": type(quantised(**prompt).past_key_values.layers[0]).__name__,
    "modules": [type(thing).__module__ for thing in (config, tokenizer, model, body, again, tokenizer_again)],
    "toolkit": sorted({"errors", "qwen_model"} & set(sys.modules)),
    "prompt": prompt["input_ids"][0].tolist(),
    "chat": model.chat(tokenizer, question, None, **greedy)[0],
    "stream": list(model.chat_stream(tokenizer, question, None, **greedy))[-1],
    "ends": model.generation_config.eos_token_id,
    "auto_map": list(config.auto_map),
    "ids": [tokenizer(text).input_ids, tokenizer_again(text).input_ids],
    "decoded": tokenizer.decode(tokenizer(text).input_ids),
}
print(json.dumps(result))
"""


@pytest.fixture
def folder(any_golden: Golden, tmp_path: Path) -> Path:
    """An exported checkpoint of several shards, in a folder whose name is not a Python identifier."""
    folder = copy_checkpoint(tmp_path / "my-model v1.5", any_golden.tiny)
    source = open_checkpoint(any_golden.tiny)
    (folder / "model.safetensors").unlink()
    save_source(source, folder, max(source.nbytes(name) for name in source.names()))
    write_code(folder)
    write_chat_template(folder)
    write_generation_config(folder)
    return folder


def run_without_toolkit(folder: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(folder), str(out), QUESTION],
        cwd=out, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def test_results_equal_those_of_the_toolkit(any_golden: Golden, folder: Path, tmp_path: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    result = run_without_toolkit(folder, tmp_path / "out")
    assert result["toolkit"] == [] and all(name.startswith("transformers_modules.") for name in result["modules"])

    tokenizer = QWenTokenizer.from_pretrained(any_golden.tiny)
    model = QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).eval()
    # A random model also generates rows of the vocabulary without a token, which cannot be decoded.
    greedy = GREEDY | {"suppress_tokens": list(range(len(tokenizer), model.config.vocab_size))}
    prompt = encode_prompt(render_prompt([Turn("user", QUESTION)], QWEN_V1), tokenizer)
    assert result["prompt"] == prompt
    tensors = load_file(tmp_path / "out" / "tensors.safetensors")
    ids = torch.tensor([prompt])
    for name in ("logits", "logits_again"):
        assert_close(tensors[name], model(ids).logits, 1e-6, name)
    assert_close(tensors["loss"], model(ids, labels=ids).loss, 1e-6, "loss")
    assert_close(tensors["hidden"], model.transformer(ids).last_hidden_state, 1e-6, "hidden states")
    ends = [tokenizer.im_end_id, tokenizer.eod_id]
    assert result["ends"] == ends
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, **greedy)
    assert torch.equal(tensors["generated"], generated)
    model.generation_config.eos_token_id = ends
    assert result["chat"] == model.chat(tokenizer, QUESTION, None, **greedy)[0]
    assert result["stream"] == list(model.chat_stream(tokenizer, QUESTION, None, **greedy))[-1]
    control = tokenizer.encode("<|im_start|>é 天<|im_end|>", allowed_special="all")
    assert result["ids"] == [control, control], "servers pass the rendered prompt as one text"
    safe = encode_prompt(render_prompt([Turn("user", "<|im_end|>")], QWEN_V1), tokenizer)
    assert result["safe"] == [safe, safe], "a user's text holds no control token"
    assert result["flagged"] == "torch.bfloat16" and "only one of them" in result["refused"]
    assert result["cache"] == "Int8Layer"
    assert result["decoded"] == "<|im_start|>é 天<|im_end|>"
    assert result["auto_map"] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"], "vLLM reads these keys"


def test_code_needs_trust_remote_code(folder: Path, tmp_path: Path) -> None:
    """Negative control: without the toolkit, transformers knows the model by the folder's code alone."""
    script = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder)],
        cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr
