"""A contender of ``benchmarks.step``: trains in a process of its own, one optimizer step per line of its input.

    python -m benchmarks.step_contenders JSON    (started by benchmarks.step)

finetune.py runs as a user would run it; the others are transformers' Trainer and trl's SFTTrainer with transformers'
classes and collators. At the end of every optimizer step the process reports it and waits for the next line, so that a
step is everything from one end to the next: reading the batches, forward, backward, update, log.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.step_inputs import MAX_LENGTH, data_flags

RANK, ALPHA, DROPOUT = 64, 16, 0.05
MANY_STEPS = 1000
MODES = {
    "full": [],
    "lora": ["--use_lora", "--trainable_embeddings", "none"],
    "lora_r16": ["--use_lora", "--trainable_embeddings", "none", "--lora_r", "16"],
    "lora_embeddings": ["--use_lora", "--trainable_embeddings", "full"],
}


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        kind: ``ours``, ``hf`` or ``trl``.
        order: of its samples, see ``Samples.write``.
        packed: a row is a pack of several samples; then a step takes about as many tokens as 16 samples have.
        flags: of finetune.py.
        bf16: computes in bfloat16; frozen weights are held in it, trained ones in float32.
    """

    kind: str
    order: str = "same"
    packed: bool = False
    flags: tuple[str, ...] = ()
    bf16: bool = False


CONTENDERS = {
    "ours_padded": Contender("ours", flags=("--padding_free", "False")),
    "ours_flat": Contender("ours", flags=("--padding_free", "True")),
    "ours_packed": Contender("ours", "whole", True, flags=("--packing", "True")),
    "ours_bf16": Contender("ours", flags=("--bf16", "True"), bf16=True),
    "original": Contender("hf"),
    "hf_dynamic": Contender("hf"),
    "hf_grouped": Contender("hf", "grouped"),
    "hf_flat": Contender("hf"),
    "hf_bf16": Contender("hf", bf16=True),
    "trl_flat": Contender("trl"),
    "trl_packed": Contender("trl", "whole", True),
}


@dataclass(frozen=True)
class Task:
    """The model, samples and mode that a contender's process trains.

    Attributes:
        batch, accumulation: rows of a micro-batch, micro-batches of an optimizer step.
        seed: of the run; it decides the order of packs, everything else keeps the order of its samples.
        flags: more flags of finetune.py, beside those of the contender.
    """

    name: str
    mode: str
    model: str
    samples: str
    output: str
    batch: int
    accumulation: int
    seed: int
    flags: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_task() -> None:
    # Copies: finetune.py sets up its own streams, and what libraries print must not reach the parent.
    orders, reports = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = Task(**json.loads(sys.argv[1]))
    kind = CONTENDERS[task.name].kind
    import peft  # noqa: F401
    import torch
    import transformers.trainer

    if kind == "ours":
        import training.build
        import training.model  # noqa: F401
    if kind == "trl":
        import datasets  # noqa: F401
        import trl  # noqa: F401
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print("imported", file=reports)
    orders.readline()
    follow_steps(transformers.trainer, orders, reports)
    {"ours": run_ours, "hf": run_hf, "trl": run_trl}[kind](task)
    raise RuntimeError("the run ended before its parent ended it")


def follow_steps(trainer: Any, orders: TextIO, reports: TextIO) -> None:
    """Let every Trainer report each optimizer step and wait for the next order.

    Args:
        trainer: transformers' module ``trainer``.
        orders: one line per step; at its end the process ends.
        reports: a line per step: its seconds, CPU seconds and counts.
    """
    counts: dict[str, int] = {}
    get_batches = trainer.Trainer.get_batch_samples

    def counted(*args: Any, **kwargs: Any) -> Any:
        batches, weight = get_batches(*args, **kwargs)
        rows = [count(batch) for batch in batches]
        counts.update({key: sum(row[key] for row in rows) for key in rows[0]})
        return batches, weight

    class StepCallback(trainer.TrainerCallback):  # type: ignore[misc]
        started, used = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times = {"seconds": time.perf_counter() - self.started, "cpu_seconds": time.process_time() - self.used}
            print(json.dumps({**times, **counts}), file=reports)
            if not orders.readline():
                os._exit(0)  # without saving
            self.started, self.used = time.perf_counter(), time.process_time()

    trainer.Trainer.get_batch_samples = counted
    trainer.DEFAULT_CALLBACKS.append(StepCallback())


def count(batch: Any) -> dict[str, int]:
    """Return the samples, real tokens, trained tokens and computed positions of a padded or flat batch."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    trained = int((labels[:, 1:] != -100).sum())
    if mask is None:
        samples, real = int((batch["position_ids"] == 0).sum()), ids.numel()
    else:
        samples, real = len(ids), int(mask.sum())
    return {"samples": samples, "real_tokens": real, "trained_tokens": trained, "positions": ids.numel()}


def run_ours(task: Task, more_flags: Sequence[str] = ()) -> None:
    flags = {
        "--output_dir": task.output, "--max_steps": MANY_STEPS, "--per_device_train_batch_size": task.batch,
        "--gradient_accumulation_steps": task.accumulation, "--gradient_checkpointing": False,
        "--save_strategy": "no", "--keep_samples": 0, "--seed": task.seed,
        "--train_sampling_strategy": "random" if CONTENDERS[task.name].packed else "sequential",
    }  # fmt: skip
    argv = [*data_flags(Path(task.model), Path(task.samples) / "records.jsonl"), *MODES[task.mode]]
    argv += [
        *CONTENDERS[task.name].flags,
        *task.flags,
        *(str(word) for flag in flags.items() for word in flag),
        *more_flags,
    ]
    sys.argv = ["finetune.py", *argv]
    runpy.run_path(str(Path(__file__).parents[1] / "finetune.py"), run_name="__main__")


def run_hf(task: Task) -> None:
    """Train with transformers' Trainer; ``original`` pads every sample to the maximum."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    collator: Any
    if task.name in ("hf_flat", "hf_bf16"):
        collator = DataCollatorWithFlattening()
    else:
        padding: dict[str, Any] = {"padding": "max_length", "max_length": MAX_LENGTH} if task.name == "original" else {}
        collator = DataCollatorForSeq2Seq(load_tokenizer(task), **padding)
    arguments = TrainingArguments(**trainer_flags(task), remove_unused_columns=False)
    model = load_model(task)
    if (lora := lora_config(task)) is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    examples: Any = load_samples(task)
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator).train()


def run_trl(task: Task) -> None:
    """Train with trl's SFTTrainer: its loss without full logits, on flat rows or packs."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    is_packed = CONTENDERS[task.name].packed
    rows = {"packing": True, "max_length": MAX_LENGTH} if is_packed else {"padding_free": True, "max_length": None}
    config = SFTConfig(**trainer_flags(task), **rows)
    SFTTrainer(
        model=load_model(task), args=config, train_dataset=Dataset.from_list(load_samples(task)),
        processing_class=load_tokenizer(task), peft_config=lora_config(task),
    ).train()  # fmt: skip


def trainer_flags(task: Task) -> dict[str, Any]:
    """Return transformers' flags with the values that finetune.py uses."""
    from training.config.defaults import training_defaults

    return {
        **training_defaults(task.mode != "full"), "output_dir": task.output, "max_steps": MANY_STEPS,
        "per_device_train_batch_size": task.batch, "gradient_accumulation_steps": task.accumulation,
        "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 10, "seed": task.seed,
        "train_sampling_strategy": "random" if CONTENDERS[task.name].packed else "sequential", "use_cpu": True,
        "disable_tqdm": True, "bf16": CONTENDERS[task.name].bf16,
    }  # fmt: skip


def lora_config(task: Task) -> Any:
    if task.mode == "full":
        return None
    from peft import LoraConfig

    embeddings: dict[str, Any] = {}
    if task.mode == "lora_embeddings":
        config = json.loads((Path(task.model) / "config.json").read_text())
        tied = config["tie_word_embeddings"]
        embeddings = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    rank = 16 if task.mode == "lora_r16" else RANK
    return LoraConfig(
        r=rank, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM", **embeddings
    )


def load_model(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(task.seed)
    is_narrow = CONTENDERS[task.name].bf16 and task.mode != "full"
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16 if is_narrow else torch.float32)


def load_tokenizer(task: Task) -> Any:
    from loading.checkpoint import load_checkpoint

    return load_checkpoint(task.model).tokenizer


def load_samples(task: Task) -> Any:
    return json.loads((Path(task.samples) / "examples.json").read_text())


if __name__ == "__main__":
    run_task()
