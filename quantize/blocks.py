"""Run samples through a model one block at a time, so that a single block is in float32 and on the GPU.

The rest of the model stays on the CPU in the dtype in which it was loaded.

Shapes: T tokens of a sample, C hidden size, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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


_FIRST_TOKEN = 0.2
"""Weight of a sample's first token in addition to that of any other, as a share of the sample's tokens."""


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

    @property
    def num_tokens(self) -> int:
        return sum(states.shape[1] for states in self.states)

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


class _SeenError(Exception):
    """Ends a block's run: the input that is to be measured was seen."""


def measure_gram(samples: SampleStates, index: int, block: nn.Module, name: str) -> Tensor:
    """Run all samples through block ``index``, up to the named layer; return the Gram matrix [I, I] of its inputs.

    It is the mean of ``weight * x x^T`` over the inputs ``x``, with the weights of :func:`token_weights`.
    """
    layer: Any = block.get_submodule(name)
    gram = torch.zeros(layer.in_features, layer.in_features, device=samples.device)

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        x = x * token_weights(x).sqrt()[:, None]
        gram.addmm_(x.T, x)
        raise _SeenError

    handle = layer.register_forward_pre_hook(add)
    try:
        for sample in range(len(samples.states)):
            with suppress(_SeenError):
                samples.output(sample, index, block)
    finally:
        handle.remove()
    return gram / samples.num_tokens


def token_weights(x: Tensor) -> Tensor:
    """Return what an error in the outputs of each token [T] of a sample counts, from the inputs [T, I] of a layer.

    In some layers of pretrained models one token, mostly the first, has nearly all the energy (Sun et al. 2024,
    "Massive activations"). With equal weights for equal energy a layer would be fitted to that token and the others
    would be worse than rounded to nearest; with equal weights for all tokens it would be as wrong as rounded to
    nearest for the one on which the states of all later blocks depend. The weights are the sum of both. The first
    token counts more also where it is as small as the others, because later tokens attend to it (Xiao et al. 2024,
    "attention sinks").
    """
    energy = x.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    weights = 1 / energy + 1 / energy.mean()
    weights[0] += _FIRST_TOKEN * len(x) / energy[0]
    return weights
