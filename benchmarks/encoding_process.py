"""Measure how fast one checkout encodes data, as ``benchmarks.encoding`` asks for it on stdin.

``python -c`` runs this text in the folder of the checkout, which may be an older one: it uses no more of it than its
reader of data. The argument is a JSON list of [folder of a checkpoint, data file, how samples are made]. It prints
which of them this checkout has, and for the number of one on stdin the CPU seconds, records and tokens.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast

from chat.detect import family_of
from chat.families import QWEN_V1
from data_utils.dataset import DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from errors import ConfigError

MAX_LENGTH = 8192


def build_encoder(folder: Path, samples: str) -> Encoder:
    """Return the encoder of a checkpoint; ``samples`` is ``whole``, or ``auto`` as in a run without flags."""
    if not (folder / "tokenizer.json").is_file():
        from qwen_model.tokenization_qwen import QWenTokenizer

        return Encoder(QWenTokenizer.from_pretrained(folder), QWEN_V1, EncodeOptions(max_length=MAX_LENGTH))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    family = family_of(tokenizer)
    if samples == "whole":
        return Encoder(tokenizer, family, EncodeOptions(max_length=MAX_LENGTH))
    from loading.prompt_modes import prompt_families

    opened: Any = SimpleNamespace(model_type="qwen3", tokenizer=tokenizer, family=family)
    options = EncodeOptions(max_length=MAX_LENGTH, thinking="auto", split_turns="auto")
    families = prompt_families(opened, "auto", {})
    return Encoder(tokenizer, families[0], options, families[1])


def answer_requests(asked: str) -> None:
    logging.disable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoders: list[Encoder | None] = []
    for folder, _, samples in json.loads(asked):
        try:
            encoder = build_encoder(Path(folder), samples)
        except (ImportError, TypeError, ConfigError):
            encoders.append(None)  # an older checkout has no such samples, or no such chat format
        else:
            encoder.prepare_for_many()
            encoders.append(encoder)
    print(json.dumps([encoder is not None for encoder in encoders]), flush=True)
    for line in sys.stdin:
        data, chosen = json.loads(asked)[int(line)][1], encoders[int(line)]
        assert chosen is not None  # the caller was told
        started = time.process_time()
        reader = DataReader({"train": [parse_source(data)]}, chosen, show_progress=False)
        total = load_examples(reader)["train"].report.total()
        seconds = time.process_time() - started
        print(json.dumps({"seconds": seconds, "records": total.kept, "tokens": total.tokens}), flush=True)


if __name__ == "__main__":
    answer_requests(sys.argv[1])
