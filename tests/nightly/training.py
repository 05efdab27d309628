"""Short runs on the small model, and what a model or adapter answers and loses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from chat.render import encode_prompt, render_prompt
from chat.turns import Turn
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.commands import run_well

STEPS = 40
SMALL_STEPS = ("--use_cpu", "True", "--gradient_accumulation_steps", "2")
TIMEOUT = 1800


@dataclass(frozen=True)
class Behaviour:
    """Greedy answers to the questions of a file, and the mean loss of the file's answers in nats per token."""

    answers: list[str]
    loss: float

    def equal(self, other: Behaviour) -> float:
        """Return the share of answers that are the same."""
        pairs = list(zip(self.answers, other.answers, strict=True))
        return sum(one == two for one, two in pairs) / len(pairs)


def tune(model: Path, data: Path, output: Path, *flags: object, steps: int = STEPS) -> Path:
    """Run ``finetune.py`` with the documented flags, except for 40 steps of 4 conversations, which take minutes."""
    fixed = ("--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_steps", steps)
    run_well("finetune.py", *fixed, *SMALL_STEPS, *flags, timeout=TIMEOUT)
    return output


def merge(adapter: Path, output: Path, *flags: object) -> Path:
    run_well("merge_lora.py", "--adapter", adapter, "--output", output, *flags, timeout=TIMEOUT)
    return output


@torch.no_grad()
def behaviour(
    model_folder: Path, data: Path, adapter: Path | None = None, count: int = 24, system: str | None = None
) -> Behaviour:
    """Ask the first questions of a file of single-turn conversations, one at a time, and measure its answers' loss.

    All is computed in float32: in bfloat16 an adapter beside its base and the same weights merged answer differently.
    The loss is that of the same questions' answers, with the token that ends them.

    Args:
        system: system message (default: that of the model's format).
    """
    checkpoint = load_checkpoint(str(model_folder))
    model = load_for_inference(checkpoint, None if adapter is None else str(adapter)).float()
    answers, losses, tokens = [], 0.0, 0
    for record in json.loads(data.read_text(encoding="utf-8"))[:count]:
        question, answer = (turn["value"] for turn in record["conversations"])
        end = checkpoint.end_ids[0]
        ids = encode_prompt(render_prompt([Turn("user", question)], checkpoint.family, system), checkpoint.tokenizer)
        output = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=48,
            do_sample=False, repetition_penalty=1.0, eos_token_id=checkpoint.end_ids, pad_token_id=end,
        )  # fmt: skip
        answers.append(checkpoint.tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True))
        target = [*checkpoint.tokenizer.encode(answer, add_special_tokens=False), end]
        logits = model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].float()
        losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        tokens += len(target)
    return Behaviour(answers, losses / tokens)
