"""Memory of generating with Qwen-7B in bfloat16 for each kind of cache: rehearsed, beside what was published.

A rehearsal is the last step of an answer on tensors without data: weights, the cache of all tokens before it, and what
the step itself takes. ``benchmarks.kv_cache`` runs it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.qwen_v1_sizes import write_config

SIZE, TOKENS, ROWS = "7B", 1024, 1

# In GB, of the original on an A100-80G: answers of 1,024 tokens by rows of the batch, answers of one row by tokens.
# None: out of memory.
PUBLISHED: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "rows": {1: (16.3, 15.5), 4: (24.1, 17.2), 16: (31.7, 22.3), 32: (48.7, 30.2), 64: (None, 48.2), 100: (None, 72.4)},
    "tokens": {512: (15.2, 15.0), 1024: (16.3, 15.5), 2048: (17.6, 15.8), 4096: (19.5, 16.6), 8192: (23.2, 17.6)},
}


def rehearse_tables(kinds: list[str | None]) -> list[dict[str, Any]]:
    """Return a row for each case of the published tables."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / SIZE
        write_config(SIZE, folder)
        for varied, cases in PUBLISHED.items():
            for number, (full, quantized) in cases.items():
                rows, tokens = (number, TOKENS) if varied == "rows" else (ROWS, number)
                memory = {str(kind or "full"): rehearse_step(folder, kind, rows, tokens) for kind in kinds}
                row = {"varied": varied, "rows": rows, "tokens": tokens, "rehearsed_gib": memory}
                results.append({**row, "published_gb": {"full": full, "int8": quantized}})
                print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    return results


def rehearse_step(folder: Path, kind: str | None, rows: int, tokens: int) -> float:
    """Return the peak of the step that adds the last of ``tokens`` tokens, in GiB."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from loading.checkpoint import load_config
    from planning.fake_cuda import looking_like_cuda
    from planning.memory import FollowedMemory
    from planning.model import module_names, put_in_place
    from qwen_model.kv_cache import build_cache
    from qwen_model.modeling_qwen import QWenLMHeadModel

    with torch.device("meta"):
        model: Any = QWenLMHeadModel._from_config(load_config(folder), dtype=torch.bfloat16).eval()
    memory = FollowedMemory("cuda", module_names(model), [1])
    config, cache = model.config, build_cache(model.config, kind)
    layers: Any = cache.layers
    with FakeTensorMode(), torch.no_grad():
        put_in_place(model)
        with memory, memory.following_calls(), looking_like_cuda(memory):
            memory.mark(model.parameters(), "weights")
            for layer in layers:
                shape = rows, config.num_attention_heads, tokens - 1, config.kv_channels
                layer.update(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
            memory.enter("evaluation")
            memory.begin()
            logits = model(torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache).logits
            logits[:, -1].float()  # as generate() does
    (peak,) = memory.moments(lambda phase, place: "step").values()
    return round(peak.bytes / 2**30, 2)
