"""Write a small random Qwen v1 checkpoint, to try the toolkit without downloading weights.

    python -m scripts.make_tiny_qwen --output build/tiny-qwen

The folder contains the files and keys of a published one: the rank file of a byte-level BPE trained on the
conversations in examples/ (or a copy, with --vocab_from), and random weights from a seed. Equal arguments give equal
bytes.
"""

from __future__ import annotations

import argparse
import base64
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat.families import QWEN_V1
from chat.render import render
from checkpoints.files import save_json
from checkpoints.folders import staged_folder
from checkpoints.writing import save_checkpoint
from commands import CommandParser, run_command
from console import show
from data_utils.files import read_records
from data_utils.formats import recognise
from errors import ConfigError
from outputs import check_output_folder, parse_output
from qwen_model.prompts import SPECIAL_TOKENS
from qwen_model.tokenization_qwen import SPLIT_PATTERN, load_ranks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUM_RANKS = 2560
# Larger than the 0.02 of the published models: at this width the logits of a frozen random head would hardly differ,
# and LoRA, which does not train the head, could not learn an answer.
INITIALIZER_RANGE = 0.2


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    inputs = {"--vocab_from": [args.vocab_from]} if args.vocab_from else {}
    check_output_folder(args.output, "--output", inputs)
    with staged_folder(args.output) as folder:
        num_ranks = save_ranks(folder / "qwen.tiktoken", args.vocab_from)
        config = build_config(args, num_ranks)
        save_json(config, folder / "config.json")
        save_json(build_generation_config(num_ranks), folder / "generation_config.json")
        save_json(build_tokenizer_config(config), folder / "tokenizer_config.json")
        save_checkpoint(build_weights(config, args.seed), folder, max_shard_size=2 * 10**9)
    show(f"Wrote {args.output}: Qwen v1, random weights of seed {args.seed}, {num_ranks} ranks")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python -m scripts.make_tiny_qwen",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=parse_output, required=True, help="folder to write; must be empty or not exist"
    )
    parser.add_argument("--vocab_from", type=Path, help="folder whose qwen.tiktoken is copied (default: train one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--intermediate_size", type=int, default=512, help="twice the width of the MLP (default: %(default)s)"
    )
    parser.add_argument("--num_hidden_layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: not a positive size", "Give a positive number")
    if args.hidden_size % (2 * args.num_attention_heads):
        raise ConfigError(
            f"--hidden_size {args.hidden_size} does not give {args.num_attention_heads} heads of an even size",
            f"Give a multiple of {2 * args.num_attention_heads}, or another --num_attention_heads",
        )
    if args.intermediate_size % 2:
        raise ConfigError(f"--intermediate_size {args.intermediate_size} is odd", "It is twice the width of the MLP")
    return args


def save_ranks(path: Path, vocab_from: Path | None) -> int:
    """Write a trained or copied rank file to ``path`` and return its number of ranks."""
    if vocab_from is None:
        tokens = rank_tokens(train_bpe(example_texts()))
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
        return len(tokens)
    source = vocab_from / "qwen.tiktoken"
    if not source.is_file():
        raise ConfigError(f"--vocab_from {vocab_from}: the folder has no qwen.tiktoken", "Give a Qwen v1 folder")
    num_ranks = len(load_ranks(source))
    shutil.copyfile(source, path)
    return num_ranks


def example_texts() -> Iterator[str]:
    """Yield the texts that training on ``examples/`` tokenises, including headers and the default system message."""
    for path in sorted(EXAMPLES.glob("*.json*")):
        for where, record in read_records(path):
            for message in render(recognise(record, where).parse(record, where).turns, QWEN_V1):
                yield from (segment.text for segment in message.segments if not segment.is_control)


def train_bpe(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE with Qwen's normalisation and splitting."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def rank_tokens(bpe: Tokenizer) -> list[bytes]:
    """Return the tokens as bytes in the order of their ranks: 256 single bytes, then the merged tokens.

    The trainer sorts the single bytes by the characters that represent them, as in the published rank files.
    """
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ids = bpe.get_vocab(with_added_tokens=False)
    return [bytes(byte_of[char] for char in token) for token in sorted(ids, key=ids.__getitem__)]


def build_config(args: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    """Build config.json with the keys of December 2023."""
    num_ids = num_ranks + len(SPECIAL_TOKENS)
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": True,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "initializer_range": INITIALIZER_RANGE,
        "kv_channels": args.hidden_size // args.num_attention_heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 2048,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": args.num_attention_heads,
        "num_hidden_layers": args.num_hidden_layers,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 512,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "torch_dtype": "float32",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": -(-num_ids // 64) * 64,
    }


def build_generation_config(num_ranks: int) -> dict[str, Any]:
    """Build generation_config.json of a chat model; eos and pad are ``<|endoftext|>``, the first special token."""
    return {
        "chat_format": "chatml",
        "eos_token_id": num_ranks,
        "pad_token_id": num_ranks,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "transformers_version": "4.31.0",
    }


def build_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    return {"model_max_length": config["max_position_embeddings"], "tokenizer_class": "QWenTokenizer"}


def build_weights(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in float32: normally distributed matrices, norms of ones, biases of zeros."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = config["hidden_size"], config["intermediate_size"] // 2

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * config["initializer_range"]

    yield "transformer.wte.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}"
        yield f"{prefix}.ln_1.weight", torch.ones(hidden)
        yield f"{prefix}.attn.c_attn.weight", matrix(3 * hidden, hidden)
        yield f"{prefix}.attn.c_attn.bias", torch.zeros(3 * hidden)
        yield f"{prefix}.attn.c_proj.weight", matrix(hidden, hidden)
        yield f"{prefix}.ln_2.weight", torch.ones(hidden)
        yield f"{prefix}.mlp.w1.weight", matrix(width, hidden)
        yield f"{prefix}.mlp.w2.weight", matrix(width, hidden)
        yield f"{prefix}.mlp.c_proj.weight", matrix(hidden, width)
    yield "transformer.ln_f.weight", torch.ones(hidden)
    yield "lm_head.weight", matrix(config["vocab_size"], hidden)


if __name__ == "__main__":
    run_command(main, "scripts.make_tiny_qwen")
