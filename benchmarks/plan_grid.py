"""The published grid of Qwen v1, rehearsed: ``python -m benchmarks.plan --grid``. Results are added to its file."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.qwen_v1_sizes import LENGTHS, PUBLISHED, PUBLISHED_GPUS, SIZES, write_config
from benchmarks.results_file import save_results
from errors import ConfigError

PICTURE = Path(__file__).parents[1] / "docs" / "memory_of_published_sizes.svg"
_LORA = ["--use_lora", "--trainable_embeddings"]
MODES: dict[str, list[str]] = {
    "lora": [*_LORA, "none", "--bf16"],
    "lora_chatml_tokens": [*_LORA, "chatml_tokens", "--bf16"],
    "lora_embeddings": [*_LORA, "full", "--bf16"],
    "q_lora": [*_LORA, "none", "--q_lora", "--bf16"],
    "full": ["--bf16"],
    "full_small": ["--pure_bf16", "--optim", "adamw_bnb_8bit"],
}
# Several GPUs, as in the published figures: all parameters and 72B with ZeRO-3.
_ZERO_3 = ["--deepspeed", "finetune/ds_config_zero3.json"]
_UNIT = 2**30


def rehearse_grid(args: argparse.Namespace) -> int:
    """Rehearse the chosen cases, save them with those that are there, and draw the picture."""
    sizes, modes, lengths = args.sizes or SIZES, args.modes or list(MODES), args.lengths or LENGTHS
    for given, known, flag in ((sizes, SIZES, "sizes"), (modes, MODES, "modes")):
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"--{flag} {unknown[0]} is unknown", f"Give some of {' '.join(known)}")
    rows = {(row["size"], row["mode"], row["tokens"]): row for row in _saved(args.output)}
    with tempfile.TemporaryDirectory() as temporary:
        for size in sizes:
            for mode in modes:
                folder = Path(temporary) / f"{size}-{mode}"
                write_config(size, folder, is_quantized=mode == "q_lora")
                for length in lengths:
                    rows[size, mode, length] = row = rehearse_case(folder, size, mode, length)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    save(list(rows.values()), args.output)
    print("\n".join(table(list(rows.values()))))
    draw(list(rows.values()), PICTURE)
    return 0


def rehearse_case(folder: Path, size: str, mode: str, length: int) -> dict[str, Any]:
    """Return the memory of one case, in GiB, over all GPUs of the published figure."""
    from planning.devices import find_device
    from planning.expectation import Machine, Planner
    from planning.model import read_checkpoint
    from training.config.parsing import parse_args

    gpus = PUBLISHED_GPUS.get((size, mode), 1)
    flags = [
        "--model_name_or_path", str(folder), "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8",
        "--model_max_length", str(length), "--plan", *MODES[mode], *(_ZERO_3 if gpus > 1 else []),
    ]  # fmt: skip
    run = parse_args(flags)
    device = find_device("A100")
    planner = Planner(Machine(device, device.memory_gib, gpus), int(read_checkpoint(run).config.hidden_size))
    started = time.perf_counter()
    expected = planner.expect(run)
    published = PUBLISHED.get(size, {}).get(mode, {}).get(length)
    total = expected.share.peak_bytes * gpus / _UNIT
    return {
        "size": size,
        "mode": mode,
        "tokens": length,
        "gpus": gpus,
        "engine": expected.engine,
        "rehearsed_gib": round(total, 2),
        "published_gb": published,
        "ratio": round(total / published, 3) if published else None,
        "peak_at": expected.share.peak_at,
        "components_gib": {name: round(part / _UNIT, 2) for name, part in expected.share.components.items()},
        "petaflop_per_step": round(expected.step_flops / 1e15, 3),
        "rehearsal_seconds": round(time.perf_counter() - started, 1),
    }


def _saved(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["rows"]) if file.is_file() else []


def save(rows: list[dict[str, Any]], file: Path) -> None:
    from benchmarks.qlora import machine

    about = {"command": "python -m benchmarks.plan --grid", "machine": machine(), "device": "A100 of 80 GiB"}
    order = {name: number for number, name in enumerate([*SIZES, *MODES])}
    rows = sorted(rows, key=lambda row: (order[row["size"]], order[row["mode"]], row["tokens"]))
    save_results({**about, "rows": rows}, file)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the grid in Markdown: rehearsed GiB, then published GB."""
    cells = {(row["size"], row["mode"], row["tokens"]): row for row in rows}
    lengths = sorted({row["tokens"] for row in rows})
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for size in SIZES:
        for mode in MODES:
            found = [cells.get((size, mode, length)) for length in lengths]
            if any(found):
                lines.append(f"| {size} {mode} | " + " | ".join(_cell(row) for row in found) + " |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['rehearsed_gib']:.1f}" + (f" / {row['published_gb']:.1f}" if row["published_gb"] else "")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw memory over length for each size, rehearsed as lines and published as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "lora": "LoRA", "lora_chatml_tokens": "LoRA, ChatML rows", "lora_embeddings": "LoRA, embeddings",
        "q_lora": "Q-LoRA (Int4)", "full_small": "full, pure bf16, 8-bit Adam",
    }  # fmt: skip
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    figure, all_axes = pyplot.subplots(1, len(sizes), figsize=(3.4 * len(sizes), 3.6), squeeze=False)
    for axes, size in zip(all_axes[0], sizes, strict=True):
        for number, (mode, title) in enumerate(titles.items()):
            chosen = sorted(
                (row for row in rows if (row["size"], row["mode"]) == (size, mode) and row["gpus"] == 1),
                key=lambda row: row["tokens"],
            )
            axes.plot(
                [row["tokens"] for row in chosen], [row["rehearsed_gib"] for row in chosen], f"C{number}-", label=title
            )
            published = [row for row in chosen if row["published_gb"]]
            axes.plot([row["tokens"] for row in published], [row["published_gb"] for row in published], f"C{number}x")
        axes.set(title=f"Qwen {size}", xscale="log", xlabel="tokens", ylim=(0, None))
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], rotation=60, fontsize=7)
        axes.minorticks_off()
        axes.axhline(80, color="0.7", linewidth=0.8)
    all_axes[0][0].set_ylabel("GiB; crosses: published for the original, GB")
    all_axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
