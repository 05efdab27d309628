"""Memory and time of merging, compared with peft and with copying the folder.

    python -m benchmarks.merge [--quick] [--output benchmarks/results/merge.json]

Writes a random checkpoint of Qwen2.5-0.5B's shape (bfloat16, tied embeddings) as one file and as shards, an adapter of
rank 16 on all linear layers, and one that also trains embedding and head in full. Merges them with merge_lora.py
(--no_verify, except in the last row; one row rounds to nearest) and with peft's merge_and_unload between transformers'
from_pretrained and save_pretrained. The clock stops when everything is on disk (fsync). Each run is a process of its
own that imports everything and then waits for its start. Memory is the peak of RssAnon above its value at the start,
sampled from outside. Runs are interleaved; figures are medians. ``kept`` is the share of the learnt change that the
linear layers contain.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.loss import anonymous_memory
from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"
THREADS, RANK = 2, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
EMBEDDING_MIB = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4 / 2**20

OURS = """
import sys
import torch, merge_lora, checkpoints.writing
import checkpoints.base_check, export.companion_files, export.inputs, export.merging, export.progress
print("ready", flush=True)
sys.stdin.readline()
base, adapter, output = sys.argv[1:]
merge_lora.main(["--base", base, "--adapter", adapter, "--output", output, "--no_verify"])
"""
NEAREST = OURS.replace('"--no_verify"', '"--no_verify", "--rounding", "nearest"')
VERIFIED = OURS.replace("import torch,", "import export.verify.samples, export.verify.compare, torch,").replace(
    ', "--no_verify"', ""
)
PEFT = """
import os, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import Qwen2ForCausalLM
print("ready", flush=True)
sys.stdin.readline()
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
model.merge_and_unload().save_pretrained(output)
for file in Path(output).iterdir():
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
"""
COPY = """
import os, shutil, sys
from pathlib import Path
print("ready", flush=True)
sys.stdin.readline()
base, adapter, output = sys.argv[1:]
shutil.copytree(base, output)
for file in Path(output).iterdir():
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
"""
# Row -> (code, base, adapter).
CASES = {
    "copying the folder": (COPY, "one", "linear"),
    "merge_lora.py, one file": (OURS, "one", "linear"),
    "merge_lora.py, shards": (OURS, "shards", "linear"),
    "merge_lora.py, --rounding nearest": (NEAREST, "one", "linear"),
    "peft": (PEFT, "one", "linear"),
    "merge_lora.py, embeddings trained": (OURS, "one", "embeddings"),
    "merge_lora.py, verified": (VERIFIED, "one", "linear"),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run each case once instead of 5 times")
    args = parse_args(parser, argv, RESULTS)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder)
        for _ in range(1 if args.quick else 5):
            for name, (code, base, adapter) in CASES.items():
                shutil.rmtree(folder / "output", ignore_errors=True)
                os.sync()
                runs[name].append(measure(code, folder / base, folder / adapter, folder / "output"))
                if name not in shares and code != COPY:
                    shares[name] = share_kept(folder / base, folder / adapter, folder / "output")
    peft = statistics.median(seconds for _, seconds in runs["peft"])
    rows = []
    for name, figures in runs.items():
        memory, seconds = (statistics.median(values) for values in zip(*figures, strict=True))
        rows.append(
            {"what": name, "memory_mib": round(memory), "seconds": round(seconds, 2),
             "times_faster_than_peft": round(peft / seconds, 2), "kept": shares.get(name, 0.0)}
        )  # fmt: skip
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    limits = {"memory_mib": 128, "memory_mib_with_embeddings": round(128 + 1.3 * EMBEDDING_MIB), "times_faster": 3}
    command = "python -m benchmarks.merge" + (" --quick" if args.quick else "")
    report = {"command": command, "machine": machine(), "limits": limits, "rows": rows}
    save_results(report, args.output)


def make_inputs(folder: Path) -> None:
    """Write the base as ``one`` file and as ``shards``, and the adapters ``linear`` and ``embeddings``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "one", max_shard_size="5GB")
    model.save_pretrained(folder / "shards", max_shard_size="100MB")
    trained_modules = {"embeddings": ["embed_tokens", "lm_head"], "linear": None}
    for name, modules in trained_modules.items():
        config = LoraConfig(r=RANK, target_modules="all-linear", modules_to_save=modules, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                # As after a short training: most changes are smaller than the distance of two 16-bit numbers.
                torch.nn.init.normal_(parameter, std=0.02 if "lora_A" in parameter_name else 0.001)
        adapted.save_pretrained(str(folder / name))
        model = adapted.unload()


def share_kept(base: Path, adapter: Path, output: Path) -> float:
    """Return the share of the change, computed in float32, that the linear layers of a merged folder contain."""
    from checkpoints.adapter import read_adapter
    from checkpoints.files import load_json
    from checkpoints.fold import WeightedAdapter, plan_fold
    from checkpoints.shards import open_checkpoint

    source, written = open_checkpoint(base), open_checkpoint(output)
    fold = plan_fold(source, load_json(base / "config.json"), [WeightedAdapter(read_adapter(adapter))])
    applied = learnt = 0.0
    for name in (name for name in fold.changed if "_proj." in name):
        before = source.read(name).float()
        change = fold.read(name) - before
        applied += float((written.read(name).float() - before).flatten().dot(change.flatten()))
        learnt += float(change.flatten().dot(change.flatten()))
    return round(applied / learnt, 4)


def measure(code: str, base: Path, adapter: Path, output: Path) -> tuple[float, float]:
    """Return the peak of anonymous memory above that of the imports (MiB), and the seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as stderr:
        command = [sys.executable, "-c", code, str(base), str(adapter), str(output)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        while process.stdout.readline() not in ("ready\n", ""):  # libraries may print first
            pass
        time.sleep(0.2)
        floor = peak = anonymous_memory(process.pid)
        started = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # the process failed: its exit status is checked below
            process.stdin.write("\n")
            process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            stderr.seek(0)
            raise RuntimeError(f"{code} failed:\n{stderr.read()[-2000:]}")
    return peak - floor, seconds


def machine() -> dict[str, Any]:
    device = f"{platform.processor() or platform.machine()}, {THREADS} threads"
    return {"device": device, **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}}


if __name__ == "__main__":
    main(sys.argv[1:])
