"""Quantise a checkpoint with your own conversations as calibration data.

    python -m scripts.quantize --model_name_or_path DIR --data_path FILE --output_dir OUT --bits 4

Conversations are sampled and tokenised as in training. Others than those that calibrate are held out: the perplexity of
their answers is measured before and after, and with weights that are rounded to nearest. The output folder appears when
it is complete. It opens in transformers, scripts.ask answers with it, and finetune.py trains an adapter on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commands import CommandParser, run_command, set_up_logging
from console import show
from errors import ConfigError
from outputs import check_output_folder, check_outside_inputs, parse_output
from training.config.defaults import MODEL_MAX_LENGTH

if TYPE_CHECKING:
    from quantize.calibration import Samples
    from quantize.checkpoint import Result

GROUP_SIZES = (32, 64, 128)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.quantize",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder, or model id on a hub")
    parser.add_argument(
        "--data_path",
        required=True,
        nargs="+",
        metavar="FILE",
        help="conversations, in any format that finetune.py reads",
    )
    parser.add_argument(
        "--output_dir", required=True, type=parse_output, help="folder to write; must not exist or be empty"
    )
    parser.add_argument("--format", choices=("gptq", "awq", "nf4"), default="gptq", help="default: %(default)s")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="8 only with gptq; default: %(default)s")
    parser.add_argument(
        "--group_size", type=int, choices=GROUP_SIZES, help="inputs that share a scale, for gptq and awq; default: 128"
    )
    parser.add_argument(
        "--symmetric", action="store_true",
        help="gptq without zero points, which vLLM needs with 4 bits; costs more (docs/qlora.md)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=128, help="number of conversations that calibrate; default: %(default)s"
    )
    parser.add_argument(
        "--model_max_length",
        type=int,
        help=f"maximum sequence length; default: min({MODEL_MAX_LENGTH}, model limit)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling; default: %(default)s")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja chat template instead of the checkpoint's")
    parser.add_argument(
        "--system_message", help="system message of conversations without one; default: that of the chat format"
    )
    parser.add_argument(
        "--data_format",
        choices=("auto", "conversations", "messages", "alpaca", "pairs"),
        default="auto",
        help="format of all files; auto (default) detects it for each file",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for invalid flags or combinations of flags."""
    if args.bits == 8 and args.format != "gptq":
        raise ConfigError(f"--bits 8 is not supported with --format {args.format}", "Give --bits 4, or --format gptq")
    if args.format == "nf4" and args.group_size is not None:
        raise ConfigError(f"--group_size {args.group_size} has no effect with --format nf4", "Remove it")
    if args.symmetric and args.format != "gptq":
        raise ConfigError(f"--symmetric has no effect with --format {args.format}", "Remove it")
    if args.samples < 1:
        raise ConfigError(f"--samples {args.samples} is too few", "Give 1 or more")
    if args.model_max_length is not None and args.model_max_length < 1:
        raise ConfigError(f"--model_max_length {args.model_max_length} is not positive", "Give a positive number")


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    check_output_folder(args.output_dir, "--output_dir", {"--model_name_or_path": [Path(args.model_name_or_path)]})
    # torch is imported after the flags are checked, so that a wrong flag is reported at once.
    from checkpoints.files import load_json
    from checkpoints.model_config import Quantization
    from data_utils.encode import EncodeOptions
    from loading.checkpoint import load_checkpoint
    from loading.opened_by import opening_lines
    from quantize.calibration import draw_samples
    from quantize.checkpoint import check_quantizable, quantize_checkpoint

    group_size = 0 if args.format == "nf4" else args.group_size or 128
    quantization = Quantization(
        args.format, args.bits, group_size, zero_offset=int(args.format == "gptq"), symmetric=args.symmetric
    )
    checkpoint = load_checkpoint(args.model_name_or_path, chat_template=args.chat_template)
    check_outside_inputs(args.output_dir, "--output_dir", {"--model_name_or_path": [checkpoint.folder]})
    check_quantizable(checkpoint, quantization)
    options = EncodeOptions(max_length=choose_length(args, checkpoint.folder), system_message=args.system_message)
    samples = draw_samples(checkpoint, args.data_path, args.samples, options, args.data_format, args.seed)
    result = quantize_checkpoint(checkpoint, quantization, samples, args.output_dir)
    calibrated = f"calibrated: on {len(samples.calibration):,} conversations, {samples.calibration_tokens:,} tokens"
    for line in (
        *([calibrated] if quantization.is_packed else []),  # others only round
        *perplexity_lines(result, samples),
        f"written:    {args.output_dir} ({quantization}), {result.bytes_after / 1e6:,.1f} MB of weights "
        f"instead of {result.bytes_before / 1e6:,.1f}",
        opening_lines(args.output_dir, load_json(args.output_dir / "config.json")),
    ):
        show(line)


def perplexity_lines(result: Result, samples: Samples) -> list[str]:
    """Say what quantising cost, what rounding to nearest would have cost, and which layer changed most."""
    from quantize.calibration import HELD_OUT_TOKENS

    number = result.before.num_tokens
    few = "" if number >= HELD_OUT_TOKENS else f", too few for a certain figure: {HELD_OUT_TOKENS:,} are needed"
    lines = [
        f"perplexity: {result.before.perplexity:.4f} before, {result.after.perplexity:.4f} after, "
        f"on the {number:,} answer tokens of {len(samples.held_out):,} held-out conversations{few}",
        f"change:     {result.after.change_from(result.before)}",
    ]
    if result.nearest is not None:
        lines[1] += f"; rounded to nearest: {result.nearest.change_from(result.before)}"
    if (worst := result.worst_layer) is not None:
        lines.append(
            f"worst:      {worst}, whose outputs changed by {result.errors[worst]:.1%} on the calibration data"
        )
    return lines


def choose_length(args: argparse.Namespace, folder: Path) -> int:
    """Return the maximum sequence length, at most the number of positions of the model."""
    from loading.config_files import load_model_config, max_positions

    positions = max_positions(load_model_config(folder))
    length: int = args.model_max_length or min(MODEL_MAX_LENGTH, positions or MODEL_MAX_LENGTH)
    if positions is not None and length > positions:
        raise ConfigError(
            f"--model_max_length {length} is more than the {positions} positions of {args.model_name_or_path}",
            f"Give {positions} or less",
        )
    return length


if __name__ == "__main__":
    run_command(main, "scripts.quantize")
