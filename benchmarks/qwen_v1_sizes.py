"""The four published sizes of Qwen v1, and the memory that was published for them."""

from __future__ import annotations

from pathlib import Path

from planning.published import write_published_config

SIZES = ("1.8B", "7B", "14B", "72B")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)

# Memory in GB of the original scripts, as published: A100-80G, batch 1, accumulation 8, flash attention 2, bfloat16.
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "1.8B": {"full": {1024: 43.5}, "lora": {1024: 8.4}, "lora_embeddings": {1024: 14.0}, "q_lora": {1024: 6.6}},
    "7B": {
        "full": {256: 139.2, 512: 148.0, 1024: 162.0},
        "lora": dict(zip(LENGTHS, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), strict=True)),
        "lora_embeddings": dict(zip(LENGTHS, (33.7, 34.1, 35.2, 35.1, 39.2, 48.5), strict=True)),
        "q_lora": dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
    },
    "14B": {
        "lora": dict(zip(LENGTHS, (34.6, 35.1, 35.3, 37.4, 42.5, 55.2), strict=True)),
        "lora_embeddings": dict(zip(LENGTHS, (51.2, 51.1, 51.5, 54.1, 56.8, 67.7), strict=True)),
        "q_lora": dict(zip(LENGTHS, (18.7, 18.4, 18.9, 19.9, 23.0, 27.9), strict=True)),
    },
    "72B": {"lora": {1024: 223.0}, "q_lora": {1024: 62.9}},
}
# GPUs of the published figures that are sums over several, all with ZeRO-3.
PUBLISHED_GPUS = {("7B", "full"): 2, ("72B", "lora"): 4}


def write_config(size: str, folder: Path, is_quantized: bool = False) -> None:
    """Write config.json and generation_config.json of a chat model, unquantised or as Int4 (GPTQ, groups of 128)."""
    write_published_config(f"Qwen/Qwen-{size.replace('.', '_')}-Chat{'-Int4' if is_quantized else ''}", folder)
