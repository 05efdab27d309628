"""merge_lora.py as a user runs it: the merged folder opens, and answers as the adapter did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import merge_lora
from checkpoints.shards import fingerprint
from errors import ConfigError
from qwen_model.register import register_qwen
from tests.commands import limited_file_size, run_here
from tests.golden import LOGITS_ATOL, REPO, Golden, GoldenTensors, assert_close, assert_logits, run_python

register_qwen()


def merge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(["merge_lora.py", *map(str, arguments)])


def merge_well(*arguments: object) -> subprocess.CompletedProcess[str]:
    result = merge(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def logits(folder: Path, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=attention_mask).logits


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def golden(golden_small: Path) -> Golden:
    return Golden("small", golden_small)


@pytest.fixture
def chat_adapter(golden: Golden) -> Path:
    """An adapter that the original script saved; its base is ``golden.tiny``."""
    return golden.path / "training" / "lora_chat_adapter"


# --------------------------------------------------------------------------------- adapters of the original script


def test_the_original_scripts_adapter_gives_its_merged_logits(any_golden: Golden, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    result = merge_well(
        "--adapter", any_golden.path / "training" / "lora_chat_adapter", "--base", any_golden.tiny, "--output", output
    )
    assert "INCOMPLETE" not in result.stderr
    assert "10 of 19 tensors changed" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last == f'next:    python -m scripts.ask --model_name_or_path {output} "Who are you?"'
    recorded = any_golden.tensors_of("training/lora_chat.safetensors")
    assert_logits(logits(output, any_golden.tensors.ids("A.input_ids")), recorded, "logits.merged.A")
    inputs = [any_golden.tensors.ids(f"B.{name}") for name in ("input_ids", "attention_mask")]
    assert_logits(logits(output, *inputs), recorded, "logits.merged.B")

    text = "Hello, 世界! <|im_end|>"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (output, any_golden.tiny)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert read(output, "generation_config.json") == read(any_golden.tiny, "generation_config.json")
    expected = ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"]
    assert names(output) == expected


def test_a_base_models_adapter_without_its_embeddings_is_merged_with_a_loud_warning(
    any_golden: Golden, tmp_path: Path
) -> None:
    adapter = any_golden.path / "training" / "lora_base_adapter"
    result = merge_well("--adapter", adapter, "--base", any_golden.tiny, "--output", tmp_path / "merged")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 1
    assert f"THE ADAPTER {adapter} IS INCOMPLETE" in warnings[0]
    assert "Missing: lm_head.weight, transformer.wte.weight." in warnings[0]
    recorded: GoldenTensors = any_golden.tensors_of("training/lora_base_reloaded.safetensors")
    actual = logits(tmp_path / "merged", any_golden.tensors.ids("A.input_ids"))
    for case in ("reloaded_merged.A", "reloaded.A"):
        assert_logits(actual, recorded, case)


# --------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_dtype_that_is_asked_for(
    golden: Golden, chat_adapter: Path, tmp_path: Path, flag: str, dtype: torch.dtype
) -> None:
    output = tmp_path / "merged"
    merge_well("--adapter", chat_adapter, "--base", golden.tiny, "--output", output, "--dtype", flag)
    expected = golden.config | {name: name == flag for name in ("bf16", "fp16", "fp32")}
    expected["torch_dtype"] = str(dtype).removeprefix("torch.")
    del expected["auto_map"]
    assert read(output) == expected
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == dtype


def copy_base(golden: Golden, folder: Path, **config: Any) -> Path:
    shutil.copytree(golden.tiny, folder)
    (folder / "config.json").write_text(json.dumps(golden.config | config))
    return folder


def test_the_bases_own_dtype_is_kept(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    base = copy_base(golden, tmp_path / "base", torch_dtype="bfloat16", bf16=True, fp32=False)
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "auto")
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "fp32", "--dtype", "fp32")
    assert read(tmp_path / "auto")["torch_dtype"] == "bfloat16" and read(tmp_path / "auto")["bf16"] is True
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "auto" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_shards_hold_the_same_tensors(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", chat_adapter, "--base", golden.tiny, "--output"]
    merge_well(*arguments, tmp_path / "one")
    result = merge_well(*arguments, tmp_path / "many", "--max_shard_size", "50KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert f"in {len(shards)} file(s)" in result.stdout and len(shards) > 3
    expected = load_file(tmp_path / "one" / "model.safetensors")
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = golden.tensors.ids("A.input_ids")
    assert torch.equal(logits(tmp_path / "many", ids), logits(tmp_path / "one", ids))


def test_the_adapters_tokenizer_and_generation_config_come_first(
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
    expected = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"]
    assert names(output) == [*expected, "tokenizer_config.json"]
    assert read(output, "generation_config.json")["eos_token_id"] == [702, 700]
    assert read(output, "tokenizer_config.json") == {"tokenizer_class": "QWenTokenizer", "model_max_length": 77}
    assert (output / "qwen.tiktoken").read_bytes() == (base / "qwen.tiktoken").read_bytes()


def test_a_tokenizers_extra_ranks_come_along(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    base = copy_base(golden, tmp_path / "base")
    # 700 ranks and 208 special tokens come first.
    (base / "more.tiktoken").write_text("Zm9vYmFyYmF6 908\n")
    config = read(base, "tokenizer_config.json") | {"extra_vocab_file": "more.tiktoken"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    merge_well("--adapter", chat_adapter, "--base", base, "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "more.tiktoken").read_text() == "Zm9vYmFyYmF6 908\n"


def test_a_tied_base_whose_embedding_alone_was_trained_is_untied(golden: Golden, tmp_path: Path) -> None:
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


def test_later_families_are_merged_too(tmp_path: Path) -> None:
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
    # The base is found beside the adapter under the name that the adapter's config gives.
    merge_well("--adapter", adapter, "--output", output)
    assert_close(logits(output, ids), expected, LOGITS_ATOL, "merged logits")
    assert read(output) == read(base)
    assert AutoConfig.from_pretrained(output).tie_word_embeddings is True


# ------------------------------------------------------------------------------------------------------------- the base


def with_record(chat_adapter: Path, folder: Path, **summary: str) -> Path:
    shutil.copytree(chat_adapter, folder)
    (folder / "run_summary.json").write_text(json.dumps(summary))
    return folder


def test_another_base_than_the_recorded_one_is_warned_of(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    right = with_record(chat_adapter, tmp_path / "right", base_fingerprint=fingerprint(golden.tiny))
    wrong = with_record(chat_adapter, tmp_path / "wrong", base_fingerprint="0" * 64)
    silent = with_record(chat_adapter, tmp_path / "silent", note="without a fingerprint")
    for adapter, warned in ((right, False), (wrong, True), (silent, False)):
        result = merge_well("--adapter", adapter, "--base", golden.tiny, "--output", tmp_path / "out" / adapter.name)
        assert ("WARNING: THE BASE IS NOT THE ONE THAT THE ADAPTER WAS TRAINED ON" in result.stderr) == warned


# ------------------------------------------------------------------------------------------------------------- refusals


def refuses(expected: str, *arguments: object) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_lora.main([str(argument) for argument in arguments])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_the_command_line_are_named(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    good = ["--adapter", chat_adapter, "--base", golden.tiny, "--output"]
    refuses("required: --output", "--adapter", chat_adapter)
    refuses("unrecognized arguments: --out_put x", *good, output, "--out_put", "x")
    refuses("argument --dtype: invalid choice: 'int8'", *good, output, "--dtype", "int8")
    refuses("--max_shard_size 2gigs: not a size", *good, output, "--max_shard_size", "2gigs")
    refuses("nowhere holds no adapter_config.json", "--adapter", tmp_path / "nowhere", "--output", output)
    refuses(f"names the base '{golden.tiny.name}'", "--adapter", chat_adapter, "--output", output)
    refuses("with --base DIR", "--adapter", chat_adapter, "--output", output)
    refuses(f"--base {chat_adapter} holds no config.json", *good[:2], "--base", chat_adapter, "--output", output)
    refuses("is the folder of --adapter", *good, chat_adapter)
    refuses("is the folder of --base", *good, golden.tiny)
    assert names(tmp_path) == []


def test_a_fault_ends_the_command_with_one_line_and_code_2(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for arguments, expected in (
        (["--base", golden.tiny], f"--output {tmp_path} is not empty"),
        (["--bse", golden.tiny], "command line: unrecognized arguments: --bse"),
    ):
        result = merge("--adapter", chat_adapter, "--output", tmp_path, *arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"merge_lora.py: error: {expected}") and result.stderr.count("\n") == 1
    assert names(tmp_path) == ["mine"]


def test_an_empty_output_folder_is_taken(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    merge_well("--adapter", chat_adapter, "--base", golden.tiny, "--output", tmp_path)
    assert "model.safetensors" in names(tmp_path)


def test_a_failure_half_way_leaves_nothing(golden: Golden, chat_adapter: Path, tmp_path: Path) -> None:
    base = copy_base(golden, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    last = sorted(tensors)[-1]
    tensors[last] = torch.full_like(tensors[last], 1e6)  # beyond fp16
    save_file(tensors, base / "model.safetensors")
    output = tmp_path / "out" / "merged"
    result = merge(
        "--adapter", chat_adapter, "--base", base, "--output", output, "--dtype", "fp16", "--max_shard_size", "1KB"
    )
    assert result.returncode == 2
    assert f"merge_lora.py: error: {last} is not finite after merging and casting to float16" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(output.parent) == []


def test_a_full_disk_is_a_failure_of_one_line(
    golden: Golden, chat_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    with limited_file_size(2000):
        code = run_here(
            merge_lora.main, "merge_lora.py", ["--adapter", chat_adapter, "--base", golden.tiny, "--output", output]
        )
    assert code == 1
    assert "merge_lora.py: error: cannot write " in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_wrong_flag_is_answered_before_torch_is_loaded() -> None:
    arguments = ["--adapter", "a", "--output", "b"]
    code = f"import sys, merge_lora; merge_lora.parse_args({arguments}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
