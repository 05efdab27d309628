"""A model whose layers are loaded one at a time, with unmerged adapters if there are any.

Shapes: P prompts, T tokens of the longest, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.fold import WeightedAdapter
from checkpoints.source import TensorSource, main_dtype
from export.verify.reference import AdaptedLinear, AdaptedParameters
from qwen_model.architectures import HEAD_WEIGHT, architecture_of
from qwen_model.block_runner import blocks_of, capture_block_inputs
from qwen_model.lean_models import build_on_meta


class LayeredModel:
    """A model on the meta device, and the source of its parameters.

    Args:
        source: the tensors by the names of the model's layout.
        config: contents of its config.json.
        adapters: in the same layout.

    Attributes:
        parameters: the parameters with the adapters applied.
        embedding: name of the embedding's weight.
        stages: names of the modules after the embedding: each block, then the final norm.
        trained_length: number of tokens that the model was trained for.

    Raises:
        ConfigError: a ``model_type`` that is not Qwen's.
    """

    def __init__(
        self, source: TensorSource, config: Mapping[str, Any], adapters: Sequence[WeightedAdapter] = ()
    ) -> None:
        architecture = architecture_of(config.get("model_type"))
        self._model: Any = build_on_meta({"tie_word_embeddings": HEAD_WEIGHT not in source, **config})
        settings = self._model.config
        if rotary := getattr(self._model.base_model, "rotary_emb", None):
            # Its frequencies are computed rather than stored, so the meta device has none.
            self._model.base_model.rotary_emb = type(rotary)(settings)
        self.embedding = architecture.embedding_weight
        self.stages = [*(f"{architecture.blocks}.{i}" for i in range(len(blocks_of(self._model)))), architecture.norm]
        self.parameters = AdaptedParameters(source, adapters, self.embedding if settings.tie_word_embeddings else None)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self._shapes = {name: shape for name, shape in shapes.items() if self.parameters.stored_name(name) == name}
        self.trained_length: int = getattr(settings, "seq_length", None) or settings.max_position_embeddings

    @property
    def source(self) -> TensorSource:
        return self.parameters.source

    @property
    def sizes(self) -> tuple[int, int, int]:
        """V, C and number of blocks."""
        return *self._shapes[self.embedding], len(self.stages) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that most floats are stored in."""
        return main_dtype(self.source)

    def faults(self) -> list[str]:
        """Describe the model's tensors that its files lack or contain in another shape."""
        faults = []
        for name, shape in self._shapes.items():
            if name not in self.source:
                faults.append(f"{name} is missing")
            elif (stored := self.source.shape(name)) != shape:
                faults.append(f"{name} has shape {stored}, config.json requires {shape}")
        return faults

    def dtypes(self, stage: str) -> dict[int, torch.dtype]:
        """Return the stored dtype of a stage's tensors by their number of dimensions: the coarsest if they differ."""
        coarsest: dict[int, torch.dtype] = {}
        for name, shape in self._shapes.items():
            if name.startswith(f"{stage}."):
                dtypes = (self.source.dtype(name), coarsest.get(len(shape), torch.float32))
                coarsest[len(shape)] = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return coarsest

    def stage_arguments(self, states: Tensor, mask: Tensor) -> list[Mapping[str, Any]]:
        """Return the arguments of each stage besides the states.

        Args:
            states: [P, T, C], the embedded tokens.
            mask: [P, T], 1 for real tokens, 0 for padding.
        """
        norm_name = self.stages[-1]
        norm = self._model.get_submodule(norm_name)
        self._model.set_submodule(norm_name, nn.Identity())  # the norm has no values yet
        block_arguments = capture_block_inputs(self._model, inputs_embeds=states, attention_mask=mask)[1]
        self._model.set_submodule(norm_name, norm)
        return [*block_arguments, {}]

    def load_stage(self, stage: str) -> nn.Module:
        """Load a stage in float32, once: the model keeps no reference, so the caller can free its memory."""
        module: nn.Module = self._model.get_submodule(stage)
        self._model.set_submodule(stage, nn.Identity())
        names = {name: f"{stage}.{name}" for name, _ in module.named_parameters()}
        values = {
            name: self.parameters.vector(full) if len(self._shapes[full]) == 1 else self.parameters.stored_rows(full)
            for name, full in names.items()
        }
        module.load_state_dict(values, assign=True)
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Linear) and (changes := self.parameters.changes(f"{stage}.{name}.weight")):
                module.set_submodule(name, AdaptedLinear(layer.weight.data, layer.bias, changes))
        return module


def round_weights(module: nn.Module, dtypes: Mapping[int, torch.dtype]) -> None:
    """Merge the adapters of a module and round its weights to ``dtypes``, in float32.

    Args:
        dtypes: by number of dimensions, see :meth:`LayeredModel.dtypes`.
    """
    for layer in module.modules():
        if isinstance(layer, AdaptedLinear):
            layer.merge()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtypes[parameter.dim()]).to(torch.float32)
