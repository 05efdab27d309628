"""Gradient checkpointing of all blocks, of every n-th, and with offloaded inputs: the same bits, less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.commands import finetune_here
from tests.models import TINY, write_conversations, write_later_checkpoint
from training.checks import check_args
from training.config.parsing import parse_args
from training.trainer import QwenTrainer

FORMS = {
    "none": ("--gradient_checkpointing", "False"),
    "every second": ("--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'),
    "all": ("--gradient_checkpointing",),
    "all, reentrant": ("--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
    "all, offloaded": ("--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"offload": true}'),
}


def train(folder: Path, model: Path, *flags: object) -> dict[str, Tensor]:
    """Train two steps with dropout, and return the adapter."""
    finetune_here(
        "--model_name_or_path", model, "--data_path", folder / "train.json", "--output_dir", folder / "out",
        "--overwrite_output_dir", "--use_lora", "--lora_r", 2, "--lora_dropout", 0.3, "--max_steps", 2,
        "--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--save_strategy", "no", *flags,
    )  # fmt: skip
    return dict(load_file(folder / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
def test_each_form_ends_with_the_same_bits_and_saves_as_much_as_it_says(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_conversations(tmp_path / "train.json")
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    saved: dict[int, int] = {}
    offloaded: list[int] = []
    compute, to_host = QwenTrainer.compute_loss, torch.autograd.graph.save_on_cpu

    def counted(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved.clear()

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return compute(self, model, *args, **kwargs)

    def recorded(pin_memory: bool, device_type: str) -> Any:
        offloaded.append(1)
        return to_host()  # only memory that a GPU reads can be pinned

    monkeypatch.setattr(QwenTrainer, "compute_loss", counted)
    monkeypatch.setattr("training.flag_checks._check_offload", lambda args: iter(()))
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", recorded)
    adapters, sizes, copies = {}, {}, {}
    for name, flags in FORMS.items():
        offloaded.clear()
        adapters[name] = train(tmp_path, model, *flags)
        sizes[name], copies[name] = sum(saved.values()), len(offloaded)
    for name in FORMS:
        assert all(torch.equal(adapters[name][key], tensor) for key, tensor in adapters["none"].items()), name
    assert sizes["all"] < sizes["every second"] < sizes["none"], sizes
    layers = 2 * 2  # blocks times steps
    assert copies == {name: layers if name == "all, offloaded" else 0 for name in FORMS}


def check(tmp_path: Path, *flags: str) -> None:
    data = write_conversations(tmp_path / "train.json")
    words = ["--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out", *flags]
    check_args(parse_args([str(word) for word in words]))


def test_settings_without_gradient_checkpointing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "training"):
        check(tmp_path, *FORMS["every second"], "--gradient_checkpointing", "False")
    message = "--gradient_checkpointing_kwargs {'every_n_layers': 2} has no effect without --gradient_checkpointing"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_offloading_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--gradient_checkpointing_kwargs: offload copies from a GPU to the host"):
        check(tmp_path, "--use_cpu", *FORMS["all, offloaded"])
