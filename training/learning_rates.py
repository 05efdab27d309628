"""LoRA+: another learning rate for the second matrices of an adapter."""

from __future__ import annotations

from typing import Any

_SECOND = (".lora_B.", ".lora_embedding_B.")


def raise_rate_of_second(optimizer: Any, model: Any, ratio: float) -> None:
    """Move the matrices B of an adapter to parameter groups of their own, with ``ratio`` times the learning rate.

    Every other setting of a group stays: its weight decay, and what the optimizer keeps in it. The first group, whose
    rate the log shows, keeps its rate. Called before a schedule reads the rates.
    """
    second = {id(parameter) for name, parameter in model.named_parameters() if any(part in name for part in _SECOND)}
    groups = []
    for factor, is_second in ((1.0, False), (ratio, True)):
        for group in optimizer.param_groups:
            parameters = [each for each in group["params"] if (id(each) in second) == is_second]
            if parameters:
                groups.append({**group, "params": parameters, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = groups
