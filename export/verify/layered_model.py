"""A model whose layers are loaded one at a time, from the parameters of a base, of base + adapters, or of a folder.

Shapes: P samples, T tokens of the longest, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.source import TensorSource, View
from export.verify.reference import AdaptedLinear, AdaptedParameters
from qwen_model.architectures import HEAD_WEIGHT, architecture_of
from qwen_model.block_runner import blocks_of, capture_block_inputs
from qwen_model.lean_models import build_on_meta

_WITHOUT_EFFECT = (
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "transformers_version",
    "architectures",
    "_name_or_path",
)
"""Keys of a config that change nothing between the embedding and the head."""


class HeldTensors(View):
    """A source of which some tensors are kept in memory, so that they are read, and dequantised, once.

    Args:
        keeps_bfloat16: keep bfloat16 as stored (a view of the file) instead of as float32.
    """

    def __init__(self, below: TensorSource, keeps_bfloat16: bool) -> None:
        super().__init__(below)
        self._keeps_bfloat16 = keeps_bfloat16
        self._held: dict[str, Tensor] = {}

    def hold(self, names: Iterable[str]) -> None:
        """Read these tensors, and forget those held before."""
        self._held.clear()
        self._held.update((name, self._read(name)) for name in names)

    def _read(self, name: str) -> Tensor:
        tensor = self.below.read(name)
        if self._keeps_bfloat16 and tensor.dtype == torch.bfloat16:
            return tensor
        return tensor.to(torch.float32)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._held[name][start:stop] if name in self._held else self.below.rows(name, start, stop)


class LayeredModel:
    """A model on the meta device.

    Args:
        config: contents of its config.json.
        source: the tensors by the names of its layout; tells whether the head is tied if the config does not.

    Attributes:
        embedding: name of the embedding's weight.
        stages: names of the modules after the embedding: each block, then the final norm.
        shapes: of the stored tensors by their names, without a tied head.
        tied_to: name of the embedding's weight if the head is tied to it.
        trained_length: number of tokens that the model was trained for.

    Raises:
        ConfigError: a ``model_type`` that is not Qwen's.
    """

    def __init__(self, config: Mapping[str, Any], source: TensorSource) -> None:
        architecture = architecture_of(config.get("model_type"))
        self._model: Any = build_on_meta({"tie_word_embeddings": HEAD_WEIGHT not in source, **config})
        settings = self._model.config
        if rotary := getattr(self._model.base_model, "rotary_emb", None):
            # Its frequencies are computed rather than stored, so the meta device has none.
            self._model.base_model.rotary_emb = type(rotary)(settings)
        self.embedding = architecture.embedding_weight
        self.stages = [*(f"{architecture.blocks}.{i}" for i in range(len(blocks_of(self._model)))), architecture.norm]
        self.tied_to = self.embedding if settings.tie_word_embeddings else None
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self.shapes = {name: shape for name, shape in shapes.items() if not (self.tied_to and name == HEAD_WEIGHT)}
        self._stage: tuple[str, nn.Module] = ("", nn.Identity())
        self.trained_length: int = getattr(settings, "seq_length", None) or settings.max_position_embeddings

    @property
    def sizes(self) -> tuple[int, int, int]:
        """V, C and number of blocks."""
        return *self.shapes[self.embedding], len(self.stages) - 1

    @property
    def settings(self) -> dict[str, Any]:
        """Everything in the config that its computations depend on, defaults included."""
        settings: dict[str, Any] = self._model.config.to_dict()
        return {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}

    def tensors_of(self, stage: str) -> list[str]:
        """Names of a stage's tensors."""
        return [name for name in self.shapes if name.startswith(f"{stage}.")]

    def faults(self, source: TensorSource) -> list[str]:
        """Describe the model's tensors that its files lack or contain in another shape."""
        faults = []
        for name, shape in self.shapes.items():
            if name not in source:
                faults.append(f"{name} is missing")
            elif (stored := source.shape(name)) != shape:
                faults.append(f"{name} has shape {stored}, config.json requires {shape}")
        return faults

    def stage_arguments(self, states: Tensor, mask: Tensor) -> list[Mapping[str, Any]]:
        """Return the arguments of each stage besides the states.

        Args:
            states: [P, T, C], the embedded tokens.
            mask: [P, T], 1 for real tokens, 0 for padding.
        """
        norm_name = self.stages[-1]
        norm = self._model.get_submodule(norm_name)
        self._model.set_submodule(norm_name, nn.Identity())  # the norm has no values
        block_arguments = capture_block_inputs(self._model, inputs_embeds=states, attention_mask=mask)[1]
        self._model.set_submodule(norm_name, norm)
        return [*block_arguments, {}]

    def load_stage(self, stage: str, parameters: AdaptedParameters) -> nn.Module:
        """Load a stage; weights of linear layers as ``parameters.weight`` returns them, all others are float32.

        The module is used again by the next call, so that no stage stays in memory.
        """
        if self._stage[0] != stage:
            module: nn.Module = self._model.get_submodule(stage)
            self._model.set_submodule(stage, nn.Identity())
            for name, layer in list(module.named_modules()):
                if isinstance(layer, nn.Linear):
                    module.set_submodule(name, AdaptedLinear(layer.weight.data, layer.bias, ()))
            self._stage = stage, module
        module = self._stage[1]
        values = {}
        for name, _ in module.named_parameters():
            full = f"{stage}.{name}"
            is_matrix = len(self.shapes[full]) == 2
            values[name] = parameters.weight(full) if is_matrix else parameters.vector(full)
        module.load_state_dict(values, assign=True)
        for name, layer in module.named_modules():
            if isinstance(layer, AdaptedLinear):
                layer.changes = parameters.changes(f"{stage}.{name}.weight")
        return module
