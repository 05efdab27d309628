"""Models and samples of ``benchmarks.step``: random checkpoints, and the same samples for every contender."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ConfigError

MAX_LENGTH, STEP_SAMPLES = 512, 16
# Random models in Qwen2's layout, in float32; one with delta nets in Qwen3.5's.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "real": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "delta_nets": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 64, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
}  # fmt: skip
VOCABULARY = 151_936


def write_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """Write a random checkpoint of a shape, with the files of a tokenizer's folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config_class: Any = Qwen3_5TextConfig if shape == "delta_nets" else Qwen2Config
    config = config_class(**SHAPES[shape], vocab_size=VOCABULARY, max_position_embeddings=2048)
    model: Any = Qwen3_5ForCausalLM if shape == "delta_nets" else Qwen2ForCausalLM
    model(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write Qwen v1's tokenizer, read from its ``qwen.tiktoken``, as the fast one that Qwen2 has.

    Raises:
        ConfigError: the folder has no ``qwen.tiktoken``.
    """
    if not (source / "qwen.tiktoken").is_file():
        raise ConfigError(f"--tokenizer {source}: the folder has no qwen.tiktoken", "Give a Qwen v1 folder")
    from tokenizers import normalizers
    from transformers import AddedToken, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from chat.chatml import END_OF_TEXT, IM_END, IM_START
    from qwen_model.tokenization_qwen import SPLIT_PATTERN

    fast = TikTokenConverter(str(source / "qwen.tiktoken"), pattern=SPLIT_PATTERN).converted()
    fast.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    control = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, IM_START, IM_END)]
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = END_OF_TEXT, IM_END
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Samples:
    """The samples that finetune.py would train: records, and their ids and labels.

    A run of ``count`` rounds that begins at round ``first`` takes 16 samples as its warm-up and ``count`` times the
    next 16 after those of the rounds before.
    """

    records: list[Any]
    examples: list[dict[str, list[int]]]
    first: int
    count: int

    @property
    def lengths(self) -> list[int]:
        return [len(example["input_ids"]) for example in self.examples]

    def write(self, order: str, start: int, folder: Path) -> None:
        """Write ``records.jsonl`` and ``examples.json`` as a process sees them that begins at round ``start``.

        Args:
            order: ``same``, ``grouped`` (the same samples, those of all rounds sorted by length as HF's sampler does)
                or ``whole`` (all samples, for packing).
        """
        indices = list(range(len(self.examples)))
        if order != "whole":
            measured = self._measured(order)
            done = STEP_SAMPLES * (start - self.first)
            indices = [*indices[:STEP_SAMPLES], *measured[done:], *measured[:done]]
        folder.mkdir(parents=True)
        lines = [json.dumps(self.records[index], ensure_ascii=False) + "\n" for index in indices]
        (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "examples.json").write_text(json.dumps([self.examples[index] for index in indices]))

    def _measured(self, order: str) -> list[int]:
        begin = STEP_SAMPLES * (1 + self.first)
        measured = list(range(begin, begin + STEP_SAMPLES * self.count))
        if order == "grouped":
            import torch
            from transformers.trainer_pt_utils import get_length_grouped_indices

            lengths = [self.lengths[index] for index in measured]
            generator = torch.Generator().manual_seed(0)
            grouped = get_length_grouped_indices(lengths, STEP_SAMPLES, self.count, generator)
            return [measured[index] for index in grouped]
        return measured


def read_samples(model: Path, data: Path, first: int, count: int) -> Samples:
    """Read the samples of a data file that finetune.py would train, in the order of the file.

    Raises:
        ConfigError: fewer samples than the rounds need, or arguments that finetune.py refuses.
    """
    from chat.label_mask import labels_from_weights
    from data_utils.blocks import KeptConversation
    from data_utils.dataset import DataReader
    from data_utils.files import read_records
    from training.config.parsing import parse_args
    from training.data import preview_data

    all_records: dict[Any, object] = dict(read_records(data))
    records: list[Any] = []
    examples: list[dict[str, list[int]]] = []

    def keep(reader: DataReader, kept: KeptConversation) -> None:
        records.append(all_records[kept.where])
        ids = list(kept.encoded.input_ids)
        labels = labels_from_weights(ids, [(span.length, span.weight) for span in kept.encoded.spans])
        examples.append({"input_ids": ids, "labels": labels})

    preview_data(parse_args(data_flags(model, data)), 0, keep)
    if len(examples) < (needed := STEP_SAMPLES * (1 + first + count)):
        what = f"--data_path {data} has {len(examples)} usable records, the rounds need {needed}"
        raise ConfigError(what, "Give fewer --rounds, or a larger file")
    return Samples(records, examples, first, count)


def data_flags(model: Path, data: Path) -> list[str]:
    """Return the flags of finetune.py that decide how records become samples."""
    return [
        "--model_name_or_path", str(model), "--data_path", str(data), "--model_max_length", str(MAX_LENGTH),
        "--no_data_cache", "--disable_tqdm", "True",
    ]  # fmt: skip
