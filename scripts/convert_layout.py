"""Bring a Qwen v1 checkpoint or adapter into Qwen2's layout, which opens without any code, or back.

    python -m scripts.convert_layout Qwen-7B-Chat Qwen-7B-Chat-qwen2
    python -m scripts.convert_layout output/my_adapter output/my_adapter-qwen2 --base Qwen-7B-Chat-qwen2

Every value stays as it is; up to the length that the model was trained with it answers alike. Checkpoints that GPTQ or
AWQ has quantised stay quantised. Tensors pass through some rows at a time; the output folder appears when it is whole.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.precision import DTYPES, with_dtype
from errors import CommandParser, ConfigError, run_command

if TYPE_CHECKING:
    from checkpoints.source import TensorSource
    from export.qwen2_names import Layout

LAYOUTS = ("qwen", "qwen2")
# What else of a checkpoint belongs to it in any layout.
LEGAL_FILES = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md")


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    is_adapter = (args.input / "adapter_config.json").is_file()
    check_args(args, is_adapter)
    # Only now torch is loaded: a wrong flag is answered at once.
    from checkpoints.folders import check_output_folder
    from export.outputs import check_apart
    from training.logs import set_up_logging

    set_up_logging()
    start = time.monotonic()
    check_apart(args.output, {"IN": [args.input]}, "OUT")
    check_output_folder(args.output, "OUT")
    convert = convert_adapter if is_adapter else convert_checkpoint
    line = convert(args)
    size = sum(file.stat().st_size for file in args.output.iterdir() if file.is_file())
    print(f"converted: {line}")
    print(f"written:   {args.output} ({size / 1e6:,.1f} MB, {time.monotonic() - start:.1f} s)")
    place = shlex.quote(str(args.output))
    if is_adapter:
        print(f"next:      python merge_lora.py --adapter {place} --output {place}-merged")
    else:
        print(f'next:      python -m scripts.ask --model_name_or_path {place} "Who are you?"')


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python -m scripts.convert_layout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", type=Path, metavar="IN", help="folder of a checkpoint or of a LoRA adapter")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")
    parser.add_argument("--layout", choices=LAYOUTS, help="what to write (default: the other one)")
    parser.add_argument("--base", help="of an adapter: the base that it names from now on (default: as before)")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of a checkpoint: what to write; quantised weights are dequantised to it (default: as they are)",
    )
    parser.add_argument(
        "--dynamic_ntk",
        action="store_true",
        help="to qwen2: ask transformers for dynamic NTK beyond the length the model was trained with. vLLM and SGLang "
        "then use other rotary embeddings for short texts, too",
    )
    parser.add_argument("--max_shard_size", default="2GB", help="size of a weight file, as 2GB or 500MiB (default 2GB)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace, is_adapter: bool) -> None:
    """Raise ``ConfigError`` for a folder that is neither kind, and for flags of the other kind."""
    if not is_adapter and not (args.input / "config.json").is_file():
        what = "holds neither config.json nor adapter_config.json" if args.input.is_dir() else "is no folder"
        raise ConfigError(f"{args.input} {what}", "Give the folder of a checkpoint or of a LoRA adapter")
    given = {"--base": args.base is not None, "--dtype": args.dtype is not None, "--dynamic_ntk": args.dynamic_ntk}
    others = ("--dtype", "--dynamic_ntk") if is_adapter else ("--base",)
    if flag := next((flag for flag in others if given[flag]), None):
        kind = "an adapter" if is_adapter else "a checkpoint"
        raise ConfigError(f"{flag} has no meaning for {kind}, which {args.input} is", "Leave it out")


def other_layout(found: str, args: argparse.Namespace) -> Layout:
    """The layout to write: the one asked for, or the one that the input has not."""
    target: Layout = args.layout or ("qwen2" if found == "qwen" else "qwen")
    if target == found:
        raise ConfigError(f"--layout {target}: {args.input} has this layout already", "Give the other one")
    return target


def convert_adapter(args: argparse.Namespace) -> str:
    """Write the adapter and give the line that says what was done."""
    from checkpoints.adapter import load_adapter
    from checkpoints.folders import staged_folder
    from export.adapter_config import save_relaid_adapter
    from export.qwen2_names import layout_of_names

    adapter = load_adapter(args.input)
    found = layout_of_names(adapter.edits)
    if found is None:
        raise ConfigError(f"{args.input}: the adapter has the same names in every layout", "Use it as it is")
    target = other_layout(found, args)
    with staged_folder(args.output, "OUT") as folder:
        save_relaid_adapter(adapter, target, folder, args.base)
        convert_companions(args, folder, target)
        save_adapter_generation_config(args, folder, target)
    return f"an adapter of {len(adapter.edits)} parameters, {found} -> {target}"


def convert_checkpoint(args: argparse.Namespace) -> str:
    """Write the checkpoint and give the line that says what was done."""
    from checkpoints.folders import save_json, staged_folder
    from checkpoints.shards import load_json
    from checkpoints.writing import parse_size, save_source
    from export.outputs import check_space, progress_bar
    from export.qwen2_config import config_to_qwen, config_to_qwen2
    from export.qwen2_layout import to_qwen, to_qwen2
    from export.standalone import write_code

    max_shard_size = parse_size(args.max_shard_size)
    config = load_json(args.input / "config.json")
    if (model_type := config.get("model_type")) not in LAYOUTS:
        what = f"{args.input / 'config.json'}: model_type {model_type!r} has no other layout"
        raise ConfigError(what, "Only qwen and qwen2 have")
    target = other_layout(str(model_type), args)
    below = open_source(args, config)
    if target == "qwen2":
        source, changed = to_qwen2(below, config), config_to_qwen2(config, args.dynamic_ntk)
    else:
        source, changed = to_qwen(below, config), config_to_qwen(config)
    if args.dtype:
        changed = with_dtype(changed, DTYPES[args.dtype])
    check_space(source, args.output, "OUT")
    with staged_folder(args.output, "OUT") as folder:
        with progress_bar(source, "converting") as bar:
            files = save_source(source, folder, max_shard_size, bar.update)
        keep_origin(args, config, changed)
        save_json(changed, folder / "config.json")
        convert_companions(args, folder, target)
        save_generation_config(args, config, folder)
        if target == "qwen":
            write_code(folder)
    return f"{len(source.names())} tensors in {len(files)} file(s), {model_type} -> {target}"


def open_source(args: argparse.Namespace, config: dict[str, Any]) -> TensorSource:
    """The tensors of the input, dequantised if ``--dtype`` says so; ``config`` then says how they are quantised."""
    import torch

    from checkpoints.dequantized import open_dequantized
    from checkpoints.shards import open_checkpoint
    from checkpoints.source import InDtype
    from export.qwen2_config import find_quantization_config

    if args.dtype:
        config.pop("quantization_config", None)
        dtype = getattr(torch, DTYPES[args.dtype])
        return InDtype(open_dequantized(args.input, dtype), dtype)
    if quantization_config := find_quantization_config(args.input, config):
        config["quantization_config"] = quantization_config
    return open_checkpoint(args.input)


def keep_origin(args: argparse.Namespace, config: dict[str, Any], changed: dict[str, Any]) -> None:
    """Say in the new config which weights these are, and what its layout has no other place for."""
    from checkpoints.shards import fingerprint, load_json
    from export.qwen2_config import KEPT

    if args.dtype is None:  # values that were rounded are others
        changed["converted_from"] = {"layout": config["model_type"], "fingerprint": fingerprint(args.input)}
    file = args.input / "generation_config.json"
    if KEPT in changed and file.is_file() and "chat_format" in (settings := load_json(file)):
        changed[KEPT]["chat_format"] = settings["chat_format"]


def convert_companions(args: argparse.Namespace, folder: Path, layout: Layout) -> None:
    """The tokenizer in the new layout, if there is one; LICENSE and the like as they are."""
    from export.folder import TOKENIZER_FILES, convert_tokenizer, copy_first, copy_tokenizer

    copy_tokenizer([args.input], folder)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        convert_tokenizer(folder, layout)
    for name in LEGAL_FILES:
        copy_first(name, [args.input], folder)


def save_generation_config(args: argparse.Namespace, config: dict[str, Any], folder: Path) -> None:
    """Settings that end an answer, and for Qwen v1 whether the model knows ChatML."""
    from checkpoints.folders import save_json
    from checkpoints.shards import load_json
    from export.chat import write_chat_template, write_generation_config
    from export.folder import copy_first
    from export.qwen2_config import KEPT

    file = folder / "generation_config.json"
    copy_first(file.name, [args.input], folder)
    write_generation_config(folder)
    write_chat_template(folder)
    chat_format = (config.get(KEPT) or {}).get("chat_format")
    if chat_format and file.is_file():
        save_json(load_json(file) | {"chat_format": chat_format}, file)


def save_adapter_generation_config(args: argparse.Namespace, folder: Path, layout: Layout) -> None:
    """The generation settings that were saved beside the adapter and its tokenizer, with the keys of the new layout."""
    from transformers import AutoTokenizer

    from checkpoints.folders import save_json
    from checkpoints.shards import load_json
    from qwen_model.register import register_qwen
    from qwen_model.stops import end_ids_of, stopping_generation_config

    file = args.input / "generation_config.json"
    if file.is_file() and (folder / "tokenizer_config.json").is_file():
        register_qwen()
        end_ids = end_ids_of(AutoTokenizer.from_pretrained(str(folder)))
        save_json(stopping_generation_config(load_json(file), end_ids, layout), folder / file.name)


if __name__ == "__main__":
    run_command(main, "scripts.convert_layout")
