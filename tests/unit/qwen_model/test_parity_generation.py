"""Generation against the original's: greedy, with and without a cache, stop words, penalties, chat."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_model.generation import make_context
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import LOGITS_ATOL, Golden, assert_close, sets_with

# If the two largest logits are closer than this, rounding may change the choice.
MARGIN = 1e-3


def greedy(model: QWenLMHeadModel, prompt: torch.Tensor, **kwargs: Any) -> list[int]:
    """Generate as recorded: 20 tokens, no penalty, otherwise the checkpoint's settings; return the new ids."""
    arguments = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.0, **kwargs}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    return output[0, prompt.shape[1] :].tolist()


def assert_same_choices(actual: list[int], expected: list[int], margins: list[float]) -> None:
    """Check that ids are equal up to the first choice with too small a margin."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours != theirs:
            assert margins[index] <= MARGIN, f"token {index} is {ours}, not {theirs}: margin {margins[index]:.4f}"
            return


PROMPTS = r"(D\d+)\.prompt"


def prompts_within_seq_length(golden: Golden) -> dict[str, torch.Tensor]:
    """Return the ids of the recorded prompts whose greedy continuation stays within seq_length, the shortest first."""
    prompts = {case: golden.tensors.ids(f"{case}.prompt") for case in golden.cases(PROMPTS)}
    short = {case: ids for case, ids in prompts.items() if ids.shape[1] + 20 <= golden.config["seq_length"]}
    return dict(sorted(short.items(), key=lambda item: item[1].shape[1]))


@sets_with(PROMPTS)
def test_greedy_with_a_cache(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    for case in any_golden.cases(PROMPTS):
        prompt = any_golden.tensors.ids(f"{case}.prompt")
        margins = any_golden.tensors[f"{case}.greedy_top2_margin"].tolist()
        assert_same_choices(greedy(tiny_model, prompt), any_golden.tensors[f"{case}.greedy"].tolist(), margins)


@sets_with(PROMPTS)
def test_greedy_without_a_cache(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """Beyond seq_length results differ: without a cache, the NTK factor changes with each token."""
    tensors = any_golden.tensors
    for case in any_golden.cases(PROMPTS):
        prompt = tensors.ids(f"{case}.prompt")
        expected = tensors[f"{case}.greedy_nocache"].tolist()
        actual = greedy(tiny_model, prompt, use_cache=False)
        if f"{case}.greedy_nocache_top2_margin" in tensors:
            assert_same_choices(actual, expected, tensors[f"{case}.greedy_nocache_top2_margin"].tolist())
        else:
            assert actual == expected, case
        crosses = prompt.shape[1] <= tiny_model.config.seq_length < prompt.shape[1] + 20
        assert (expected != tensors[f"{case}.greedy"].tolist()) == crosses, case


@sets_with(PROMPTS)
@torch.no_grad()
def test_incremental_logits(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """Teacher forcing: logits after the prompt and after each recorded token, one at a time with a cache."""
    tensors = any_golden.tensors
    for case in any_golden.cases(PROMPTS):
        name, stride = tensors.strided(f"{case}.incremental_logits")
        output = tiny_model(input_ids=tensors.ids(f"{case}.prompt"), use_cache=True)
        steps = [output.logits[:, -1, ::stride]]
        for token in tensors[f"{case}.greedy"].tolist()[:-1]:
            output = tiny_model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            steps.append(output.logits[:, -1, ::stride])
        assert_close(torch.stack(steps, dim=1), tensors[name], LOGITS_ATOL, name)


@sets_with(r"G\.([^.]+)\.greedy")
def test_greedy_of_other_architectures(any_golden: Golden) -> None:
    tensors = any_golden.tensors
    described = any_golden.load_json("logits.json")["tensors"]
    for variant in any_golden.cases(r"G\.([^.]+)\.greedy"):
        model = QWenLMHeadModel.from_pretrained(any_golden.path / variant, dtype=torch.float32).eval()
        # "prompt = input_ids[0, :6]"; 10 without such a note
        length = re.search(r"input_ids\[0, :(\d+)\]", described[f"G.{variant}.greedy"].get("note", ""))
        prompt = tensors.ids(f"G.{variant}.input_ids")[:1, : int(length[1]) if length else 10]
        actual = greedy(model, prompt, eos_token_id=None, pad_token_id=0)
        assert actual == tensors[f"G.{variant}.greedy"].tolist(), variant


def test_left_padded_batch_generates_as_each_prompt_alone(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    prompts = prompts_within_seq_length(any_golden)
    rows = [ids[0] for ids in prompts.values()]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    assert 0 in mask
    output = tiny_model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=1.0)
    for row, case in zip(output[:, width:].tolist(), prompts, strict=True):
        assert_same_choices(row, tensors[f"{case}.greedy"].tolist(), tensors[f"{case}.greedy_top2_margin"].tolist())


def test_single_left_padded_prompt_generates_as_unpadded(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """The original dropped the mask of a batch of one."""
    case, prompt = next(iter(prompts_within_seq_length(any_golden).items()))
    ids = torch.nn.functional.pad(prompt, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (5, 0))
    output = tiny_model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=1.0)
    margins = any_golden.tensors[f"{case}.greedy_top2_margin"].tolist()
    assert_same_choices(output[0, ids.shape[1] :].tolist(), any_golden.tensors[f"{case}.greedy"].tolist(), margins)


def test_stop_words(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """After a stop word of one or more tokens the end token is forced."""
    chosen = any_golden.tensors["D1.greedy"].tolist()
    recorded = {key: ids for key, ids in any_golden.notes.items() if key.startswith("D1 stop_words_ids=")}
    assert recorded
    for key, expected in recorded.items():
        # "[[g[3],g[4]]]": tokens of the greedy continuation
        words = [
            [chosen[int(index)] for index in re.findall(r"g\[(\d+)\]", word)]
            for word in re.findall(r"\[((?:g\[\d+\],?)+)\]", key)
        ]
        assert words, key
        prompt = any_golden.tensors.ids("D1.prompt")
        assert greedy(tiny_model, prompt, stop_words_ids=words) == expected, key


def test_repetition_penalty(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    expected = any_golden.notes["D1 greedy, repetition_penalty 1.1, top_p from generation_config ignored"]
    prompt = any_golden.tensors.ids("D1.prompt")
    assert tiny_model.generation_config.repetition_penalty == 1.1
    assert greedy(tiny_model, prompt, repetition_penalty=1.1) == expected


def test_end_tokens_with_stop_words(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """Any token of a list of end tokens ends the text; after a stop word the last of them is forced."""
    prompt = any_golden.tensors.ids("D1.prompt")
    chosen = any_golden.tensors["D1.greedy"].tolist()
    first, later = [index for index in range(4, len(chosen)) if chosen.index(chosen[index]) == index][:2]
    end = any_golden.load_json("tokenizer.json")["attributes"]["eod_id"]
    assert greedy(tiny_model, prompt, eos_token_id=[chosen[first], end]) == chosen[: first + 1]
    word = chosen[first - 1 : first + 1]
    stopped = greedy(tiny_model, prompt, eos_token_id=[chosen[later], end], stop_words_ids=[word])
    assert stopped == [*chosen[: first + 1], end]


def test_beam_search(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    prompt = any_golden.tensors.ids("D1.prompt")
    assert greedy(tiny_model, prompt, num_beams=3) == any_golden.notes["D1 beam search 3"]


def test_generation_settings_of_the_checkpoint(golden_small: Path) -> None:
    folder = golden_small / "tiny-qwen-small"
    model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    written = json.loads((folder / "generation_config.json").read_text())
    for name in ("eos_token_id", "pad_token_id", "max_new_tokens", "top_k", "top_p", "repetition_penalty", "do_sample"):
        assert getattr(model.generation_config, name) == written[name], name
    assert (model.generation_config.chat_format, model.generation_config.max_window_size) == ("chatml", 6144)
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        answers.append(model.generate(torch.tensor([[1, 2, 3]]), eos_token_id=None)[0].tolist())
    assert [len(answer) for answer in answers] == [3 + written["max_new_tokens"]] * 2
    assert answers[0] != answers[1], "sampled"


CHAT = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.0}


def has_one_more_token(original: str, ours: str) -> bool:
    """Return whether ours extends the original's answer, which lost its last token without a stop token."""
    return ours.startswith(original) and len(ours) > len(original)


def test_chat(tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer, any_golden: Golden) -> None:
    recorded = any_golden.notes["chat greedy"]
    first, second = recorded["first"], recorded["second"]

    response, history = tiny_model.chat(tiny_tokenizer, first["query"], first["history"], **CHAT)
    assert has_one_more_token(first["response"], response)
    assert history == [(first["query"], response)]

    # The recorded history contains the original's shortened answer.
    before = [tuple(turn) for turn in second["history"]]
    response, history = tiny_model.chat(tiny_tokenizer, second["query"], before, system=second["system"], **CHAT)
    assert has_one_more_token(second["response"], response)
    assert history == [*before, (second["query"], response)]
    assert before == [tuple(turn) for turn in second["history"]], "the caller's history is unchanged"


def test_chat_query_shortened_by_normalisation(tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer) -> None:
    """The original cut that many characters off the answer."""
    query = "a café in Göteborg"
    decomposed = unicodedata.normalize("NFD", query)
    assert len(decomposed) == len(query) + 2
    answer, _ = tiny_model.chat(tiny_tokenizer, query, None, **CHAT)
    answer_to_decomposed, history = tiny_model.chat(tiny_tokenizer, decomposed, None, **CHAT)
    assert answer_to_decomposed == answer != ""
    assert history == [(decomposed, answer)]


def test_chat_ends_at_given_stop_words(
    tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer, any_golden: Golden
) -> None:
    query = any_golden.notes["chat greedy"]["first"]["query"]
    full, _ = tiny_model.chat(tiny_tokenizer, query, None, **CHAT)
    _, context = make_context(tiny_tokenizer, query, None, system="You are a helpful assistant.")
    third = greedy(tiny_model, torch.tensor([context]))[2]
    short, _ = tiny_model.chat(tiny_tokenizer, query, None, stop_words_ids=[[third]], **CHAT)
    assert full.startswith(short) and len(short) < len(full)
    assert short.endswith(tiny_tokenizer.decode([third]).strip())


def test_chat_with_a_base_model_is_refused(tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer) -> None:
    settings = deepcopy(tiny_model.generation_config)
    settings.chat_format = "raw"
    with pytest.raises(ValueError, match="'raw'"):
        tiny_model.chat(tiny_tokenizer, "hi", None, generation_config=settings)
    with pytest.raises(ValueError, match="'raw'"):
        next(tiny_model.chat_stream(tiny_tokenizer, "hi", None, generation_config=settings))


def test_errors_in_the_thread_of_chat_stream_are_raised(
    tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer
) -> None:
    with pytest.raises(ValueError, match="stop_words_ids"):
        list(tiny_model.chat_stream(tiny_tokenizer, "hi", None, stop_words_ids=[[-1]], **CHAT))


def test_chat_stream_ends_with_the_answer_of_chat(
    tiny_model: QWenLMHeadModel, tiny_tokenizer: QWenTokenizer, any_golden: Golden
) -> None:
    query = any_golden.notes["chat greedy"]["first"]["query"]
    texts = list(tiny_model.chat_stream(tiny_tokenizer, query, None, **CHAT))
    assert len(texts) > 10
    response, _ = tiny_model.chat(tiny_tokenizer, query, None, **CHAT)
    assert texts[-1] == response
    # Before it, as in the original, without control tokens and incomplete characters, which chat() contains.
    growing = texts[: CHAT["max_new_tokens"]]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(growing))
    assert growing[-1].strip() == re.sub(r"<\|\w+\|>|\ufffd", "", response)
    recorded = any_golden.notes.get("chat_stream top_k=1 (partial strings)")
    if recorded:
        assert growing == recorded
