"""Merge LoRA adapters into their base: a standalone checkpoint that needs neither peft nor the adapters.

    python merge_lora.py --adapter output/my_adapter --output output/my_model
    python merge_lora.py --adapter output/a=0.7 output/b=0.3 --output output/both

The base is the one named in adapter_config.json; --base overrides it. A quantised base is dequantised. Tensors are
streamed, computed in float32 and rounded once, in a way that keeps the learnt change. The written weights, and the
answers to a few training samples, are compared with base and adapters in a staging folder: the output folder appears
only when it is complete and verified.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.model_config import DTYPE_NAMES, ROUNDINGS
from checkpoints.names import MERGE_REPORT
from commands import CommandParser, run_command, set_up_logging
from console import show, visible
from errors import RunError
from export.layouts.qwen2_names import LAYOUTS
from outputs import check_output_folder, parse_output

if TYPE_CHECKING:
    from export.merging import MergePlan

logger = logging.getLogger("merge_lora")


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    # torch is imported after the flags are checked, so that a wrong flag is reported at once.
    from checkpoints.base_check import check_trained_on
    from checkpoints.files import save_json
    from checkpoints.folders import check_space, staged_folder
    from checkpoints.rope import common_yarn
    from checkpoints.writing import parse_size, save_source
    from export.companion_files import write_card, write_companion_files
    from export.inputs import find_base, load_adapters, open_base
    from export.merging import plan_merge
    from export.progress import progress_bar
    from export.quantized_form import quantization_to_match
    from export.trained_form import compare_with_training
    from loading.opened_by import opening_lines

    start = time.monotonic()
    named = [Path(name) for value in args.adapter for name in (value, value.rpartition("=")[0]) if name]
    inputs = {"--adapter": named, "--base": [args.base] if args.base else []}
    check_output_folder(args.output, "--output", inputs)
    max_shard_size = parse_size(args.max_shard_size)
    weighted = load_adapters(args.adapter)
    adapters = [each.adapter for each in weighted]
    yarn = common_yarn(adapter.folder for adapter in adapters)
    base = open_base(find_base(args.base, adapters[0].folder, adapters[0].config), yarn)
    inputs |= {"--adapter": [adapter.folder for adapter in adapters], "--base": [base.folder]}
    check_output_folder(args.output, "--output", inputs)
    check_trained_on(base.folder, adapters, args.any_base, base_is_given=args.base is not None)
    matched = quantization_to_match(weighted, base.quantization) if args.match_quantised_base else None
    plan = plan_merge(base, weighted, args.layout, args.dtype, args.rounding, matched)
    if args.verify:
        from export.verify.compare import check_verifiable

        check_verifiable(base.model_type)
    with staged_folder(args.output) as folder:
        check_space(plan.written.total_nbytes(), args.output)
        with progress_bar(plan.written, "merging") as bar:
            files = save_source(plan.written, folder, max_shard_size, bar.update)
        size = sum(file.stat().st_size for file in files)
        plan.warn_of_loss()
        write_companion_files(plan, folder)
        save_json(plan.report(), folder / MERGE_REPORT)
        verification = verify(plan, folder) if args.verify else ""
        differences = compare_with_training(plan, folder, args.verify)
        write_card(plan, args.output.name, verification, differences, folder)
    show(f"merged:   {plan.summary()}")
    if kinds := plan.source.kept.describe_kinds():
        show(f"kept:     {kinds}")
    if verification:
        print(visible(verification))
    show(f"written:  {args.output} ({size / 1e6:,.1f} MB in {len(files)} file(s), {time.monotonic() - start:.1f} s)")
    contents = "weights, config.json, tokenizer, generation_config.json, README.md (the model card), merge_report.json"
    show(f"contains: {contents}")
    if commands := opening_lines(args.output, plan.config):
        show(commands)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python merge_lora.py",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        required=True,
        metavar="DIR[=WEIGHT]",
        help="folders of LoRA adapters; WEIGHT scales an adapter's change to the base (default: 1)",
    )
    parser.add_argument("--output", type=parse_output, required=True, help="new folder for the merged checkpoint")
    parser.add_argument("--base", type=Path, help="folder of the base (default: the one that the adapter names)")
    parser.add_argument(
        "--any_base",
        action="store_true",
        help="merge into a base that the adapter was not trained on, with a warning instead of an error",
    )
    parser.add_argument(
        "--match_quantised_base",
        action="store_true",
        help="adapters of --q_lora on an unquantised checkpoint: round its linear layers first, as in the training "
        "(NF4, FP4, 8 bits), so that the result is what was trained (default: merge into the unrounded weights)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPE_NAMES),
        default="auto",
        help="dtype of the written weights (default: the base's)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=ROUNDINGS[0],
        help="how changed weights are rounded to 16 bits: dithered keeps the learnt change, nearest loses all below "
        f"half of what two numbers differ by (default: {ROUNDINGS[0]})",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="tensor names and config to write: qwen (Qwen v1; needs its code), qwen2 (opens without code) "
        "(default: the base's)",
    )
    parser.add_argument(
        "--max_shard_size", default="2GB", help="maximum size of a weight file, such as 2GB or 500MiB (default: 2GB)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        default=True,
        help="compare the written weights, and answers to a few training samples, with base and adapters (default)",
    )
    parser.add_argument("--no_verify", dest="verify", action="store_false", help="skip the comparison")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def verify(plan: MergePlan, folder: Path) -> str:
    """Compare the merged folder with base and adapters; return the result as text.

    Raises:
        RunError: the merged model is not what base and adapters give.
    """
    from export.progress import steps_bar
    from export.verify.behaviour import Comparison
    from export.verify.compare import describe, verify_merge
    from export.verify.samples import choose_samples

    samples = choose_samples(plan.adapters, folder, plan.vocab_size)
    parts = plan.base.other_parts
    comparison = Comparison(plan.fold.base, plan.fold_config, plan.adapters, folder, samples, parts)
    with steps_bar("verifying") as show:
        verification = verify_merge(comparison, plan.source.rounding, show)
    if verification.faults:
        fix = "Nothing was kept. Merge again; if it fails again, the disk or the memory of this machine may be faulty"
        raise RunError(f"the merged model is not what base and adapter give: {describe(verification)}", fix)
    if verification.warning:
        logger.warning("%s", verification.warning)
    return describe(verification)


if __name__ == "__main__":
    run_command(main, "merge_lora.py")
