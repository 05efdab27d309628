"""What a run takes on a machine: the rehearsed step of one process, its share under an engine, and the time of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from planning.batches import RunBatches, assumed_batch, assumed_evaluation
from planning.devices import GIB, RESERVE_GIB, Device
from planning.engines import Share, Task, share_of
from planning.rehearsal import BatchShape, Rehearsal, rehearse
from planning.shallow import Blocks, estimate
from training.config.args import RunArguments
from training.config.engines import find_engine
from training.rows import why_apart

_SMALL_STATES = ("8bit", "4bit")


@dataclass(frozen=True)
class Machine:
    """Where a run is planned to take place.

    Attributes:
        memory_gib: of one device.
        gpus: devices of a host, each with a process.
        rate_share: part of the device's rate of matrix products that a step reaches.
    """

    device: Device
    memory_gib: float
    gpus: int = 1
    hosts: int = 1
    rate_share: float = 0.4

    @property
    def processes(self) -> int:
        return self.gpus * self.hosts

    @property
    def usable_bytes(self) -> int:
        return int((self.memory_gib - RESERVE_GIB) * GIB)


@dataclass(frozen=True)
class Expectation:
    """What one process of a run takes.

    Attributes:
        changes: flags that were changed from the user's, as he would type them.
        engine: title of the engine.
    """

    args: RunArguments
    machine: Machine
    shape: BatchShape
    rehearsal: Rehearsal
    share: Share
    engine: str
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.share.peak_bytes <= self.machine.usable_bytes

    @property
    def micro_steps(self) -> float:
        """Forward and backward passes of one process in an optimizer step."""
        return self.shape.per_step or float(self.args.trainer_value("gradient_accumulation_steps"))

    @property
    def step_flops(self) -> float:
        """Floating-point operations of one process in an optimizer step."""
        return float(self.rehearsal.flops_forward + self.rehearsal.flops_backward) * self.micro_steps

    @property
    def seconds(self) -> float | None:
        """Seconds of an optimizer step's matrix products; ``None`` if the device's rate is not known."""
        rate = self.machine.device.tflops * 1e12 * self.machine.rate_share
        return self.step_flops / rate if rate else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, in bytes, operations and seconds."""
        rehearsal, share = self.rehearsal, self.share
        return {
            "changes": list(self.changes),
            "engine": self.engine,
            "batch": {"lengths": list(self.shape.lengths), "targets": self.shape.targets},
            "micro_steps": self.micro_steps,
            "fits": self.fits,
            "peak_bytes": share.peak_bytes,
            "peak_at": share.peak_at,
            "components": share.components,
            "host_bytes": share.host_bytes,
            "sent_bytes_per_step": share.sent_bytes,
            "flops_forward": rehearsal.flops_forward,
            "flops_backward": rehearsal.flops_backward,
            "flops_per_step": self.step_flops,
            "seconds_per_step": self.seconds,
            "parameters": rehearsal.parameters,
            "trained_parameters": rehearsal.trained_parameters,
            "rehearsed_in_seconds": round(rehearsal.seconds_taken, 2),
        }


class Planner:
    """Rehearses variants of one run on one machine; the data is read once.

    Attributes:
        hidden_size: of the model.
        blocks: of the model.
    """

    def __init__(
        self, machine: Machine, hidden_size: int, batches: RunBatches | None = None, blocks: Blocks | None = None
    ) -> None:
        self.machine, self.hidden_size, self.batches, self.blocks = machine, hidden_size, batches, blocks or Blocks()
        self._rehearsed: dict[str, Rehearsal] = {}
        self._longest: dict[tuple[int, int, str], BatchShape] = {}  # by what changes alter: batch, accumulation, engine

    def shape(self, args: RunArguments) -> BatchShape:
        """Return the longest micro-batch of a run with these arguments."""
        if self.batches is None:
            return assumed_batch(args)
        get, processes = args.trainer_value, self.machine.processes
        key = get("per_device_train_batch_size"), get("gradient_accumulation_steps"), why_apart(args, processes)
        if key not in self._longest:
            self._longest[key] = self.batches.longest(args, processes)
        return self._longest[key]

    def expect(
        self,
        args: RunArguments,
        changes: tuple[str, ...] = (),
        machine: Machine | None = None,
        is_estimate: bool = False,
    ) -> Expectation:
        """Rehearse a run.

        Args:
            is_estimate: rehearse fewer of its blocks (see ``planning.shallow``).

        Raises:
            ConfigError: something in it cannot be rehearsed, which the message names.
        """
        machine, shape = machine or self.machine, self.shape(args)
        engine = find_engine(args.trainer, machine.processes)
        is_half = bool(args.trainer_value("bf16") or args.trainer_value("fp16") or args.options.pure_bf16)
        alone = _without_engine(args, casts_model=is_half and engine.name not in ("none", "ddp"))
        rehearsal = self._rehearse(alone, shape, is_estimate, engine.name == "none")
        task = Task(
            machine.processes,
            self.hidden_size,
            is_half,
            args.trainer_value("gradient_accumulation_steps"),
            any(word in args.trainer_value("optim") for word in _SMALL_STATES),
        )
        share = share_of(engine, rehearsal, task)
        return Expectation(args, machine, shape, rehearsal, share, engine.title, changes)

    def _rehearse(self, args: RunArguments, shape: BatchShape, is_estimate: bool, is_alone: bool) -> Rehearsal:
        """Rehearse a run of one process, once: variants that differ in their engine, if they have one, share it."""
        key = repr((args.to_dict(), shape, is_alone))
        if is_estimate and key not in self._rehearsed:
            key += " estimate"
        if key not in self._rehearsed:
            evaluation = self.batches.longest_evaluation(args) if self.batches else assumed_evaluation(args)
            kind = self.machine.device.kind
            options: dict[str, Any] = {"device_type": kind, "evaluation": evaluation, "is_alone": is_alone}
            if is_estimate:
                self._rehearsed[key] = estimate(args, shape, self.blocks, **options)
            else:
                self._rehearsed[key] = rehearse(args, shape, **options)
        return self._rehearsed[key]


def _without_engine(args: RunArguments, casts_model: bool) -> RunArguments:
    """Return the arguments of one process.

    Args:
        casts_model: ZeRO and FSDP2 compute with parameters of 16 bits; their shares in float32 are added afterwards.
    """
    trainer = {name: value for name, value in args.trainer.items() if name not in ("deepspeed", "fsdp", "fsdp_config")}
    options = replace(args.options, pure_bf16=True) if casts_model else args.options
    return replace(args, trainer=trainer, options=options)
