"""Greedy answers of a small chat model, and the perplexity of held-out answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 16


def encode_questions(checkpoint: Any, questions: Sequence[str], system: str | None = None) -> list[list[int]]:
    """Return the ids of the prompts of questions.

    Args:
        system: system message (default: that of the model's format).
    """
    from chat.render import encode_prompt, render_prompt
    from chat.turns import Turn

    family, tokenizer = checkpoint.family, checkpoint.tokenizer
    return [encode_prompt(render_prompt([Turn("user", text)], family, system), tokenizer) for text in questions]


def greedy_answers(
    model: Any, checkpoint: Any, questions: Sequence[str], max_new_tokens: int, system: str | None = None
) -> list[str]:
    """Return the greedy answers, computed 16 at a time with padding on the left.

    Args:
        system: see ``encode_questions``.
    """
    import torch

    tokenizer, end = checkpoint.tokenizer, checkpoint.end_ids
    prompts = encode_questions(checkpoint, questions, system)
    answers = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[end[-1]] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            repetition_penalty=1.0, eos_token_id=end, pad_token_id=end[-1],
        )  # fmt: skip
        answers += [tokenizer.decode(row[width:].tolist(), skip_special_tokens=True).strip() for row in output]
    return answers


def encode_records(checkpoint: Any, records: Sequence[dict[str, Any]], file: Path) -> Any:
    """Write records to a file, and return their examples of up to 512 tokens."""
    from data_utils.dataset import DataOptions, DataReader
    from data_utils.encode import EncodeOptions, Encoder
    from data_utils.prepared import load_examples
    from data_utils.sources import parse_source

    file.write_text(json.dumps(records))
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=512))
    reader = DataReader({"train": [parse_source(str(file))]}, encoder, DataOptions(), show_progress=False)
    return load_examples(reader)["train"]


def perplexity(model: Any, examples: Any) -> float:
    """Return exp of the mean loss of the answers of examples."""
    import torch

    loss, targets = 0.0, 0
    with torch.inference_mode():
        for example in examples:
            labels = torch.tensor([example["labels"]])
            count = int((labels[:, 1:] >= 0).sum())
            loss += count * float(model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss)
            targets += count
    return math.exp(loss / targets)
