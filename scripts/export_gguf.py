"""Write a merged or fully tuned checkpoint as one GGUF file, for llama.cpp, Ollama and LM Studio.

    python -m scripts.export_gguf output/merged --outfile build/model.gguf --modelfile

Qwen v1 is converted to Qwen2's layout on the way. The file is compared with the checkpoint before it appears: names,
shapes and values of all tensors, vocabulary, chat template and the token that ends an answer.

llama.cpp's converter is a package of its own, in a folder of its own; the command says how to install it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from checkpoints.files import is_file
from checkpoints.input_folders import check_name
from checkpoints.names import ADAPTER_CONFIG
from commands import CommandParser, run_command, set_up_logging
from console import python_command, show
from errors import ConfigError
from export.gguf_models import load_model_type
from export.gguf_tools import TOOLS, check_tools
from outputs import check_output_file, parse_output


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("python -m scripts.export_gguf", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of a checkpoint; adapters are merged first")
    parser.add_argument("--outfile", type=parse_output, required=True, help="file to write; must not exist")
    parser.add_argument(
        "--quantize",
        choices=("q8_0", "q4_k_m", "f16", "bf16", "f32"),
        default="q8_0",
        help="type of the weights: 8 bits (default), 4 bits (needs llama-cpp-python), or floats",
    )
    parser.add_argument(
        "--modelfile", action="store_true", help="write Ollama's Modelfile beside it: NAME.Modelfile for NAME.gguf"
    )
    parser.add_argument(
        "--tools", type=Path, default=TOOLS, help="folder of the converter's packages (default: build/gguf_tools)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    check_name(args.model, "DIR")
    settings_file: Path = args.outfile.with_suffix(".Modelfile")
    for path in (args.outfile, *([settings_file] if args.modelfile else [])):
        check_output_file(path, "--outfile", {"DIR": [args.model]})
        if os.path.lexists(path):
            raise ConfigError(f"--outfile {args.outfile}: {path} exists", "Give another name, or remove it")
    check_model(args.model)
    check_tools(args.tools, args.quantize)
    # torch is imported after the flags are checked, so that a wrong flag is reported at once.
    from export.gguf import export_model, open_model
    from export.ollama import modelfile, write_modelfile

    model = open_model(args.model)
    settings = None
    if args.modelfile:
        template = model.tokenizer.chat_template
        settings = modelfile(model.family, template, model.generation_config, args.outfile.name)
    checked = export_model(model, args.outfile, args.quantize, args.tools)
    ids = f"{checked['ids']} texts have equal ids in llama.cpp" if checked["ids"] else "ids: llama.cpp is not installed"
    show(f"checked:    {checked['tensors']} tensors, {checked['tokens']:,} tokens, metadata; {ids}")
    show(f"written:    {args.outfile} ({args.outfile.stat().st_size / 1e6:,.1f} MB)")
    if settings is not None:
        write_modelfile(settings, settings_file)
        show(f"next:       ollama create NAME -f {settings_file}")


def check_model(folder: Path) -> None:
    """Raise ``ConfigError`` unless a folder holds a model that can be exported."""
    if is_file(folder / ADAPTER_CONFIG) and not is_file(folder / "config.json"):
        merge = python_command("merge_lora.py --adapter", folder, "--output", Path(f"{folder}-merged"))
        raise ConfigError(f"{folder} holds an adapter, not a model", f"Merge it first: {merge}")
    if not is_file(folder / "config.json"):
        what = "has no config.json" if os.path.isdir(folder) else "is not a folder"
        raise ConfigError(f"{folder} {what}", "Give the folder of a checkpoint")
    load_model_type(folder)  # refused before the converter is asked for


if __name__ == "__main__":
    run_command(main, "scripts.export_gguf")
