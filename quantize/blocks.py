"""Run samples through a model one block at a time, so that a single block is in float32 and on the GPU.

The rest of the model stays on the CPU in the dtype in which it was loaded.

Shapes: T tokens of a sample, C hidden size, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import UnweightedExample
from quantize.perplexity import AnswerLosses
from qwen_model.block_runner import architecture_of_model, blocks_of, capture_block_inputs, run_block
from qwen_model.lean_loss import lean_causal_lm_loss


def pop_blocks(model: Any, device: torch.device, description: str) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, block), the block on ``device`` in float32, and free it afterwards; shows a progress bar."""
    blocks = blocks_of(model)
    for index in tqdm(range(len(blocks)), description, unit=" layers", disable=None):
        yield index, blocks[index].to(device, torch.float32)
        blocks[index] = nn.Identity()


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a model that are written to files: without a tied head."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


class SampleStates:
    """Hidden states of samples between two blocks of a model. Samples are run one by one, without padding.

    Args:
        device: where blocks are run; states wait on the CPU.

    Attributes:
        states: float32 [1, T, C] of each sample, after the last block that :meth:`advance` was called with.
    """

    def __init__(self, model: Any, examples: Sequence[UnweightedExample], device: torch.device) -> None:
        self.device = device
        self.states: list[Tensor] = []
        self._labels = [torch.tensor([example["labels"]]) for example in examples]
        # For each sample the other arguments of each block: masks and rotary tables.
        self._arguments: list[list[Mapping[str, Any]]] = []
        for example in examples:
            input_ids = torch.tensor([example["input_ids"]], device=model.device)
            states, arguments = capture_block_inputs(model, input_ids=input_ids)
            self.states.append(states.cpu())
            self._arguments.append([_to_device(of_block, torch.device("cpu")) for of_block in arguments])

    @torch.no_grad()
    def output(self, sample: int, index: int, block: nn.Module) -> Tensor:
        """Return the output of block ``index`` for a sample, on ``device``."""
        arguments = _to_device(self._arguments[sample][index], self.device)
        return run_block(block, self.states[sample].to(self.device), arguments)

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the states by the outputs of block ``index``."""
        for sample in range(len(self.states)):
            self.states[sample] = self.output(sample, index, block).cpu()

    @torch.no_grad()
    def answer_losses(self, model: Any) -> AnswerLosses:
        """Return the cross entropy of the trained tokens; the states must have passed all blocks."""
        norm, head = model.get_submodule(architecture_of_model(model).norm), model.lm_head
        for module in (norm, head):
            module.to(self.device, torch.float32)
        sums, counts = [], []
        for states, labels in zip(self.states, self._labels, strict=True):
            loss, _ = lean_causal_lm_loss(norm(states.to(self.device)), head, labels, num_items_in_batch=1)
            sums.append(float(loss))
            counts.append(int((labels[:, 1:] != IGNORE_INDEX).sum()))
        return AnswerLosses(tuple(sums), tuple(counts))


def _to_device(value: Any, device: torch.device) -> Any:
    """Copy a value with all tensors in it moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to_device(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@dataclass
class InputStatistics:
    """Statistics of a layer's inputs ``x`` over all tokens.

    Attributes:
        gram: [I, I], the mean of ``x x^T``.
        mean_abs: [I], the mean of ``|x|``.
    """

    gram: Tensor
    mean_abs: Tensor


class _AllMeasuredError(Exception):
    """Ends a block's run: all inputs that are to be measured were seen."""


def measure_inputs(
    samples: SampleStates, index: int, block: nn.Module, names: Sequence[str]
) -> dict[str, InputStatistics]:
    """Return statistics of the inputs of the named layers of block ``index``, which runs up to the last of them."""
    sums: dict[str, InputStatistics] = {}
    missing: set[str] = set()

    def measure(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        if name not in sums:
            width = x.shape[1]
            sums[name] = InputStatistics(x.new_zeros(width, width), x.new_zeros(width))
        sums[name].gram.addmm_(x.T, x)
        sums[name].mean_abs.add_(x.abs().sum(0))
        missing.discard(name)
        if not missing:
            raise _AllMeasuredError

    def hook(name: str) -> Any:
        return lambda module, inputs: measure(name, inputs[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for sample in range(len(samples.states)):
            missing.update(names)
            with suppress(_AllMeasuredError):
                samples.output(sample, index, block)
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = sum(states.shape[1] for states in samples.states)
    return {name: InputStatistics(of.gram / num_tokens, of.mean_abs / num_tokens) for name, of in sums.items()}
