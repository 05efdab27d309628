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

from checkpoints.model_config import DTYPE_NAMES
from commands import CommandParser, run_command
from errors import ConfigError

LAYOUTS = ("qwen", "qwen2")


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    is_adapter = (args.input / "adapter_config.json").is_file()
    check_args(args, is_adapter)
    # Only now torch is loaded: a wrong flag is answered at once.
    from checkpoints.folders import check_apart, check_output_folder
    from checkpoints.writing import parse_size
    from export.layouts.convert import Conversion, convert_adapter, convert_checkpoint
    from training.logs import set_up_logging

    set_up_logging()
    start = time.monotonic()
    check_apart(args.output, {"IN": [args.input]}, "OUT")
    check_output_folder(args.output, "OUT")
    convert = convert_adapter if is_adapter else convert_checkpoint
    line = convert(
        Conversion(
            source=args.input,
            output=args.output,
            layout=args.layout,
            base=args.base,
            dtype=DTYPE_NAMES.get(args.dtype),
            dynamic_ntk=args.dynamic_ntk,
            max_shard_size=parse_size(args.max_shard_size),
        )
    )
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
        choices=tuple(DTYPE_NAMES),
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


if __name__ == "__main__":
    run_command(main, "scripts.convert_layout")
