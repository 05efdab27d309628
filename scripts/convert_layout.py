"""Convert a Qwen v1 checkpoint or adapter to Qwen2's layout, which opens without custom code, or back.

    python -m scripts.convert_layout Qwen-7B-Chat Qwen-7B-Chat-qwen2
    python -m scripts.convert_layout output/my_adapter output/my_adapter-qwen2 --base Qwen-7B-Chat-qwen2

No value changes: up to the length that the model was trained with, both compute the same. GPTQ and AWQ checkpoints stay
quantised. Tensors are streamed; the output folder appears only when it is complete.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints.files import is_file, load_json
from checkpoints.input_folders import check_name
from checkpoints.model_config import DTYPE_NAMES
from checkpoints.names import ADAPTER_CONFIG
from commands import CommandParser, run_command, set_up_logging
from console import python_command, show
from errors import ConfigError
from export.layouts.qwen2_names import LAYOUTS
from outputs import check_output_folder, parse_output


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    check_name(args.input, "IN")
    is_adapter = is_file(args.input / ADAPTER_CONFIG)
    check_args(args, is_adapter)
    check_output_folder(args.output, "OUT", {"IN": [args.input]})
    set_up_logging()
    # torch is imported after the flags are checked, so that a wrong flag is reported at once.
    from checkpoints.writing import parse_size
    from export.conversion import Conversion, convert_adapter, convert_checkpoint
    from loading.opened_by import opening_lines

    start = time.monotonic()
    convert = convert_adapter if is_adapter else convert_checkpoint
    summary = convert(
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
    show(f"converted: {summary}")
    show(f"written:   {args.output} ({size / 1e6:,.1f} MB, {time.monotonic() - start:.1f} s)")
    output: Path = args.output
    if is_adapter:
        merged = Path(f"{output}-merged")
        show(f"next:      {python_command('merge_lora.py --adapter', output, '--output', merged)}")
    elif commands := opening_lines(output, load_json(output / "config.json")):
        show(commands)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python -m scripts.convert_layout",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("input", type=Path, metavar="IN", help="folder of a checkpoint or of a LoRA adapter")
    parser.add_argument("output", type=parse_output, metavar="OUT", help="folder to write; must be empty or not exist")
    parser.add_argument("--layout", choices=LAYOUTS, help="layout to write (default: the one that IN does not have)")
    parser.add_argument("--base", help="adapters only: base to name in the new adapter_config.json (default: as in IN)")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPE_NAMES),
        help="checkpoints only: dtype to write; quantised weights are dequantised (default: as stored)",
    )
    parser.add_argument(
        "--dynamic_ntk",
        action="store_true",
        help="to qwen2 only: request transformers' dynamic NTK beyond the trained length; vLLM and SGLang then change "
        "the rotary embeddings of short texts too",
    )
    parser.add_argument(
        "--max_shard_size", default="2GB", help="maximum size of a weight file, such as 2GB or 500MiB (default: 2GB)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace, is_adapter: bool) -> None:
    """Raise ``ConfigError`` for a folder that is neither kind, and for flags of the other kind."""
    if not is_adapter and not is_file(args.input / "config.json"):
        is_folder = os.path.isdir(args.input)
        what = "has neither config.json nor adapter_config.json" if is_folder else "is not a folder"
        raise ConfigError(f"{args.input} {what}", "Give the folder of a checkpoint or of a LoRA adapter")
    is_set = {"--base": args.base is not None, "--dtype": args.dtype is not None, "--dynamic_ntk": args.dynamic_ntk}
    inapplicable = ("--dtype", "--dynamic_ntk") if is_adapter else ("--base",)
    if flag := next((flag for flag in inapplicable if is_set[flag]), None):
        kind = "an adapter" if is_adapter else "a checkpoint"
        raise ConfigError(f"{flag} does not apply to {kind}, which {args.input} is", "Remove the flag")


if __name__ == "__main__":
    run_command(main, "scripts.convert_layout")
