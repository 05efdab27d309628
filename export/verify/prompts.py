"""Conversations that a merged model is compared on, as ids of its own tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from chat.chatml import IM_END, IM_START
from chat.render import control_ids_of, encode_prompt, render
from chat.turns import Turn
from checkpoints.companions import has_tokenizer
from checkpoints.whole import load_text_config
from errors import ConfigError, one_line
from loading.chat_family import chat_family
from loading.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENS = 64
"""Maximum length of a prompt: tokenizers with few ranks need many ids for a text."""

# Questions and answers in English, Chinese and code.
PROMPTS = (
    ("Why does the moon look larger near the horizon?", "It does not: beside houses and trees we misjudge its size."),
    ("List three things to pack for a rainy hike.", "1. A light waterproof jacket\n2. Dry socks\n3. A thermos of tea"),
    ("A train leaves at 9:40 and rides 85 minutes. When does it arrive?", "It arrives at 11:05."),
    ("Write one sentence about an old lighthouse.", "Its lamp went dark years ago, yet ships still slow down there."),
    ("早上喝一杯温水有什么好处？", "可以补充夜里流失的水分，也让肠胃慢慢醒过来。"),
    ("请把“学而时习之”翻译成现代汉语。", "学了知识，并且按时去复习它。"),
    ("推荐一个适合雨天的周末活动。", "去旧书店转转，挑一本小说，再喝杯热茶。"),
    ("三只猫分九条鱼，每只几条？", "9 ÷ 3 = 3，每只猫三条。"),
    ("Reverse a list in Python without changing it.", "```python\nbackwards = items[::-1]\n```"),
    ("What does this print?\nfor i in range(3):\n    print(i * i)", "0\n1\n4"),
    ("用 SQL 查出年龄最大的用户。", "SELECT name FROM users ORDER BY age DESC LIMIT 1;"),
    ("Why is `if (x = 5)` wrong in C?", "`=` assigns, so the test is always true; compare with `==`."),
)


def prompt_ids(folder: Path, vocab_size: int) -> list[list[int]]:
    """Encode :data:`PROMPTS` in a checkpoint's chat format.

    If its tokenizer cannot be used, a warning is logged and pseudo-random ids are returned, always the same ones.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of the model's embedding; every id is smaller.
    """
    try:
        return _encode(folder, vocab_size)
    except (ConfigError, OSError, ValueError, TypeError, KeyError, ImportError) as error:
        logger.warning("the tokenizer of %s cannot be used (%s): verifying with random tokens", folder, one_line(error))
    generator = torch.Generator().manual_seed(0)
    lengths = [16 + 2 * number for number in range(len(PROMPTS))]
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _encode(folder: Path, vocab_size: int) -> list[list[int]]:
    if not has_tokenizer(folder):
        raise ValueError("it has no files")
    tokenizer = load_tokenizer(folder, str(folder))
    if len(set(control_ids_of(tokenizer).values())) < 2:
        raise ValueError(f"it lacks {IM_START} and {IM_END}")
    family = chat_family(load_text_config(folder)["model_type"], tokenizer)
    conversations = ([Turn("user", question), Turn("assistant", answer)] for question, answer in PROMPTS)
    prompts = [encode_prompt(render(turns, family), tokenizer)[:MAX_TOKENS] for turns in conversations]
    if (largest := max(id_ for prompt in prompts for id_ in prompt)) >= vocab_size:
        raise ValueError(f"its id {largest} is beyond the model's {vocab_size} embedding rows")
    return prompts
