"""Every mode of training under every engine, with two processes beside one.

    python -m benchmarks.engines [--model qwen3_5] [--float64] [--modes full lora ...] [--engines ddp zero3 ...]

For each mode one process trains with batches of 8, and under each engine two processes with batches of 4 (packed: 2
packs, and 1): a tiny random model in float32 on the CPU, on conversations of many lengths whose last batch is not full.
Twenty steps of AdamW, evaluated twice, give the differences of the loss curves; one step of SGD with a huge learning
rate gives the gradients of the first step, for what it leaves of the weights is the gradient. Then the files of both
results are compared, and adapters merged. A combination that is refused is one whose command ended with exit code 2
before a model was loaded. Answers to held-out questions are compared under the engines that write them. The file of
results keeps what was measured before of other models, modes and engines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import parse_args, save_results
from benchmarks.step_inputs import write_tokenizer
from checkpoints.names import ADAPTER_SAFETENSORS, EVAL_SAMPLES, TRAINING_LOG
from commands import HelpFormatter

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
QWEN = ROOT / "tests" / "references" / "qwen_v1_small" / "tiny-qwen-small"
TRAINED, EVALUATED = 19, 5  # conversations: neither fills its last batch
STEPS, BATCH, PACKS, WORLD = 20, 8, 2, 2
# A power of two: the weights after the step are exactly as many gradients, but for what they were before.
GRADIENT_RATE = 2.0**20

MODES: dict[str, list[str]] = {
    "full": [],
    "lora": ["--use_lora", "--trainable_embeddings", "none"],
    "lora_packed": ["--use_lora", "--trainable_embeddings", "none", "--packing", "--model_max_length", "128"],
    "lora_embeddings": ["--use_lora", "--trainable_embeddings", "full"],
    "lora_embeddings_packed": [
        "--use_lora", "--trainable_embeddings", "full", "--packing", "--model_max_length", "128",
        "--gradient_checkpointing", "True",
    ],
    "lora_chatml_tokens": ["--use_lora", "--trainable_embeddings", "chatml_tokens"],
    "q_lora_nf4": ["--use_lora", "--q_lora", "--trainable_embeddings", "none"],
}  # fmt: skip
ENGINES: dict[str, list[str]] = {
    "ddp": [],
    "zero2": ["--deepspeed", "finetune/ds_config_zero2.json"],
    "zero3": ["--deepspeed", "finetune/ds_config_zero3.json"],
    "zero3_offload": ["--deepspeed", "finetune/ds_config_zero3_offload.json"],
    "fsdp2": ["--fsdp", "--fsdp_config", "finetune/fsdp_config.json"],
}
# Where each process has all weights.
ANSWERING = ("ddp", "zero2")
# DeepSpeed offloads its own Adam only.
NO_GRADIENTS = ("zero3_offload",)
SGD = [
    "--max_steps", 1, "--optim", "sgd", "--learning_rate", GRADIENT_RATE, "--max_grad_norm", 0, "--weight_decay", 0,
]  # fmt: skip


def write_qwen3_5(folder: Path) -> Path:
    """Write a tiny Qwen3.5 with Qwen v1's tokens, a block of each kind.

    Its convolution has more than 10 x 32 weights, above which ZeRO-3 shards a parameter.
    """
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    write_tokenizer(QWEN, folder)
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16, max_position_embeddings=512,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = Qwen3_5ForCausalLM(config)
    model.save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {"qwen": lambda folder: QWEN, "qwen3_5": write_qwen3_5}
"""Tiny models: name -> function that returns the folder, given one where the model may be written."""


@dataclass
class Result:
    """Result of a command: exit code, printed lines, output folder."""

    code: int
    stderr: str
    folder: Path

    @property
    def message(self) -> str:
        """The first line of its error."""
        lines = [line for line in self.stderr.splitlines() if "finetune.py" in line and "error: " in line]
        return lines[0].partition("error: ")[2] if lines else ""

    def logged(self, name: str) -> list[float]:
        """The values of a key in the run's log."""
        rows = map(json.loads, (self.folder / TRAINING_LOG).read_text().splitlines())
        return [row[name] for row in rows if name in row]

    def weights(self) -> dict[str, Tensor]:
        """Saved parameters that were trained."""
        adapter = self.folder / ADAPTER_SAFETENSORS
        from safetensors.torch import load_file

        return load_file(adapter if adapter.exists() else self.folder / "model.safetensors")

    def answers(self) -> list[str]:
        """The answers to held-out questions at all evaluations."""
        return [json.loads(line)["answer"] for line in (self.folder / EVAL_SAMPLES).read_text().splitlines()]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != EVAL_SAMPLES)


def python() -> str:
    """Return the interpreter of all processes: that of torchrun's, which may be another one."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


class Runs:
    """Runs of ``finetune.py`` on the same model and data, in a folder of their own.

    Args:
        in_float64: compute in float64, see ``benchmarks/in_float64.py``.
    """

    def __init__(self, folder: Path, model: str, in_float64: bool = False) -> None:
        self.folder, self.model = folder, MODELS[model](folder / "model")
        self._command = ["-m", "benchmarks.in_float64"] if in_float64 else ["finetune.py"]
        records = json.loads((ROOT / "examples" / "identity.json").read_text(encoding="utf-8"))
        for name, part in (("train", records[:TRAINED]), ("eval", records[TRAINED : TRAINED + EVALUATED])):
            (folder / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")

    def run(self, name: str, mode: Sequence[object], engine: Sequence[object] | None, *flags: object) -> Result:
        """Train; without an engine in one process, else in two."""
        output = self.folder / name
        processes, batch = 1 if engine is None else WORLD, PACKS if "--packing" in mode else BATCH
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", WORLD] if processes > 1 else []
        words = [
            python(), *start, *self._command, "--model_name_or_path", self.model, "--data_path",
            self.folder / "train.json", "--eval_data_path", self.folder / "eval.json", "--output_dir", output,
            "--per_device_train_batch_size", batch // processes, "--gradient_accumulation_steps", 1, "--weight_decay",
            0, "--per_device_eval_batch_size", 2, "--lora_dropout", 0, "--logging_steps", 1, "--save_strategy", "no",
            "--lr_scheduler_type", "constant", "--use_cpu", "--disable_tqdm", "True", "--gradient_checkpointing",
            "False", *mode, *(engine or ()), *flags,
        ]  # fmt: skip
        if "--use_lora" not in mode:
            at = words.index("--lora_dropout")
            del words[at : at + 2]
        shutil.rmtree(output, ignore_errors=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return Result(done.returncode, done.stderr, output)

    def train(self, name: str, mode: Sequence[object], engine: Sequence[object] | None) -> Result:
        """Twenty steps of AdamW, evaluated twice; with answers where an engine writes them."""
        evaluate = ["--eval_strategy", "steps", "--eval_steps", STEPS // 2]
        if engine is None or engine in [ENGINES[each] for each in ANSWERING]:
            evaluate += ["--eval_generate", EVALUATED, "--eval_max_new_tokens", 4]
        return self.run(name, mode, engine, "--max_steps", STEPS, "--learning_rate", 1e-3, *evaluate)

    def first_gradients(self, name: str, mode: Sequence[object], engine: Sequence[object] | None) -> Result:
        """One step of SGD, which leaves gradients where weights were."""
        return self.run(name, mode, engine, *SGD)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two curves of the same length."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest norm of a difference, as a share of the tensor's norm."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    shares = [
        ((ours[name] - tensor).double().norm() / tensor.double().norm()).item()
        for name, tensor in theirs.items()
        if tensor.any()
    ]
    return max(shares)


def compare(runs: Runs, mode: str, engine: str, alone: Result, alone_gradients: Result | None) -> dict[str, Any]:
    """The figures of one combination.

    Raises:
        RuntimeError: its run failed.
    """
    flags, name = (MODES[mode], ENGINES[engine]), f"{mode}-{engine}"
    together = runs.train(name, *flags)
    if together.code == 1 and "exitcode  : 2" in together.stderr and not together.folder.exists():
        return {"refused": together.message}
    if together.code:
        raise RuntimeError(f"{name}: {together.stderr[-3000:]}")
    figures: dict[str, Any] = {
        "loss": largest_difference(together.logged("loss"), alone.logged("loss")),
        "eval_loss": largest_difference(together.logged("eval_loss"), alone.logged("eval_loss")),
    }
    if alone_gradients is not None and engine not in NO_GRADIENTS:
        gradients = runs.first_gradients(f"{name}-gradients", *flags)
        if gradients.code:
            raise RuntimeError(f"{name}, gradients: {gradients.stderr[-3000:]}")
        figures["first_gradients"] = gradient_difference(gradients.weights(), alone_gradients.weights())
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in run.weights().items()} for run in (together, alone)
    ]
    figures["same_files"] = together.files() == alone.files() and shapes[0] == shapes[1]
    if engine in ANSWERING:
        figures["same_answers"] = together.answers() == alone.answers()
    if mode != "full":
        figures["merges"] = merges(together.folder)
    return figures


def merges(adapter: Path) -> bool:
    """Return whether merge_lora.py folds an adapter into the model."""
    merged = adapter.with_name(f"{adapter.name}-merged")
    words = [python(), "merge_lora.py", "--adapter", str(adapter), "--output", str(merged)]
    code = subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode
    return code == 0 and (merged / "model.safetensors").is_file()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", default="qwen", choices=MODELS, help="tiny model (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument(
        "--float64", action="store_true", help="compute in float64: rounding then explains no difference in float32"
    )
    args = parse_args(parser, argv, RESULTS)
    model = f"{args.model} in float64" if args.float64 else args.model
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), args.model, args.float64)
        for mode in args.modes:
            alone = runs.train(f"{mode}-alone", MODES[mode], None)
            alone_gradients = runs.first_gradients(f"{mode}-alone-gradients", MODES[mode], None)
            for result in (alone, alone_gradients):
                if result.code:
                    raise RuntimeError(f"{mode}, one process: {result.stderr[-3000:]}")
            for engine in args.engines:
                figures = compare(runs, mode, engine, alone, alone_gradients)
                print(model, mode, engine, json.dumps(figures), flush=True)
                save_figures(figures, (model, mode, engine), args.output)


def save_figures(figures: dict[str, Any], place: tuple[str, str, str], path: Path) -> None:
    """Write the figures of a model, mode and engine; others, which may have been measured before, stay."""
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    model, mode, engine = place
    results.setdefault(model, {}).setdefault(mode, {})[engine] = figures
    report = {
        "command": "python -m benchmarks.engines",
        "what": "largest differences between two processes with batches of 4 and one with batches of 8; gradients as a "
        "share of each tensor's norm",
        "steps": STEPS,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "deepspeed")},
        "results": results,
    }
    save_results(report, path)


if __name__ == "__main__":
    main(sys.argv[1:])
