"""What one process of several holds and sends: shares of a rehearsed step, computed from the sizes of its parameters.

A rehearsal is of one process. DDP, ZeRO and FSDP2 leave its activations as they are; they divide weights, gradients and
optimizer state among the processes and add buffers. No process group is needed.

n processes, P elements of all parameters, T of the trained ones, d bytes of an element in the engine's 16- or 32-bit
copy. A ring moves (n - 1) / n of a buffer through every process for a gather or a scatter of it, and twice that for an
all-reduce (NCCL's doc/PERFORMANCE.md in nccl-tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from errors import ConfigError
from planning.rehearsal import Moment, ParameterSize, Rehearsal
from training.config.engines import Engine

ENGINE = "engine"
"""Component of what an engine adds: buffers of communication, gathered parameters."""

_MAX_LIVE = 10**9  # elements; DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance
_SUB_GROUP = 10**9  # elements; DeepSpeed's default of sub_group_size


@dataclass(frozen=True)
class Task:
    """What decides the shares beside the parameters.

    Attributes:
        hidden_size: of the model; transformers derives DeepSpeed's bucket sizes from it.
        is_half: ``--bf16`` or ``--fp16``.
        accumulation: micro-batches of an optimizer step.
        keeps_state_small: the optimizer's state is of 8 bits or less, which an engine does not widen.
    """

    processes: int
    hidden_size: int
    is_half: bool = False
    accumulation: int = 1
    keeps_state_small: bool = False


@dataclass(frozen=True)
class Share:
    """One process's part of a step.

    Attributes:
        components: bytes on the device at the peak, by component.
        peak_at: where in the step the peak is.
        host_bytes: of offloaded state, in the memory of the host.
        sent_bytes: of an optimizer step, through the device's links in one direction.
    """

    components: dict[str, int]
    peak_at: str
    host_bytes: int = 0
    sent_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class _Held:
    """Bytes that replace components of every moment; buffers are there until the update, ``at_update`` in it."""

    replaced: dict[str, int] = field(default_factory=dict)
    buffers: int = 0
    at_update: int = 0
    host_bytes: int = 0
    sent_bytes: float = 0.0


def share_of(engine: Engine, rehearsal: Rehearsal, task: Task) -> Share:
    """Return what one process of an engine holds and sends.

    Args:
        rehearsal: of one process without the engine; for DeepSpeed in 16 bits one in which trained parameters are of 16
            bits too, because DeepSpeed casts the whole model.

    Raises:
        ConfigError: the engine cannot be rehearsed.
    """
    if engine.name not in _ENGINES:
        what = f"--deepspeed {engine.given}: zero_optimization.stage is 0 or missing, which cannot be rehearsed"
        raise ConfigError(what, "Give a config of stage 1, 2 or 3, such as finetune/ds_config_zero2.json")
    held = _ENGINES[engine.name](engine, rehearsal, task)
    moments = {where: _at(moment, held) for where, moment in rehearsal.moments.items()}
    peak_at = max(moments, key=lambda where: sum(moments[where].values()))
    components = moments[peak_at]
    if engine.name == "none":
        peak_at = rehearsal.peak_at
    return Share(components, peak_at, held.host_bytes, round(held.sent_bytes))


def _at(moment: Moment, held: _Held) -> dict[str, int]:
    """Return the components of a moment under an engine."""
    added = held.at_update if moment.phase == "optimizer" else held.buffers
    components = {**moment.components, **held.replaced, ENGINE: added}
    return {name: size for name, size in components.items() if size}


# ------------------------------------------------------------------------------------------------------ the engines


def _alone(engine: Engine, rehearsal: Rehearsal, task: Task) -> _Held:
    return _Held()


def _ddp(engine: Engine, rehearsal: Rehearsal, task: Task) -> _Held:
    """Return what DDP adds: buckets as large as all gradients, which are all-reduced once per optimizer step.

    Source: torch's documentation of ``DistributedDataParallel``, ``gradient_as_bucket_view`` (False here).
    """
    gradients = _bytes(rehearsal.tensors, trained=True)
    sent = 2 * _others(task) * gradients
    return _Held(buffers=gradients, at_update=gradients, sent_bytes=sent)


def _zero_1_2(engine: Engine, rehearsal: Rehearsal, task: Task) -> _Held:
    """Return what ZeRO-1 and ZeRO-2 hold.

    Of the trained parameters every process holds a flat copy (d T), a partition in float32 (4 T / n) and its optimizer
    state; stage 1 all gradients (d T), stage 2 those of its partition, twice while it accumulates. Two buckets (one
    without ``overlap_comm``) and the copy of one that is all-reduced are there in the backward pass, and a float32 copy
    of the partition's gradients in the update. Stage 2 all-reduces in every micro-batch, stage 1 once; then the updated
    partitions are gathered.

    Source: ``deepspeed/runtime/zero/stage_1_and_2.py`` of DeepSpeed 0.19.
    """
    zero, n, width = engine.config.get("zero_optimization", {}), task.processes, 2 if task.is_half else 4
    trained = _elements(rehearsal.tensors, trained=True)
    partition = math.ceil(trained / n)
    bucket = min(_setting(zero, "reduce_bucket_size", task.hidden_size**2, 500_000_000), trained)
    copies = (2 if zero.get("overlap_comm") else 1) + 1
    largest = max((tensor.elements for tensor in rehearsal.tensors if tensor.is_trained), default=0)
    state = _state_bytes(rehearsal, task, width) // n + 4 * partition
    if engine.name == "zero2":
        gradients, reductions = width * partition * (2 if task.accumulation > 1 else 1), task.accumulation
    else:
        gradients, reductions = width * trained, 1
    offloads = _offloads(zero, "offload_optimizer")
    return _Held(
        replaced={"optimizer": 0 if offloads else state, "gradients": 0 if offloads else gradients},
        buffers=width * (copies * bucket + largest),
        at_update=0 if offloads else 4 * partition,
        host_bytes=state + (4 + width) * partition if offloads else 0,
        sent_bytes=_others(task) * width * trained * (2 * reductions + 1),
    )


def _zero_3(engine: Engine, rehearsal: Rehearsal, task: Task) -> _Held:
    """Return what ZeRO-3 holds.

    Every process holds 1 / n of each parameter (d P / n; small ones whole), of the trained ones also a partition in
    float32, its optimizer state and its gradients. Gathered parameters are at most ``stage3_max_live_parameters``. Each
    micro-batch gathers all parameters in the forward and again in the backward pass, and scatters the gradients.

    Source: DeepSpeed's documentation of its ZeRO settings, ``deepspeed/runtime/zero/stage3.py`` of DeepSpeed 0.19, and
    section 7 of arXiv:1910.02054.
    """
    zero, n, width = engine.config.get("zero_optimization", {}), task.processes, 2 if task.is_half else 4
    persistent = _setting(zero, "stage3_param_persistence_threshold", 10 * task.hidden_size, 100_000)
    small = [tensor for tensor in rehearsal.tensors if tensor.elements <= persistent]
    large = [tensor for tensor in rehearsal.tensors if tensor.elements > persistent]
    partitions = sum(math.ceil(tensor.elements / n) for tensor in large) + sum(tensor.elements for tensor in small)
    live = min(sum(tensor.elements for tensor in large), _setting(zero, "stage3_max_live_parameters", 0, _MAX_LIVE))
    trained = _elements(rehearsal.tensors, trained=True)
    partition = sum(math.ceil(tensor.elements / n) for tensor in rehearsal.tensors if tensor.is_trained)
    bucket = min(_setting(zero, "reduce_bucket_size", task.hidden_size**2, 500_000_000), trained)
    state = _state_bytes(rehearsal, task, width) // n + 4 * partition
    update = 4 * min(partition, _setting(zero, "sub_group_size", 0, _SUB_GROUP))
    offloads, offloads_weights = (_offloads(zero, f"offload_{part}") for part in ("optimizer", "param"))
    everything = _elements(rehearsal.tensors)
    return _Held(
        replaced={
            "weights": 0 if offloads_weights else width * partitions,
            "adapter": 0,  # within weights
            "optimizer": 0 if offloads else state,
            "gradients": 0 if offloads else width * partition,
        },
        buffers=width * (live + bucket),
        at_update=0 if offloads else update,
        host_bytes=(state + update + width * partition if offloads else 0)
        + (width * partitions if offloads_weights else 0),
        sent_bytes=_others(task) * width * task.accumulation * (2 * everything + trained),
    )


def _fsdp2(engine: Engine, rehearsal: Rehearsal, task: Task) -> _Held:
    """Return what FSDP2 holds.

    Every process holds 1 / n of each parameter in its own type, and of gradients and optimizer state. Gathered, in the
    type of computation, are the block that computes and the next one, and from the forward to the backward pass what is
    in no block; in the backward pass a block's gradients too, in that type and in float32. With
    ``reshard_after_forward: false`` all blocks stay gathered.

    Source: torch's documentation of ``fully_shard`` and ``MixedPrecisionPolicy``; ``accelerate/utils/fsdp_utils.py``,
    ``fsdp2_prepare_model``.
    """
    n, width = task.processes, 2 if task.is_half else 4
    blocks: dict[int, list[ParameterSize]] = {}
    for tensor in rehearsal.tensors:
        if tensor.block is not None:
            blocks.setdefault(tensor.block, []).append(tensor)
    outside = [tensor for tensor in rehearsal.tensors if tensor.block is None]
    sizes = [_elements(tensors) for tensors in blocks.values()] or [0]
    gathered = 2 * max(sizes) if engine.config.get("reshard_after_forward", True) else sum(sizes)
    most_trained = max((_elements(tensors, trained=True) for tensors in blocks.values()), default=0)
    everything, trained = _elements(rehearsal.tensors), _elements(rehearsal.tensors, trained=True)
    frozen = _bytes(rehearsal.tensors) - _bytes(rehearsal.tensors, trained=True)
    held = {"weights": frozen + 4 * trained, "adapter": 0}
    if rehearsal.resident.get("adapter"):
        held = {"weights": frozen, "adapter": 4 * trained}
    held |= {"gradients": 4 * trained, "optimizer": _state_bytes(rehearsal, task, width)}
    shares = {name: math.ceil(size / n) for name, size in held.items()}
    offloads = bool(engine.config.get("cpu_offload"))
    return _Held(
        replaced=dict.fromkeys(shares, 0) if offloads else shares,
        buffers=width * (gathered + _elements(outside)) + (width + 4) * most_trained,
        host_bytes=sum(shares.values()) if offloads else 0,
        sent_bytes=_others(task) * task.accumulation * (2 * width * everything + 4 * trained),
    )


_ENGINES: dict[str, Callable[[Engine, Rehearsal, Task], _Held]] = {
    "none": _alone, "ddp": _ddp, "zero1": _zero_1_2, "zero2": _zero_1_2, "zero3": _zero_3, "fsdp2": _fsdp2,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ sizes


def _others(task: Task) -> float:
    return (task.processes - 1) / task.processes


def _elements(tensors: Sequence[ParameterSize], trained: bool = False) -> int:
    return sum(tensor.elements for tensor in tensors if tensor.is_trained or not trained)


def _bytes(tensors: Sequence[ParameterSize], trained: bool = False) -> int:
    return sum(tensor.bytes for tensor in tensors if tensor.is_trained or not trained)


def _state_bytes(rehearsal: Rehearsal, task: Task, width: int) -> int:
    """Return the bytes of the optimizer's state of all trained parameters, in float32 unless it is kept small."""
    state = rehearsal.resident.get("optimizer", 0)
    return state if task.keeps_state_small else state * 4 // width


def _setting(zero: Mapping[str, object], name: str, auto: int, default: int) -> int:
    """Return a number of DeepSpeed's config; ``auto`` is what transformers derives from the hidden size."""
    value = zero.get(name, default)
    return auto if value == "auto" else int(value) if isinstance(value, int | float) else default


def _offloads(zero: Mapping[str, object], name: str) -> bool:
    part = zero.get(name)
    return isinstance(part, dict) and part.get("device", "none") != "none"
