"""A model as a row of blocks: what is quantised in them, and samples that go through one block at a time.

So one block is in float32 at a time, on the GPU where there is one, and the rest of the model needs no more memory than
it is stored in.

Shapes: T tokens of a sample, C hidden size, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import UnweightedExample
from qwen_model.block_runner import architecture_of_model, blocks_of, capture_block_inputs, run_block
from qwen_model.lean_loss import lean_causal_lm_loss


def take_blocks(model: Any, device: torch.device, what: str) -> Iterator[tuple[int, nn.Module]]:
    """Each block in its turn, on the device and in float32; behind it its memory is free. Draws a bar."""
    blocks = blocks_of(model)
    for index in tqdm(range(len(blocks)), what, unit=" layers"):
        yield index, blocks[index].to(device, torch.float32)
        blocks[index] = nn.Identity()


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What of a model goes into files: a tied head does not."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


class Stream:
    """Samples on their way through the blocks of a model, each on its own and hence without padding.

    Args:
        device: where blocks compute; what waits lies on the CPU.

    Attributes:
        states: [1, T, C] of each sample in float32, behind the blocks that ``pass_through`` was called with.
    """

    def __init__(self, model: Any, examples: Sequence[UnweightedExample], device: torch.device) -> None:
        self.device = device
        self.states: list[Tensor] = []
        self._labels = [torch.tensor([example["labels"]]) for example in examples]
        # For each sample what each block is called with: masks and rotary tables.
        self._arguments: list[list[Mapping[str, Any]]] = []
        for example in examples:
            states, arguments = capture_block_inputs(
                model, input_ids=torch.tensor([example["input_ids"]], device=model.device)
            )
            self.states.append(states.cpu())
            self._arguments.append([_moved(each, torch.device("cpu")) for each in arguments])

    @torch.no_grad()
    def run(self, index: int, block: nn.Module) -> Iterator[Tensor]:
        """The block's output for each sample, on ``device``."""
        for states, arguments in zip(self.states, self._arguments, strict=True):
            yield run_block(block, states.to(self.device), _moved(arguments[index], self.device))

    def pass_through(self, index: int, block: nn.Module) -> None:
        """Make the outputs of the block at this place the inputs of the next one."""
        for place, output in enumerate(self.run(index, block)):
            self.states[place] = output.cpu()

    @property
    def targets(self) -> int:
        """Trained tokens of all samples."""
        return sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for labels in self._labels)

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        """exp of the mean cross entropy over the trained tokens, from the states behind the last block."""
        norm, head = model.get_submodule(architecture_of_model(model).norm), model.lm_head
        for module in (norm, head):
            module.to(self.device, torch.float32)
        total = torch.zeros((), dtype=torch.float64)
        for states, labels in zip(self.states, self._labels, strict=True):
            loss, _ = lean_causal_lm_loss(norm(states.to(self.device)), head, labels, num_items_in_batch=1)
            total += loss.cpu()
        return float((total / self.targets).exp())


def _moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors in it on that device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        moved = [_moved(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


@dataclass
class InputStatistics:
    """Of the inputs ``x`` of a layer.

    Attributes:
        gram: [I, I], the mean of ``x x^T``.
        sizes: [I], the mean of ``|x|``.
    """

    gram: Tensor
    sizes: Tensor


def measure_inputs(stream: Stream, index: int, block: nn.Module, names: Sequence[str]) -> dict[str, InputStatistics]:
    """Run all samples through a block and look at what these layers of it get."""
    sums: dict[str, InputStatistics] = {}
    tokens = 0

    def look(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        if name not in sums:
            width = x.shape[1]
            sums[name] = InputStatistics(x.new_zeros(width, width), x.new_zeros(width))
        sums[name].gram.addmm_(x.T, x)
        sums[name].sizes.add_(x.abs().sum(0))

    def hook(name: str) -> Any:
        return lambda module, inputs: look(name, inputs[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for output in stream.run(index, block):
            tokens += output.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: InputStatistics(each.gram / tokens, each.sizes / tokens) for name, each in sums.items()}
