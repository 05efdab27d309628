"""Rehearsal of an optimizer step: what it takes on a device, from the flags and config.json alone.

The step is the trainer's own, on tensors that have shapes, types and lifetimes, but no data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from planning.memory import COMPONENTS, Moment
from planning.sizes import BatchShape, ParameterSize
from training.config.args import RunArguments


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes in one process without an engine. Bytes are those of the device.

    Attributes:
        components: bytes at the peak, by ``planning.memory.COMPONENTS``; their sum is ``peak_bytes``.
        peak_at: where in the step the peak is.
        moments: the largest moment of each part of the step: ``forward, block 3``, ``loss``, ``backward, block 3``,
            ``optimizer`` and so on.
        resident: bytes of weights, adapter, gradients and optimizer states, each when it is complete.
        flops_forward, flops_backward: of one micro-batch; with gradient checkpointing, backward repeats forward passes.
            Attention counts as if it were not causal.
        parameters: weights of the model without its adapter; a 4-bit layer counts those that it encodes.
        not_rehearsed: differences between this step and a real one, a phrase each.
    """

    peak_bytes: int
    components: dict[str, int]
    peak_at: str
    moments: dict[str, Moment]
    resident: dict[str, int]
    tensors: tuple[ParameterSize, ...]
    flops_forward: int
    flops_backward: int
    parameters: int
    trained_parameters: int
    seconds_taken: float
    not_rehearsed: tuple[str, ...] = ()


def rehearse(
    args: RunArguments,
    batch: BatchShape,
    *,
    device_type: str = "cuda",
    evaluation: BatchShape | None = None,
    blocks: int | None = None,
    is_alone: bool = True,
) -> Rehearsal:
    """Rehearse an optimizer step with one micro-batch, between two others.

    Args:
        args: flags of the run; an engine's (``--deepspeed``, ``--fsdp``) are left out.
        device_type: ``cuda`` or ``cpu``; needs no such device.
        evaluation: the largest batch of an evaluation after the step.
        blocks: rehearse a model that has only so many; by default those of config.json.
        is_alone: the run has no engine, so that gradients may be summed in place.

    Raises:
        ConfigError: config.json is missing or cannot be used, or something that cannot be rehearsed.
    """
    from planning.fake_run import run_step
    from planning.model import describe_parameters, place_of, read_checkpoint, with_blocks

    started = time.perf_counter()
    checkpoint = read_checkpoint(args)
    if blocks is not None:
        checkpoint = with_blocks(checkpoint, blocks)
    step = run_step(args, checkpoint, batch, evaluation, device_type, is_alone)
    place = place_of(checkpoint.model_type)
    moments = step.memory.moments(lambda phase, module: place(phase, module).part)
    peak = max(moments.values(), key=lambda moment: moment.bytes)
    tensors = describe_parameters(step.model, checkpoint.model_type)
    return Rehearsal(
        peak_bytes=peak.bytes,
        components=peak.components,
        peak_at=place(peak.phase, peak.place).text,
        moments=moments,
        resident=step.resident,
        tensors=tensors,
        flops_forward=step.memory.flops.get("forward", 0),
        flops_backward=step.memory.flops.get("backward", 0),
        parameters=step.parameters,
        trained_parameters=sum(tensor.elements for tensor in tensors if tensor.is_trained),
        seconds_taken=time.perf_counter() - started,
        not_rehearsed=step.not_rehearsed,
    )


__all__ = ["COMPONENTS", "BatchShape", "Moment", "ParameterSize", "Rehearsal", "rehearse"]
