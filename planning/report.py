"""A plan as a table for a terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from planning.advice import Advice
from planning.devices import GIB, RESERVE_GIB
from planning.expectation import Expectation, Machine

_COLUMN = 14  # of the names
_SHOWN_BYTES = 2**14  # of a component at least
_UNITS = ("", "k", "M", "G", "T", "P", "E")


def render(run: Expectation, title: str, advice: Advice | None) -> list[str]:
    """Return the lines of the table of a run, then what would make it fit.

    Args:
        title: model, mode and precision.
        advice: for a run that does not fit.
    """
    shape, machine = run.shape, run.machine
    lengths, peak = shape.lengths, run.share.peak_bytes
    batch = f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else f"{len(lengths)} samples"
    rows = [
        ("model", title),
        ("micro-batch", f"{batch}: {sum(lengths):,} tokens, {shape.targets:,} of them trained"),
        ("devices", _devices(machine, run.engine)),
        ("peak", f"{gib(peak)} of {machine.memory_gib:g} GiB: {_verdict(run)}"),
        *((f"  {name}", gib(size, peak)) for name, size in run.share.components.items() if size >= _SHOWN_BYTES),
        *([("on the host", f"{gib(run.share.host_bytes, peak)} per process")] if run.share.host_bytes else []),
        ("peak is in", run.share.peak_at),
        ("parameters", f"{run.rehearsal.parameters:,}, trained {run.rehearsal.trained_parameters:,}"),
        ("step", _step(run)),
        ("time", _time(run)),
        ("sent", _sent(run)),
        *(("not included", text) for text in run.rehearsal.not_rehearsed),
    ]
    lines = [f"  {name:<{_COLUMN}}{value}" for name, value in rows]
    return [*lines, *(_advice_lines(run, advice) if advice else [])]


def _verdict(run: Expectation) -> str:
    spare = run.machine.usable_bytes - run.share.peak_bytes
    reserve = _reserve(run)
    return f"fits {reserve}, {gib(spare)} to spare" if run.fits else f"does not fit {reserve}: {gib(-spare)} too much"


def _reserve(run: Expectation) -> str:
    return f"beside {RESERVE_GIB:g} GiB for {'CUDA' if run.machine.device.kind == 'cuda' else 'Python'}"


def _devices(machine: Machine, engine: str) -> str:
    hosts = f" on each of {machine.hosts} hosts" if machine.hosts > 1 else ""
    return f"{machine.gpus} x {machine.device.name} of {machine.memory_gib:g} GiB{hosts}, {engine}"


def _step(run: Expectation) -> str:
    forward, backward = (amount(flops) for flops in (run.rehearsal.flops_forward, run.rehearsal.flops_backward))
    return f"{amount(run.step_flops)}FLOP per device: {run.micro_steps:.3g} x ({forward} forward + {backward} backward)"


def _time(run: Expectation) -> str:
    device, share = run.machine.device, run.machine.rate_share
    if run.seconds is None:
        return f"not known: the table of devices has no rate of {device.name}"
    return f"{run.seconds:.3g} s per step at {share:.0%} (--share {share:g}) of {device.tflops:g} TFLOP/s"


def _sent(run: Expectation) -> str:
    if run.machine.processes == 1:
        return "nothing: one process"
    return f"{gib(run.share.sent_bytes, run.share.peak_bytes)} per step by each device"


def _advice_lines(run: Expectation, advice: Advice) -> list[str]:
    if not advice.proposals:
        changes = f" ({' '.join(advice.smallest.changes)})" if advice.smallest.changes else ""
        least = gib(advice.smallest.share.peak_bytes, run.share.peak_bytes)
        memory, smaller = f"{run.machine.memory_gib:g} GiB", "--model_max_length"
        smaller += " or --lora_r" if run.args.lora.use_lora else ""
        return [
            f"No change makes it fit into {memory}: the least is {least} {_reserve(run)}{changes}. "
            f"Give a larger --gpu_memory, more --gpus or a smaller {smaller}"
        ]
    lines = ["The smallest changes that make it fit, cheapest first:"]
    for proposal in advice.proposals:
        time = "" if proposal.seconds is None else f", {proposal.seconds:.3g} s per step"
        lines.append(
            f"  {gib(proposal.share.peak_bytes, run.share.peak_bytes):>10}{time}  {' '.join(proposal.changes)}"
        )
    return lines


def to_json(run: Expectation, title: str, advice: Advice | None, command: str) -> dict[str, Any]:
    """Return everything that is known, for ``--json``."""
    machine = run.machine
    moments = {where: moment.components for where, moment in run.rehearsal.moments.items()}
    return {
        "command": command,
        "title": title,
        "machine": {
            "device": machine.device.name,
            "memory_gib": machine.memory_gib,
            "tflops": machine.device.tflops,
            "share": machine.rate_share,
            "gpus": machine.gpus,
            "hosts": machine.hosts,
        },
        "run": {**run.to_dict(), "moments_of_one_process": moments, "not_included": list(run.rehearsal.not_rehearsed)},
        "proposals": [proposal.to_dict() for proposal in advice.proposals] if advice else [],
        "smallest": advice.smallest.to_dict() if advice else run.to_dict(),
    }


def gib(size: float, peak: float | None = None) -> str:
    """Return bytes in GiB, small ones in MiB.

    Args:
        peak: of the same table, which decides the unit of all its sizes.
    """
    if abs(size if peak is None else peak) < GIB:
        return f"{size / 2**20:.2f} MiB"
    return "<0.01 GiB" if 0 < size < GIB / 200 else f"{size / GIB:.2f} GiB"


def amount(count: float) -> str:
    """Return a large count with a unit's letter: ``1.24 P``."""
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"
