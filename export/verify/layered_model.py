"""A model whose layers are given their values one at a time, with adapters beside them where there are some.

Shapes: P prompts, T tokens of the longest, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.fold import WeightedAdapter
from checkpoints.source import TensorSource, main_dtype
from errors import ConfigError
from export.verify.reference import HEAD_WEIGHT, Adapted, AdaptedLinear
from qwen_model.block_runner import PLACES, blocks_of, capture_block_inputs
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.qwen2_qwen3 import MODEL_CLASSES


class LayeredModel:
    """A model without values, and where they come from.

    Args:
        source: the tensors by the names of the model's layout.
        config: its config.json.
        adapters: in the same layout.

    Attributes:
        parameters: the values, adapters on them.
        embedding: the name of its weight.
        stages: the names of what the states go through: each block, then the norm.
        longest: tokens of a text that the model was trained for.

    Raises:
        ConfigError: another ``model_type`` than Qwen's.
    """

    def __init__(
        self, source: TensorSource, config: Mapping[str, Any], adapters: Sequence[WeightedAdapter] = ()
    ) -> None:
        model_type = config.get("model_type")
        if model_type not in PLACES:
            what = f"config.json: model_type {model_type!r} is not supported"
            raise ConfigError(what, "Use a checkpoint of model_type qwen, qwen2 or qwen3")
        places = PLACES[model_type]
        model_class: Any = MODEL_CLASSES.get(model_type, QWenLMHeadModel)
        given = {"tie_word_embeddings": HEAD_WEIGHT not in source, **config}
        settings = model_class.config_class.from_dict({k: v for k, v in given.items() if k != "quantization_config"})
        with torch.device("meta"):
            self._model: Any = model_class(settings).eval()
        if rotary := getattr(self._model.base_model, "rotary_emb", None):
            # No file holds its frequencies: they are computed here and nowhere else.
            self._model.base_model.rotary_emb = type(rotary)(settings)
        self.embedding = f"{places.embedding}.weight"
        self.stages = [*(f"{places.blocks}.{i}" for i in range(len(blocks_of(self._model)))), places.norm]
        self.parameters = Adapted(source, adapters, self.embedding if settings.tie_word_embeddings else None)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self._shapes = {name: shape for name, shape in shapes.items() if self.parameters.stored_name(name) == name}
        self.longest: int = getattr(settings, "seq_length", None) or settings.max_position_embeddings

    @property
    def source(self) -> TensorSource:
        return self.parameters.source

    @property
    def sizes(self) -> tuple[int, int, int]:
        """V, C and the number of blocks."""
        return *self._shapes[self.embedding], len(self.stages) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What most of the floats are stored in."""
        return main_dtype(self.source)

    def faults(self) -> list[str]:
        """Tensors that the model has, and its files lack or hold in another shape."""
        faults = []
        for name, shape in self._shapes.items():
            if name not in self.source:
                faults.append(f"{name} is missing")
            elif (found := self.source.shape(name)) != shape:
                faults.append(f"{name} has shape {found}, config.json asks for {shape}")
        return faults

    def dtypes(self, stage: str) -> dict[int, torch.dtype]:
        """What the tensors of a stage are stored in, by their number of dimensions: the coarsest of each."""
        found: dict[int, torch.dtype] = {}
        for name, shape in self._shapes.items():
            if name.startswith(f"{stage}."):
                dtypes = (self.source.dtype(name), found.get(len(shape), torch.float32))
                found[len(shape)] = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return found

    def calls(self, states: Tensor, mask: Tensor) -> list[Mapping[str, Any]]:
        """What each stage is called with besides the states.

        Args:
            states: [P, T, C], the embedded tokens.
            mask: [P, T], 1 where a token is real.
        """
        norm = self.stages[-1]
        kept = self._model.get_submodule(norm)
        self._model.set_submodule(norm, nn.Identity())  # it has no values yet
        calls = capture_block_inputs(self._model, inputs_embeds=states, attention_mask=mask)[1]
        self._model.set_submodule(norm, kept)
        return [*calls, {}]

    def take(self, stage: str) -> nn.Module:
        """A stage with its values, in float32. It can be had once: its memory is free when the caller lets it go."""
        module: nn.Module = self._model.get_submodule(stage)
        self._model.set_submodule(stage, nn.Identity())
        names = {name: f"{stage}.{name}" for name, _ in module.named_parameters()}
        values = {
            name: self.parameters.vector(full) if len(self._shapes[full]) == 1 else self.parameters.plain(full)
            for name, full in names.items()
        }
        module.load_state_dict(values, assign=True)
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Linear) and (changes := self.parameters.changes(f"{stage}.{name}.weight")):
                module.set_submodule(name, AdaptedLinear(layer.weight.data, layer.bias, changes))
        return module


def round_to(module: nn.Module, dtypes: Mapping[int, torch.dtype]) -> None:
    """Put adapters into the weights they stand beside, and round all values to what they will be stored in.

    Args:
        dtypes: as :meth:`LayeredModel.dtypes` gives them.
    """
    for layer in module.modules():
        if isinstance(layer, AdaptedLinear):
            layer.settle()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtypes[parameter.dim()]).to(torch.float32)
