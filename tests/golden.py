"""Recorded behaviour of the original Qwen v1 code ("golden" sets), and comparison with it.

Two sets share one layout: a small one with its own vocabulary, committed in ``references/qwen_v1_small``, and a large
one with the real vocabulary outside the repository (``QWEN_SHARED``). Each set's README.md describes how it was made.
Tests take the recorded cases and their number from the files, because other recordings may replace the large set.
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

import pytest
import torch
from safetensors import safe_open

REPO = Path(__file__).resolve().parents[1]
SMALL = REPO / "tests" / "references" / "qwen_v1_small"
LARGE = Path(os.environ.get("QWEN_SHARED") or REPO.parent / "shared").resolve() / "golden"
IGNORE = -100

# A correct fp32 forward in other code than the original's differs by up to 1e-5, a wrong formula by far more.
LOGITS_ATOL = 1e-4
LOSS_ATOL = 1e-4
GRADIENT_RTOL = 1e-4


class GoldenTensors:
    """A safetensors file of a golden set, read tensor by tensor."""

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
        """Return token ids, a mask or labels as int64, which models need; they are stored as int32."""
        return self[name].long()

    def strided(self, stem: str) -> tuple[str, int]:
        """Return the name of the tensor ``<stem>_sN`` and N.

        Raises:
            KeyError: there is no such tensor, or several.
        """
        pattern = re.compile(re.escape(stem) + r"_s(\d+)")
        matches = [(name, int(match[1])) for name in self._names if (match := pattern.fullmatch(name))]
        if len(matches) != 1:
            raise KeyError(f"{self.path}: {len(matches)} tensors are called {stem}_sN")
        return matches[0]

    def cases(self, pattern: str) -> list[str]:
        """Return the distinct texts of the group in ``pattern``, a regular expression for whole tensor names."""
        return sorted({match[1] for name in self._names if (match := re.fullmatch(pattern, name))})


@dataclass(frozen=True)
class Golden:
    """A golden set."""

    name: str
    path: Path

    @property
    def tiny(self) -> Path:
        """Folder of the checkpoint that most figures were made with."""
        return self.path / {"small": "tiny-qwen-small", "large": "tiny-qwen"}[self.name]

    def load_json(self, name: str) -> Any:
        """Return the content of a JSON file; strings may contain lone surrogates."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @cached_property
    def notes(self) -> dict[str, Any]:
        return self.load_json("logits.json")["notes"]

    @cached_property
    def tensors(self) -> GoldenTensors:
        return GoldenTensors(self.path / "logits.safetensors")

    def tensors_of(self, name: str) -> GoldenTensors:
        """Open another tensor file of the set, such as ``training/full.safetensors``."""
        return GoldenTensors(self.path / name)

    def cases(self, pattern: str) -> list[str]:
        """Return the recorded cases, at least one: the group of ``pattern`` in the tensor names that match it."""
        cases = self.tensors.cases(pattern)
        assert cases, f"{self.tensors.path}: no tensor matches {pattern}"
        return cases

    @cached_property
    def training_runs(self) -> dict[str, dict[str, Any]]:
        """The recorded training runs by name."""
        files = {
            path.stem: self.load_json(f"training/{path.name}") for path in sorted(self.path.glob("training/*.json"))
        }
        runs = {name: content for name, content in files.items() if "lrs_used" in content}
        assert runs, f"{self.path}: no training runs"
        return runs

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.tiny / "config.json").read_text(encoding="utf-8"))


def sets_with(pattern: str) -> pytest.MarkDecorator:
    """Parametrize ``any_golden`` with the sets that record a case of ``pattern``, as in ``Golden.cases``.

    A set whose folder is missing stays a parameter: the fixture reports it.
    """
    files = {"small": SMALL / "logits.safetensors", "large": LARGE / "logits.safetensors"}
    names = [name for name, file in files.items() if not file.is_file() or GoldenTensors(file).cases(pattern)]
    assert names, f"no golden set records a case of {pattern}"
    return pytest.mark.parametrize("any_golden", names, indirect=True)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float, what: str = "") -> None:
    """Assert equal shapes and no difference above ``atol``."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().float() - expected.float()).abs().max().item()
    assert difference <= atol, f"{what}: differs by {difference:.3g}, allowed {atol:.3g}"


def assert_logits(logits: torch.Tensor, tensors: GoldenTensors, case: str, where: torch.Tensor | None = None) -> None:
    """Compare ``logits`` [B, T, V] with all recorded figures of ``case``, at the positions in ``where`` [B, T]."""
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
    """Return the norm of the difference over the norm of ``expected`` (the former alone if the latter is zero)."""
    norm = expected.float().norm().item()
    difference = (actual.detach().float() - expected.float()).norm().item()
    return difference / norm if norm > 0 else difference


def offline_environment() -> dict[str, str]:
    """Return the environment of a subprocess: two threads, no network access for Hugging Face's clients."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(REPO),
    }


def run_python(arguments: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python <arguments>`` in the repository's root, offline, without checking the exit code."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env=offline_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
