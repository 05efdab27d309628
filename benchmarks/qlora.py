"""Measure memory and time of full-parameter training, LoRA, and Q-LoRA with each kind of quantised weights.

    python -m benchmarks.qlora [--quick] [--output benchmarks/results/qlora.json]

Writes a random Qwen v1 of 0.1 billion parameters (12 layers, hidden size 768, bfloat16) and its GPTQ and AWQ versions
to a temporary folder and runs finetune.py on each, interleaved and repeated, on a GPU if there is one, else on two CPU
threads. Peak memory is the process's RssAnon, read from outside, or on a GPU the memory allocated by torch; "above" is
the peak minus that of a run on a tiny model. Seconds are medians of the steps after the second.

The second table trains adapters on the GPTQ model without gradient checkpointing, with this toolkit's layers and, if it
is installed, with those of gptqmodel: they differ in what autograd saves.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.loss import anonymous_memory
from benchmarks.results_file import parse_args, save_results
from checkpoints.names import RUN_SUMMARY, TRAINING_LOG
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "qlora.json"
HIDDEN, LAYERS, WIDTH, GROUP, TOKENS, THREADS = 768, 12, 3072, 128, 256, 2
LORA = ["--use_lora", "--lora_r", "16"]
Q_LORA = [*LORA, "--q_lora"]
CASES: dict[str, tuple[str, list[str]]] = {
    "all parameters": ("base", []),
    "LoRA": ("base", LORA),
    "Q-LoRA NF4": ("base", Q_LORA),
    "Q-LoRA FP4": ("base", [*Q_LORA, "--quant_type", "fp4"]),
    "Q-LoRA 8-bit": ("base", [*Q_LORA, "--load_in_8bit"]),
    "Q-LoRA GPTQ Int4": ("gptq4", Q_LORA),
    "Q-LoRA GPTQ Int8": ("gptq8", Q_LORA),
    "Q-LoRA AWQ": ("awq4", Q_LORA),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qlora", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run each case once")
    parser.add_argument("--layers", nargs=2, help=argparse.SUPPRESS)
    args = parse_args(parser, argv, RESULTS)
    if args.layers:
        return train_layers(*args.layers)
    repeats = 1 if args.quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder)
        rows = [*whole_runs(folder, repeats), *compare_layers(folder, repeats)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    command = "python -m benchmarks.qlora" + (" --quick" if args.quick else "")
    save_results({"command": command, "machine": machine(), "rows": rows}, args.output)


# ----------------------------------------------------------------------------------------------------- models and data


def make_models(folder: Path) -> None:
    """Write ``tiny``, ``base`` in bfloat16, ``gptq4``, ``gptq8``, ``awq4``, and conversations of ``TOKENS`` or more."""
    shape = ["--hidden_size", HIDDEN, "--num_hidden_layers", LAYERS, "--intermediate_size", 2 * WIDTH]
    for name, arguments in (("tiny", []), ("base", [*shape, "--num_attention_heads", 12])):
        command = [sys.executable, "-m", "scripts.make_tiny_qwen", "--output", folder / name, *arguments]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "base" / "model.safetensors").items()}
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "base" / "config.json").read_text())
    for name, method, bits in (("gptq4", "gptq", 4), ("gptq8", "gptq", 8), ("awq4", "awq", 4)):
        (folder / name).mkdir()
        for file in (folder / "base").iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
        quantization = {"quant_method": method, "bits": bits, "group_size": GROUP}
        half = {"fp16": True, "fp32": False, "torch_dtype": "float16", "quantization_config": quantization}
        (folder / name / "config.json").write_text(json.dumps({**config, **half}))
        packed = dict(pack(weights, method, bits))
        save_file(packed, folder / name / "model.safetensors", metadata={"format": "pt"})
    records = json.loads((ROOT / "examples" / "identity.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    data = [
        {"conversations": [{"from": "user", "value": texts[i]}, {"from": "assistant", "value": " ".join(texts)}]}
        for i in range(32)
    ]
    (folder / "data.json").write_text(json.dumps(data))


def pack(
    weights: dict[str, Any], method: str, bits: int, group: int = GROUP, blocks: str = ".h."
) -> Iterator[tuple[str, Any]]:
    """Yield the model with random packed integers for the matrices of its blocks: only their shapes matter."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Any:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    for name, weight in weights.items():
        if blocks not in name or weight.dim() != 2:
            yield name, weight.half()
            continue
        (outputs, inputs), per_word, layer = weight.shape, 32 // bits, name.removesuffix(".weight")
        groups = inputs // group
        rows, columns = (inputs, outputs // per_word) if method == "awq" else (inputs // per_word, outputs)
        yield f"{layer}.qweight", words(rows, columns)
        yield f"{layer}.qzeros", words(groups, outputs // per_word)
        yield f"{layer}.scales", torch.full((groups, outputs), 0.2 / 2 ** (bits - 1), dtype=torch.float16)
        if method == "gptq":
            yield f"{layer}.g_idx", (torch.arange(inputs) // group).int()


# ---------------------------------------------------------------------------------------------------------- whole runs


def whole_runs(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Run finetune.py on every case, interleaved."""
    runs_of: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    baseline = []
    for _ in range(repeats):
        baseline.append(finetune(folder, "tiny", LORA)[0])
        for name, (model, flags) in CASES.items():
            runs_of[name].append(finetune(folder, model, flags))
    lora = statistics.median(seconds for _, seconds in runs_of["LoRA"])
    rows = []
    for name, runs in runs_of.items():
        memory, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append(
            {"what": name, "peak_mib": round(memory), "above_mib": round(memory - statistics.median(baseline)),
             "seconds_per_step": round(seconds, 3), "time_ratio_to_lora": round(seconds / lora, 2)}
        )  # fmt: skip
    return rows


def finetune(folder: Path, model: str, flags: list[str]) -> tuple[float, float]:
    """Return peak memory in MiB and seconds per step of a short run."""
    output = folder / "output"
    common = [
        "--max_steps", "7", "--logging_steps", "1", "--per_device_train_batch_size", "1", "--model_max_length",
        str(TOKENS), "--truncation", "cut", "--gradient_accumulation_steps", "1", "--gradient_checkpointing",
        "--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir", "--disable_tqdm",
    ]  # fmt: skip
    paths = ["--model_name_or_path", folder / model, "--data_path", folder / "data.json", "--output_dir", output]
    precision = ["--bf16"] if gpu() else []
    command = [sys.executable, "finetune.py", *map(str, paths), *common, *precision, *flags]
    peak = watch(command)
    log = [json.loads(line) for line in (output / TRAINING_LOG).read_text().splitlines()]
    times = [row["elapsed"] for row in log if "loss" in row]
    summary = json.loads((output / RUN_SUMMARY).read_text())
    memory = summary["peak_memory"]["gpu_gib"] * 1024 if gpu() else peak
    return memory, statistics.median(after - before for before, after in itertools.pairwise(times[1:]))


def watch(command: Sequence[str]) -> float:
    """Run a command and return the peak of its RssAnon in MiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.005)
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return peak


# -------------------------------------------------------------------------------------------------------------- layers


def compare_layers(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Train adapters on the same GPTQ weights with our layers and with those of gptqmodel."""
    implementations = ["ours", *(["gptqmodel"] if importlib.util.find_spec("gptqmodel") else [])]
    runs_of: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for _ in range(repeats):
        for name in implementations:
            peak = watch([sys.executable, "-m", "benchmarks.qlora", "--layers", name, str(folder / "gptq4")])
            result = json.loads((folder / "gptq4" / "layers.json").read_text())
            runs_of[name].append((result["gpu_mib"] if gpu() else peak, result["seconds"]))
    rows = []
    for name, runs in runs_of.items():
        memory, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append({"what": f"GPTQ layers: {name}", "peak_mib": round(memory), "seconds_per_step": round(seconds, 3)})
    return rows


def train_layers(implementation: str, model_folder: str) -> None:
    """Train LoRA for a few steps without gradient checkpointing, in a child process; write ``layers.json``."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPTQConfig

    from loading.checkpoint import load_checkpoint, load_model

    torch.set_num_threads(THREADS)
    checkpoint = load_checkpoint(model_folder)
    model: Any
    if implementation == "ours":
        model = load_model(checkpoint, torch.float32)
    else:
        kernel = GPTQConfig(bits=4, backend="torch")
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, quantization_config=kernel)
    adapter = LoraConfig(r=16, target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).train().to("cuda" if gpu() else "cpu")
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, 2000, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, loss_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    result = {
        "seconds": statistics.median(seconds[1:]),
        "gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if gpu() else 0,
    }
    (Path(model_folder) / "layers.json").write_text(json.dumps(result))


def gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def machine() -> dict[str, Any]:
    import torch

    device = (
        torch.cuda.get_device_name() if gpu() else f"{platform.processor() or platform.machine()}, {THREADS} threads"
    )
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel")
    return {"device": device, **{name: version(name) for name in libraries if importlib.util.find_spec(name)}}


if __name__ == "__main__":
    main(sys.argv[1:])
