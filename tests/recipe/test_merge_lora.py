"""merge_lora.py as a user runs it: the merged folder opens and computes what base and adapter do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from checkpoints.shards import fingerprint
from loading.checkpoint import load_checkpoint
from qwen_model.register import register_qwen
from scripts import convert_layout
from tests.golden import LOGITS_ATOL, Golden, GoldenTensors, assert_close, assert_logits
from tests.merging import merge, merge_well, message_of, names, read
from tests.quantized import write_awq, write_gptq

register_qwen()


def logits(folder: Path, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=attention_mask).logits


# Files of a merged Qwen v1 folder, besides the code.
FILES = [
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge_report.json",
    "model.safetensors", "qwen.tiktoken", "tokenizer_config.json",
]  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig", "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}  # fmt: skip


def names_without_code(folder: Path) -> list[str]:
    files = names(folder)
    assert {f"{class_name.partition('.')[0]}.py" for class_name in AUTO_MAP.values()} < set(files)
    return [name for name in files if not name.endswith(".py")]


@pytest.fixture
def golden(golden_small: Path) -> Golden:
    return Golden("small", golden_small)


@pytest.fixture
def chat_adapter(golden: Golden) -> Path:
    """An adapter saved by the original script; its base is ``golden.tiny``."""
    return golden.path / "training" / "lora_chat_adapter"


# -------------------------------------------------------------------------------------- adapters of the original script


def test_adapter_of_the_original_script_has_the_recorded_logits(any_golden: Golden, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    result = merge_well(
        "--adapter", any_golden.path / "training" / "lora_chat_adapter", "--base", any_golden.tiny, "--output", output
    )
    assert "INCOMPLETE" not in result.stderr
    assert "10 of 19 tensors changed" in result.stdout
    assert "verified: 19 tensors" in result.stdout and "same next token at 100.0%" in result.stdout
    assert f'python -m scripts.ask --model_name_or_path {output} "Who are you?"' in result.stdout
    recorded = any_golden.tensors_of("training/lora_chat.safetensors")
    assert_logits(logits(output, any_golden.tensors.ids("A.input_ids")), recorded, "logits.merged.A")
    inputs = [any_golden.tensors.ids(f"B.{name}") for name in ("input_ids", "attention_mask")]
    assert_logits(logits(output, *inputs), recorded, "logits.merged.B")

    text = "Hello, 世界! <|im_end|>"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (output, any_golden.tiny)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    ends = [tokenizers[0].im_end_id, tokenizers[0].eod_id]
    settings = read(any_golden.tiny, "generation_config.json") | {"eos_token_id": ends, "pad_token_id": ends[1]}
    assert read(output, "generation_config.json") == settings
    assert names_without_code(output) == FILES


def test_incomplete_adapter_of_a_base_model_is_merged_with_a_warning(any_golden: Golden, tmp_path: Path) -> None:
    adapter = any_golden.path / "training" / "lora_base_adapter"
    result = merge_well("--adapter", adapter, "--base", any_golden.tiny, "--output", tmp_path / "merged")
    warnings = [line for line in result.stderr.splitlines() if " WARNING " in line]
    assert len(warnings) == 1
    assert f"THE ADAPTER {adapter} IS INCOMPLETE" in warnings[0]
    assert "Missing: lm_head.weight, transformer.wte.weight." in warnings[0]
    recorded: GoldenTensors = any_golden.tensors_of("training/lora_base_reloaded.safetensors")
    actual = logits(tmp_path / "merged", any_golden.tensors.ids("A.input_ids"))
    for case in ("reloaded_merged.A", "reloaded.A"):
        assert_logits(actual, recorded, case)


# -------------------------------------------------------------------------------------------------------- written files


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype_flag(golden: Golden, chat_adapter: Path, tmp_path: Path, flag: str, dtype: torch.dtype) -> None:
    output = tmp_path / "merged"
    merge_well("--adapter", chat_adapter, "--base", golden.tiny, "--output", output, "--dtype", flag)
    expected = golden.config | {name: name == flag for name in ("bf16", "fp16", "fp32")}
    expected["torch_dtype"] = str(dtype).removeprefix("torch.")
    expected["auto_map"] = AUTO_MAP
    expected["rms_norm_eps"] = expected["layer_norm_epsilon"]  # llama.cpp reads it by this name
    assert read(output) == expected
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == dtype


def copy_base(golden: Golden, folder: Path, **config: Any) -> Path:
    shutil.copytree(golden.tiny, folder)
    (folder / "config.json").write_text(json.dumps(golden.config | config))
    return folder


def test_dtype_auto_keeps_the_dtype_of_the_base(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    base = copy_base(golden, tmp_path / "base", torch_dtype="bfloat16", bf16=True, fp32=False)
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "auto")
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "fp32", "--dtype", "fp32")
    assert read(tmp_path / "auto")["torch_dtype"] == "bfloat16" and read(tmp_path / "auto")["bf16"] is True
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "auto" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        # Between the numbers next to the exact value; the test of plan_merge in unit/export says more.
        assert ((tensor.float() - exact[name]).abs() <= 2**-7 * exact[name].abs()).all(), name


def test_shards_contain_the_same_tensors(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", chat_adapter, "--base", golden.tiny, "--output"]
    merge_well(*arguments, tmp_path / "one")
    result = merge_well(*arguments, tmp_path / "many", "--max_shard_size", "50KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert f"in {len(shards)} file(s)" in result.stdout and len(shards) > 3
    expected = load_file(tmp_path / "one" / "model.safetensors")
    sharded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sharded.keys() == expected.keys()
    assert all(torch.equal(sharded[name], expected[name]) for name in expected)
    ids = golden.tensors.ids("A.input_ids")
    assert torch.equal(logits(tmp_path / "many", ids), logits(tmp_path / "one", ids))


def test_tokenizer_and_generation_config_of_the_adapter_take_precedence(
    golden: Golden, chat_adapter: Path, tmp_path: Path
) -> None:
    base, adapter, output = copy_base(golden, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(chat_adapter, adapter)
    (adapter / "generation_config.json").write_text('{"chat_format": "chatml", "eos_token_id": [702, 700]}')
    config = {"tokenizer_class": "QWenTokenizer", "model_max_length": 77, "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for folder in (base, adapter):
        for name in ("modeling_qwen.py", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "README.md"):
            (folder / name).write_text("not to be copied")
    merge_well("--adapter", adapter, "--base", base, "--output", output)
    assert names_without_code(output) == FILES
    assert "not to be copied" not in {path.read_text() for path in output.glob("*.py")}
    assert "not to be copied" not in (output / "README.md").read_text()
    assert read(output, "generation_config.json")["eos_token_id"] == [702, 700]
    expected = {**config, "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    assert read(output, "tokenizer_config.json") == expected | {"split_special_tokens": False}
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (output / "qwen.tiktoken").read_bytes() == (base / "qwen.tiktoken").read_bytes()


def test_named_chat_templates_are_copied_and_the_default_one_is_used(
    golden: Golden, chat_adapter: Path, tmp_path: Path
) -> None:
    base, output = copy_base(golden, tmp_path / "base"), tmp_path / "merged"
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    merge_well("--adapter", chat_adapter, "--base", base, "--output", output)
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert AutoTokenizer.from_pretrained(output).chat_template == templates
    assert load_checkpoint(str(output)).tokenizer.chat_template == templates


def test_extra_ranks_of_the_tokenizer_are_copied(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    base = copy_base(golden, tmp_path / "base")
    # 700 ranks and 208 special tokens come first.
    (base / "more.tiktoken").write_text("Zm9vYmFyYmF6 908\n")
    config = read(base, "tokenizer_config.json") | {"extra_vocab_file": "more.tiktoken"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "more.tiktoken").read_text() == "Zm9vYmFyYmF6 908\n"


def test_tied_base_with_a_trained_embedding_is_untied(golden: Golden, tmp_path: Path) -> None:
    base, adapter, output = golden.path / "tiny-qwen-tied", tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["wte"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    trained = torch.randn(64, 16)
    save_file({"base_model.model.transformer.wte.weight": trained}, adapter / "adapter_model.safetensors")
    result = merge_well("--adapter", adapter, "--base", base, "--output", output)
    assert "stores both" in result.stderr and "1 of " in result.stdout
    assert read(base)["tie_word_embeddings"] is True and read(output)["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.get_input_embeddings().weight, trained)
    stored = load_file(base / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.get_output_embeddings().weight, stored.float())


def test_qwen2_base_is_found_beside_the_adapter_and_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    base, adapter, output = (tmp_path / name for name in ("base", "adapter", "merged"))
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], trainable_token_indices=[3, 4]))
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    tuned.peft_config["default"].base_model_name_or_path = "base"
    tuned.save_pretrained(adapter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
    # The base is found beside the adapter, under the name in the adapter's config.
    merge_well("--adapter", adapter, "--output", output)
    assert_close(logits(output, ids), expected, LOGITS_ATOL, "merged logits")
    assert read(output) == read(base) | {"rope_theta": 10000.0}  # which transformers 4 reads
    assert AutoConfig.from_pretrained(output).tie_word_embeddings is True


# ------------------------------------------------------------------------------------------------------------- the base


def with_record(chat_adapter: Path, folder: Path, **summary: object) -> Path:
    shutil.copytree(chat_adapter, folder)
    (folder / "run_summary.json").write_text(json.dumps(summary))
    return folder


def test_base_with_another_fingerprint_is_refused(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    right = with_record(chat_adapter, tmp_path / "right", base_fingerprint=fingerprint(golden.tiny))
    wrong = with_record(chat_adapter, tmp_path / "wrong", base_fingerprint="0" * 64)
    silent = with_record(chat_adapter, tmp_path / "silent", note="without a fingerprint")
    output = tmp_path / "out"
    for adapter, code in ((right, 0), (wrong, 2), (silent, 0)):
        arguments = ["--base", golden.tiny, "--output", output / adapter.name, "--no_verify"]
        result = merge("--adapter", adapter, *arguments)
        assert result.returncode == code, result.stderr
    assert f"--adapter {wrong} was trained on other weights than those of {golden.tiny}" in message_of(
        merge("--adapter", wrong, "--base", golden.tiny, "--output", output / "wrong")
    )
    assert names(output) == ["right", "silent"]
    result = merge_well("--adapter", wrong, "--base", golden.tiny, "--output", output / "wrong", "--any_base")
    assert " WARNING --adapter" in result.stderr and "may answer differently from the trained one" in result.stderr


def test_adapter_of_a_quantised_base_is_merged_into_an_unquantised_base(
    golden: Golden, chat_adapter: Path, tmp_path: Path
) -> None:
    record = {"base_fingerprint": "0" * 64, "base_is_quantized": True}
    adapter = with_record(chat_adapter, tmp_path / "adapter", **record)
    result = merge_well("--adapter", adapter, "--base", golden.tiny, "--output", tmp_path / "out", "--no_verify")
    assert f"{adapter} was trained on a quantised base: its changes are added to the unquantised" in result.stderr
    shutil.copytree(golden.tiny, tmp_path / "tiny-qwen-small")
    named = merge("--adapter", adapter, "--output", tmp_path / "named")
    assert named.returncode == 2, "only with --base"


def test_converted_base_is_recognised_by_the_fingerprint_of_its_origin(
    golden: Golden, chat_adapter: Path, tmp_path: Path
) -> None:
    record = fingerprint(golden.tiny)
    adapter = with_record(chat_adapter, tmp_path / "adapter", base_fingerprint=record)
    convert_layout.main([str(golden.tiny), str(tmp_path / "qwen2")])
    arguments = ["--adapter", adapter, "--base", tmp_path / "qwen2", "--output"]
    merge_well(*arguments, tmp_path / "merged")
    merge_well(*arguments, tmp_path / "back", "--layout", "qwen")
    merge_well("--adapter", adapter, "--base", golden.tiny, "--output", tmp_path / "plain", "--layout", "qwen2")
    assert read(tmp_path / "merged")["model_type"] == "qwen2" and read(tmp_path / "back")["model_type"] == "qwen"
    ids = golden.tensors.ids("A.input_ids")
    expected = golden.tensors_of("training/lora_chat.safetensors")
    for name in ("merged", "back", "plain"):
        assert_logits(logits(tmp_path / name, ids), expected, "logits.merged.A")
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain")]
    assert same[0].keys() == same[1].keys() and all(torch.equal(same[0][name], same[1][name]) for name in same[0])


# ----------------------------------------------------------------------------------------------------- several adapters


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """Copy an adapter with its change multiplied by ``factor``."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: each * factor if "lora_B" in name else each for name, each in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors")
    return folder


def test_weighted_sum_of_adapters(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    other = scaled(chat_adapter, tmp_path / "other", -2.0)
    with_equals_sign = scaled(chat_adapter, tmp_path / "name=0.5", 1.0)
    arguments = ["--base", golden.tiny, "--no_verify", "--output"]
    merge_well("--adapter", scaled(chat_adapter, tmp_path / "alone", 0.7 - 2 * 0.3), *arguments, tmp_path / "expected")
    result = merge_well("--adapter", f"{chat_adapter}=0.7", f"{other}=0.3", *arguments, tmp_path / "both")
    merge_well("--adapter", with_equals_sign, *arguments, tmp_path / "odd")
    expected, both = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "both"))
    assert expected.keys() == both.keys()
    for name, tensor in expected.items():
        assert_close(both[name], tensor, 1e-6, name)
    assert (tmp_path / "odd" / "model.safetensors").is_file()
    card = (tmp_path / "both" / "README.md").read_text()
    assert "0.7" in card and "0.3" in card and "10 of 19" in result.stdout


def test_several_adapters_are_verified(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    other = scaled(chat_adapter, tmp_path / "other", -2.0)
    adapters = ["--adapter", f"{chat_adapter}=0.7", f"{other}=0.3", "--base", golden.tiny]
    result = merge_well(*adapters, "--output", tmp_path / "both", "--dtype", "bf16")
    assert "verified: 19 tensors" in result.stdout


# ------------------------------------------------------------------------------------------------------ quantised bases


@pytest.mark.parametrize("write", [write_gptq, write_awq])
def test_quantised_base_is_dequantised_and_verified(
    golden: Golden, chat_adapter: Path, tmp_path: Path, write: Callable[..., dict[str, Tensor]]
) -> None:
    write(golden.tiny, tmp_path / "base")
    arguments = ["--adapter", chat_adapter, "--base", tmp_path / "base", "--output"]
    result = merge_well(*arguments, tmp_path / "merged", "--dtype", "fp32")
    assert "quantised" in result.stderr and "verified: 19 tensors" in result.stdout
    assert "quantization_config" not in read(tmp_path / "merged")
    merge_well(*arguments, tmp_path / "qwen2", "--layout", "qwen2")
