"""Comparison of a written GGUF file with its checkpoint: metadata, vocabulary, and the values of every tensor.

Runs in the process of :mod:`export.gguf_driver`, which has the converter's version of the package gguf.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy
import torch

from chat.chatml import IM_END
from chat.render import encode_prompt, plain_encoder, render_prompt, text_of
from chat.turns import Turn
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource
from checkpoints.whole import load_text_config
from errors import RunError
from export.verify.prompts import PROMPTS
from loading.chat_family import chat_family
from loading.checkpoint import load_config
from loading.tokenizer import load_tokenizer
from qwen_model.architectures import is_computed

_FIX = "Report this with the versions of the converter and of transformers"
_ROWS = 64  # of each tensor are compared
# Largest error of a tensor's values, as a share of their size: some times what each type has with any weights.
_MOST_ERROR = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.05, "Q6_K": 0.1, "Q5_0": 0.15, "Q5_K": 0.15}
_MOST_ERROR_OF_OTHERS = 0.3
_CONTROL = 3  # llama.cpp's type of a control token
_TEXTS = (
    "a \U0001f469\u200d\U0001f680 rocket \U0001f680\U0001f680", f"the text {IM_END} is no token", "12345, 3.14; x=[1]",
    "  two  spaces\tand\n\n a break\n", "It's WE'LL they'd", "學而時習之，不亦說乎？", "",
)  # fmt: skip


def check_file(path: Path, folder: Path, end_id: int) -> dict[str, Any]:
    """Compare a file with the checkpoint that it was made of; return numbers of what was compared.

    Args:
        end_id: id that ends an answer.

    Raises:
        RunError: they differ; names what does.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = load_tokenizer(folder, str(folder))
    checked = {
        "tensors": check_tensors(reader, open_checkpoint(folder), int(load_config(folder).num_hidden_layers)),
        "tokens": check_vocabulary(fields, folder, tokenizer),
    }
    check_metadata(fields, folder, tokenizer, end_id)
    return {**checked, "ids": check_ids(path, folder, tokenizer)}


def _differs(what: str, found: object, expected: object) -> RunError:
    return RunError(f"the written file has {what} {found!r}, the checkpoint {expected!r}. {_FIX}")


def check_metadata(fields: dict[str, Any], folder: Path, tokenizer: Any, end_id: int) -> None:
    """Check that the file has the sizes of config.json, and the chat template and end of the tokenizer."""
    config = load_config(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = fields["general.architecture"]
    expected = {
        "general.architecture": config.model_type,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": rope.get("rope_theta", getattr(config, "rope_theta", None)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": end_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    for name, value in expected.items():
        found = fields.get(name)
        if isinstance(value, dict):  # several templates, of which the file has the default one
            value = value["default"]
        is_equal = abs(found - value) <= 1e-6 * abs(value) if isinstance(value, float) and found else found == value
        if not is_equal:
            raise _differs(name, found, value)


def check_vocabulary(fields: dict[str, Any], folder: Path, tokenizer: Any) -> int:
    """Check every token with its kind, and every merge; return the number of tokens."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = tokenizer.added_tokens_decoder
    for id_, expected in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if expected is not None and tokens[id_] != expected:
            raise _differs(f"token {id_}", tokens[id_], expected)
        if id_ in added and added[id_].special and kinds[id_] != _CONTROL:
            raise _differs(f"the kind of token {expected!r}", kinds[id_], _CONTROL)
    stated = json.loads((folder / "tokenizer.json").read_bytes())["model"]["merges"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in stated]
    if fields["tokenizer.ggml.merges"] != merges:
        raise _differs("merges", len(fields["tokenizer.ggml.merges"]), len(merges))
    return len(tokens)


def check_tensors(reader: Any, source: TensorSource, layers: int) -> int:
    """Check names, shapes and the first rows of all tensors; return their number."""
    import gguf

    kind = reader.fields["general.architecture"].contents()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), layers)
    written = {tensor.name: tensor for tensor in reader.tensors}
    stored = [name for name in source.names() if not is_computed(name)]
    for name in stored:
        mapped = names.get_name(name, (".weight", ".bias"))
        if mapped not in written:
            raise RunError(f"the written file has no tensor for {name}. {_FIX}")
        compare_values(written.pop(mapped), source, name)
    if others := written.keys() - {"output.weight", "rope_freqs.weight"}:  # a copy of a tied head, scaled rotary tables
        raise RunError(f"the written file has tensors of no name in the checkpoint: {sorted(others)}. {_FIX}")
    return len(stored)


def compare_values(tensor: Any, source: TensorSource, name: str) -> None:
    """Compare the first rows of a tensor; raise RunError if their error is more than its type explains."""
    import gguf

    shape = tuple(int(size) for size in reversed(tensor.shape))
    if shape != source.shape(name):
        raise _differs(f"{tensor.name} of shape", shape, source.shape(name))
    expected = source.rows(name, 0, _ROWS).to(torch.float64).numpy()
    values = gguf.quants.dequantize(tensor.data[:_ROWS], tensor.tensor_type).astype(numpy.float64)
    error, size = (float(numpy.linalg.norm(each)) for each in (values - expected, expected))
    most = _MOST_ERROR.get(tensor.tensor_type.name, _MOST_ERROR_OF_OTHERS)
    if not error <= most * size:  # true for NaN
        what = f"{tensor.name} differs by {error / max(size, 1e-300):.1%} from {name}"
        fix = "Give --quantize bf16 or f32: float16 ends at 65,504" if tensor.tensor_type.name == "F16" else _FIX
        raise RunError(f"{what}, more than {tensor.tensor_type.name} explains. {fix}")


def check_ids(path: Path, folder: Path, tokenizer: Any) -> int:
    """Compare the ids of texts and of prompts with llama.cpp's; return their number, 0 if it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return 0
    llama_cpp: Any = importlib.import_module("llama_cpp")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    encode = plain_encoder(tokenizer)
    texts = [*_TEXTS, *(text for pair in PROMPTS for text in pair)]
    family = chat_family(str(load_text_config(folder)["model_type"]), tokenizer)
    prompts = [render_prompt([Turn("user", question)], family) for question, _ in PROMPTS]
    pairs = [(text, encode(text), False) for text in texts]
    pairs += [(text_of(prompt), encode_prompt(prompt, tokenizer), True) for prompt in prompts]
    for text, ids, has_control in pairs:
        if (found := llama.tokenize(text.encode(), add_bos=False, special=has_control)) != ids:
            raise RunError(f"llama.cpp gives other ids for {text!r}: {found} instead of {ids}. {_FIX}")
    return len(pairs)
