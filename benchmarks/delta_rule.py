"""Time and memory of the gated delta rule, forward and backward: this toolkit's and transformers' function in torch.

    python -m benchmarks.delta_rule [--rounds 7]

Heads are those of a layer of Qwen3.5-9B: 16 of queries and keys, 32 of values, of size 128, in float32 on two threads.
transformers' function takes samples of one length as a batch; ours a row of samples of any lengths, so it also has a
case that the other cannot compute at once. Both run in turn; seconds are medians. What is kept for the backward pass
is counted with hooks, without the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loss import machine
from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

if TYPE_CHECKING:
    from torch import Tensor

KEY_HEADS, VALUE_HEADS, SIZE, THREADS = 16, 32, 128, 2
CASES: dict[str, tuple[int, ...]] = {
    "1 x 1,024 tokens": (1024,), "1 x 2,048 tokens": (2048,), "8 x 128 tokens": (128,) * 8,
    "one row of 512, 300, 100, 90 and 22 tokens": (512, 300, 100, 90, 22),
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "delta_rule.json"

Rule = Callable[..., "Tensor"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delta_rule", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each case (default: 7)")
    args = parse_args(parser, argv, RESULTS)
    import torch

    torch.set_num_threads(THREADS)
    rows = []
    for name, lengths in CASES.items():
        rules: dict[str, Rule] = {"ours": ours}
        if len(set(lengths)) == 1:
            rules["transformers"] = theirs
        rows.append({"case": name, **measure(rules, lengths, args.rounds)})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    versions = {package: version(package) for package in ("torch", "transformers")}
    command = " ".join(["python -m benchmarks.delta_rule", *argv])
    save_results({"command": command, "machine": machine(), "versions": versions, "rows": rows}, args.output)


def measure(rules: dict[str, Rule], lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Run the rules in turn on the same inputs."""
    import torch

    torch.manual_seed(0)
    tokens = sum(lengths)
    query, key = (torch.randn(tokens, KEY_HEADS, SIZE) for _ in range(2))
    value, log_decay = torch.randn(tokens, VALUE_HEADS, SIZE), -0.1 * torch.rand(tokens, VALUE_HEADS)
    inputs = [query, key, value, log_decay, torch.rand(tokens, VALUE_HEADS)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    factors = torch.randn(tokens, VALUE_HEADS, SIZE)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
    kept: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, rule in rules.items():
            start = time.perf_counter()
            with counted(kept, name, inputs):
                output = rule(inputs, lengths)
            middle = time.perf_counter()
            torch.autograd.grad((output * factors).sum(), inputs)
            if number:  # the first one warms up
                seconds[name].append((middle - start, time.perf_counter() - middle))
    figures: dict[str, Any] = {}
    for name, values in seconds.items():
        forward, backward = (statistics.median(column) for column in zip(*values, strict=True))
        whole = statistics.median(map(sum, values))
        figures |= {f"{name}_forward": round(forward, 3), f"{name}_backward": round(backward, 3)}
        figures |= {f"{name}_seconds": round(whole, 3), f"{name}_kept_mib": round(kept[name] / 2**20)}
    if "transformers" in rules:
        pairs = zip(seconds["transformers"], seconds["ours"], strict=True)
        figures["times_as_fast"] = round(statistics.median(sum(them) / sum(us) for them, us in pairs), 2)
    return figures


def counted(kept: dict[str, int], name: str, inputs: Sequence[Tensor]) -> Any:
    """Count the bytes that are saved for the backward pass, each storage once."""
    from torch.autograd.graph import saved_tensors_hooks

    storages = {tensor.untyped_storage().data_ptr(): 0 for tensor in inputs}

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        kept[name] = sum(storages.values())
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def ours(inputs: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    from qwen_model.delta_rule import gated_delta_rule

    query, key, value, log_decay, strength = inputs
    return gated_delta_rule(query, key, value, log_decay, strength, lengths)


def theirs(inputs: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    query, key, value, log_decay, strength = (tensor.unflatten(0, (len(lengths), -1)) for tensor in inputs)
    output: Tensor
    output, _ = torch_chunk_gated_delta_rule(
        query, key, value, g=log_decay, beta=strength, use_qk_l2norm_in_kernel=True
    )
    return output.flatten(0, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
