"""Reading the recorded behaviour of the original Qwen v1 code ("golden" sets) and comparing with it.

Two sets share one layout: a small one with a vocabulary of its own, committed in ``references/qwen_v1_small``, and a
large one with the real vocabulary, which lies beside the repository. The README.md of each set says how it was made.
A stride is part of a tensor's name: ``logits_s13`` is ``logits[:, :, ::13]``, ``weight.s7`` is ``weight[::7]``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

REPO = Path(__file__).resolve().parents[1]
SMALL = REPO / "tests" / "references" / "qwen_v1_small"
IGNORE = -100

# An fp32 forward of other code than the original's differs from it by up to 1e-5; a wrong formula by far more.
LOGITS_ATOL = 1e-4
LOSS_ATOL = 1e-4
GRADIENT_RTOL = 1e-4


class GoldenTensors:
    """One safetensors file of a golden set, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            self._names = list(file.keys())
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(name)

    def ids(self, name: str) -> torch.Tensor:
        """Token ids, masks and labels are stored as int32; models index with int64."""
        return self[name].long()

    def strided(self, stem: str, separator: str = "_s") -> tuple[str, int]:
        """The only tensor called ``<stem><separator>N``: its name and N. KeyError if there is none."""
        pattern = re.compile(re.escape(stem + separator) + r"(\d+)")
        matches = [(name, int(found[1])) for name in self._names if (found := pattern.fullmatch(name))]
        if len(matches) != 1:
            raise KeyError(f"{self.path}: {len(matches)} tensors are called {stem}{separator}N")
        return matches[0]


@dataclass(frozen=True)
class Golden:
    """A golden set: its name, its folder and what lies in it."""

    name: str
    path: Path

    @property
    def tiny(self) -> Path:
        """The checkpoint that most figures were made with."""
        return self.path / {"small": "tiny-qwen-small", "large": "tiny-qwen"}[self.name]

    def load_json(self, name: str) -> Any:
        """The content of a JSON file of the set; strings may hold lone surrogates."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @cached_property
    def notes(self) -> dict[str, Any]:
        return self.load_json("logits.json")["notes"]

    @cached_property
    def tensors(self) -> GoldenTensors:
        return GoldenTensors(self.path / "logits.safetensors")

    def tensors_of(self, name: str) -> GoldenTensors:
        """Another tensor file of the set, such as ``training/full.safetensors``."""
        return GoldenTensors(self.path / name)

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.tiny / "config.json").read_text(encoding="utf-8"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float, what: str = "") -> None:
    """Same shape and nowhere more than ``atol`` apart."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().float() - expected.float()).abs().max().item()
    assert difference <= atol, f"{what}: differs by {difference:.3g}, allowed {atol:.3g}"


def assert_logits(logits: torch.Tensor, tensors: GoldenTensors, case: str, where: torch.Tensor | None = None) -> None:
    """Compare ``logits`` [B, T, V] with all that the set records of ``case``; ``where`` [B, T] picks positions."""
    logits = logits.detach().float()
    where = torch.ones(logits.shape[:2], dtype=torch.bool) if where is None else where.bool()
    name, stride = tensors.strided(f"{case}.logits")
    assert_close(logits[:, :, ::stride][where], tensors[name][where], LOGITS_ATOL, name)
    if f"{case}.logsumexp" in tensors:
        assert_close(logits.logsumexp(-1)[where], tensors[f"{case}.logsumexp"][where], LOGITS_ATOL, f"{case}.logsumexp")
    if f"{case}.top5_ids" in tensors:
        ids = tensors.ids(f"{case}.top5_ids")
        assert_close(
            logits.gather(-1, ids)[where], tensors[f"{case}.top5_values"][where], LOGITS_ATOL, f"{case}.top5_values"
        )


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected (the norm itself where that is zero)."""
    norm = expected.float().norm().item()
    difference = (actual.detach().float() - expected.float()).norm().item()
    return difference / norm if norm > 0 else difference


def offline_environment() -> dict[str, str]:
    """An environment for a subprocess: two threads, no network through Hugging Face's clients."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(REPO),
    }


def run_python(arguments: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python <arguments>`` from the repository's root, offline; the caller looks at the exit code."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env=offline_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
