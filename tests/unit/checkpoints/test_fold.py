"""Folding adapters into their base: the numbers of peft's own merging, and a refusal of what cannot be merged."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints.adapter import read_adapter
from checkpoints.files import load_json
from checkpoints.fold import Fold, WeightedAdapter, plan_fold
from checkpoints.shards import open_checkpoint
from checkpoints.source import InDtype, TensorSource
from checkpoints.writing import save_checkpoint, save_source
from errors import ConfigError
from tests.golden import Golden, assert_close

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
IDS = torch.tensor([[3, 5, 7, 1, 0, 39, 20, 3], [9, 8, 7, 6, 5, 4, 3, 2]])


def make_base(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny Qwen2 with random weights and biases: 2 layers, hidden 16, vocabulary 40."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """A LoRA adapter of which every trainable value is random, saved by peft."""
    model = Qwen2ForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12} | options))
        torch.manual_seed(1)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        peft_model.save_pretrained(folder)
    return folder


def open_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks of rows as real tensors have."""
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 48)


def plan(base: Path, *adapters: Path | tuple[Path, float]) -> Fold:
    given = [each if isinstance(each, tuple) else (each, 1.0) for each in adapters]
    weighted = [WeightedAdapter(read_adapter(folder), weight) for folder, weight in given]
    return plan_fold(open_checkpoint(base), load_json(base / "config.json"), weighted)


def read_all(source: TensorSource) -> dict[str, Tensor]:
    return {name: torch.cat([*source.blocks(name)]).to(source.dtype(name)) for name in source.names()}


def fold(base: Path, *adapters: Path | tuple[Path, float], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    folded = plan(base, *adapters)
    return read_all(folded if dtype is None else InDtype(folded, dtype))


def assert_equals_peft(base: Path, adapter: Path, merged: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = open_peft(base, adapter).merge_and_unload().state_dict()
    if HEAD not in merged:
        assert torch.equal(expected.pop(HEAD), expected[EMBEDDING]), "peft kept them tied"
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(merged[name], tensor, 1e-6, name)


def logits_of(tensors: dict[str, Tensor], base: Path) -> Tensor:
    """The logits of a plain model that holds these tensors, with its head tied where they have none."""
    config = Qwen2Config.from_pretrained(base, tie_word_embeddings=HEAD not in tensors)
    model = Qwen2ForCausalLM(config)
    lost = model.load_state_dict(tensors, strict=False)
    assert not lost.unexpected_keys and lost.missing_keys in ([], [HEAD])
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(IDS).logits


def peft_logits(base: Path, adapter: Path) -> Tensor:
    with torch.no_grad():
        return open_peft(base, adapter)(IDS).logits


# ------------------------------------------------------------------------------------------------------ equal to peft

LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
# Patterns match the end of a module's name; the first match counts, and a dot in front of a name is not needed.
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 6, "v_proj": 3, "^model.layers.1.mlp.down_proj": 5},
    "alpha_pattern": {"layers.*.q_proj": 5, "_proj": 7, "gate_proj": 30, "self_attn.o_proj": 31},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one module by a regular expression": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True},
    "rslora with patterns": {"use_rslora": True, **PATTERNS},
    "all biases": {"bias": "all"},
    "biases of LoRA's modules": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias of B and all biases": {"lora_bias": True, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True},
    "dora on the embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"], **PATTERNS},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a whole module": {"modules_to_save": ["mlp", "norm"], "target_modules": ["q_proj"]},
    "trained tokens": {"trainable_token_indices": [7, 3, 39]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "other trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [0, 1, 2]}},
    "trained tokens of the head": {"trainable_token_indices": {"lm_head": [5]}},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], **PATTERNS},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}
if "mica" in str(LoraConfig.__dataclass_fields__["init_lora_weights"].type):  # which peft knows from 0.20
    CASES["mica start"] = {"init_lora_weights": "mica"}
TIED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding in full, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [7, 3]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "all biases": {"bias": "all"},
}
# Where peft merges different changes of the two modules, or one change twice, into the shared tensor.
APART_CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LoRA on the embedding": (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on the head": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on embedding and head": (True, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "one LoRA for both": (False, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "trained tokens of the head": (True, {"trainable_token_indices": {"lm_head": [5]}}),
    "other trained tokens": (True, {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merging(tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | CASES[case])
    merged = fold(base, adapter)
    assert_equals_peft(base, adapter, merged)
    unchanged = load_file(base / "model.safetensors")
    changed = [name for name in merged if not torch.equal(merged[name], unchanged[name])]
    assert sorted(changed) == sorted(plan(base, adapter).changed), "what is counted as changed has changed"


@pytest.mark.parametrize("case", TIED_CASES)
def test_equals_pefts_merging_onto_a_tied_base(tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    assert HEAD not in load_file(base / "model.safetensors")
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | TIED_CASES[case])
    merged = fold(base, adapter)
    assert_equals_peft(base, adapter, merged)
    assert plan(base, adapter).untied == (HEAD in merged)
    # fp32 sums in another order differ by 2e-6 at logits of 20.
    assert_close(logits_of(merged, base), peft_logits(base, adapter), 2e-5, "logits of the adapter")


@pytest.mark.parametrize("case", APART_CASES)
def test_a_tied_base_is_merged_into_what_the_adapter_computes(tmp_path: Path, case: str) -> None:
    untied, options = APART_CASES[case]
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | options)
    merged = fold(base, adapter)
    assert plan(base, adapter).untied == untied == (HEAD in merged)
    assert_close(logits_of(merged, base), peft_logits(base, adapter), 2e-5, "logits of the adapter")


def test_equal_tensors_with_another_effect_untie_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    both = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(base, tmp_path / "lora", **both)
    assert not plan(base, adapter).untied
    rewrite(adapter, alpha_pattern={"lm_head": 1})
    assert plan(base, adapter).untied

    tokens = {"embed_tokens": [7, 3], "lm_head": [5, 3]}
    adapter = make_adapter(base, tmp_path / "rows", target_modules=LINEAR, trainable_token_indices=tokens)
    rewrite(adapter, lambda tensors: {name: tensor * ("delta" not in name) for name, tensor in tensors.items()})
    assert plan(base, adapter).untied


def test_a_redundant_head_of_a_tied_base_is_left_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, HEAD: torch.zeros(40, 16)}, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    assert fold(base, adapter).keys() == tensors.keys()


# ----------------------------------------------------------------------------------------------------- several adapters

BLENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "of the same modules": ({}, {"r": 3, "lora_alpha": 5}),
    "of other modules": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "lm_head"], "bias": "all"}),
    "of other kinds": ({"use_dora": True}, {"use_rslora": True, "modules_to_save": ["embed_tokens", "mlp"]}),
    "with embeddings": (
        {"trainable_token_indices": [7, 3]}, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("blend", BLENDS)
def test_weighted_adapters_add_up_their_changes(tmp_path: Path, blend: str) -> None:
    base = make_base(tmp_path / "base")
    adapters = [
        make_adapter(base, tmp_path / f"adapter{number}", **{"target_modules": LINEAR} | options)
        for number, options in enumerate(BLENDS[blend])
    ]
    alone = [open_peft(base, adapter).merge_and_unload().state_dict() for adapter in adapters]
    plain = load_file(base / "model.safetensors")
    merged = fold(base, (adapters[0], 0.7), (adapters[1], -0.3))
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        expected = tensor + 0.7 * (alone[0][name] - tensor) - 0.3 * (alone[1][name] - tensor)
        assert_close(merged[name], expected, 1e-6, name)
    assert_same(fold(base, (adapters[0], 1.0)), fold(base, adapters[0]))


def test_a_weight_of_nothing_is_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, modules_to_save=["lm_head"])
    assert_same(fold(base, (adapter, 0.0)), load_file(base / "model.safetensors"))


def test_tokens_trained_for_a_tied_embedding_serve_the_head_that_another_adapter_unties(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    tokens = make_adapter(base, tmp_path / "tokens", target_modules=LINEAR, trainable_token_indices=[7])
    head = make_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    merged, alone = fold(base, tokens, head), fold(base, head)
    change = fold(base, tokens)[EMBEDDING][7] - load_file(base / "model.safetensors")[EMBEDDING][7]
    assert change.any()
    assert_close(merged[HEAD][7], alone[HEAD][7] + change, 1e-6, HEAD)
    assert torch.equal(merged[HEAD][8], alone[HEAD][8])


# --------------------------------------------------------------------------------------------- forms of adapter files


def rewrite(adapter: Path, change: Change | None = None, **config: Any) -> None:
    """Change a saved adapter's tensors and its config."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors) if change else tensors, file)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(load_json(path) | config))


def test_files_with_the_adapters_name_mean_the_same(tmp_path: Path) -> None:
    def with_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for end in ("lora_A.weight", "lora_B.weight"):
                name = name.replace(end, end.replace(".", ".default."))
            if name.endswith(("trainable_tokens_delta", "lora_magnitude_vector")):
                name += ".default"
            if ".mlp." in name and "lora" not in name:
                name = name.replace(".mlp.", ".mlp.modules_to_save.default.")
            renamed[name] = tensor
        return renamed

    base = make_base(tmp_path / "base")
    options = {"use_dora": True, "modules_to_save": ["mlp"], "trainable_token_indices": [1, 2]}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **options)
    expected = fold(base, adapter)
    before = load_file(adapter / "adapter_model.safetensors")
    rewrite(adapter, with_name)
    assert not before.keys() & load_file(adapter / "adapter_model.safetensors").keys()
    assert_same(fold(base, adapter), expected)


def test_a_pickled_adapter_means_the_same(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    expected = fold(base, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_same(fold(base, adapter), expected)


def test_a_sharded_base_gives_the_same_tensors(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    expected = fold(base, adapter)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    assert len(save_checkpoint(tensors.items(), base, max_shard_size=4000)) > 3
    assert_same(fold(base, adapter), expected)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_cast_once_from_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, trainable_token_indices=[2])
    rewrite(adapter, lambda tensors: {name: tensor.float() * 1.001 for name, tensor in tensors.items()})
    exact = fold(base, adapter, dtype=torch.float32)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert_same(fold(base, adapter), {name: tensor.to(dtype) for name, tensor in exact.items()})

    name = "model.layers.0.mlp.down_proj.weight"
    stem = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    lora = load_file(adapter / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")[name]
    delta = 3 * lora[f"{stem}B.weight"].double() @ lora[f"{stem}A.weight"].double()
    assert_close(exact[name], (stored.double() + delta).float(), 1e-6, name)
    assert not torch.equal(exact[name].to(dtype), stored + delta.to(dtype)), "rounding twice would show"


def test_what_is_not_a_float_keeps_its_type(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    tensors = load_file(base / "model.safetensors") | {"model.table": torch.arange(3)}
    save_file(tensors, base / "model.safetensors")
    merged = fold(base, adapter, dtype=torch.float16)
    assert torch.equal(merged.pop("model.table"), torch.arange(3))
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


def test_the_base_on_disk_is_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, modules_to_save=["lm_head"], bias="all")
    files = (base / "model.safetensors", adapter / "adapter_model.safetensors")
    before = [file.read_bytes() for file in files]
    folded = plan(base, adapter)
    assert_same(read_all(folded), read_all(folded))
    assert [file.read_bytes() for file in files] == before


def test_an_overflow_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite(adapter, lambda tensors: {name: tensor * 1000 for name, tensor in tensors.items()})
    name = "model.layers.0.self_attn.q_proj.weight"
    assert fold(base, adapter)[name].isfinite().all()
    with pytest.raises(ConfigError, match=rf"{name} is not finite in float16\. Try --dtype bf16"):
        save_source(InDtype(plan(base, adapter), torch.float16), tmp_path / "out", 10**9)
    assert [*(tmp_path / "out").iterdir()] == []


# ------------------------------------------------------------------------------------------------------------ refusals


def refuses(base: Path, adapter: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        plan(base, adapter)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fold") / "base")


@pytest.fixture
def plain_adapter(plain_base: Path, tmp_path: Path) -> Path:
    return make_adapter(plain_base, tmp_path / "adapter", target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 0.1}),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 3}),
        ("target_parameters", ["mlp.weight"]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"scale": 1.0}),
        ("an_option_of_tomorrow", "on"),
    ],
)
def test_options_that_cannot_be_merged_are_named(
    plain_base: Path, plain_adapter: Path, option: str, value: object
) -> None:
    rewrite(plain_adapter, **{option: value})
    refuses(plain_base, plain_adapter, rf"adapter_config\.json: the option {option} \(")
    rewrite(plain_adapter, **{option: None})
    plan(plain_base, plain_adapter)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(plain_base: Path, plain_adapter: Path, start: str) -> None:
    rewrite(plain_adapter, init_lora_weights=start)
    refuses(plain_base, plain_adapter, rf"init_lora_weights {start} trains against a changed copy of the base")


def test_other_methods_are_refused(plain_base: Path, plain_adapter: Path) -> None:
    for method in ("ADALORA", "PROMPT_TUNING", "TRAINABLE_TOKENS", None):
        rewrite(plain_adapter, peft_type=method)
        refuses(plain_base, plain_adapter, rf"peft_type {method} cannot be merged.*Only LORA")


def test_folders_that_hold_no_adapter_are_refused(plain_base: Path, plain_adapter: Path) -> None:
    (plain_adapter / "adapter_model.safetensors").unlink()
    refuses(plain_base, plain_adapter, r"adapter holds no weights \(adapter_model\.safetensors or adapter_model\.bin")
    save_file({}, plain_adapter / "adapter_model.safetensors")
    refuses(plain_base, plain_adapter, "holds an adapter without tensors")
    refuses(plain_base, plain_base, r"^--adapter .*base holds no adapter_config\.json")


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def with_tensor(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{QUERY}.lora_A.weight", torch.zeros(4, 15), r"lora_A\.weight has shape \(4, 15\), .* ask for \(4, 16\)"),
        (f"{QUERY}.lora_A.weight", torch.zeros(3, 16), r"lora_A\.weight has shape \(3, 16\), .* ask for \(4, 16\)"),
        (f"{QUERY}.lora_B.weight", torch.zeros(0), r"lora_B\.weight has shape \(0,\), .* ask for \(16, 4\)"),
        (f"{QUERY}.lora_B.weight", torch.full((16, 4), torch.nan), r"lora_B\.weight holds NaN or infinity"),
        (f"{QUERY}.lora_A.weight", torch.full((4, 16), -torch.inf), r"lora_A\.weight holds NaN or infinity"),
        (f"{QUERY}.lora_A.other.weight", torch.zeros(4, 16), r"q_proj\.lora_A.* claim the same place"),
        (f"{QUERY}.base_layer.bias", torch.zeros(15), r"base_layer\.bias has shape \(15,\), .* ask for \(16,\)"),
        (f"{QUERY}.lora_magnitude_vector", torch.zeros(16), r"use_dora is False but .*q_proj\.weight has"),
        (f"{QUERY}.lora_diag", torch.zeros(4), r"q_proj\.lora_diag fits no tensor of the base"),
        (f"{QUERY}.token_adapter.trainable_tokens_delta", torch.zeros(1, 16), r"trainable_token_indices .* lacks "),
        ("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", torch.zeros(4, 16), r"without its lora_B"),
        ("base_model.model.model.layers.2.mlp.up_proj.weight", torch.zeros(24, 16), r"layers\.2\..*fits no tensor"),
        ("base_model.model.score.weight", torch.zeros(2, 16), r"score\.weight fits no tensor of the base"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16), r"is not a name of a LoRA adapter"),
        ("base_model.model.lm_head.weight", torch.zeros(41, 16), r"has shape \(41, 16\), .* ask for \(40, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    plain_base: Path, plain_adapter: Path, name: str, tensor: Tensor, match: str
) -> None:
    rewrite(plain_adapter, with_tensor(name, tensor))
    refuses(plain_base, plain_adapter, match)


def test_lora_on_a_vector_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    norm = {f"base_model.model.model.norm.lora_{side}.weight": torch.zeros(4, 16) for side in "AB"}
    rewrite(plain_adapter, lambda tensors: tensors | norm)
    refuses(plain_base, plain_adapter, r"model\.norm\.weight has shape \(16,\)")


def test_a_parameter_is_trained_in_one_way(plain_base: Path, plain_adapter: Path) -> None:
    rows = with_tensor(f"{QUERY}.token_adapter.trainable_tokens_delta", torch.zeros(1, 16))
    rewrite(plain_adapter, rows, trainable_token_indices=[1])
    refuses(plain_base, plain_adapter, r"q_proj\.weight is trained in two ways \(lora_A, lora_B, rows\)")


def test_dora_needs_its_magnitudes(plain_base: Path, plain_adapter: Path) -> None:
    rewrite(plain_adapter, use_dora=True)
    refuses(plain_base, plain_adapter, r"use_dora is True but model\.layers\.0\.self_attn\.q_proj\.weight has lora_A")


@pytest.mark.parametrize("indices", [[1, 40], [-1, 2], [1, 2, 3]])
def test_token_indices_have_to_fit(plain_base: Path, tmp_path: Path, indices: list[int]) -> None:
    adapter = make_adapter(plain_base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    rewrite(adapter, trainable_token_indices=indices)
    refuses(plain_base, adapter, r"ask for \(3, 16\)" if len(indices) == 3 else r"ids outside of 0\.\.39")


# ------------------------------------------------------------------------------------------------------------ warnings


def warned(base: Path, adapter: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        plan(base, adapter)
    return " ".join(record.getMessage() for record in caplog.records)


def test_lost_modules_are_warned_of(plain_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = ["embed_tokens", "lm_head", "score"]
    adapter = make_adapter(plain_base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=modules)
    assert warned(plain_base, adapter, caplog) == "", "the base has no score to be trained"
    rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed" not in name})
    message = warned(plain_base, adapter, caplog)
    assert "INCOMPLETE" in message and f"Missing: {EMBEDDING}." in message and "checkpoint-*" in message
    rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora" in name})
    assert f"Missing: {HEAD}, {EMBEDDING}." in warned(plain_base, adapter, caplog)


@pytest.mark.parametrize(
    ("tied", "tokens", "dropped", "missing"),
    [
        (False, [1], "", None),
        (False, [1], "embed_tokens", "the trained rows of the input embedding"),
        (False, {"embed_tokens": [1], "lm_head": [1]}, "", None),
        (False, {"embed_tokens": [1], "lm_head": [1]}, "lm_head", "the trained rows of lm_head"),
        (True, {"embed_tokens": [1], "lm_head": [1]}, "", None),
        (True, [1], "embed_tokens", "the trained rows of the input embedding"),
    ],
)
def test_lost_token_rows_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool, tokens: Any, dropped: str, missing: str | None
) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=tokens)
    if dropped:
        rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if dropped not in name})
    message = warned(base, adapter, caplog)
    assert f"Missing: {missing}." in message if missing else message == ""


# -------------------------------------------------------------------------------------- adapters of the original script


def test_the_original_scripts_adapter_merges_to_its_recorded_blocks(any_golden: Golden) -> None:
    recorded = any_golden.tensors_of("training/lora_chat.safetensors")
    merged = fold(any_golden.tiny, any_golden.path / "training" / "lora_chat_adapter", dtype=torch.float32)
    compared = set()
    for name in recorded:
        if name.startswith("merged."):
            stem, _, stride = name.removeprefix("merged.").partition(".s")
            assert_close(merged[stem][:: int(stride or 1)], recorded[name], 1e-5, name)
            compared.add(stem)
    changed = set(plan(any_golden.tiny, any_golden.path / "training" / "lora_chat_adapter").changed)
    assert len(changed) == 10 and changed <= compared
