"""Changes of a run that take less memory, cheapest first, and those of them that make it fit.

A change costs least if it alters only the order of the same computation, more if steps get slower, most if something
else is trained or more devices are needed. Every change that is proposed has been rehearsed in full.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from console import ROOT, shown_path
from errors import ConfigError
from planning.devices import GIB
from planning.expectation import Expectation, Planner
from planning.rehearsal import Rehearsal
from planning.shallow import can_be_shallow
from training.config.args import RunArguments
from training.config.engines import find_engine, is_set

logger = logging.getLogger(__name__)

_MOST_PROPOSALS = 3
_NEARLY = 1.02  # of the memory: an estimate up to this is rehearsed in full
_COMPUTED = ("activations", "workspace", "loss")
_TRAINED = ("adapter", "gradients", "optimizer", "engine")
_EVERYTHING = ("weights", *_TRAINED, *_COMPUTED)


@dataclass(frozen=True)
class Change:
    """One change of the flags.

    Attributes:
        kind: changes of one kind exclude each other; each is stronger than the one before.
        flags: as a user would type them.
        lowers: components that it can lower; others stay.
        activations: part of the activations that stays, at least.
        gpus: of a host, if the change is to use more of them.
    """

    kind: str
    flags: str
    args: RunArguments
    lowers: tuple[str, ...]
    activations: float = 0.0
    gpus: int | None = None


@dataclass(frozen=True)
class Advice:
    """What to change.

    Attributes:
        proposals: each of them fits; none if no change does.
        smallest: what takes least of all that was rehearsed.
    """

    proposals: tuple[Expectation, ...]
    smallest: Expectation


def advise(planner: Planner, base: Expectation) -> Advice:
    """Find the smallest changes that make a run fit: single ones first, else the first combination.

    What seems to fit is rehearsed in full, and so is what takes least if nothing fits; everything else is estimated.

    Args:
        base: the run as it is, which does not fit.
    """
    trial = _Trial(planner, base)
    proposals: list[Expectation] = []
    smallest = base
    for change in changes_of(base):
        if _floor(base, change) <= base.machine.usable_bytes and (tried := trial.expect([change])) is not None:
            smallest = min(smallest, tried, key=_size)
            proposals += [tried] if tried.fits else []
        if len(proposals) == _MOST_PROPOSALS:
            break
    if not proposals:
        smallest = trial.in_full(_combine(trial, base, smallest))
        proposals = [smallest] if smallest.fits else []
    return Advice(tuple(proposals), smallest)


def _combine(trial: _Trial, base: Expectation, smallest: Expectation) -> Expectation:
    """Add the strongest change of each kind until the run fits; return the smallest of all that was tried."""
    applied: list[Change] = []
    current, kinds = base, set[str]()
    while remaining := [change for change in changes_of(current) if change.kind not in kinds]:
        kind = remaining[0].kind
        kinds.add(kind)
        group = [change for change in remaining if change.kind == kind]
        for change in group if kind == "engine" else group[-1:]:
            tried = trial.expect([*applied, change])
            if tried is None or _size(tried) >= _size(current):
                continue
            smallest = min(smallest, tried, key=_size)
            if tried.fits:
                return tried
            if change is group[-1]:
                applied.append(change)
                current = tried
    return smallest


def _size(expectation: Expectation) -> int:
    return expectation.share.peak_bytes


def _floor(base: Expectation, change: Change) -> int:
    """Return the bytes that stay after a change, at least."""
    components = base.share.components
    kept = sum(size for name, size in components.items() if name not in change.lowers)
    return kept + int(components.get("activations", 0) * change.activations)


class _Trial:
    """Expects changed runs.

    Args:
        base: the run without changes, rehearsed in full.
    """

    def __init__(self, planner: Planner, base: Expectation) -> None:
        self._planner, self._machine = planner, base.machine
        self._estimates = can_be_shallow(base.args, base.rehearsal, planner.blocks)

    def expect(self, changes: Sequence[Change]) -> Expectation | None:
        """Expect the last of several changes that build on each other; ``None`` if it cannot be rehearsed."""
        flags, last = tuple(change.flags for change in changes), changes[-1]
        gpus = next((change.gpus for change in reversed(changes) if change.gpus is not None), None)
        machine = self._machine if gpus is None else replace(self._machine, gpus=gpus)
        try:
            tried = self._planner.expect(last.args, flags, machine, self._estimates)
            if _size(tried) <= machine.usable_bytes * _NEARLY:
                tried = self.in_full(tried)
        except ConfigError as error:
            logger.info("%s is not rehearsed: %s", " ".join(flags), error)
            return None
        logger.info("%s: %.2f GiB", " ".join(flags), _size(tried) / GIB)
        return tried

    def in_full(self, tried: Expectation) -> Expectation:
        """Rehearse what was estimated."""
        return self._planner.expect(tried.args, tried.changes, tried.machine)


# --------------------------------------------------------------------------------------------------------- the changes


def changes_of(run: Expectation) -> Iterator[Change]:
    """Yield every change that applies to a run, cheapest first."""
    args, machine = run.args, run.machine
    yield from _fewer_rows(args)
    yield from _checkpointing(args)
    if args.lora.use_lora:
        yield from _smaller_adapter(args, run.rehearsal)
    elif machine.device.kind == "cuda":
        yield from _smaller_state(args)
    if machine.device.kind == "cuda":
        yield from _engines(args, machine.gpus, machine.hosts)


def _fewer_rows(args: RunArguments) -> Iterator[Change]:
    """Divide the rows of a micro-batch: the same step in more parts."""
    size, parts = args.trainer_value("per_device_train_batch_size"), args.trainer_value("gradient_accumulation_steps")
    for rows in (rows for rows in range(size // 2, 0, -1) if size % rows == 0):
        values = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts * size // rows}
        yield Change("rows", _flags(values), _with(args, **values), _COMPUTED, 0.8 * rows / size)


def _checkpointing(args: RunArguments) -> Iterator[Change]:
    """Compute activations of every fourth, second and every block again; then keep what is left on the host."""
    get = args.trainer_value
    is_on, kwargs = get("gradient_checkpointing"), dict(get("gradient_checkpointing_kwargs") or {})
    others = {name: value for name, value in kwargs.items() if name != "every_n_layers"}
    every = int(kwargs.get("every_n_layers", 1)) if is_on else 8
    switch: dict[str, object] = {} if is_on else {"gradient_checkpointing": True}
    for number in (4, 2, 1):
        if number < every:
            new = others | ({"every_n_layers": number} if is_on or number > 1 else {})
            values = switch | {"gradient_checkpointing_kwargs": new or None}
            stays = 0.9 * (1 - 1 / number)
            yield Change("checkpointing", _flags(values), _with(args, **values), _COMPUTED, stays)
    if not kwargs.get("offload") and not get("use_cpu"):
        values = switch | {"gradient_checkpointing_kwargs": others | {"offload": True}}
        yield Change("offload", _flags(values), _with(args, **values), _COMPUTED)


def _smaller_adapter(args: RunArguments, rehearsal: Rehearsal) -> Iterator[Change]:
    """Train two rows in place of embedding and head; hold the frozen weights in 4 bits."""
    lora = args.lora
    if any(tensor.is_trained and "modules_to_save" in tensor.name for tensor in rehearsal.tensors):
        changed = replace(args, lora=replace(lora, trainable_embeddings="chatml_tokens"))
        yield Change("embeddings", "--trainable_embeddings chatml_tokens", changed, (*_TRAINED, *_COMPUTED))
    if not lora.q_lora and not find_engine(args.trainer).shards_parameters:
        changed = _in_mixed_precision(replace(args, lora=replace(lora, q_lora=True)))
        yield Change("q_lora", "--q_lora", changed, ("weights", *_COMPUTED))


def _smaller_state(args: RunArguments) -> Iterator[Change]:
    """Hold optimizer state in 8 bits, then everything in bfloat16."""
    if args.trainer_value("optim") in ("adamw_torch", "adamw_torch_fused") and not is_set(
        args.trainer.get("deepspeed")
    ):
        yield Change("optim", "--optim adamw_bnb_8bit", _with(args, optim="adamw_bnb_8bit"), ("optimizer",))
    if not args.options.pure_bf16 and not is_set(args.trainer.get("deepspeed")):
        trainer = {name: value for name, value in args.trainer.items() if name not in ("bf16", "fp16")}
        changed = replace(args, trainer=trainer, options=replace(args.options, pure_bf16=True))
        yield Change("pure_bf16", "--pure_bf16", changed, _EVERYTHING)


def _engines(args: RunArguments, gpus: int, hosts: int) -> Iterator[Change]:
    """Divide the state among the processes there are, or among more of them."""
    engine, shards = find_engine(args.trainer, gpus * hosts), not args.lora.q_lora
    names = ["ds_config_zero2.json", *(["ds_config_zero3.json", "fsdp_config.json"] if shards else [])]
    if engine.name in ("none", "ddp"):
        mixed = _in_mixed_precision(args)
        for count in [gpus] if gpus * hosts > 1 else (2, 4, 8):
            more = "" if count == gpus else f" on {count} GPUs"
            for name in names:
                values, flags = _engine_flags(name)
                yield Change("engine", flags + more, _with(mixed, **values), _EVERYTHING, 0, count)
    elif engine.is_deepspeed and "offloading" not in engine.title:
        name = "ds_config_zero3_offload.json" if engine.name == "zero3" else "ds_config_zero2_offload.json"
        values, flags = _engine_flags(name)
        yield Change("engine", flags, _with(args, **values), _EVERYTHING)


def _engine_flags(name: str) -> tuple[dict[str, object], str]:
    """Return the values of the flags that select an engine with a config of ``finetune/``, and the flags as text."""
    file = ROOT / "finetune" / name
    config, shown = json.loads(file.read_text(encoding="utf-8")), shown_path(file)
    if name.startswith("fsdp"):
        return {"fsdp": True, "fsdp_config": config}, f"--fsdp --fsdp_config {shown}"
    return {"deepspeed": config}, f"--deepspeed {shown}"


def _in_mixed_precision(args: RunArguments) -> RunArguments:
    """Return the arguments with ``--bf16`` in place of ``--pure_bf16``, which an engine or Q-LoRA does not take."""
    if not args.options.pure_bf16:
        return args
    return replace(_with(args, bf16=True), options=replace(args.options, pure_bf16=False))


def _with(args: RunArguments, **values: object) -> RunArguments:
    return replace(args, trainer={**args.trainer, **values})


def _flags(values: Mapping[str, object]) -> str:
    """Return flags as a user would type them; without those that have no value."""
    shown = []
    for name, value in values.items():
        if value is True:
            shown.append(f"--{name}")
        elif isinstance(value, dict):
            shown.append(f"--{name} '{json.dumps(value)}'")
        elif value is not None:
            shown.append(f"--{name} {value}")
    return " ".join(shown)
