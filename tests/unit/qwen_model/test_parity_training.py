"""Losses and weights of the original script's recorded training runs.

The training loop is written here with torch alone, so that the model, its gradients and the encoding are compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chat.label_mask import IGNORE_INDEX
from data_utils.collate import Collator
from data_utils.encode import Example
from data_utils.files import read_records
from data_utils.formats import FORMATS
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.encoding import OriginalEncoder
from tests.golden import LOSS_ATOL, Golden, assert_close

# The order of summation alone changes weights by about 1e-4 in a dozen AdamW steps.
WEIGHTS_ATOL = 1e-3
TRAINED_LOGITS_ATOL = 5e-3

Batch = dict[str, torch.Tensor]


def encode_file(golden: Golden, name: str, tokenizer: QWenTokenizer, max_length: int) -> list[Example]:
    """Encode the conversations of a data file as the original did."""
    encoder = OriginalEncoder(tokenizer, max_length=max_length)
    records = read_records(golden.path / name)
    encoded = [encoder.encode_conversation(FORMATS["conversations"].parse(record, where)) for where, record in records]
    return [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in encoded]


def build_optimizer(model: nn.Module, arguments: dict[str, Any]) -> torch.optim.AdamW:
    """Build AdamW with weight decay on everything but biases; the original also decays RMSNorm weights."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for name, p in trainable if not name.endswith("bias")],
            "weight_decay": arguments["weight_decay"],
        },
        {"params": [p for name, p in trainable if name.endswith("bias")], "weight_decay": 0.0},
    ]
    betas = (arguments["adam_beta1"], arguments["adam_beta2"])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=arguments["adam_epsilon"])


@dataclass
class Run:
    """Measurements of a training run."""

    losses: list[float]
    micro_losses: list[float]
    grad_norms: list[float]
    eval_losses: list[dict[str, float]]


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    losses = [model(**batch).loss.item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def train(
    model: nn.Module, recorded: dict[str, Any], samples: list[Example], held_out: list[Example], collate: Collator
) -> Run:
    """Repeat a recorded run with its batches, learning rates and gradient clipping."""
    arguments = recorded["training_args"]
    optimizer = build_optimizer(model, arguments)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    accumulation = arguments["gradient_accumulation_steps"]
    run = Run([], [], [], [])
    evaluated = {entry["step"] for entry in recorded["eval_losses"]}
    model.train()
    for step, learning_rate in enumerate(recorded["lrs_used"], 1):
        losses = []
        for micro in recorded["micro"][(step - 1) * accumulation : step * accumulation]:
            batch = collate([samples[row] for row in micro["rows"]])
            assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == micro["n_label"], f"step {step}"
            loss = model(**batch).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        run.grad_norms.append(nn.utils.clip_grad_norm_(trainable, arguments["max_grad_norm"]).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(sum(losses) / accumulation)
        run.micro_losses += losses
        if step in evaluated:
            run.eval_losses.append(
                {"step": step, "eval_loss": evaluate(model, [collate([sample]) for sample in held_out])}
            )
    return run


def build_model(golden: Golden, name: str, recorded: dict[str, Any]) -> nn.Module:
    """Build the model at the start of the run, with the recorded LoRA matrices."""
    model: nn.Module = QWenLMHeadModel.from_pretrained(golden.tiny, dtype=torch.float32)
    if not name.startswith("lora"):
        return model
    config = recorded["adapter_config"]
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "task_type")
    model = get_peft_model(model, LoraConfig(**{key: config[key] for key in keys}))
    tensors = golden.tensors_of(f"training/{name}.safetensors")
    initial = {key.removeprefix("init."): tensors[key] for key in tensors if key.startswith("init.")}
    assert set(initial) == {key for key, parameter in model.named_parameters() if "lora_" in key}
    model.load_state_dict(initial, strict=False)
    return model


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # peft uses an old name
def test_training_runs_have_the_recorded_losses_and_weights(any_golden: Golden, tiny_tokenizer: QWenTokenizer) -> None:
    """All runs of the small set; of the large one, whose steps take ten times as long, that of all parameters."""
    for name, recorded in any_golden.training_runs.items():
        if any_golden.name == "small" or not name.startswith("lora"):
            check_run(any_golden, tiny_tokenizer, name, recorded)


def check_run(any_golden: Golden, tiny_tokenizer: QWenTokenizer, name: str, recorded: dict[str, Any]) -> None:
    """Repeat a recorded run and compare losses, gradient norms, evaluations and final weights."""
    max_length = recorded["training_args"]["model_max_length"]
    samples = encode_file(any_golden, "train.json", tiny_tokenizer, max_length)
    held_out = encode_file(any_golden, "eval.json", tiny_tokenizer, max_length)

    model = build_model(any_golden, name, recorded)
    trainable = {key: list(p.shape) for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == recorded["trainable"]
    run = train(model, recorded, samples, held_out, Collator(tiny_tokenizer.pad_token_id))

    assert run.losses == pytest.approx(recorded["losses_exact"], abs=LOSS_ATOL)
    assert run.micro_losses == pytest.approx([micro["loss"] for micro in recorded["micro"]], abs=LOSS_ATOL)
    assert run.grad_norms == pytest.approx(recorded["grad_norm_before_clip"], rel=1e-3)
    assert len(run.eval_losses) == len(recorded["eval_losses"])
    for ours, theirs in zip(run.eval_losses, recorded["eval_losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=LOSS_ATOL)
    assert sum(run.losses[-3:]) < sum(run.losses[:3]), "the loss must fall"
    check_trained(model.eval(), any_golden, name)


@torch.no_grad()
def check_trained(model: nn.Module, golden: Golden, name: str) -> None:
    """Compare the final weights, and the logits of the trained model."""
    final = golden.tensors_of(f"training/{name}.safetensors")
    parameters = dict(model.named_parameters())
    compared = set()
    for key in final:
        if match := re.fullmatch(r"final\.(.+?)(?:\.s(\d+))?", key):
            assert_close(parameters[match[1]][:: int(match[2] or 1)], final[key], WEIGHTS_ATOL, key)
            compared.add(match[1])
    assert compared == {key for key, parameter in parameters.items() if parameter.requires_grad}
    for case in ("A", "B"):
        stem, stride = final.strided(f"logits.{case}.logits")
        inputs = {"input_ids": golden.tensors.ids(f"{case}.input_ids")}
        if case == "B":
            inputs["attention_mask"] = golden.tensors.ids("B.attention_mask")
        assert_close(model(**inputs).logits[:, :, ::stride], final[stem], TRAINED_LOGITS_ATOL, stem)
