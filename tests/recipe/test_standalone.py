"""An exported Qwen v1 folder in a process that knows nothing of this toolkit, against the toolkit itself."""

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
BARE = """
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
model.save_pretrained(out + "/again")
tokenizer.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", dtype=torch.float32, **trusting).eval()
retold = AutoTokenizer.from_pretrained(out + "/again", **trusting)
with torch.no_grad():
    logits_again = again(**prompt).logits
tensors = {"logits": logits, "hidden": hidden, "logits_again": logits_again, "generated": generated}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out + "/told.safetensors")
text = "<|im_start|>e\\u0301 天<|im_end|>"
told = {
    "modules": [type(thing).__module__ for thing in (config, tokenizer, model, body, again, retold)],
    "toolkit": sorted({"errors", "qwen_model"} & set(sys.modules)),
    "prompt": prompt["input_ids"][0].tolist(),
    "chat": model.chat(tokenizer, question, None, **greedy)[0],
    "stream": list(model.chat_stream(tokenizer, question, None, **greedy))[-1],
    "ends": model.generation_config.eos_token_id,
    "auto_map": list(config.auto_map),
    "ids": [tokenizer(text).input_ids, retold(text).input_ids],
    "decoded": tokenizer.decode(tokenizer(text).input_ids),
}
print(json.dumps(told))
"""


@pytest.fixture
def folder(any_golden: Golden, tmp_path: Path) -> Path:
    """An exported checkpoint in several shards, in a folder whose name is no Python name."""
    folder = copy_checkpoint(tmp_path / "my-model v1.5", any_golden.tiny)
    source = open_checkpoint(any_golden.tiny)
    (folder / "model.safetensors").unlink()
    save_source(source, folder, max(source.nbytes(name) for name in source.names()))
    write_code(folder)
    write_chat_template(folder)
    write_generation_config(folder)
    return folder


def run_bare(folder: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(folder), str(out), QUESTION],
        cwd=out, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def test_it_answers_as_with_the_toolkit(any_golden: Golden, folder: Path, tmp_path: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    told = run_bare(folder, tmp_path / "out")
    assert told["toolkit"] == [] and all(name.startswith("transformers_modules.") for name in told["modules"])

    tokenizer = QWenTokenizer.from_pretrained(any_golden.tiny)
    model = QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).eval()
    # A random model also likes rows of the vocabulary that no token has, which cannot be decoded.
    greedy = GREEDY | {"suppress_tokens": list(range(len(tokenizer), model.config.vocab_size))}
    prompt = encode_prompt(render_prompt([Turn("user", QUESTION)], QWEN_V1), tokenizer)
    assert told["prompt"] == prompt
    tensors = load_file(tmp_path / "out" / "told.safetensors")
    ids = torch.tensor([prompt])
    for name in ("logits", "logits_again"):
        assert_close(tensors[name], model(ids).logits, 1e-6, name)
    assert_close(tensors["hidden"], model.transformer(ids).last_hidden_state, 1e-6, "hidden states")
    ends = [tokenizer.im_end_id, tokenizer.eod_id]
    assert told["ends"] == ends
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, **greedy)
    assert torch.equal(tensors["generated"], generated)
    model.generation_config.eos_token_id = ends
    assert told["chat"] == model.chat(tokenizer, QUESTION, None, **greedy)[0]
    assert told["stream"] == list(model.chat_stream(tokenizer, QUESTION, None, **greedy))[-1]
    control = tokenizer.encode("<|im_start|>é 天<|im_end|>", allowed_special="all")
    assert told["ids"] == [control, control], "servers hand over whole prompts"
    assert told["decoded"] == "<|im_start|>é 天<|im_end|>"
    assert told["auto_map"] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"], "vLLM looks there"


def test_without_leave_it_is_not_run(folder: Path, tmp_path: Path) -> None:
    """The negative control: a bare process knows the folder by its code alone."""
    script = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder)],
        cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr
