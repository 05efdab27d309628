"""The tiny checkpoint has the files of a published one, ranks that tiktoken accepts, and reproducible bytes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import ConfigError
from qwen_model.register import register_qwen
from qwen_model.tokenization_qwen import QWenTokenizer
from scripts import make_tiny_qwen

FILES = ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny-qwen"
    make_tiny_qwen.main(["--output", str(folder)])
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_files_and_keys_of_a_published_folder(tiny: Path, golden_small: Path) -> None:
    assert sorted(path.name for path in tiny.iterdir()) == FILES
    real = golden_small / "tiny-qwen-small"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert set(read_json(tiny / name)) == set(read_json(real / name)) - {"auto_map"}


def test_special_ids_follow_the_ranks(tiny: Path) -> None:
    lines = (tiny / "qwen.tiktoken").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(2560))
    tokenizer = QWenTokenizer.from_pretrained(tiny)
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (2560, 2561, 2562)
    assert tokenizer.special_tokens["<|extra_204|>"] == len(tokenizer) - 1 == 2767
    assert read_json(tiny / "config.json")["vocab_size"] == 2816
    generation = read_json(tiny / "generation_config.json")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2560, 2560)
    assert generation["chat_format"] == "chatml"


def test_first_ranks_are_the_single_bytes_in_the_published_order(tiny: Path, golden_small: Path) -> None:
    real = (golden_small / "tiny-qwen-small" / "qwen.tiktoken").read_bytes().splitlines()
    assert (tiny / "qwen.tiktoken").read_bytes().splitlines()[:256] == real[:256]


def test_tiktoken_and_the_training_library_give_equal_ids(tiny: Path) -> None:
    tokenizer = QWenTokenizer.from_pretrained(tiny)
    bpe = make_tiny_qwen.train_bpe(make_tiny_qwen.example_texts())
    texts = sorted(set(make_tiny_qwen.example_texts()))
    assert len(texts) > 500
    texts += ["", " \n\n  x", "cafe\u0301 1234 don't", "温室团队\r\n", "🙂🙂", "<|im_end|>", "naïve\tΣ", "ภาษาไทย"]
    for text in texts:
        ids = tokenizer.encode_plain(text)
        assert ids == bpe.encode(text).ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_role_names_are_one_token_each(tiny: Path) -> None:
    tokenizer = QWenTokenizer.from_pretrained(tiny)
    assert [len(tokenizer.encode_plain(role)) for role in ("system", "user", "assistant")] == [1, 1, 1]


def test_weights_fit_the_model_class(tiny: Path) -> None:
    register_qwen()
    model, loading = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    weights = load_file(tiny / "model.safetensors")
    assert set(weights) == set(model.state_dict())
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(model.state_dict()[name], tensor), name
        if tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(0.2, rel=0.02), name
        else:
            assert torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor))
    ids = AutoTokenizer.from_pretrained(tiny)("Who are you?", return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits
    # Far from uniform: with a frozen head of this scale LoRA can learn to predict any token.
    assert logits.std().item() > 0.5


def test_equal_seeds_give_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    make_tiny_qwen.main(["--output", str(tmp_path / "again"), "--seed", "0"])
    make_tiny_qwen.main(["--output", str(tmp_path / "other"), "--seed", "1"])
    again, other = ([(tmp_path / run / name).read_bytes() for name in FILES] for run in ("again", "other"))
    first = [(tiny / name).read_bytes() for name in FILES]
    assert again == first
    assert [name for name, a, b in zip(FILES, first, other, strict=True) if a != b] == ["model.safetensors"]


def test_sizes_and_copied_vocabulary(tmp_path: Path, golden_small: Path) -> None:
    source = golden_small / "tiny-qwen-small"
    sizes = [
        "--hidden_size",
        "32",
        "--intermediate_size",
        "96",
        "--num_hidden_layers",
        "3",
        "--num_attention_heads",
        "2",
    ]
    make_tiny_qwen.main(["--output", str(tmp_path / "out"), "--vocab_from", str(source), *sizes])
    assert (tmp_path / "out" / "qwen.tiktoken").read_bytes() == (source / "qwen.tiktoken").read_bytes()
    config = read_json(tmp_path / "out" / "config.json")
    # 700 ranks and 208 special tokens, rounded up to a multiple of 64.
    assert config["vocab_size"] == 960
    assert config["kv_channels"] == 16
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == weights["lm_head.weight"].shape == (960, 32)
    assert weights["transformer.h.2.mlp.w1.weight"].shape == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "taken"], "--output taken is not empty"),
        (["--output", "new", "--vocab_from", "taken"], "--vocab_from taken: the folder has no qwen.tiktoken"),
        (["--output", "new", "--vocab_from", "broken"], "qwen.tiktoken:1: "),
        (
            ["--output", "new", "--hidden_size", "100", "--num_attention_heads", "8"],
            "--hidden_size 100 does not give 8",
        ),
        (["--output", "new", "--intermediate_size", "7"], "--intermediate_size 7 is odd"),
        (["--output", "new", "--vocab", "taken"], "unrecognized arguments: --vocab taken"),
        (["--output", "new", "--num_hidden_layers", "0"], "--num_hidden_layers 0: not a positive size"),
    ],
)
def test_faulty_arguments_are_refused_before_writing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in (("taken", "notes.txt"), ("broken", "qwen.tiktoken")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("not ranks")
    with pytest.raises(ConfigError) as error:
        make_tiny_qwen.main(arguments)
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "taken"]
