"""Windows of a text, and their losses by variant: those of the original, of transformers, and of whole logits."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chat.template import CHATML_TEMPLATE
from checkpoints.rope import Yarn
from errors import ConfigError
from evaluation.losses import answer_losses, window_losses
from evaluation.perplexity import Windows, read_ids
from evaluation.variants import Variants, use_variant
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.golden import LOSS_ATOL, Golden, sets_with
from tests.models import TINY, change_json, copy_checkpoint, write_later_checkpoint

SEQ_LENGTH = 64
IDS = torch.randint(700, (2, 4 * SEQ_LENGTH), generator=torch.Generator().manual_seed(0))


def losses_of(model: Any, folder: Path, name: str, ids: torch.Tensor, yarn: Yarn | None = None) -> torch.Tensor:
    use_variant(model, Variants(folder, yarn=yarn).config(name))
    return torch.tensor(window_losses(model, ids), dtype=torch.float64)


@sets_with(r"C\.(ntk\d_logn\d)\.eval\.loss")
def test_losses_beyond_seq_length_are_those_of_the_original(any_golden: Golden) -> None:
    tensors = any_golden.tensors
    [ids], [labels] = tensors.ids("C.input_ids").tolist(), tensors.ids("C.labels").tolist()
    model = load_for_inference(load_checkpoint(str(any_golden.tiny)))
    names = {"ntk0_logn0": "plain", "ntk1_logn0": "ntk", "ntk0_logn1": "logn", "ntk1_logn1": "ntk+logn"}
    for case in any_golden.cases(r"C\.(ntk\d_logn\d)\.eval\.loss"):
        use_variant(model, Variants(any_golden.tiny).config(names[case]))
        [turns] = answer_losses(model, [{"input_ids": ids, "labels": labels}])
        loss = sum(turn.loss for turn in turns) / sum(turn.targets for turn in turns)
        assert loss == pytest.approx(tensors[f"C.{case}.eval.loss"].item(), abs=LOSS_ATOL), case


def test_variants_of_qwen_v1_are_its_own_forward_pass(tmp_path: Path) -> None:
    """As loaded with these switches: equal within ``seq_length``, different beyond it."""
    model = load_for_inference(load_checkpoint(str(TINY)))
    switches = {"plain": (False, False), "ntk": (True, False), "logn": (False, True), "ntk+logn": (True, True)}
    beyond = {}
    for name, (ntk, logn) in switches.items():
        folder = copy_checkpoint(tmp_path / name, use_dynamic_ntk=ntk, use_logn_attn=logn)
        own = load_for_inference(load_checkpoint(str(folder)))
        with torch.no_grad():
            loss = own(input_ids=IDS, labels=IDS).loss.item()
        beyond[name] = losses_of(model, TINY, name, IDS)
        assert beyond[name].sum().item() / (2 * (IDS.shape[1] - 1)) == pytest.approx(loss, rel=1e-6)
        within = losses_of(model, TINY, name, IDS[:, :SEQ_LENGTH])
        assert torch.equal(within, losses_of(model, TINY, "plain", IDS[:, :SEQ_LENGTH]))
    assert len({loss.sum().item() for loss in beyond.values()}) == 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_5_text"])
def test_variants_of_later_families_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = write_later_checkpoint(tmp_path / "model", model_type, CHATML_TEMPLATE)
    change_json(folder / "config.json", max_position_embeddings=SEQ_LENGTH)
    model, yarn = load_for_inference(load_checkpoint(str(folder))), Yarn(4.0)
    kinds = {
        "ntk": {"rope_type": "dynamic", "factor": 2.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SEQ_LENGTH},
        "plain": {"rope_type": "default"},
    }
    found = {}
    # From the longest to the shortest: transformers' dynamic embeddings would keep the factor of the longest.
    for length in (4 * SEQ_LENGTH, 2 * SEQ_LENGTH, SEQ_LENGTH):
        ids = IDS[:, :length]
        for name, kind in kinds.items():
            config = AutoConfig.from_pretrained(folder)
            config.rope_parameters = {**config.rope_parameters, **kind}
            theirs = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
            with torch.no_grad():
                loss = theirs(input_ids=ids, labels=ids).loss.item()
            found[name] = losses_of(model, folder, name, ids, yarn).sum().item() / (2 * (length - 1))
            assert found[name] == pytest.approx(loss, rel=1e-6), (name, length)
        assert (found["ntk"] == found["plain"]) == (length == SEQ_LENGTH)
        assert found["yarn"] != found["plain"]


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    model = load_for_inference(load_checkpoint(str(TINY)))
    torch.nn.init.zeros_(model.lm_head.weight)
    for loss in losses_of(model, TINY, "ntk+logn", IDS):
        assert math.exp(loss / (IDS.shape[1] - 1)) == pytest.approx(model.config.vocab_size)


def test_all_lengths_share_the_text_of_the_longest() -> None:
    ids = array("i", range(1000))
    windows = Windows(ids, [64, 300, 64], None, "text")
    assert (windows.lengths, windows.used) == ([64, 300], 900)
    assert (windows.count(300), windows.count(64)) == (3, 14)
    assert windows.batch(300, [2]).tolist() == [list(range(600, 900))]
    assert windows.batch(64, [0, 13])[1].tolist() == list(range(832, 896))
    assert Windows(ids, [64, 300], 1, "text").used == 300
    assert Windows(ids, [1000], 5, "text").used == 1000
    with pytest.raises(ConfigError, match=r"--lengths 1001: text has 1,000 tokens. Give lengths up to 1000, or a long"):
        Windows(ids, [2, 1001], None, "text")


def test_documents_are_joined_with_the_end_of_text(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(TINY))
    (tmp_path / "texts.jsonl").write_text('{"text": "One.\\n<|im_end|>"}\n{"text": "你好", "weight": 0.5}\n')
    encode, end = checkpoint.tokenizer.encode_plain, checkpoint.tokenizer.eod_id
    expected = [*encode("One.\n<|im_end|>"), end, *encode("你好"), end]
    assert read_ids(checkpoint, tmp_path / "texts.jsonl").tolist() == expected
    (tmp_path / "text.txt").write_text('{"text": "One."}')
    assert read_ids(checkpoint, tmp_path / "text.txt").tolist() == [*encode('{"text": "One."}'), end]


def test_scaled_config_is_the_variant_yarn(tmp_path: Path) -> None:
    folder = write_later_checkpoint(tmp_path / "model", "qwen2", CHATML_TEMPLATE)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert Variants(folder).names == ("plain", "ntk")
    change_json(folder / "config.json", rope_parameters={**scaling, "rope_theta": 5e5}, max_position_embeddings=2048)
    variants = Variants(folder)
    assert variants.names == ("plain", "ntk", "yarn")
    assert variants.settings("yarn")["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    assert variants.settings("plain") == {
        "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip
    assert variants.settings("ntk")["rope_parameters"]["rope_type"] == "dynamic"
    with pytest.raises(ConfigError, match=r"--rope_scaling yarn: config.json scales the rotary embeddings already"):
        Variants(folder, yarn=Yarn(2.0))
    change_json(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    with pytest.raises(ConfigError, match=r"config.json scales the rotary embeddings by 'linear'"):
        Variants(folder)
