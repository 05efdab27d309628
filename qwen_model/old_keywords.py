"""Keywords of the original's ``from_pretrained`` as keywords of current transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtype of each flag of Qwen v1's config."""

_CACHE = "use_cache_quantization"  # a setting of the config
# Downloads always resume. The softmax of every attention here is computed in float32. A quantised cache is dequantised
# before any attention, without a kernel of its own.
_WITHOUT_EFFECT = ("resume_download", "softmax_in_fp32", "use_cache_kernel")
_FLASH = "flash_attention_2"


def with_current_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of ``from_pretrained`` in which those of the original are replaced by what they mean now.

    Raises:
        ConfigError: one that contradicts another, has a wrong type, or means something that does not exist here.
    """
    current = dict(keywords)
    for name in (*DTYPES, _CACHE, *_WITHOUT_EFFECT):
        if not isinstance(current.get(name), (bool, type(None))):
            raise ConfigError(f"from_pretrained({name}={current[name]!r}): not a bool", "Write True or False")
    if flags := [name for name in DTYPES if current.pop(name, None)]:
        _set_dtype(current, flags)
    for name in _WITHOUT_EFFECT:
        current.pop(name, None)
    if current.get(_CACHE) is None:
        current.pop(_CACHE, None)
    flash = current.pop("use_flash_attn", None)
    if flash is True and current.get(_CACHE):
        logger.warning("use_cache_quantization=True turns use_flash_attn=True off, as in the original")
    else:
        _set_attention(current, flash)
    return current


def _set_dtype(keywords: dict[str, Any], flags: list[str]) -> None:
    written = f"from_pretrained({', '.join(f'{flag}=True' for flag in flags)})"
    if len(flags) > 1:
        raise ConfigError(f"{written}: only one of them may be true", f"Write dtype={DTYPES[flags[0]]}")
    dtype, old_name = DTYPES[flags[0]], keywords.pop("torch_dtype", None)
    given = keywords.get("dtype") or old_name
    if given not in (None, "auto", dtype, str(dtype), str(dtype).removeprefix("torch.")):
        raise ConfigError(f"{written} contradicts dtype={given}", f"Write dtype={dtype} or dtype={given} alone")
    keywords["dtype"] = dtype


def _set_attention(keywords: dict[str, Any], wanted: object) -> None:
    """Apply ``use_flash_attn``. ``"auto"`` and false need nothing: PyTorch's own attention is the default."""
    given = keywords.get("attn_implementation")
    if wanted not in (True, False, "auto", None):
        raise ConfigError(f"from_pretrained(use_flash_attn={wanted!r})", f'Write attn_implementation="{_FLASH}"')
    is_flash = str(given).startswith("flash")
    if (wanted is True and given is not None and not is_flash) or (wanted is False and is_flash):
        raise ConfigError(
            f"from_pretrained(use_flash_attn={wanted}) contradicts attn_implementation={given!r}",
            "Leave use_flash_attn out",
        )
    if wanted is not True:
        return
    from transformers.utils import is_flash_attn_2_available  # type: ignore[attr-defined]

    if not is_flash_attn_2_available():
        raise ConfigError(
            "from_pretrained(use_flash_attn=True): the package flash-attn or a GPU for it is missing",
            "Leave it out: PyTorch's own attention is the default, and uses flash attention on a GPU where it can",
        )
    keywords["attn_implementation"] = given or _FLASH
