"""Engines over tiny checkpoints, and what transformers answers to a prompt alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from serving.engine import Engine
from serving.requests import Request, Sampling
from tests.models import TINY, change_json, copy_checkpoint, write_later_checkpoint

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=12, ignore_end=True)


def write_checkpoint(folder: Path, kind: str) -> Path:
    """Write a tiny checkpoint: ``qwen`` (trained length 16), a later type, or ``windows`` of 8 tokens."""
    if kind == "qwen":
        copy_checkpoint(folder, seq_length=16, use_dynamic_ntk=True, use_logn_attn=True)
        return folder
    write_later_checkpoint(folder, "qwen2" if kind == "windows" else kind)
    if kind == "windows":
        layers = {"layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 1}
        change_json(folder / "config.json", use_sliding_window=True, sliding_window=8, **layers)
    return folder


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    """Return prompts of different lengths, of ids that are no control tokens."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(256, 690) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def requests(count: int, sampling: Sampling = GREEDY, **options: Any) -> list[Request]:
    return [Request(prompt, sampling, **options) for prompt in prompts(count)]


def alone(model: Any, request: Request) -> tuple[int, ...]:
    """Return the greedy answer of transformers' ``generate``."""
    ids = torch.tensor([request.prompt_ids])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.0,
            max_new_tokens=request.sampling.max_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return tuple(output[0, ids.shape[1] :].tolist())


def load_base(folder: Path) -> Any:
    return load_for_inference(load_checkpoint(str(folder)))


def load_engine(folder: Path = TINY, adapters: Mapping[str, Path] | None = None, **options: Any) -> Engine:
    return Engine.load(str(folder), {name: str(path) for name, path in (adapters or {}).items()}, **options)


def answers(engine: Engine, asked: Sequence[Request]) -> list[tuple[int, ...]]:
    """Return the ids of the answers of requests that are submitted together."""
    tickets = [engine.submit(request) for request in asked]
    return [ticket.answer().token_ids for ticket in tickets]
