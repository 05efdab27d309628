"""Fold a LoRA adapter into its base: a standalone checkpoint that needs neither peft nor the adapter.

    python merge_lora.py --adapter output/my_adapter --output output/my_model

The base is the one that the adapter names; --base gives another place for it. Tensors are computed one at a time in
fp32 and cast once, so a model merges in the memory of one shard. The output folder appears when it is whole.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import CommandParser, ConfigError, run_command

if TYPE_CHECKING:
    import torch

    from checkpoints.fold import Fold

logger = logging.getLogger("merge_lora")

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOKENIZER_FILES = (
    "tokenizer_config.json", "qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    # Only now torch is loaded: a wrong flag is answered at once.
    from tqdm import tqdm

    from checkpoints.adapter import load_adapter
    from checkpoints.dequantized import open_dequantized
    from checkpoints.fold import plan_fold
    from checkpoints.quantization import find_quantization
    from checkpoints.shards import (
        check_output_folder,
        load_json,
        parse_size,
        save_checkpoint,
        staged_folder,
    )

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    start = time.monotonic()
    max_shard_size = parse_size(args.max_shard_size)
    adapter = load_adapter(args.adapter)
    base_folder = find_base(args.base, args.adapter, adapter.config)
    check_apart(args.output, {"--adapter": args.adapter, "--base": base_folder})
    check_output_folder(args.output)
    base_config = load_json(base_folder / "config.json")
    stored = declared_dtype(base_config)
    if quantization := find_quantization(base_folder):
        logger.info(
            "The base is quantised (%s): its weights are dequantised, the merged model is not quantised", quantization
        )
    fold = plan_fold(open_dequantized(base_folder, stored), base_config, adapter)
    dtype = choose_dtype(args.dtype, base_config)
    check_space(fold, dtype, args.output)
    warn_of_other_base(args.adapter, base_folder)
    with staged_folder(args.output) as folder:
        progress = tqdm(fold.tensors(dtype), total=len(fold.names), desc="merging", unit="tensor")
        files = save_checkpoint(progress, folder, max_shard_size)
        save_config(base_config, fold, dtype, folder)
        copy_tokenizer(args.adapter, base_folder, folder)
        copy_first("generation_config.json", (args.adapter, base_folder), folder)
        size = sum(file.stat().st_size for file in files)
    print(f"merged:  {len(fold.changed)} of {len(fold.names)} tensors changed, base {base_folder}")
    print(f"written: {args.output} ({size / 1e6:,.1f} MB in {len(files)} file(s), {time.monotonic() - start:.1f} s)")
    print(f'next:    python -m scripts.ask --model_name_or_path {shlex.quote(str(args.output))} "Who are you?"')


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python merge_lora.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the LoRA adapter")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument("--base", type=Path, help="folder of the base; default: the one that the adapter names")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="what to write; auto: as the base (default)"
    )
    parser.add_argument("--max_shard_size", default="2GB", help="size of a weight file, as 2GB or 500MiB (default 2GB)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_args(argv)


def find_base(base: Path | None, adapter: Path, adapter_config: dict[str, Any]) -> Path:
    """The base's folder: --base, or what the adapter names.

    A folder is looked for from here, from the adapter's folder and from its parent, a hub id in the local cache.
    """
    from training.hubs import cached_folder

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


def check_apart(output: Path, inputs: dict[str, Path]) -> None:
    for flag, folder in inputs.items():
        if output.resolve() == folder.resolve():
            raise ConfigError(f"--output {output} is the folder of {flag}", "Give a folder that does not exist yet")


def choose_dtype(flag: str, base_config: dict[str, Any]) -> torch.dtype | None:
    """What floats are written in; ``None`` leaves every tensor its own dtype.

    A base that declares fp32 but is stored in 16 bits is loaded, tuned and hence merged in fp32: rounding would take
    away from what was trained.
    """
    import torch

    if flag != "auto":
        return getattr(torch, DTYPES[flag])
    declared = base_config.get("dtype") or base_config.get("torch_dtype")
    return torch.float32 if declared == "float32" or (not declared and base_config.get("fp32")) else None


def declared_dtype(base_config: dict[str, Any]) -> torch.dtype:
    """The precision that a config says its floats have; where it says nothing float16, as GPTQ's and AWQ's scales."""
    import torch

    declared = str(base_config.get("dtype") or base_config.get("torch_dtype") or "").removeprefix("torch.")
    flagged = next((name for flag, name in DTYPES.items() if base_config.get(flag)), "float16")
    return getattr(torch, declared if declared in DTYPES.values() else flagged)


def check_space(fold: Fold, dtype: torch.dtype | None, output: Path) -> None:
    needed = sum(fold.nbytes(name, dtype) for name in fold.names)
    folder = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"--output {output} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ConfigError(what, "Free some space or choose another disk")


def warn_of_other_base(adapter: Path, base: Path) -> None:
    """Compare the base with the record that finetune.py leaves beside an adapter, where there is one."""
    from checkpoints.shards import fingerprint, load_json

    record = adapter / "run_summary.json"
    trained_on = load_json(record).get("base_fingerprint") if record.is_file() else None
    if trained_on and trained_on != fingerprint(base):
        logger.warning(
            "THE BASE IS NOT THE ONE THAT THE ADAPTER WAS TRAINED ON: the weights of %s differ from those that %s "
            "records. The merged model will not answer like the model that was trained. Give the right base with "
            "--base, unless you know that both hold the same values in other files.",
            base,
            record,
        )


def save_config(base_config: dict[str, Any], fold: Fold, dtype: torch.dtype | None, folder: Path) -> None:
    """Write the base's config.json with what merging changed: the dtype and whether the embeddings are tied."""
    from checkpoints.shards import save_json

    sizes: Counter[str] = Counter()
    for name in fold.names:
        if (written := fold.dtype(name, dtype)).is_floating_point:
            sizes[str(written).removeprefix("torch.")] += fold.nbytes(name, dtype)
    main_dtype = sizes.most_common(1)[0][0]
    # No remote code ships with the merged checkpoint.
    config = {key: value for key, value in base_config.items() if key not in ("auto_map", "quantization_config")}
    # Older folders say torch_dtype, newer ones dtype.
    config |= dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"], main_dtype)
    if config.get("model_type") == "qwen":
        config |= {flag: name == main_dtype for flag, name in DTYPES.items()}
    if fold.untied:
        logger.info("the adapter trained the tied embedding and head apart: the merged checkpoint stores both")
        config["tie_word_embeddings"] = False
    save_json(config, folder / "config.json")


def copy_tokenizer(adapter: Path, base: Path, folder: Path) -> None:
    """Copy the tokenizer's files, the adapter's where it has them: training may have changed the chat template."""
    from checkpoints.shards import load_json, save_json

    for name in TOKENIZER_FILES:
        copy_first(name, (adapter, base), folder)
    config_file = folder / "tokenizer_config.json"
    if not config_file.is_file():
        return
    config = load_json(config_file)
    if extra := config.get("extra_vocab_file"):
        copy_first(Path(extra).name, (adapter, base), folder)
    if config.pop("auto_map", None):
        save_json(config, config_file)


def copy_first(name: str, sources: Sequence[Path], folder: Path) -> None:
    """Copy the first file of that name, if there is one."""
    source = next((source / name for source in sources if (source / name).is_file()), None)
    if source is not None:
        shutil.copyfile(source, folder / name)


if __name__ == "__main__":
    run_command(main, "merge_lora.py")
