"""The classes that the toolkit loads: each architecture's own with the lean loss inside ``forward``, and ``chat``.

The loss has to be computed inside ``forward``: calling the head outside of it bypasses the hooks of DDP, ZeRO-3 and
FSDP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen3_5ForCausalLM, Qwen3ForCausalLM

from chat.label_mask import IGNORE_INDEX
from qwen_model.architectures import architecture_of
from qwen_model.family_chat import FamilyChatMixin
from qwen_model.head import why_opaque
from qwen_model.lean_loss import CausalLMLossOutput, lean_causal_lm_loss
from qwen_model.loss import causal_lm_loss
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.sample_attention import NO_MASKS, check_takes_rows

logger = logging.getLogger(__name__)


def with_lean_loss(parent_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a causal language model, with the loss of ``loss.py`` or ``lean_loss.py``.

    Its signature stays that of the parent: transformers reads from it what ``generate`` may pass. Its arguments are
    the parent's and:

        labels: [B, T], an id or -100; not shifted.
        loss_only: compute the loss and ``num_correct`` without logits, in a small part of their memory; with a head
            that the lean loss does not know, from all logits.
        num_items_in_batch, loss_weights, label_smoothing, num_targets: see ``lean_causal_lm_loss``; the last two are
            used with ``loss_only`` alone.
        sequence_lengths: the input is a row of samples of these lengths, see ``sample_attention.py``.
    """

    @wraps(parent_forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        loss_only: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        loss_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        num_targets: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("sequence_lengths") is not None:
            check_takes_rows(self)
            kwargs["attention_mask"] = NO_MASKS
        if labels is None or not loss_only:
            outputs = parent_forward(self, *args, **kwargs)
            if labels is not None:
                outputs.loss = causal_lm_loss(outputs.logits, labels, num_items_in_batch, loss_weights)
            return outputs
        if reason := why_opaque(self.lm_head):
            _warn_of_full_logits(reason)
            outputs = parent_forward(self, *args, **kwargs)
            loss, correct = _full_logits_loss(outputs.logits, labels, num_items_in_batch, loss_weights, label_smoothing)
        else:
            outputs = self.base_model(*args, **kwargs)
            loss, correct = lean_causal_lm_loss(
                outputs.last_hidden_state, self.lm_head, labels, num_items_in_batch, loss_weights, label_smoothing,
                num_targets,
            )  # fmt: skip
        return CausalLMLossOutput(
            loss=loss,
            num_correct=correct,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    return forward


@cache
def _warn_of_full_logits(reason: str) -> None:
    """Warn once of the memory that a head needs which is not computed from its tensors."""
    text = "The head %s: the loss is computed from the logits of all positions, as with --loss full_logits"
    logger.warning(text, reason)


class LeanQWenLMHeadModel(QWenLMHeadModel):
    forward = with_lean_loss(QWenLMHeadModel.forward)


class LeanQwen2ForCausalLM(FamilyChatMixin, Qwen2ForCausalLM):
    forward = with_lean_loss(Qwen2ForCausalLM.forward)


class LeanQwen3ForCausalLM(FamilyChatMixin, Qwen3ForCausalLM):
    forward = with_lean_loss(Qwen3ForCausalLM.forward)


class LeanQwen3_5ForCausalLM(FamilyChatMixin, Qwen3_5ForCausalLM):
    forward = with_lean_loss(Qwen3_5ForCausalLM.forward)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # FSDP looks for all of these classes; the parent's list has a block of the vision tower, too.
        self._no_split_modules = sorted({type(block).__name__ for block in self.model.layers})


def model_class_of(model_type: str) -> Any:
    """The class that loads checkpoints of a ``model_type``.

    Raises:
        ConfigError: it is not supported.
    """
    return globals()[architecture_of(model_type).model_class]


def build_on_meta(config: Mapping[str, Any]) -> Any:
    """Build the model of a config.json on the meta device, unquantised: names, shapes and modules without values.

    Raises:
        ConfigError: its ``model_type`` is not supported, or a value is contradictory.
    """
    model_class = model_class_of(config["model_type"])
    values = {name: value for name, value in config.items() if name != "quantization_config"}
    settings = model_class.config_class.from_dict(values)
    with torch.device("meta"):
        return model_class(settings).eval()


def _full_logits_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the results of ``lean_causal_lm_loss`` from the logits [B, T, V] of all positions."""
    flat, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    is_target = targets != IGNORE_INDEX
    losses = F.cross_entropy(
        flat, targets, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=label_smoothing
    )
    weights = is_target.float()
    if loss_weights is not None:
        weights = weights * loss_weights[:, 1:].flatten().to(weights)
    count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=flat.device)
    loss = (losses * weights).sum() / count.clamp(min=torch.finfo(torch.float32).tiny)
    return loss, ((flat.argmax(-1) == targets) & is_target).sum()
