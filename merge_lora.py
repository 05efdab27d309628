"""Fold LoRA adapters into their base: a standalone checkpoint that needs neither peft nor the adapters.

    python merge_lora.py --adapter output/my_adapter --output output/my_model
    python merge_lora.py --adapter output/a=0.7 output/b=0.3 --output output/both

The base is the one that the adapter names; --base gives another place for it. It may be quantised: then its weights are
dequantised. Tensors pass through some rows at a time, computed in fp32, rounded once. The result is compared with base
and adapters on a dozen prompts, layer by layer, before it gets its name: the output folder appears when it is whole.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.model_config import DTYPE_NAMES
from commands import CommandParser, run_command
from errors import ConfigError, RunError

if TYPE_CHECKING:
    from checkpoints.fold import WeightedAdapter
    from export.merging import Merge

LAYOUTS = ("auto", "qwen", "qwen2")


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    # Only now torch is loaded: a wrong flag is answered at once.
    from checkpoints.folders import check_apart, check_output_folder, check_space, staged_folder
    from checkpoints.writing import parse_size, save_source
    from export.bases import check_trained_on, open_base
    from export.folder import write_card, write_others
    from export.merging import plan_merge
    from export.model_card import serve_lines
    from export.progress import progress_bar
    from training.logs import set_up_logging

    set_up_logging()
    start = time.monotonic()
    max_shard_size = parse_size(args.max_shard_size)
    adapters = load_adapters(args.adapter)
    first = adapters[0].adapter
    base = open_base(find_base(args.base, first.folder, first.config))
    check_apart(args.output, {"--adapter": [each.adapter.folder for each in adapters], "--base": [base.folder]})
    check_output_folder(args.output)
    check_trained_on(base, [each.adapter for each in adapters], args.base is not None, args.any_base)
    merge = plan_merge(base, adapters, args.layout, args.dtype)
    if args.verify:
        from export.verify.compare import check_verifiable

        check_verifiable(merge.base.model_type)
    with staged_folder(args.output) as folder:
        check_space(merge.source.total_nbytes(), args.output)
        with progress_bar(merge.source, "merging") as bar:
            files = save_source(merge.source, folder, max_shard_size, bar.update)
        size = sum(file.stat().st_size for file in files)
        write_others(merge, folder)
        verified = verify(merge, folder) if args.verify else ""
        write_card(merge, args.output.name, verified, folder)
    print(f"merged:   {merge.summary()}")
    if verified:
        print(verified)
    print(f"written:  {args.output} ({size / 1e6:,.1f} MB in {len(files)} file(s), {time.monotonic() - start:.1f} s)")
    print("next:")
    for line in serve_lines(args.output, str(merge.config["model_type"]), merge.base.model_type):
        print(f"  {line}")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python merge_lora.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        required=True,
        metavar="DIR[=WEIGHT]",
        help="folders of LoRA adapters, each with the share of its change that is taken (default 1)",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument("--base", type=Path, help="folder of the base; default: the one that the adapter names")
    parser.add_argument(
        "--any_base", action="store_true", help="merge onto a base that the adapter was not trained on, with a warning"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPE_NAMES), default="auto", help="what to write; auto: as the base (default)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="names of the tensors: qwen (Qwen v1's), qwen2 (opens without any code); auto: the base's (default)",
    )
    parser.add_argument("--max_shard_size", default="2GB", help="size of a weight file, as 2GB or 500MiB (default 2GB)")
    parser.add_argument(
        "--verify",
        action="store_true",
        default=True,
        help="compare the result with base and adapters on a dozen prompts, block by block (default)",
    )
    parser.add_argument("--no_verify", dest="verify", action="store_false", help="leave that out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_args(argv)


def load_adapters(given: Sequence[str]) -> list[WeightedAdapter]:
    """``DIR`` or ``DIR=WEIGHT`` each; a folder whose name holds ``=`` is taken as it stands."""
    from checkpoints.adapter import read_adapter
    from checkpoints.fold import WeightedAdapter

    adapters = []
    for text in given:
        folder, _, weight = (text, "", "1") if Path(text).is_dir() else text.rpartition("=")
        if not folder:
            folder, weight = weight, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ConfigError(f"--adapter {text}: {weight!r} is no weight", "Write it like --adapter output/a=0.7")
        adapters.append(WeightedAdapter(read_adapter(folder), factor))
    folders = [each.adapter.folder.resolve() for each in adapters]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"--adapter {twice} is given twice", "Give it once, with the sum of its weights")
    return adapters


def find_base(base: Path | None, adapter: Path, adapter_config: dict[str, Any]) -> Path:
    """The base's folder: --base, or what the adapter names.

    A folder is looked for from here, from the adapter's folder and from its parent, a hub id in the local cache.
    """
    from loading.hubs import cached_folder

    if base is not None:
        if not (base / "config.json").is_file():
            raise ConfigError(f"--base {base} holds no config.json", "Give the folder of the model that was tuned")
        return base
    named = adapter_config.get("base_model_name_or_path")
    if named:
        for folder in (Path(named), adapter / named, adapter.resolve().parent / named):
            if (folder / "config.json").is_file():
                return folder
        if named.count("/") == 1 and not named.startswith((".", "/", "~")) and (cached := cached_folder(named)):
            return cached
    what = f"the adapter {adapter} names the base {named!r}, which is no model folder here"
    raise ConfigError(what, "Say where the base lies with --base DIR")


def verify(merge: Merge, folder: Path) -> str:
    """Compare the merged folder with base and adapters; returns what was found, in words.

    Raises:
        RunError: it does not compute what they do.
    """
    from tqdm import tqdm

    from export.verify.compare import describe, verify_merge
    from export.verify.prompts import prompt_ids

    prompts = prompt_ids(folder, merge.vocabulary)
    with tqdm(desc="verifying", unit=" steps") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        verification = verify_merge(merge.fold.base, merge.fold_config, merge.adapters, folder, prompts, show)
    if verification.faults:
        fix = "Nothing is kept. Merge again; if it fails again, the disk or the memory of this machine may be faulty"
        raise RunError(f"the merged model does not compute what base and adapter do: {describe(verification)}", fix)
    return describe(verification)


if __name__ == "__main__":
    run_command(main, "merge_lora.py")
