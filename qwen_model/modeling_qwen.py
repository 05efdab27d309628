"""The decoder of Qwen v1 for current transformers, with the original names of its weights.

Shapes: B batch, T tokens of this call, H heads, D head size, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.generation import QWenChatMixin
from qwen_model.kv_cache import build_cache
from qwen_model.loss import causal_lm_loss
from qwen_model.old_keywords import with_current_keywords
from qwen_model.rope import RotaryTables, logn_scale, ntk_alpha, rotary_tables, rotate


class QWenRMSNorm(nn.Module):
    """RMS norm that normalises in float32, casts back, then multiplies by the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return states.to(hidden_states.dtype) * self.weight


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step; the only backend that returns the attention weights.

    Args:
        query, key, value: [B, H, T, D]; keys and values over the length of the cache, and possibly of fewer heads.
        attention_mask: added to the scores, broadcast to [B, H, T, keys].

    Returns:
        Output [B, T, H, D] and weights [B, H, T, keys].
    """
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class QWenAttention(nn.Module):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.kv_channels
        self.scaling = 1 / math.sqrt(self.head_dim) if config.scale_attn_weights else 1.0
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables,
        query_scale: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        stacked = self.c_attn(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = (states.transpose(1, 2) for states in stacked.unbind(2))
        query, key = rotate(query, rotary), rotate(key, rotary)
        if query_scale is not None:
            query = query * query_scale[:, None, :, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.c_proj(output.reshape(batch, length, -1)), weights


class QWenMLP(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c_proj(self.w1(hidden_states) * F.silu(self.w2(hidden_states)))


class QWenBlock(GradientCheckpointingLayer):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


class QWenPreTrainedModel(PreTrainedModel):
    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Old checkpoints may contain tables that are now computed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"attn\.(bias|masked_bias)$"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, trust_remote_code: Any = None, **kwargs: Any
    ) -> Any:
        """Call transformers' method; keywords of the original have their meaning, or are refused.

        Args:
            trust_remote_code: without effect: transformers would replace ``generate`` by code of the folder.
        """
        keywords = with_current_keywords(kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **keywords)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, QWenRMSNorm):
            init.ones_(module.weight)
        if isinstance(module, (QWenAttention, QWenMLP)):
            # The residual stream sums two projections per layer (Radford et al. 2019, section 2.3).
            init.normal_(module.c_proj.weight, mean=0.0, std=std / math.sqrt(2 * self.config.num_hidden_layers))


class QWenModel(QWenPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        if config.use_dynamic_ntk or config.use_logn_attn:
            config.trained_length()
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        sequence_lengths: Sequence[int] | None = None,
        ntk_factors: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of each position.

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, C].
            attention_mask: [B, cached + T], 1 for real tokens and 0 for padding, on either side; or, as
                ``full_attention`` of a mapping, what the attention gets.
            position_ids: [B, T]; by default each row counts from its first real token. Without an attention mask,
                positions that restart at 0 separate packed conversations.
            past_key_values: keys and values of the preceding tokens.
            sequence_lengths: of the conversations of a row; the attention must keep them apart.
            ntk_factors: dynamic-NTK factor of each row [B], for a caller that computes a prompt in parts or changes the
                rows of a cache; by default that of the prompt.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = build_cache(self.config, self.config.cache_kind)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_weights = self.config.output_attentions if output_attentions is None else output_attentions

        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        padding_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        causal_mask: Any
        if isinstance(attention_mask, Mapping):
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,  # those of the caller: restarts in them mark packed conversations
            )
        if position_ids is None:
            position_ids = _positions(hidden_states, padding_mask, cached)
        if sequence_lengths is None:
            rotary, query_scale = self._evaluation_tables(
                position_ids, padding_mask, past_key_values, cached, ntk_factors
            )
        else:
            rotary, query_scale = self._tables_by_sample(position_ids, sequence_lengths)
            kwargs["sequence_lengths"] = sequence_lengths

        hidden_states = self.drop(hidden_states)
        all_states: tuple[Tensor, ...] = ()
        all_weights: tuple[Any, ...] = ()
        for block in self.h:
            if with_states:
                all_states += (hidden_states,)
            hidden_states, weights = block(
                hidden_states,
                attention_mask=causal_mask,
                rotary=rotary,
                query_scale=query_scale,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
            if with_weights:
                all_weights += (weights,)
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_states, hidden_states) if with_states else None,
            attentions=all_weights if with_weights else None,
        )

    def _evaluation_tables(
        self,
        position_ids: Tensor,
        padding_mask: Tensor | None,
        past_key_values: Cache | None,
        cached: int,
        alpha: Tensor | None,
    ) -> tuple[RotaryTables, Tensor | None]:
        """Compute rotary tables [B, T, R], and log-n factors of the queries [B, T] if any is beyond ``seq_length``.

        Training uses neither dynamic NTK nor log-n. In evaluation the NTK factor of a row depends on its number of
        real tokens; with a cache it stays that of the prompt, because the cached keys are rotated with it.
        """
        config = self.config
        query_scale = None
        if not self.training and (config.use_dynamic_ntk or config.use_logn_attn):
            seq_length, total = config.trained_length(), cached + position_ids.shape[1]
            if config.use_dynamic_ntk and alpha is None:
                if cached:
                    alpha = getattr(past_key_values, "ntk_alpha", None)
                elif total > seq_length:
                    full = torch.full(position_ids.shape[:1], total, device=position_ids.device)
                    alpha = ntk_alpha(full if padding_mask is None else padding_mask.sum(-1), seq_length)
                if past_key_values is not None and not cached:
                    setattr(past_key_values, "ntk_alpha", alpha)  # noqa: B010 - our attribute on a library's object
            if config.use_logn_attn and total > seq_length:
                query_scale = logn_scale(position_ids, seq_length)
        if alpha is not None and alpha.shape[0] not in (1, position_ids.shape[0]):
            # generate() repeated the cache for several continuations of each prompt.
            alpha = alpha.repeat_interleave(position_ids.shape[0] // alpha.shape[0])
        return rotary_tables(position_ids, config.rotary_dim, config.rotary_emb_base, alpha), query_scale

    def _tables_by_sample(self, position_ids: Tensor, lengths: Sequence[int]) -> tuple[RotaryTables, Tensor | None]:
        """Compute the tables of a row [1, T] with samples of these lengths; dynamic NTK is that of each sample."""
        config = self.config
        alpha = query_scale = None
        if not self.training and (config.use_dynamic_ntk or config.use_logn_attn):
            seq_length, counts = config.trained_length(), torch.tensor(lengths, device=position_ids.device)
            if config.use_dynamic_ntk and max(lengths) > seq_length:
                alpha = ntk_alpha(counts.repeat_interleave(counts), seq_length)
            if config.use_logn_attn and max(lengths) > seq_length:
                query_scale = logn_scale(position_ids, seq_length)
        # Factors are those of rows, so each token is one.
        cos, sin = rotary_tables(position_ids.T, config.rotary_dim, config.rotary_emb_base, alpha)
        return (cos.transpose(0, 1), sin.transpose(0, 1)), query_scale


class QWenLMHeadModel(QWenPreTrainedModel, QWenChatMixin, GenerationMixin):
    """Qwen v1 with its language-model head; ``chat``, ``chat_stream`` and ``chat_batch`` come from the mixin."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits, and the loss if labels are given.

        Args:
            labels: [B, T], an id or -100; not shifted.
            logits_to_keep: number of last positions whose logits are computed (0: all), or indices of positions.
            num_items_in_batch: divisor of the summed loss; ``None``: the number of targets of this batch.
            Others as in ``QWenModel.forward``.

        Returns:
            ``logits`` [B, T, V] in the head's dtype, ``loss`` in float32.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _positions(hidden_states: Tensor, padding_mask: Tensor | None, cached: int) -> Tensor:
    """Number positions [B, T] from each row's first real token; padding before it has position 0."""
    length = hidden_states.shape[1]
    positions = torch.arange(cached, cached + length, device=hidden_states.device)[None]
    if padding_mask is None:
        return positions
    leading = (padding_mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)
    return (positions - leading).clamp(min=0)
