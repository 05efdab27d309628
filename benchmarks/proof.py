"""Cost of verifying a merge, and which corruptions of the merged weights it finds.

    python -m benchmarks.proof [--quick] [--base DIR --adapter DIR] [--output benchmarks/results/proof.json]

Cost: merge_lora.py with and without verification, on the inputs of benchmarks.merge (Qwen2.5-0.5B's shape, 8 training
samples of 40 random ids beside the adapter), interleaved; figures are medians of 5.

Power: a merge is corrupted in one tensor, 200 times for each rounding and model, with fixed
seeds: the kinds are in ``benchmarks/corruptions.py``, in turn, each on a tensor drawn by chance. A corruption is found
if the verification reports a fault. It changes an answer if one of the greedy answers, of up to 16 tokens in float32,
to the questions of the three shortest training samples is no longer that of the right merge. Models: a random Qwen2 of
4 layers with biases, and ``--base`` with an ``--adapter`` trained on it by finetune.py, if given (in Qwen2's layout;
dithered only).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

if TYPE_CHECKING:
    import torch

    from checkpoints.model_config import Rounding

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "proof.json"
ANSWER_TOKENS, QUESTIONS = 16, 3
CORRUPTIONS = 200
SMALL: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": None,
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one run of each case, 20 corruptions")
    parser.add_argument("--base", type=Path, help="folder of a trained model")
    parser.add_argument("--adapter", type=Path, help="output folder of a run of finetune.py on it")
    args = parse_args(parser, argv, RESULTS)
    if (args.base is None) != (args.adapter is None):
        parser.error("give --base and --adapter together")
    base, adapter = (each and each.absolute() for each in (args.base, args.adapter))
    from benchmarks.merge import machine
    from checkpoints.model_config import ROUNDINGS

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"random": make_small(folder / "small")}
        if args.adapter is not None:
            models["trained"] = (base, adapter)
        for title, (base, adapter) in models.items():
            for rounding in ROUNDINGS if title == "random" else ("dithered",):
                rows.append(measure_power(title, base, adapter, rounding, folder, 20 if args.quick else CORRUPTIONS))
                print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ")
        cost = measure_cost(folder, 1 if args.quick else 5)
        print(*(f"{key} {value}" for key, value in cost.items()), sep="  ")
    command = "python -m benchmarks.proof" + " --quick" * args.quick
    command += " --base DIR --adapter DIR" * (args.adapter is not None)
    save_results({"command": command, "machine": machine(), "cost": cost, "power": rows}, args.output)


def measure_cost(folder: Path, runs: int) -> dict[str, Any]:
    """Return medians of seconds and memory of a merge with and without verification."""
    from benchmarks.merge import OURS, VERIFIED, make_inputs, measure

    make_inputs(folder)
    write_samples(folder / "linear", 151936)
    figures: dict[str, list[tuple[float, float]]] = {OURS: [], VERIFIED: []}
    for _ in range(runs):
        for code, measured in figures.items():
            shutil.rmtree(folder / "output", ignore_errors=True)
            measured.append(measure(code, folder / "one", folder / "linear", folder / "output"))
    (memory, seconds), (memory_verified, seconds_verified) = (
        tuple(statistics.median(values) for values in zip(*measured, strict=True)) for measured in figures.values()
    )
    return {
        "merge_seconds": round(seconds, 2), "with_verification_seconds": round(seconds_verified, 2),
        "verification_per_merge": round((seconds_verified - seconds) / seconds, 2),
        "merge_memory_mib": round(memory), "with_verification_memory_mib": round(memory_verified),
    }  # fmt: skip


def make_small(folder: Path) -> tuple[Path, Path]:
    """Write a random model with biases, and an adapter whose changes are as small as those of short runs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.003)
    adapted.save_pretrained(str(folder / "adapter"))
    write_samples(folder / "adapter", SMALL["vocab_size"])
    return folder / "base", folder / "adapter"


def write_samples(folder: Path, vocabulary: int) -> None:
    """Write 8 samples of 40 random ids: questions of 20, answers of 20."""
    from checkpoints.training_samples import TrainingSample, TrainingSamples

    draw = random.Random(0)
    ids = [[draw.randrange(vocabulary) for _ in range(40)] for _ in range(8)]
    TrainingSamples([TrainingSample("random", each, [-100] * 20 + each[20:]) for each in ids]).write(folder)


def measure_power(
    title: str, base: Path, adapter: Path, rounding: Rounding, folder: Path, count: int
) -> dict[str, int | str | dict[str, str]]:
    """Corrupt a merge ``count`` times; return how many of the corruptions are found, by kind and effect."""
    from benchmarks.corruptions import KINDS, Corruptor

    output = folder / f"{title}-{rounding}"
    command = [sys.executable, "merge_lora.py", "--base", base, "--adapter", adapter, "--output", output]
    subprocess.run([*map(str, command), "--rounding", rounding], cwd=ROOT, check=True)
    corruptor, answers, draw = Corruptor(base, adapter, output, rounding), Answers(output, adapter), random.Random(1)
    results: list[tuple[str, bool, bool]] = []
    for number in range(count):
        kind = [*KINDS][number % len(KINDS)]
        if (corruption := corruptor.draw(kind, draw)) is not None:
            name, tensor = corruption
            results.append((kind, bool(corruptor.faults(name, tensor)), answers.differ(name, tensor)))
    shutil.rmtree(output)
    changing = [found for _, found, changes in results if changes]
    others = [found for _, found, changes in results if not changes]
    kinds = {kind: [found for each, found, _ in results if each == kind] for kind in KINDS}
    return {
        "model": title, "rounding": rounding, "corruptions": len(results),
        "change_an_answer": len(changing), "of_these_found": sum(changing),
        "change_none": len(others), "of_those_found": sum(others),
        "found_by_kind": {kind: f"{sum(found)} of {len(found)}" for kind, found in kinds.items() if found},
    }  # fmt: skip


class Answers:
    """Greedy answers of a merged model to the questions of training samples, and whether a tensor changes them."""

    def __init__(self, merged: Path, adapter: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from checkpoints.training_samples import TrainingSamples
        from qwen_model.register import register_qwen

        register_qwen()
        self._model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        samples = sorted(TrainingSamples.read(adapter).samples, key=lambda sample: len(sample.ids))
        lengths = [next(i for i, label in enumerate(each.labels) if label != -100) for each in samples]
        self._dialogues = []
        for sample, length in list(zip(samples, lengths, strict=True))[:QUESTIONS]:
            question = torch.tensor([sample.ids[:length]])
            ids = self._model.generate(question, max_new_tokens=ANSWER_TOKENS, do_sample=False, repetition_penalty=1.0)
            self._dialogues.append((ids, length))
        self._right = self._predicted()

    def _predicted(self) -> list[torch.Tensor]:
        """Return the most likely tokens after each prefix of the right answers.

        A greedy answer is the right one if and only if all of these are.
        """
        import torch

        with torch.no_grad():
            return [self._model(ids).logits[0, length - 1 : -1].argmax(-1) for ids, length in self._dialogues]

    def differ(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether the model with this tensor gives another answer."""
        import torch

        parameter = self._model.get_parameter(name)
        before = parameter.detach().clone()
        parameter.data.copy_(tensor)
        predicted = self._predicted()
        parameter.data.copy_(before)
        return not all(map(torch.equal, predicted, self._right))


if __name__ == "__main__":
    main(sys.argv[1:])
