"""Estimates of a rehearsal from two of the same model with fewer blocks, in a fraction of its time.

Blocks are alike, or their kinds repeat every few blocks, so everything that a step holds at a given place is a constant
and a multiple of the number of blocks. Places are counted from the first block and from the last one, at least one
block of each kind; what is in between lies between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planning.memory import COMPONENTS, Moment
from planning.rehearsal import BatchShape, ParameterSize, Rehearsal, rehearse
from training.config.args import RunArguments

_NEAR = 2  # blocks from either end, at least
_WORTH = 12  # blocks of a model: fewer are rehearsed sooner than two shallow ones
_LONGEST = 8  # period of a model whose blocks count as alike
_BLOCK = re.compile(r"(.*block )(\d+)")


@dataclass(frozen=True)
class Blocks:
    """Blocks of a model.

    Attributes:
        count: 0 if it is not known, or no pattern repeats, as where only the first blocks attend to a window.
        period: so many blocks after one comes the next of its kind.
    """

    count: int = 0
    period: int = 1

    @property
    def near(self) -> int:
        """Blocks from either end of which each place is estimated."""
        return max(_NEAR, self.period)


def find_blocks(config: Any) -> Blocks:
    """Return the blocks of a model by its config."""
    count, types = int(config.num_hidden_layers), list(getattr(config, "layer_types", None) or ())
    for period in range(1, _LONGEST + 1):
        if types[period:] == types[:-period]:
            return Blocks(count, period)
    return Blocks()


def can_be_shallow(args: RunArguments, rehearsal: Rehearsal, blocks: Blocks) -> bool:
    """Return whether all blocks of a kind train the same in a rehearsed run, and are enough for an estimate."""
    lora = args.lora
    if lora.lora_weight_path or lora.lora_rank_pattern or lora.lora_alpha_pattern:
        return False  # a saved adapter has all blocks, and a pattern may name one of them
    if blocks.count < max(_WORTH, sum(depths(args, blocks))):
        return False
    parts = [_of_block(rehearsal.tensors, number) for number in range(blocks.count)]
    return bool(parts[0]) and all(part == parts[number % blocks.period] for number, part in enumerate(parts))


def depths(args: RunArguments, blocks: Blocks) -> tuple[int, int]:
    """Return two small numbers of blocks, of which as many are left over as of all where every n-th differs."""
    every, least = blocks.period, 2 * blocks.near - 1
    if args.trainer_value("gradient_checkpointing"):
        kwargs = args.trainer_value("gradient_checkpointing_kwargs") or {}
        every = math.lcm(every, int(kwargs.get("every_n_layers", 1)))
    first = least + (blocks.count - least) % every
    return first, first + every


def estimate(args: RunArguments, batch: BatchShape, blocks: Blocks, **options: Any) -> Rehearsal:
    """Return what ``rehearse`` would return, without the text of where the peak is.

    Args:
        blocks: of the model.
        options: those of ``rehearse``.

    Raises:
        ConfigError: see ``rehearse``.
    """
    first, second = depths(args, blocks)
    if second >= blocks.count:
        return rehearse(args, batch, **options)
    small, large = (rehearse(args, batch, blocks=number, **options) for number in (first, second))
    steps = (blocks.count - second) // (second - first)

    def at(low: int, high: int) -> int:
        return high + (high - low) * steps

    starts, ends = _places(small, first, blocks.near), _places(large, second, blocks.near)
    moments = {
        _name(place, blocks.count): _moment(starts[place], ends[place], at) for place in starts if place in ends
    }  # fmt: skip
    peak = max(moments, key=lambda name: moments[name].bytes)
    outside = [tensor for tensor in large.tensors if tensor.block is None]
    inside = [
        replace(each, block=number)
        for number in range(blocks.count) for each in large.tensors if each.block == number % blocks.period
    ]  # fmt: skip
    return Rehearsal(
        peak_bytes=moments[peak].bytes,
        components=moments[peak].components,
        peak_at=peak,
        moments=moments,
        resident={name: at(size, large.resident[name]) for name, size in small.resident.items()},
        tensors=(*outside, *inside),
        flops_forward=at(small.flops_forward, large.flops_forward),
        flops_backward=at(small.flops_backward, large.flops_backward),
        parameters=at(small.parameters, large.parameters),
        trained_parameters=at(small.trained_parameters, large.trained_parameters),
        seconds_taken=small.seconds_taken + large.seconds_taken,
        not_rehearsed=large.not_rehearsed,
    )


def _of_block(tensors: Sequence[ParameterSize], number: int) -> list[tuple[int, int, bool]]:
    return [(tensor.elements, tensor.bytes, tensor.is_trained) for tensor in tensors if tensor.block == number]


def _places(rehearsal: Rehearsal, blocks: int, near: int) -> Mapping[tuple[str, int | None], Moment]:
    """Return the moments by part of the step and block, negative if it is counted from the last one."""
    found: dict[tuple[str, int | None], Moment] = {}
    for name, moment in rehearsal.moments.items():
        if (match := _BLOCK.fullmatch(name)) is None:
            found[name, None] = moment
            continue
        number = int(match[2])
        if number < near:
            found[match[1], number] = moment
        if number >= blocks - near:
            found[match[1], number - blocks] = moment
    return found


def _name(place: tuple[str, int | None], blocks: int) -> str:
    part, number = place
    return part if number is None else f"{part}{number % blocks}"


def _moment(small: Moment, large: Moment, at: Any) -> Moment:
    components = {name: at(small.components.get(name, 0), large.components.get(name, 0)) for name in COMPONENTS}
    return Moment(large.phase, large.place, components)
