"""Memory and time of the loss: our lean loss, torch's linear_cross_entropy, and full logits.

    python -m benchmarks.loss [--quick] [--output benchmarks/results/loss.json]

All three compute the loss of the same trained positions; torch's runs with its default options ("torch") and with
chunks of our size ("torch_chunks"). Each case runs in a process of its own, whose parent reads its RssAnon (memory that
it shares with no other process) every few milliseconds. "Extra" is the peak while loss and gradients are computed,
minus weights and hidden states. Times are medians of interleaved runs on two threads; their ratios are more reliable
than the seconds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

VOCABULARY, HIDDEN, TRAINED_SHARE, THREADS = 151_936, 896, 0.4, 2
LOSSES = ("lean", "torch", "torch_chunks", "full")
MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "loss.json"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run each case once, with at most 4,096 tokens")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    args = parse_args(parser, argv, RESULTS)
    if args.case:
        return run_case(*args.case)
    repeats = 1 if args.quick else 5
    lengths = [1024, 4096] if args.quick else [1024, 2048, 4096, 8192, 16384, 32768]
    rows = []
    for measure_rows in (lambda: compare(repeats), lambda: grow(lengths), lambda: whole_steps(repeats)):
        for row in measure_rows():
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    command = "python -m benchmarks.loss" + (" --quick" if args.quick else "")
    record = {"command": command, "machine": machine(), "settings": settings(), "rows": rows}
    save_results(record, args.output)


def compare(repeats: int) -> list[dict[str, Any]]:
    """Measure all losses with a frozen and a trained head, interleaved."""
    cases = [(loss, head) for head in ("frozen", "trained") for loss in LOSSES]
    measured: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(repeats):
        for loss, head in cases:
            measured[loss, head].append(measure("loss", loss, head, "1024"))
    rows = []
    for loss, head in cases:
        memory, seconds = (statistics.median(values) for values in zip(*measured[loss, head], strict=True))
        full = statistics.median(seconds for _, seconds in measured["full", head])
        rows.append(
            {"what": "loss", "head": head, "loss": loss, "tokens": 1024, "extra_mib": round(memory),
             "seconds": round(seconds, 3), "time_ratio_to_full": round(seconds / full, 2)}
        )  # fmt: skip
    return rows


def grow(lengths: list[int]) -> list[dict[str, Any]]:
    """Measure the lean loss with a frozen head for growing lengths, and its memory minus two hidden states."""
    rows = []
    for length in lengths:
        memory, seconds = measure("loss", "lean", "frozen", str(length))
        beyond = memory - 2 * length * HIDDEN * 4 / MIB
        rows.append(
            {"what": "length", "loss": "lean", "tokens": length, "extra_mib": round(memory),
             "beyond_2_hidden_mib": round(beyond), "seconds": round(seconds, 3)}
        )  # fmt: skip
    return rows


def whole_steps(repeats: int) -> list[dict[str, Any]]:
    """Measure a training step of LoRA, with and without trained rows of the two ChatML tokens."""
    measured: dict[str, list[float]] = {"none": [], "chatml_tokens": []}
    for _ in range(repeats):
        for mode in measured:
            measured[mode].append(measure("step", mode)[0])
    base = statistics.median(measured["none"])
    return [
        {"what": "step", "trainable_embeddings": mode, "peak_mib": round(statistics.median(values)),
         "ratio": round(statistics.median(values) / base, 3)}
        for mode, values in measured.items()
    ]  # fmt: skip


def measure(*case: str) -> tuple[float, float]:
    """Run a case in a process of its own; return peak RssAnon in MiB (for a loss above its start) and seconds."""
    command = [sys.executable, "-m", "benchmarks.loss", "--case", *case]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n", "the case did not start"
    start = anonymous_memory(process.pid)
    peak, done = [start], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_memory(process.pid))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    print("go", file=process.stdin, flush=True)
    seconds = float(process.stdout.readline())
    done.set()
    watcher.join()
    process.communicate("end\n")
    return peak[0] - (start if case[0] == "loss" else 0), seconds


def anonymous_memory(pid: int) -> float:
    """Return the RssAnon of a process in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def run_case(kind: str, *arguments: str) -> None:
    """Child process: prepare, wait for the parent, run the case, print its duration."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    work = loss_case(*arguments) if kind == "loss" else step_case(*arguments)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    work()
    print(time.perf_counter() - started, flush=True)
    sys.stdin.readline()


def loss_case(loss: str, head: str, tokens: str) -> Any:
    import torch

    from qwen_model.lean_loss import LOGITS_CHUNK_BYTES, lean_causal_lm_loss
    from qwen_model.loss import causal_lm_loss

    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss}")
    linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    linear.weight.requires_grad_(head == "trained")
    hidden = torch.randn(1, int(tokens), HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, int(tokens)))
    labels[torch.rand(labels.shape) >= TRAINED_SHARE] = -100
    warm = torch.randn(64, 64)
    (warm @ warm).sum()  # threads and libraries start before the measurement

    def work() -> None:
        if loss == "lean":
            value = lean_causal_lm_loss(hidden, linear, labels)[0]
        elif loss == "full":
            value = causal_lm_loss(linear(hidden), labels)
        else:
            value = torch_loss(hidden, linear, labels, LOGITS_CHUNK_BYTES if loss == "torch_chunks" else None)
        value.backward()

    return work


def torch_loss(hidden: Any, linear: Any, labels: Any, chunk_bytes: int | None) -> Any:
    """The loss by torch's chunked function, given only the trained positions as in the lean loss.

    Args:
        chunk_bytes: size of the float32 logits of a chunk; ``None``: torch decides.
    """
    import torch
    from torch.nn.functional import linear_cross_entropy

    targets = labels[:, 1:].flatten()
    positions = (targets != -100).nonzero()[:, 0]
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=None if chunk_bytes is None else chunk_bytes // (4 * VOCABULARY)
    )
    inputs = hidden[:, :-1].flatten(0, 1)[positions]
    return linear_cross_entropy(inputs, linear.weight, targets[positions], options=options)


def step_case(mode: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    from loading.adapters import without_gptqmodel
    from loading.token_rows import use_lean_trainable_tokens
    from qwen_model.configuration_qwen import QWenConfig
    from qwen_model.lean_models import LeanQWenLMHeadModel

    config = QWenConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=14, kv_channels=64,
        intermediate_size=4864, seq_length=2048, use_cache=False,
    )  # fmt: skip
    rows = {name: [151644, 151645] for name in ("wte", "lm_head")}
    adapter = LoraConfig(
        r=8, target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM",
        trainable_token_indices=rows if mode == "chatml_tokens" else None,
    )  # fmt: skip
    with without_gptqmodel():
        model = get_peft_model(LeanQWenLMHeadModel(config), adapter).train()
    use_lean_trainable_tokens(model.modules())
    ids = torch.randint(0, 151_000, (1, 1024))
    ids[:, ::50] = 151644
    labels = ids.clone()
    labels[torch.rand(labels.shape) >= TRAINED_SHARE] = -100
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def work() -> None:
        for _ in range(2):
            model(input_ids=ids, labels=labels, loss_only=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def settings() -> dict[str, Any]:
    return {
        "vocabulary": VOCABULARY, "hidden_size": HIDDEN, "trained_share": TRAINED_SHARE, "dtype": "float32",
        "threads": THREADS,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    import torch

    return {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "system": platform.system()}


if __name__ == "__main__":
    main(sys.argv[1:])
