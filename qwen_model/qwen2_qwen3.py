"""Qwen2 and Qwen3 with the loss inside of ``forward``, as Qwen v1 has it; everything else is transformers'."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from qwen_model.loss import CausalLMLossOutput, causal_lm_loss, lean_causal_lm_loss


class LeanLossMixin:
    """A ``forward`` that knows ``loss_only``, in front of a class with ``model`` and ``lm_head``."""

    def forward(self, *args: Any, labels: Tensor | None = None, loss_only: bool = False, **kwargs: Any) -> Any:
        """transformers' forward; with ``loss_only`` the loss without logits (see ``QWenLMHeadModel.forward``)."""
        terms = {name: kwargs.pop(name, default) for name, default in _LEAN_TERMS.items()}
        if labels is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        num_items = kwargs.pop("num_items_in_batch", None)
        if not loss_only:
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
            outputs.loss = causal_lm_loss(outputs.logits, labels, num_items, terms["loss_weights"])
            return outputs
        this: Any = self
        outputs = this.model(*args, **kwargs)
        loss, correct = lean_causal_lm_loss(outputs.last_hidden_state, this.lm_head, labels, num_items, **terms)
        return CausalLMLossOutput(loss=loss, num_correct=correct, past_key_values=outputs.past_key_values)


_LEAN_TERMS: dict[str, Any] = {"loss_weights": None, "label_smoothing": 0.0, "num_targets": None}


class LeanQwen2ForCausalLM(LeanLossMixin, Qwen2ForCausalLM):
    pass


class LeanQwen3ForCausalLM(LeanLossMixin, Qwen3ForCausalLM):
    pass


MODEL_CLASSES = {"qwen2": LeanQwen2ForCausalLM, "qwen3": LeanQwen3ForCausalLM}
