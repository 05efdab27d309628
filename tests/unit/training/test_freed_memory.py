"""Freed memory stays with a process that trains on a CPU, unless the environment says otherwise."""

from __future__ import annotations

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.freed_memory import LIBRARY_SETTINGS, kept_freed_memory, why_returned

VARIABLES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *LIBRARY_SETTINGS):
        monkeypatch.delenv(name, raising=False)


def new_pages(blocks: int = 4) -> int:
    """Return how many pages the system gives while blocks of 96 MiB are allocated one after the other."""
    for _ in range(8):
        torch.zeros(24 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.zeros(24 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_kept_blocks() -> tuple[int, int, int, int, int]:
    """Return new pages (returned, kept), and the resident bytes before, while blocks are kept, and at the end."""
    with kept_freed_memory(is_kept=False):
        usual, before = new_pages(), resident()
    with kept_freed_memory(is_kept=True):
        kept, while_kept = new_pages(), resident()
    return usual, kept, before, while_kept, resident()


@pytest.mark.skipif(why_returned() != "", reason="another C library")
def test_blocks_are_reused_without_new_pages_and_returned_at_the_end() -> None:
    # In a new process: the heap of this one may have room for the blocks between those of earlier tests.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        usual, kept, before, while_kept, after = process.submit(measure_kept_blocks).result()
    assert kept < usual / 10
    assert while_kept > before + 64 * 2**20
    assert after < before + 32 * 2**20


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_the_user_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1" if name == "GLIBC_TUNABLES" else "131072")
    assert why_returned() == f"{name}={os.environ[name]}"
    with kept_freed_memory(is_kept=True):
        assert new_pages() > 0


def test_the_log_says_what_becomes_of_freed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_conversations(tmp_path / "train.json")
    flags = ["--model_name_or_path", TINY, "--data_path", data, "--max_steps", 1, "--use_cpu"]
    finetune_here(*flags, "--loss", "full_logits", "--output_dir", tmp_path / "matrices")
    assert "  memory     returned when it is freed (gradients of embeddings would " in capsys.readouterr().err
    settings = "THP_MEM_ALLOC_ENABLE=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=128 LRU_CACHE_CAPACITY=128"
    for name, lora in (("full", []), ("lora", ["--use_lora", "--trainable_embeddings", "none"])):
        finetune_here(*flags, *lora, "--output_dir", tmp_path / name)
        assert f"  memory     kept by the process when it is freed; {settings}\n" in capsys.readouterr().err
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    finetune_here(*flags, "--output_dir", tmp_path / "returned")
    line = "  memory     returned when it is freed (MALLOC_TRIM_THRESHOLD_=131072); THP_MEM_ALLOC_ENABLE=0 "
    assert line in capsys.readouterr().err
