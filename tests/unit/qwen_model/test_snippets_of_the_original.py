"""The snippets of the original's README that run here, as it has them but for names of folders and short answers.

They pass ``trust_remote_code=True``: the toolkit's classes are used all the same. Its batch snippet is in
``test_prompts.py``, its keywords of ``from_pretrained`` are in ``test_old_keywords.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig

from qwen_generation_utils import decode_tokens, make_context
from qwen_model.kv_cache import Int8Layer
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.register import register_qwen
from tests.models import copy_checkpoint

register_qwen()

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chat checkpoint whose config names code, as the published ones do."""
    names = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    copied = copy_checkpoint(tmp_path / "Qwen-7B-Chat", auto_map=names)
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (copied / f"{name}.py").write_text("raise SystemExit('code of the folder ran')\n")
    return copied


@pytest.fixture
def banned() -> dict[str, Any]:
    """Ids without a token, which random weights choose."""
    return {"suppress_tokens": list(range(908, 960))}


@pytest.mark.parametrize("flags", [{}, {"bf16": True}, {"fp16": True}])
def test_quickstart_with_three_turns(folder: Path, flags: dict[str, bool], banned: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", trust_remote_code=True, **flags).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=True, **GREEDY, **banned)
    assert type(model) is QWenLMHeadModel
    history = None
    for number, question in enumerate(("你好", "给我讲一个故事。", "给这个故事起一个标题"), 1):
        response, history = model.chat(tokenizer, question, history=history)
        assert isinstance(response, str) and len(history) == number and history[-1] == (question, response)


def test_base_model(folder: Path, banned: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", trust_remote_code=True).eval()
    inputs = tokenizer("蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是", return_tensors="pt")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs, **GREEDY, **banned)
    assert tokenizer.decode(pred.cpu()[0], skip_special_tokens=True).startswith("蒙古国的首都是乌兰巴托")


def test_batch_gives_the_ids_of_the_context(folder: Path, banned: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        folder, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left", trust_remote_code=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, pad_token_id=tokenizer.pad_token_id, device_map="auto", trust_remote_code=True
    ).eval()
    model.generation_config = GenerationConfig.from_pretrained(
        folder, pad_token_id=tokenizer.pad_token_id, **GREEDY, **banned
    )
    all_raw_text = ["我想听你说爱我。", "今天我想吃点啥，甜甜的，推荐下", "我马上迟到了，怎么做才能不迟到"]
    batch_raw_text, contexts = [], []
    for q in all_raw_text:
        raw_text, context = make_context(
            tokenizer, q, system="You are a helpful assistant.",
            max_window_size=model.generation_config.max_window_size,
            chat_format=model.generation_config.chat_format,
        )  # fmt: skip
        batch_raw_text.append(raw_text)
        contexts.append(context)
    batch_input_ids = tokenizer(batch_raw_text, padding="longest")
    batch_input_ids = torch.LongTensor(batch_input_ids["input_ids"]).to(model.device)
    batch_out_ids = model.generate(
        batch_input_ids, return_dict_in_generate=False, generation_config=model.generation_config
    )
    padding_lens = [batch_input_ids[i].eq(tokenizer.pad_token_id).sum().item() for i in range(batch_input_ids.size(0))]
    batch_response = [
        decode_tokens(
            batch_out_ids[i][padding_lens[i] :], tokenizer, raw_text_len=len(batch_raw_text[i]),
            context_length=(batch_input_ids[i].size(0) - padding_lens[i]), chat_format="chatml", verbose=False,
            errors="replace",
        )
        for i in range(len(all_raw_text))
    ]  # fmt: skip
    assert [row[padding:].tolist() for row, padding in zip(batch_input_ids, padding_lens, strict=True)] == contexts
    assert sum(padding_lens) > 0
    assert batch_response == [model.chat(tokenizer, q, history=None)[0] for q in all_raw_text]


def test_quantised_cache(folder: Path, banned: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", trust_remote_code=True,
        use_cache_quantization=True, use_cache_kernel=True, use_flash_attn=False,
    ).eval()  # fmt: skip
    response, _ = model.chat(tokenizer, "Hi", history=None, **GREEDY, **banned)
    assert response
    cache = model(torch.arange(9)[None]).past_key_values
    assert {type(layer) for layer in cache.layers} == {Int8Layer}


def test_adapter(folder: Path, tmp_path: Path, banned: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    path_to_adapter = tmp_path / "adapter"
    settings = LoraConfig(r=2, target_modules=["c_attn", "w1"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(path_to_adapter)

    model = AutoPeftModelForCausalLM.from_pretrained(path_to_adapter, device_map="auto", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    response, history = model.chat(tokenizer, "你好", history=None, **GREEDY, **banned)
    assert history == [("你好", response)]
    merged_model = model.merge_and_unload()
    merged_model.save_pretrained(tmp_path / "merged", max_shard_size="2048MB", safe_serialization=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert merged.chat(tokenizer, "你好", history=None, **GREEDY, **banned)[0] == response
