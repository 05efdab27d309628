"""Configuration of Qwen v1, with the keys of its December 2023 release.

Folders of August 2023 use other keys (``n_embd``, ``ffn_hidden_size``...): transformers' ``attribute_map`` makes them
aliases of the later ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from errors import ConfigError
from qwen_model.kv_cache import CacheKind
from qwen_model.old_keywords import DTYPES, with_current_keywords

# Published folders name their remote code under these keys; the toolkit needs none and saves none.
_CODE_KEYS = ("auto_map", "custom_pipelines")

# Far above every published model. Without limits a config of a few bytes makes building the model take hours.
_SIZES = {
    "vocab_size": (1, 10_000_000),
    "hidden_size": (1, 1_000_000),
    "num_hidden_layers": (1, 1_000),
    "num_attention_heads": (1, 10_000),
    "intermediate_size": (2, 10_000_000),
    "kv_channels": (1, 100_000),
    "seq_length": (2, 1_000_000_000),
    "max_position_embeddings": (1, 1_000_000_000),
}
_FACTORS = {
    "emb_dropout_prob": (0, 1),
    "attn_dropout_prob": (0, 1),
    "layer_norm_epsilon": (0, 1),
    "initializer_range": (0, 1_000),
    "rotary_pct": (0, 1),
    "rotary_emb_base": (1, 10**12),
}
_FLAGS = (
    "use_dynamic_ntk", "use_logn_attn", "no_bias", "use_cache", "tie_word_embeddings", "scale_attn_weights",
    "use_cache_quantization", *DTYPES,
)  # fmt: skip


@strict
class QWenConfig(PreTrainedConfig):
    """Configuration of ``QWenModel``.

    Attributes:
        vocab_size: rows of the embedding and of the head; more than the tokenizer has ids.
        intermediate_size: twice the width of the MLP (``w1`` and ``w2`` have ``intermediate_size // 2`` rows each).
        kv_channels: size of one head; ``kv_channels * num_attention_heads`` must be ``hidden_size``.
        seq_length: sequence length of pre-training; dynamic NTK and log-n attention apply beyond it.
        max_position_embeddings: longest sequence that the model supports.
        rotary_pct: fraction of the channels of a head that are rotated.
        no_bias: whether the linear layers other than ``c_attn`` have no bias.
        use_cache_quantization: keep keys and values in 8 bits (``kv_cache.py``) unless ``generate`` is given a cache.
        bf16, fp16, fp32: precision of the saved weights; at most one is true.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
        "embd_pdrop": "emb_dropout_prob",
        "attn_pdrop": "attn_dropout_prob",
        "head_dim": "kv_channels",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 22016
    kv_channels: int = 128
    seq_length: int | None = None
    max_position_embeddings: int = 8192
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_pct: float | int = 1.0
    rotary_emb_base: float | int = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    scale_attn_weights: bool = True
    use_flash_attn: bool | str = "auto"
    use_cache_quantization: bool = False
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config of a file.

        Args:
            kwargs: keywords of ``from_pretrained``; those of the original have their meaning, or are refused.
        """
        keywords = with_current_keywords(kwargs)
        # Settings among the keywords are checked as those of the file; the parent would set them afterwards.
        settings = {key: keywords.pop(key) for key in list(keywords) if key in QWenConfig.__annotations__}
        values = config_dict | settings
        if any(kwargs.get(flag) for flag in DTYPES):
            values |= {flag: keywords["dtype"] == dtype for flag, dtype in DTYPES.items()}
        # transformers would download and run an attention kernel of that name.
        for key in ("attn_implementation", "_attn_implementation"):
            if "/" in str(values.get(key)):
                del values[key]
        return super().from_dict(values, **keywords)

    def __post_init__(self, **kwargs: Any) -> None:
        # If this class is itself the remote code of a folder, vLLM finds the model by auto_map.
        if self._auto_class is None:
            for key in _CODE_KEYS:
                kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        self._check_values()
        flags = [name for name in ("bf16", "fp16", "fp32") if getattr(self, name)]
        if len(flags) > 1:
            raise ConfigError(f"config.json: {' and '.join(flags)} are both true", "Only one of them may be")
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ConfigError(
                f"config.json: kv_channels {self.kv_channels} x num_attention_heads {self.num_attention_heads} is not "
                f"hidden_size {self.hidden_size}",
                "Copy it again from the original checkpoint",
            )

    def _check_values(self) -> None:
        """Check types and ranges; ``strict`` checks neither with annotations that are not evaluated."""
        for table, types in ((_SIZES, (int,)), (_FACTORS, (int, float))):
            for name, (least, most) in table.items():
                value = getattr(self, name)
                is_number = isinstance(value, types) and not isinstance(value, bool)
                if not (is_number and least <= value <= most) and (name, value) != ("seq_length", None):
                    kind = "a whole number" if table is _SIZES else "a number"
                    raise ConfigError(
                        f"config.json: {name} {value!r} is not {kind} from {least:,} to {most:,}",
                        "Copy it again from the original checkpoint",
                    )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ConfigError(f"config.json: {name} {getattr(self, name)!r} is not a bool", "Write true or false")

    @property
    def rotary_dim(self) -> int:
        """Number of leading channels of a head that are rotated."""
        return int(self.kv_channels * self.rotary_pct)

    @property
    def cache_kind(self) -> CacheKind | None:
        """Return the kind of cache that ``generate`` builds."""
        return "int8" if self.use_cache_quantization else None

    def trained_length(self) -> int:
        """Return ``seq_length``, which dynamic NTK and log-n attention need.

        Raises:
            ConfigError: the config lacks it.
        """
        if self.seq_length is None:
            raise ConfigError(
                "config.json: seq_length is missing, and use_dynamic_ntk or use_logn_attn needs it",
                "Add the length the checkpoint was trained with: 8192 for Qwen-1.8B and Qwen-7B, 2048 for Qwen-14B",
            )
        return self.seq_length
