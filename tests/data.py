"""Reading data files in tests."""

from __future__ import annotations

from typing import Any

from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import Encoder
from data_utils.examples import ExampleSet
from data_utils.prepared import load_examples
from data_utils.sources import parse_source


def reader(encoder: Encoder, *train: object, eval: tuple[object, ...] = (), **options: Any) -> DataReader:
    """Build a reader of values of ``--data_path`` and ``--eval_data_path`` with ``DataOptions``."""
    sources = {"train": [parse_source(str(name)) for name in train]}
    if eval:
        sources["eval"] = [parse_source(str(name)) for name in eval]
    return DataReader(sources, encoder, DataOptions(**options), show_progress=False)


def load(encoder: Encoder, *train: object, **options: Any) -> ExampleSet:
    """Load the training examples."""
    return load_examples(reader(encoder, *train, **options))["train"]
