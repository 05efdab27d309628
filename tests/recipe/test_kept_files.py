"""Every command that writes a folder keeps the base's files beside the weights, but for what is stated here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loading.checkpoint import load_checkpoint, load_model
from tests.bases import BASES, ROPE_THETA, TEMPLATE, copy_of, train, write_current, write_published, write_v1
from tests.commands import finetune_here, names_in, read_json, run_here
from tests.merging import merge_well
from tests.models import change_json, write_conversations
from training.run_folder.saving import save_model

ABSENT = "is absent"
Changes = dict[str, dict[str, Any]]

# What every result changes, by base, in files that the base has.
CODE = {"tokenizer_config.json": {"auto_map": ABSENT}}
STOPS: dict[str, Changes] = {
    "published": {},
    "current": {"generation_config.json": {"eos_token_id": [702, 700], "_from_model_config": ABSENT}},
    "named templates": {},
    "few files": {},
    "foreign tokenizer": {},
    "v1": {"generation_config.json": {"eos_token_id": [702, 700], "chat_format": "chatml"}, **CODE},
}
CONFIG: dict[str, Changes] = {
    "current": {"config.json": {"rope_theta": ROPE_THETA}},
    "v1": {"config.json": {"auto_map": ABSENT}},
}
NEW = {"few files": ["generation_config.json"]}
WEIGHTS = ["model.safetensors"]


def changes(base: Path, result: Path) -> Changes:
    """Return what differs in the base's files beside the weights; a JSON file with equal values has equal bytes."""
    found: Changes = {}
    for path in sorted(base.rglob("*")):
        name = str(path.relative_to(base))
        if not path.is_file() or path.suffix in (".py", ".safetensors"):
            continue
        if not (result / name).is_file():
            found[name] = {"file": ABSENT}
        elif (result / name).read_bytes() != path.read_bytes():
            before, after = (json.loads(each.read_bytes()) for each in (path, result / name))
            keys = [*before, *(after.keys() - before.keys())]
            found[name] = {
                key: after.get(key, ABSENT) for key in keys if before.get(key, ABSENT) != after.get(key, ABSENT)
            }
            assert found[name], f"{name} has equal values in other bytes"
    return found


def new_names(base: Path, result: Path) -> list[str]:
    return sorted(set(names_in(result)) - set(names_in(base)))


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base's kind and folder; tests must not change it."""
    return request.param, BASES[request.param](tmp_path_factory.mktemp("base") / "base")


def test_training_and_merging_keep_the_files_of_the_base(base: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = base
    train(folder, tmp_path / "full")
    assert changes(folder, tmp_path / "full") == STOPS[kind] | CONFIG.get(kind, {})
    template = ["chat_template.jinja"] if kind in ("few files", "v1") else []
    assert new_names(folder, tmp_path / "full") == sorted([*template, *NEW.get(kind, [])])

    train(folder, tmp_path / "adapter", "--use_lora", "--trainable_embeddings", "full", "--lora_r", "2")
    assert changes(folder, tmp_path / "adapter") == STOPS[kind] | {"config.json": {"file": ABSENT}}
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert new_names(folder, tmp_path / "adapter") == sorted([*adapter, *NEW.get(kind, [])])

    merge_well("--adapter", tmp_path / "adapter", "--base", folder, "--output", tmp_path / "merged", "--no_verify")
    merged = changes(folder, tmp_path / "merged")
    if kind == "v1":  # with the toolkit's code, and the epsilon under llama.cpp's name
        assert merged.pop("config.json").keys() == {"auto_map", "rms_norm_eps"}
        assert merged.pop("tokenizer_config.json") == {"split_special_tokens": False}
        assert merged == {"generation_config.json": STOPS[kind]["generation_config.json"]}
    else:
        assert merged == STOPS[kind] | CONFIG.get(kind, {})
        assert new_names(folder, tmp_path / "merged") == sorted(
            [*template, *NEW.get(kind, []), "README.md", "merge_report.json"]
        )


@pytest.mark.parametrize("kind", ["published", "current"])
def test_quantising_keeps_the_files_of_the_base(kind: str, tmp_path: Path) -> None:
    base, data = BASES[kind](tmp_path / "base"), write_conversations(tmp_path / "data.json")
    arguments = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out"]
    main = importlib.import_module("scripts.quantize").main
    assert run_here(main, "scripts.quantize", [*arguments, "--samples", 8, "--group_size", 32]) == 0
    changed = changes(base, tmp_path / "out")
    assert changed["config.json"].pop("quantization_config")["quant_method"] == "gptq"
    assert {name: values for name, values in changed.items() if values} == CONFIG.get(kind, {})
    assert new_names(base, tmp_path / "out") == ["quantization_report.json"]


def test_converting_keeps_what_both_layouts_have(tmp_path: Path) -> None:
    base = write_v1(tmp_path / "base")
    main = importlib.import_module("scripts.convert_layout").main
    for source, output in ((base, tmp_path / "qwen2"), (tmp_path / "qwen2", tmp_path / "back")):
        assert run_here(main, "scripts.convert_layout", [source, output]) == 0
    assert (tmp_path / "back" / "qwen.tiktoken").read_bytes() == (base / "qwen.tiktoken").read_bytes()
    config, back = read_json(base / "config.json"), read_json(tmp_path / "back" / "config.json")
    unused = {"auto_map", "onnx_safe", "transformers_version", "use_flash_attn"}
    assert {key: back.get(key) for key in config.keys() - unused} == {
        key: value for key, value in config.items() if key not in unused
    }
    assert read_json(tmp_path / "qwen2" / "config.json")["rope_theta"] == config["rotary_emb_base"]


# ------------------------------------------------------------------------------------------- adapters' own files


def test_templates_of_the_adapter_come_first_in_whichever_file_they_are(tmp_path: Path) -> None:
    """Libraries disagree whether a template's file or tokenizer_config.json takes precedence: only one has any."""
    base, own = write_current(tmp_path / "base"), TEMPLATE + "{# of the adapter #}"
    train(base, tmp_path / "adapter", "--use_lora", "--trainable_embeddings", "none", "--lora_r", "2")
    files = ("chat_template.jinja", "additional_chat_templates")
    inline = copy_of(tmp_path / "adapter", tmp_path / "inline", *files)
    change_json(inline / "tokenizer_config.json", chat_template=own)
    in_base = write_published(tmp_path / "published")
    in_file = copy_of(tmp_path / "adapter", tmp_path / "file", "tokenizer_config.json", "additional_chat_templates")
    (in_file / "chat_template.jinja").write_text(own)
    none = copy_of(tmp_path / "adapter", tmp_path / "none", *files)
    for adapter, of, expected in (
        (inline, base, (own, None)),
        (in_file, in_base, (None, own)),
        (none, in_base, (TEMPLATE, None)),
    ):
        output = tmp_path / f"{adapter.name}-merged"
        merge_well("--adapter", adapter, "--base", of, "--output", output, "--no_verify", "--any_base")
        file = output / "chat_template.jinja"
        settings = read_json(output / "tokenizer_config.json")
        assert (settings.get("chat_template"), file.read_text() if file.is_file() else None) == expected, adapter.name
        assert not (output / "additional_chat_templates").exists()


def test_tokens_that_the_adapter_adds_stay_with_its_tokenizer(tmp_path: Path) -> None:
    """Files of the base that its tokenizer lacks are not put beside it: they do not know its tokens."""
    base = write_published(tmp_path / "base")
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (base / "added_tokens.json").write_text('{"<tool_call>": 703}')
    train(base, tmp_path / "first", "--use_lora", "--trainable_embeddings", "full", "--lora_r", "2")
    adapter = copy_of(
        tmp_path / "first", tmp_path / "adapter", "vocab.json", "special_tokens_map.json", "added_tokens.json"
    )
    fast = read_json(adapter / "tokenizer.json")
    fast["added_tokens"].append({**fast["added_tokens"][-1], "id": 705, "content": "<new>"})
    (adapter / "tokenizer.json").write_text(json.dumps(fast))
    merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / "merged", "--no_verify")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not {"vocab.json", "special_tokens_map.json", "added_tokens.json"} & set(names_in(tmp_path / "merged"))
    assert load_checkpoint(str(tmp_path / "merged")).tokenizer("a<new>").input_ids[-1] == 705


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_and_its_checkpoints_keep_the_files(tmp_path: Path) -> None:
    """The base's folder may be gone when the run ends."""
    base, data = write_published(tmp_path / "base"), write_conversations(tmp_path / "data.json")
    finetune_here(
        "--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--save_strategy", "steps", "--save_steps", 1,
    )  # fmt: skip
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert changes(base, folder) == {}
    checkpoint = load_checkpoint(str(base))
    model = load_model(checkpoint, torch.float32)
    base.rename(tmp_path / "moved")
    save_model(model, checkpoint, tmp_path / "late", show_progress=False)
    assert changes(tmp_path / "moved", tmp_path / "late") == {}
