"""A merged folder against base + adapters: honest merges pass, and one wrong tensor is caught and named."""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from checkpoints.adapter import read_adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, save_json
from checkpoints.fold import WeightedAdapter, plan_fold
from checkpoints.shards import open_checkpoint
from checkpoints.source import InDtype
from checkpoints.writing import save_source
from errors import ConfigError
from export.layouts.config import config_to_qwen2
from export.layouts.tensors import tensors_to_qwen2
from export.verify.compare import Verification, check_verifiable, describe, verify_merge
from export.verify.prompts import PROMPTS, prompt_ids
from qwen_model.register import register_qwen
from tests.golden import run_python
from tests.models import TINY, change_json, copy_checkpoint, copy_tied, write_later_checkpoint
from tests.quantized import write_awq, write_gptq, write_wide

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINEAR = {
    "qwen": ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LINEAR["qwen3"] = LINEAR["qwen2"]
EMBEDDING = {"qwen": "wte", "qwen2": "embed_tokens", "qwen3": "embed_tokens"}


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding and head come in as many pieces as those of real models."""
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 100 * 32)


def make_base(folder: Path, family: str, tied: bool = False) -> Path:
    """A tiny checkpoint whose biases and norms are not all alike."""
    if family == "qwen":
        copy_tied(folder) if tied else copy_checkpoint(folder)
    else:
        write_later_checkpoint(folder, family, tied=tied)
    generator = torch.Generator().manual_seed(3)
    change(
        folder,
        lambda tensors: {
            name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
            for name, tensor in tensors.items()
        },
    )
    return folder


def make_adapter(base: Path, folder: Path, size: float = 0.1, seed: int = 1, **options: Any) -> Path:
    """A LoRA adapter of which every trainable value is random, saved by peft."""
    register_qwen()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = {"target_modules": LINEAR[model.config.model_type]}
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | targets | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
        peft_model.save_pretrained(folder)
    return folder


def weighted(*adapters: Path) -> list[WeightedAdapter]:
    return [WeightedAdapter(read_adapter(folder)) for folder in adapters]


def merge(
    base: Path, adapters: list[WeightedAdapter], merged: Path, dtype: str = "float32", layout: str | None = None
) -> Path:
    """Write the merged folder, with the base's tokenizer."""
    config = load_json(base / "config.json")
    fold = plan_fold(open_dequantized(base, torch.float16), config, adapters)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if fold.untied:
        config["tie_word_embeddings"] = False
    source = InDtype(fold, DTYPES[dtype])
    shutil.copytree(base, merged, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_source(source if layout is None else tensors_to_qwen2(source, config), merged, 10**9)
    save_json(config if layout is None else config_to_qwen2(config), merged / "config.json")
    return merged


def verify(base: Path, adapters: list[WeightedAdapter], merged: Path) -> Verification:
    config = load_json(base / "config.json")
    ids = prompt_ids(merged, config["vocab_size"])
    return verify_merge(open_dequantized(base, torch.float16), config, adapters, merged, ids)


def assert_passes(base: Path, adapters: list[WeightedAdapter], merged: Path) -> Verification:
    found = verify(base, adapters, merged)
    assert not found.faults, describe(found)
    assert 0 < found.largest_difference <= 2 * found.largest_explained + 1e-4
    return found


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a folder with one weight file."""
    file = folder / "model.safetensors"
    tensors = edit({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------------------------- honest merges

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "large": {"size": 1.0},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "use_rslora": True},
    "bias of B": {"lora_bias": True},
    "embedding and head in full": {"modules_to_save": ["EMBEDDING", "lm_head"]},
    "a norm in full": {"modules_to_save": ["NORM"]},
    "trained tokens": {"trainable_token_indices": {"EMBEDDING": [700, 3, 250]}},
    "trained tokens of both": {"trainable_token_indices": {"EMBEDDING": [700, 3], "lm_head": [5]}},
    "dora on embedding and head": {"target_modules": ["EMBEDDING", "lm_head"], "use_dora": True},
}


def named(kind: str, family: str) -> dict[str, Any]:
    text = json.dumps(KINDS[kind]).replace("EMBEDDING", EMBEDDING[family])
    options: dict[str, Any] = json.loads(text.replace("NORM", "ln_f" if family == "qwen" else "model.norm"))
    if kind == "bias of B":
        options["target_modules"] = ["c_attn"] if family == "qwen" else ["q_proj", "v_proj"]
    return options


def test_families_that_cannot_be_run_block_by_block_are_refused() -> None:
    check_verifiable("qwen3")
    with pytest.raises(ConfigError, match=r"of the type 'llama' cannot be verified, only qwen, qwen2, qwen3"):
        check_verifiable("llama")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "dtype"), [("qwen", "float16"), ("qwen2", "bfloat16"), ("qwen3", "float32")])
def test_honest_merges_pass(tmp_path: Path, family: str, dtype: str, kind: str) -> None:
    if kind == "bias of B" and family == "qwen3":
        kind = "lora"  # none of its layers has a bias
    base = make_base(tmp_path / "base", family)
    adapters = weighted(make_adapter(base, tmp_path / "adapter", **named(kind, family)))
    found = assert_passes(base, adapters, merge(base, adapters, tmp_path / "merged", dtype))
    assert found.prompts == len(PROMPTS) == 12 and str(found.dtype) == f"torch.{dtype}"
    if dtype != "float32":
        assert found.largest_difference == pytest.approx(found.largest_explained, rel=0.1)


@pytest.mark.parametrize(
    "kind", ["lora", "trained tokens", "trained tokens of both", "dora on embedding and head", "a norm in full"]
)
@pytest.mark.parametrize("family", ["qwen", "qwen2"])
def test_tied_bases_pass(tmp_path: Path, family: str, kind: str) -> None:
    base = make_base(tmp_path / "base", family, tied=True)
    adapters = weighted(make_adapter(base, tmp_path / "adapter", **named(kind, family)))
    assert_passes(base, adapters, merge(base, adapters, tmp_path / "merged", "bfloat16"))


def test_several_adapters_pass_with_their_weights_only(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    first = make_adapter(base, tmp_path / "a", **named("dora on embedding and head", "qwen2"))
    second = make_adapter(base, tmp_path / "b", seed=2, bias="all", modules_to_save=["embed_tokens"])
    adapters = [replace(each, weight=weight) for each, weight in zip(weighted(first, second), (0.7, -0.4), strict=True)]
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    assert_passes(base, adapters, merged)
    assert verify(base, [adapters[0], replace(adapters[1], weight=-0.3)], merged).faults


@pytest.mark.parametrize("method", ["gptq", "gptq act-order", "awq", "nf4"])
def test_merges_into_quantised_bases_pass(tmp_path: Path, method: str) -> None:
    plain = write_wide(tmp_path / "plain")
    if method == "nf4":
        register_qwen()
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(tmp_path / "base")
    elif method == "awq":
        write_awq(plain, tmp_path / "base")
    else:
        write_gptq(plain, tmp_path / "base", desc_act=method != "gptq")
    adapters = weighted(make_adapter(plain, tmp_path / "adapter"))
    assert_passes(tmp_path / "base", adapters, merge(tmp_path / "base", adapters, tmp_path / "merged", "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_in_another_layout_passes(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", "qwen")
    adapters = weighted(make_adapter(base, tmp_path / "adapter", use_dora=True))
    merged = merge(base, adapters, tmp_path / "merged", dtype, layout="qwen2")
    assert load_json(merged / "config.json")["model_type"] == "qwen2"
    assert_passes(base, adapters, merged)
    zero(merged, "model.layers.1.self_attn.k_proj.weight")
    assert_names(verify(base, adapters, merged), "model.layers.1")


def peft_model(base: Path, adapter: Path) -> Any:
    register_qwen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
        ).eval()


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_what_peft_merges_passes(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head"])
    shutil.copytree(base, tmp_path / "merged")
    peft_model(base, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_passes(base, weighted(adapter), tmp_path / "merged")


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_figures_are_those_of_whole_models(tmp_path: Path, family: str) -> None:
    """Prompts one by one through peft's model and through what transformers loads from the folder."""
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", bias="all")
    merged = merge(base, weighted(adapter), tmp_path / "merged", "bfloat16")
    found = verify(base, weighted(adapter), merged)
    models = (peft_model(base, adapter), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval())
    ids = prompt_ids(merged, 768)
    with torch.no_grad():
        logits = [torch.cat([model(torch.tensor([each])).logits[0] for each in ids]) for model in models]
    assert found.tokens == len(logits[0]) == sum(len(each) for each in ids)
    assert found.largest_difference == pytest.approx((logits[0] - logits[1]).abs().max().item(), rel=1e-3)
    equal = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    assert found.equal_tokens == pytest.approx(equal) and equal > 0.5


def test_the_original_scripts_adapter_passes(tmp_path: Path) -> None:
    adapters = weighted(TINY.parent / "training" / "lora_chat_adapter")
    merged = merge(TINY, adapters, tmp_path / "merged")
    assert_passes(TINY, adapters, merged)
    zero(merged, "transformer.h.0.attn.c_attn.weight")
    assert_names(verify(TINY, adapters, merged), "transformer.h.0")


# ---------------------------------------------------------------------------------------------------------- corruptions


def zero(folder: Path, name: str) -> None:
    change(folder, lambda tensors: {**tensors, name: torch.zeros_like(tensors[name])})


def assert_names(found: Verification, name: str) -> None:
    """One part is named, besides the logits."""
    others = [fault for fault in found.faults if not fault.startswith("logits:")]
    assert len(others) == 1 and others[0].startswith(f"{name}: "), found.faults
    assert "DIFFERS" in describe(found) and others[0] in describe(found)


def zeroed(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def scaled(tensor: Tensor) -> Tensor:
    return tensor * 1.05


def swapped(tensor: Tensor) -> Tensor:
    tensor[[3, 8]] = tensor[[8, 3]]
    return tensor


def one_more(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] += 1
    return tensor


def slightly(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] += 0.1
    return tensor


def not_a_number(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] = math.nan
    return tensor


CORRUPTIONS: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
    "qwen": [
        ("transformer.h.1.attn.c_attn.weight", zeroed),
        ("transformer.h.0.attn.c_attn.weight", swapped),
        ("transformer.h.1.attn.c_attn.bias", one_more),
        ("transformer.h.1.mlp.w2.weight", scaled),
        ("transformer.h.0.ln_1.weight", slightly),
        ("transformer.ln_f.weight", slightly),
        ("transformer.wte.weight", zeroed),
        ("lm_head.weight", swapped),
    ],
    "qwen2": [
        ("model.layers.0.self_attn.o_proj.weight", scaled),
        ("model.layers.1.self_attn.q_proj.weight", scaled),
        ("model.layers.1.self_attn.q_proj.weight", swapped),
        ("model.layers.1.self_attn.v_proj.bias", one_more),
        ("model.layers.0.self_attn.k_proj.bias", one_more),
        ("model.layers.0.mlp.down_proj.weight", swapped),
        ("model.layers.1.mlp.gate_proj.weight", not_a_number),
        ("model.layers.1.post_attention_layernorm.weight", slightly),
        ("lm_head.weight", one_more),
    ],
    "qwen3": [
        ("model.layers.0.self_attn.q_norm.weight", slightly),
        ("model.layers.1.self_attn.v_proj.weight", scaled),
        ("model.layers.1.mlp.up_proj.weight", zeroed),
        ("model.norm.weight", scaled),
        ("model.embed_tokens.weight", swapped),
        ("lm_head.weight", zeroed),
    ],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CORRUPTIONS)
def test_one_wrong_tensor_is_named(tmp_path: Path, family: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", dtype)
    assert_passes(base, adapters, merged)
    before = {name: tensor.clone() for name, tensor in load_file(merged / "model.safetensors").items()}
    for name, corrupt in CORRUPTIONS[family]:
        changed = corrupt(before[name].clone())
        assert not torch.equal(changed, before[name])
        save_file({**before, name: changed}, merged / "model.safetensors", metadata={"format": "pt"})
        part = name.removesuffix(".weight")
        if ".layers." in name or ".h." in name:
            part = ".".join(name.split(".")[:3])
        assert_names(verify(base, adapters, merged), part)


def test_a_forgotten_factor_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapters = weighted(make_adapter(base, tmp_path / "adapter", size=0.02))
    whole = adapters[0].adapter
    edits = {name: edit for name, edit in whole.edits.items() if name != "model.layers.1.mlp.up_proj.weight"}
    partial = [WeightedAdapter(replace(whole, edits=edits))]
    merged = merge(base, partial, tmp_path / "merged", "bfloat16")
    assert_passes(base, partial, merged)
    assert_names(verify(base, adapters, merged), "model.layers.1")


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_of_no_prompt_is_compared(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", "qwen2", tied)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    used = {id_ for prompt in prompt_ids(merged, 768) for id_ in prompt}
    token = max(set(range(768)) - used)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][token] *= 1.02
        return tensors

    change(merged, edit)
    found = verify(base, adapters, merged)
    assert found.faults[0].startswith(f"model.embed_tokens: row {token} is off by ")
    assert [fault.split(":")[0] for fault in found.faults[1:]] == (["lm_head"] if tied else [])


def test_a_config_that_computes_otherwise_is_caught(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen")
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    change_json(merged / "config.json", rotary_emb_base=20000)
    assert any(fault.startswith("transformer.h.0: ") for fault in verify(base, adapters, merged).faults)
    change_json(merged / "config.json", rotary_emb_base=10000, num_hidden_layers=1)
    found = verify(base, adapters, merged)
    assert found.largest_difference == math.inf and "number of layers are (960, 32, 1)" in found.faults[0]


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged")
    change(merged, lambda tensors: {**tensors, "model.norm.weight": torch.ones(31)})
    assert verify(base, adapters, merged).faults == [
        "model.norm.weight has shape (31,), config.json asks for (32,)",
    ]
    change(merged, without("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in verify(base, adapters, merged).faults
    change(base, without("model.layers.0.self_attn.o_proj.weight"))
    with pytest.raises(ConfigError, match=r"the base: model\.layers\.0\.self_attn\.o_proj\.weight is missing"):
        verify(base, adapters, merged)


# -------------------------------------------------------------------------------------------------- prompts, and memory


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_prompts_are_written_as_conversations(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = prompt_ids(base, 960)
    assert len(ids) == 12 and all(10 <= len(each) <= 64 for each in ids)
    text = tokenizer.decode(ids[4])
    assert "<|im_start|>user\n早上喝" in text
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert any(ends in each for each in ids)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from checkpoints.adapter import read_adapter
from checkpoints.fold import WeightedAdapter
from checkpoints.files import load_json
from checkpoints.shards import open_checkpoint
from export.verify.compare import verify_merge

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while watching:
        seen.append(anonymous())
        time.sleep(0.001)

def run(base, adapters, merged):
    ids = [[(7 * place + number) % 512 for place in range(10 + number)] for number in range(12)]
    given = [WeightedAdapter(read_adapter(adapter)) for adapter in adapters]
    found = verify_merge(open_checkpoint(base), load_json(Path(base) / "config.json"), given, Path(merged), ids)
    assert not found.faults, found

small, base, adapter, merged = sys.argv[1:]
run(small, [], small)  # what is imported and kept once
seen, watching = [anonymous()], True
thread = threading.Thread(target=watch)
thread.start()
run(base, [adapter], merged)
watching = False
thread.join()
print(max(seen) - seen[0])
"""


def test_memory_is_that_of_two_layers_of_each(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).to(torch.bfloat16)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters()) / 2**20
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", size=0.01)
    merged = merge(base, weighted(adapter), tmp_path / "merged", "bfloat16")
    del model
    done = run_python(["-c", MEASURE, *map(str, (TINY, base, adapter, merged))])
    assert done.returncode == 0, done.stderr
    used = float(done.stdout.splitlines()[-1])
    activations = 16
    assert 1.5 * layer < used < 4 * layer + activations < 6 * layer, f"{used:.0f} MiB, a layer is {layer:.0f} MiB"


@pytest.mark.parametrize("lost", [True, False])
def test_without_a_usable_tokenizer_ids_are_drawn(tmp_path: Path, lost: bool, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    if lost:
        for file in base.glob("token*"):
            file.unlink()
    vocabulary = 768 if lost else 100
    with caplog.at_level(logging.WARNING):
        ids = prompt_ids(base, vocabulary)
    assert "cannot be used" in caplog.text and "random tokens" in caplog.text
    assert ids == prompt_ids(base, vocabulary) and len(ids) == 12
    assert all(0 <= id_ < vocabulary for each in ids for id_ in each)


def test_prompts_are_cut_to_what_the_model_was_trained_for(tmp_path: Path) -> None:
    """Beyond it Qwen v1 changes its rotary base, which other layouts cannot."""
    base = make_base(tmp_path / "base", "qwen")
    change_json(base / "config.json", seq_length=20)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", layout="qwen2")
    assert assert_passes(base, adapters, merged).tokens == 12 * 20


def test_the_summary_says_both_figures() -> None:
    found = Verification(0.02134, 0.01877, 1.0, 0.998, 412, 12, torch.bfloat16)
    assert describe(found) == (
        "verified: 12 prompts, 412 tokens: largest logit difference 0.021 (rounding to bfloat16 explains 0.019); "
        "same next token at 100.0 % (99.8 %)"
    )
    lines = describe(replace(found, faults=[f"part {number}" for number in range(8)])).splitlines()
    assert lines[0].startswith("DIFFERS") and lines[1:] == [
        *(f"  part {number}" for number in range(5)),
        "  and 3 more",
    ]


def test_progress_ends_with_all_steps(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    steps: list[tuple[int, int]] = []
    merged = merge(base, [], tmp_path / "merged")
    config = load_json(base / "config.json")
    verify_merge(open_checkpoint(base), config, [], merged, [[1, 2, 3]], lambda *step: steps.append(step))
    assert steps == [(number, 5) for number in range(1, 6)]
