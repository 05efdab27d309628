"""Losses, likelihoods and answers are those of the model alone, whatever is computed beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chat.render import encode_prompt, render_prompt
from chat.template import CHATML_TEMPLATE
from chat.turns import Turn
from evaluation.losses import answer_losses
from evaluation.task_answerer import TaskAnswerer
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.models import copy_checkpoint, write_later_checkpoint

PAIRS = [
    ("Question: What is 2 + 3?\nA. 4\nB. 5\nAnswer:", " A"),
    ("Question: What is 2 + 3?\nA. 4\nB. 5\nAnswer:", " B"),
    ("问题：一年有几个月？\n答案：", "十二个月"),
    ("Hi " * 30, "there, you"),
    ("<|im_start|>", "x"),
]


def checkpoint_of(kind: str, folder: Path) -> Any:
    if kind == "qwen":  # far beyond its trained length, where the rotary base depends on it
        return load_checkpoint(str(copy_checkpoint(folder, use_dynamic_ntk=True, use_logn_attn=True, seq_length=16)))
    return load_checkpoint(str(write_later_checkpoint(folder, kind, CHATML_TEMPLATE)))


def alone(model: Any, ids: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Return the likelihood of the last ids of one row, from the logits of all of it."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *continuation]])).logits[0, len(ids) - 1 : -1]
    targets = torch.tensor(continuation)
    total = logits.log_softmax(-1)[range(len(targets)), targets].sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3_5_text"])
def test_losses_of_answers_do_not_depend_on_the_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of examples with different lengths and numbers of answers, in batches of two rows, and in one."""
    model = load_for_inference(checkpoint_of(kind, tmp_path / "model"))
    generator = torch.Generator().manual_seed(1)
    examples: list[Any] = []
    for length, trained in ((40, [range(9, 20), range(30, 40)]), (7, [range(3, 7)]), (90, [range(1, 90)]), (40, [])):
        ids = torch.randint(700, (length,), generator=generator).tolist()
        positions = {position for each in trained for position in each}
        labels = [id_ if index in positions else -100 for index, id_ in enumerate(ids)]
        examples.append({"input_ids": ids, "labels": labels})
    alone = [answer_losses(model, [example])[0] for example in examples]
    assert [[turn.targets for turn in turns] for turns in alone] == [[11, 10], [4], [89], []]
    for example, turns in zip(examples, alone, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="sum", ignore_index=-100)
        assert sum(turn.loss for turn in turns) == pytest.approx(loss.item(), rel=1e-5)
    for tokens in (200, 4096):
        monkeypatch.setattr("evaluation.losses.TOKENS", tokens)
        together = answer_losses(model, examples)
        for turns, others in zip(together, alone, strict=True):
            assert [turn.loss for turn in turns] == pytest.approx([turn.loss for turn in others], rel=1e-5)
            assert [(turn.targets, turn.correct) for turn in turns] == [(turn.targets, turn.correct) for turn in others]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3_5_text"])
def test_likelihoods_are_those_of_each_row_alone(kind: str, is_chat: bool, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(kind, tmp_path / "model")
    model = load_for_inference(checkpoint)
    asked = TaskAnswerer(checkpoint, checkpoint.family if is_chat else None, 3, 8)
    found = asked.likelihoods(model, PAIRS)
    for (prompt, continuation), given in zip(PAIRS, found, strict=True):
        if is_chat:
            ids = encode_prompt(render_prompt([Turn("user", prompt)], checkpoint.family), checkpoint.tokenizer)
            after = asked._encode(continuation)
        else:
            ids = asked._encode(prompt)
            after = asked._encode(prompt + continuation)[len(ids) :]
        total, is_greedy = alone(model, ids, after)
        assert given.log == pytest.approx(total, abs=2e-4) and given.is_greedy == is_greedy
    assert found[0].log != found[1].log and asked.shortened == 0
    # A control token in a question is text.
    assert checkpoint.tokenizer.convert_tokens_to_ids("<|im_start|>") not in asked._encode(PAIRS[4][0])


def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("qwen2", tmp_path / "model")
    model = load_for_inference(checkpoint)
    asked = TaskAnswerer(checkpoint, None, 3, 8)
    long = "天地 word " * 300
    [given] = asked.likelihoods(model, [(long, "end")])
    ids = asked._encode(long)
    after = asked._encode(long + "end")[len(ids) :]
    most = checkpoint.config.max_position_embeddings
    assert len(ids) > most and asked.shortened == 1
    total, _ = alone(model, [*ids, *after[:-1]][-most:][: most - len(after) + 1], after)
    assert given.log == pytest.approx(total, abs=2e-4)
    assert len(asked.write(model, [(long, ())])) == 1 and asked.shortened == 1


def test_answers_are_greedy_and_end_before_a_stop(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("qwen2", tmp_path / "model")
    model = load_for_inference(checkpoint)
    asked = TaskAnswerer(checkpoint, None, 2, 12)
    prompts = ["Hello", "天地玄黄，宇宙洪荒", "x = 1\ny ="]
    answers = asked.write(model, [(prompt, ()) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([asked._encode(prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert answer == checkpoint.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    stop = answers[0][3:5]
    assert asked.write(model, [(prompts[0], (stop,))]) == [answers[0].partition(stop)[0]]
