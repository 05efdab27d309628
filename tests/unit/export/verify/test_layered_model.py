"""Layers are loaded one at a time; missing and misshapen tensors are reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from errors import ConfigError
from tests.golden import run_python
from tests.models import TINY
from tests.verification import (
    change,
    make_adapter,
    make_base,
    merge,
    verify,
    weighted,
)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def test_missing_and_misshapen_tensors_are_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged")
    change(merged, lambda tensors: {**tensors, "model.norm.weight": torch.ones(31)})
    assert verify(base, adapters, merged).faults == [
        "model.norm.weight has shape (31,), config.json requires (32,)",
    ]
    change(merged, without("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in verify(base, adapters, merged).faults
    change(base, without("model.layers.0.self_attn.o_proj.weight"))
    with pytest.raises(ConfigError, match=r"the base: model\.layers\.0\.self_attn\.o_proj\.weight is missing"):
        verify(base, adapters, merged)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from checkpoints.adapter import read_adapter
from checkpoints.fold import WeightedAdapter
from checkpoints.files import load_json
from checkpoints.shards import open_checkpoint
from export.verify import behaviour
from export.verify.behaviour import Comparison
from export.verify.compare import verify_merge
from export.verify.samples import Sample, Samples

behaviour.computes_bfloat16 = lambda: False  # which needs less memory

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while watching:
        samples.append(anonymous())
        time.sleep(0.001)

def run(base, folders, merged):
    ids = [[(7 * index + number) % 512 for index in range(30)] for number in range(4)]
    samples = Samples(tuple(Sample(each, [-100, *each[1:]]) for each in ids), True)
    adapters = [WeightedAdapter(read_adapter(folder)) for folder in folders]
    config = load_json(Path(base) / "config.json")
    result = verify_merge(Comparison(open_checkpoint(base), config, adapters, Path(merged), samples), "nearest")
    assert not result.faults, result

small, base, adapter, merged = sys.argv[1:]
run(small, [], small)  # imports and caches
samples, watching = [anonymous()], True
thread = threading.Thread(target=watch)
thread.start()
run(base, [adapter], merged)
watching = False
thread.join()
print(max(samples) - samples[0])
"""


def test_peak_memory_is_about_two_layers_of_each_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).to(torch.bfloat16)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters()) / 2**20
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", size=0.01)
    merged = merge(base, weighted(adapter), tmp_path / "merged", "bfloat16")
    del model
    done = run_python(["-c", MEASURE, *map(str, (TINY, base, adapter, merged))])
    assert done.returncode == 0, done.stderr
    used = float(done.stdout.splitlines()[-1])
    activations_and_blocks = 54  # of at most 4 MiB each
    assert layer < used < 4 * layer + activations_and_blocks < 6 * layer, f"{used:.0f} MiB, a layer is {layer:.0f} MiB"
