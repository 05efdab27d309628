"""Loading of checkpoints, and the folders that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.writing import save_checkpoint
from errors import ConfigError
from loading.checkpoint import load_checkpoint, load_model
from loading.inference import load_for_inference
from qwen_model.lean_models import model_class_of
from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.models import (
    TINY,
    change_json,
    copy_checkpoint,
    copy_in_bfloat16,
    write_later_checkpoint,
)

IDS = torch.tensor([[701, 39, 72, 702, 198, 5, 6, 7]])


def refuses(folder: Path | str, *expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(str(folder))
    message = str(caught.value)
    assert all(part in message for part in expected), message
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------------------ loading


def test_qwen_v1_checkpoint() -> None:
    checkpoint = load_checkpoint(str(TINY))
    assert (checkpoint.name, checkpoint.folder, checkpoint.model_type) == (str(TINY), TINY, "qwen")
    assert (checkpoint.chat_format, checkpoint.dtype) == ("chatml", torch.float32)
    assert checkpoint.end_ids == [702, 700]
    assert checkpoint.family.name == "qwen"
    model = load_model(checkpoint, torch.float32)
    assert isinstance(model, QWenLMHeadModel)
    stored = load_file(TINY / "model.safetensors")
    assert all(torch.equal(p, stored[name].float()) for name, p in model.named_parameters())


@pytest.mark.parametrize(("model_type", "template"), [("qwen2", "qwen2_5"), ("qwen3", "qwen3")])
def test_later_families(tmp_path: Path, shared: Path, model_type: str, template: str) -> None:
    text = (shared / "families" / "templates" / f"{template}.jinja").read_text()
    write_later_checkpoint(tmp_path / "model", model_type, text)
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    assert (checkpoint.model_type, checkpoint.chat_format, checkpoint.end_ids) == (model_type, None, [702, 700])
    default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert checkpoint.family.default_system == (default_system if model_type == "qwen2" else None)
    assert type(load_model(checkpoint, torch.float32)) is model_class_of(model_type)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16", "fp32": False}, torch.bfloat16),
        ({"torch_dtype": "float16", "fp32": False}, torch.float16),
        # Some published folders have only the flags.
        ({"torch_dtype": None, "fp32": False, "bf16": True}, torch.bfloat16),
        ({"torch_dtype": None, "fp32": False, "fp16": True}, torch.float16),
        ({"torch_dtype": None, "fp32": True}, torch.float32),
    ],
)
def test_saved_dtype_comes_from_the_config(tmp_path: Path, config: dict[str, object], dtype: torch.dtype) -> None:
    assert load_checkpoint(str(copy_checkpoint(tmp_path / "model", **config))).dtype == dtype


def test_saved_dtype_comes_from_the_weights_if_the_config_has_none(tmp_path: Path) -> None:
    copy_in_bfloat16(tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", torch_dtype=None, bf16=False)
    assert load_checkpoint(str(tmp_path / "model")).dtype == torch.bfloat16


def test_config_of_august_2023(tmp_path: Path) -> None:
    """Its keys have other names than the later ones."""
    copy_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    old_names = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions",
        "vocab_size": "padded_vocab_size", "emb_dropout_prob": "embd_pdrop", "attn_dropout_prob": "attn_pdrop",
    }  # fmt: skip
    config = {old_names.get(key, key): value for key, value in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(config | {"resid_pdrop": 0.0, "apply_residual_connection_post_layernorm": False}))
    old, new = (load_model(load_checkpoint(str(folder)), torch.float32).eval() for folder in (tmp_path / "model", TINY))
    with torch.no_grad():
        assert torch.equal(old(IDS).logits, new(IDS).logits)


def test_model_type_decides_and_not_the_folder_name(tmp_path: Path) -> None:
    for name, chat_format in (("my-chat", "raw"), ("my-base", "chatml"), ("Qwen2.5-7B-Instruct", "chatml")):
        checkpoint = load_checkpoint(str(copy_checkpoint(tmp_path / name, chat_format=chat_format)))
        assert (checkpoint.model_type, checkpoint.chat_format) == ("qwen", chat_format)
    write_later_checkpoint(tmp_path / "Qwen-7B-Chat", "qwen2")
    assert load_checkpoint(str(tmp_path / "Qwen-7B-Chat")).model_type == "qwen2"


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "model")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('remote code')\n")
    checkpoint = load_checkpoint(str(folder))
    load_model(checkpoint, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_without_a_generation_config(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    checkpoint = load_checkpoint(str(folder))
    assert (checkpoint.chat_format, checkpoint.end_ids) == (None, [702, 700])


def test_inference_uses_the_saved_dtype(tmp_path: Path) -> None:
    for folder, dtype in ((TINY, torch.float32), (copy_in_bfloat16(tmp_path / "model"), torch.bfloat16)):
        model = load_for_inference(load_checkpoint(str(folder)))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not model.training


# ----------------------------------------------------------------------------------------------------------- refusals


def test_names_that_are_not_a_checkpoint(tmp_path: Path) -> None:
    refuses(
        tmp_path / "nowhere", f"--model_name_or_path {tmp_path / 'nowhere'}: there is no such folder. Check the path"
    )
    refuses("nowhere", "--model_name_or_path nowhere: there is no such folder")
    refuses(TINY / "config.json", "config.json: there is no such folder")
    refuses("not a/hub:id", "--model_name_or_path not a/hub:id")
    refuses(
        tmp_path, f"--model_name_or_path {tmp_path}: the folder has no config.json. Give the folder of a checkpoint"
    )


@pytest.mark.parametrize(
    ("text", "fault"), [('{"model_type": "qwen",', "is not JSON"), ("[1, 2]", "holds a list"), ("", "is not JSON")]
)
def test_broken_config(tmp_path: Path, text: str, fault: str) -> None:
    copy_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    refuses(tmp_path / "model", f"{tmp_path / 'model' / 'config.json'} {fault}")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama", ". Use a checkpoint of model_type qwen, qwen2, qwen3 or qwen3_5"),
        *((name, ": it is a mixture of experts,") for name in ("qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next")),
        *((name, ": it is made for images,") for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
        *((name, ": it is made for sound,") for name in ("qwen2_audio", "qwen2_5_omni")),
    ],
)
def test_unknown_model_type(tmp_path: Path, model_type: str, reason: str) -> None:
    folder = copy_checkpoint(tmp_path / "model", model_type=model_type)
    refuses(folder, f"{folder / 'config.json'}: model_type {model_type!r} is not supported{reason}")


def test_contradictory_config(tmp_path: Path) -> None:
    refuses(copy_checkpoint(tmp_path / "a", bf16=True), "config.json: bf16 and fp32 are both true")
    refuses(copy_checkpoint(tmp_path / "b", kv_channels=7), "kv_channels 7 x num_attention_heads 4", "hidden_size 32")


def test_config_and_weights_disagree_about_quantisation(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    folder = copy_checkpoint(tmp_path / "model", quantization_config=quantised)
    refuses(folder, f"{folder}: its config names GPTQ, 4 bits, groups of 32, but no weight is quantised")
    folder = copy_checkpoint(tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.mlp.w1.qweight"] = torch.zeros(4, 64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    refuses(folder, f"{folder}: transformer.h.0.mlp.w1.qweight is quantised, but no config describes how")


def test_broken_generation_config(tmp_path: Path) -> None:
    """It contains the chat format: without it a chat model would be taken for a base model."""
    folder = copy_checkpoint(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"chat_format": "chatml"')
    refuses(folder, str(folder / "generation_config.json"))


def test_broken_tokenizers(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "a")
    (folder / "qwen.tiktoken").unlink()
    refuses(folder, f"{folder}: qwen.tiktoken is missing")
    folder = copy_checkpoint(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text("{")
    refuses(folder, f"{folder / 'tokenizer_config.json'} is not JSON")
    folder = copy_checkpoint(tmp_path / "c")
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    (folder / "qwen.tiktoken").write_text("\n".join([*lines, f"{lines[0].split()[0]}ZZ== 5"]))
    refuses(folder, f"{folder / 'qwen.tiktoken'}:{len(lines) + 1}: ")
    (folder / "qwen.tiktoken").write_text("\n".join([*lines[:300], "enp6eno= 299", *lines[300:]]))
    refuses(folder, f"{folder / 'qwen.tiktoken'}:301: rank 299 occurs a second time")


def test_truncated_rank_file(tmp_path: Path) -> None:
    """It loads, with wrong ids of all special tokens; they contradict generation_config.json."""
    folder = copy_checkpoint(tmp_path / "model")
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    assert len(lines) == 700
    (folder / "qwen.tiktoken").write_text("\n".join(lines[:512]) + "\n")
    refuses(
        folder, f"{folder}: end-of-text is id 512 in qwen.tiktoken and 700 in generation_config.json",
        "copy it from the original checkpoint",
    )  # fmt: skip


def test_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "model", vocab_size=896)
    refuses(folder, f"{folder}: the tokenizer has 908 ids, the model 896 rows")


def refuses_weights(
    folder: Path, expected: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> None:
    checkpoint = load_checkpoint(str(folder))
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_model(checkpoint, dtype, attn_implementation)
    assert str(folder) in str(caught.value) or attn_implementation
    assert "\n" not in str(caught.value)


def test_missing_or_damaged_weights_are_refused_before_loading(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "none")
    (folder / "model.safetensors").unlink()
    refuses(folder, f"--model_name_or_path {folder} holds no weights (model.safetensors or pytorch_model.bin")
    for name, content in (
        ("truncated", (TINY / "model.safetensors").read_bytes()[:100_000]),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 166352\n"),
        ("empty", b""),
    ):
        folder = copy_checkpoint(tmp_path / name)
        (folder / "model.safetensors").write_bytes(content)
        refuses(folder, f"--model_name_or_path {folder / 'model.safetensors'} is damaged or incomplete (")


def test_faulty_shards(tmp_path: Path) -> None:
    def sharded(name: str) -> tuple[Path, list[Path]]:
        folder = copy_checkpoint(tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_checkpoint(tensors.items(), folder, 50_000)
        return folder, sorted(folder.glob("model-*.safetensors"))

    folder, shards = sharded("whole")
    assert len(shards) > 2
    load_model(load_checkpoint(str(folder)), torch.float32)
    folder, shards = sharded("missing")
    shards[1].unlink()
    refuses(folder, f"--model_name_or_path {shards[1]} is missing, but model.safetensors.index.json lists it")
    folder, shards = sharded("truncated")
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    refuses(folder, f"--model_name_or_path {shards[1]} is damaged or incomplete (")
    folder, shards = sharded("exchanged")
    shards[1].write_bytes(shards[2].read_bytes())
    refuses(folder, f"--model_name_or_path {shards[1]} lacks the tensor ")
    folder, shards = sharded("index")
    (folder / "model.safetensors.index.json").write_text("{")
    refuses(folder, f"{folder / 'model.safetensors.index.json'} is not JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_that_is_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = copy_checkpoint(tmp_path / "model", torch_dtype=str(dtype).removeprefix("torch."), fp32=None)
    name = "transformer.h.1.ln_2.weight"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors[name][3] = value
    (folder / "model.safetensors").unlink()
    save_checkpoint(tensors.items(), folder, 50_000)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    fault = f"{folder / weight_map[name]}: {name} holds NaN or infinity in float32. Copy the file again"
    refuses_weights(folder, fault)
    refuses_weights(folder, f"{name} holds NaN or infinity in bfloat16", torch.bfloat16)


def test_weight_too_large_for_the_dtype(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load_checkpoint(str(folder))
    load_model(checkpoint, torch.float32)
    with pytest.raises(ConfigError, match=r"lm_head\.weight holds NaN or infinity in float16\. .* instead of --fp16$"):
        load_model(checkpoint, torch.float16)


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    """transformers would initialise missing ones randomly."""
    folder = copy_checkpoint(tmp_path / "lost")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refuses(folder, "--model_name_or_path", "transformer.h.1.attn.c_attn.weight")
    refuses(copy_checkpoint(tmp_path / "deeper", num_hidden_layers=3), "--model_name_or_path", "transformer.h.2")
    refuses(copy_checkpoint(tmp_path / "narrower", intermediate_size=64), "--model_name_or_path", "mlp.w1.weight")


def test_unavailable_attention_implementation() -> None:
    for name in ("magic", "flash_attention_2"):
        refuses_weights(TINY, f"--attn_implementation {name}: ", attn_implementation=name)
    checkpoint = load_checkpoint(str(TINY))
    models = [load_model(checkpoint, torch.float32, name).eval() for name in ("eager", "sdpa")]
    with torch.no_grad():
        first, second = (model(IDS).logits for model in models)
    assert torch.allclose(first, second, atol=1e-5)


def test_missing_seq_length(tmp_path: Path) -> None:
    refuses(copy_checkpoint(tmp_path / "model", seq_length=None), "seq_length is missing")


@pytest.mark.parametrize("name", ["nowhere", "an/adapter"])
def test_missing_adapter(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--adapter {name} holds no adapter_config\.json\. Give the folder"):
        load_for_inference(load_checkpoint(str(TINY)), name)


def test_adapter_of_another_model(tmp_path: Path, golden_small: Path) -> None:
    write_later_checkpoint(tmp_path / "model", "qwen2")
    with pytest.raises(ConfigError, match=r"^--adapter .*lora_chat_adapter: "):
        load_for_inference(
            load_checkpoint(str(tmp_path / "model")), str(golden_small / "training" / "lora_chat_adapter")
        )
