"""Shares of a step under an engine, beside sums that are written out for a model of three tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import ConfigError
from planning.engines import Task, share_of
from planning.memory import Moment
from planning.rehearsal import ParameterSize, Rehearsal
from tests.golden import REPO
from training.config.engines import Engine, find_engine

# An embedding of 1,000 elements, two blocks of 300: all of them trained, in 16 bits.
SIZES = (1000, 300, 300)
TRAINED = sum(SIZES)
BF16 = 2


def rehearsal(is_trained: bool = True, width: int = BF16) -> Rehearsal:
    """A step whose activations are largest at the end of the forward pass."""
    tensors = tuple(
        ParameterSize(f"tensor {number}", size, width * size, is_trained, None if number == 0 else number - 1)
        for number, size in enumerate(SIZES)
    )
    resident = {
        "weights": width * TRAINED,
        "adapter": 0,
        "gradients": width * TRAINED,
        "optimizer": 2 * width * TRAINED,
    }
    kept = {"weights": width * TRAINED, "gradients": width * TRAINED, "optimizer": resident["optimizer"]}
    moments = {
        "loss": Moment("forward", "", {**kept, "activations": 500}),
        "optimizer": Moment("optimizer", "", {**kept, "workspace": 100}),
    }
    return Rehearsal(
        peak_bytes=moments["loss"].bytes, components=moments["loss"].components, peak_at="loss, forward",
        moments=moments, resident=resident, tensors=tensors, flops_forward=1, flops_backward=2, parameters=TRAINED,
        trained_parameters=TRAINED if is_trained else 0, seconds_taken=0.0,
    )  # fmt: skip


def config(name: str) -> dict[str, object]:
    value: dict[str, object] = json.loads((Path(REPO) / "finetune" / name).read_text())
    return value


def test_one_process_holds_what_was_rehearsed() -> None:
    share = share_of(Engine("none"), rehearsal(), Task(1, 10))
    assert share.peak_bytes == rehearsal().peak_bytes and share.sent_bytes == 0
    assert share.peak_at == "loss, forward"


def test_ddp_adds_buckets_of_all_gradients_and_reduces_them_once() -> None:
    share = share_of(Engine("ddp"), rehearsal(), Task(4, 10, is_half=True, accumulation=8))
    assert share.components["engine"] == BF16 * TRAINED
    assert share.peak_bytes == rehearsal().peak_bytes + BF16 * TRAINED
    assert share.sent_bytes == 2 * 3 / 4 * BF16 * TRAINED


def test_zero2_divides_gradients_and_state_and_keeps_a_partition_in_float32() -> None:
    """Bucket: 10 x 10 elements, twice because communication overlaps, and once as a copy; the embedding by itself."""
    engine = Engine("zero2", config("ds_config_zero2.json"))
    share = share_of(engine, rehearsal(), Task(4, 10, is_half=True, accumulation=8))
    partition = TRAINED // 4
    assert share.components == {
        "weights": BF16 * TRAINED,
        "gradients": 2 * BF16 * partition,
        "optimizer": 4 * partition + 8 * partition,
        "activations": 500,
        "engine": BF16 * (3 * 100 + 1000),
    }
    assert share.sent_bytes == 3 / 4 * BF16 * TRAINED * (2 * 8 + 1)


def test_zero2_offloads_gradients_and_state_to_the_host() -> None:
    engine = Engine("zero2", config("ds_config_zero2_offload.json"))
    share = share_of(engine, rehearsal(), Task(4, 10, is_half=True))
    assert not {"gradients", "optimizer"} & share.components.keys()
    assert share.host_bytes == TRAINED // 4 * (8 + 4 + 4 + BF16)


def test_zero3_divides_the_weights_but_small_ones() -> None:
    """A parameter of at most 10 x 40 elements stays whole; the other is gathered, and sent in both passes."""
    engine = Engine("zero3", config("ds_config_zero3.json"))
    share = share_of(engine, rehearsal(), Task(4, 40, is_half=True, accumulation=2))
    partition = TRAINED // 4
    assert share.components["weights"] == BF16 * (1000 // 4 + 300 + 300)
    assert share.components["gradients"] == BF16 * partition
    assert share.components["optimizer"] == 12 * partition
    assert share.components["engine"] == BF16 * (1000 + TRAINED)  # a bucket is no larger than what is trained
    assert share.sent_bytes == 3 / 4 * BF16 * 2 * (2 * TRAINED + TRAINED)


def test_zero3_with_offloading_leaves_only_what_is_gathered() -> None:
    engine = Engine("zero3", config("ds_config_zero3_offload.json"))
    share = share_of(engine, rehearsal(), Task(4, 40, is_half=True))
    assert share.components.keys() == {"activations", "engine"}
    assert share.host_bytes > 16 * TRAINED // 4


def test_fsdp2_divides_everything_and_gathers_two_blocks() -> None:
    engine = Engine("fsdp2", config("fsdp_config.json"))
    share = share_of(engine, rehearsal(), Task(4, 10, is_half=True))
    assert share.components == {
        "weights": 4 * TRAINED // 4,
        "gradients": 4 * TRAINED // 4,
        "optimizer": 8 * TRAINED // 4,
        "activations": 500,
        "engine": BF16 * (2 * 300 + 1000) + (BF16 + 4) * 300,
    }
    assert share.sent_bytes == 3 / 4 * (2 * BF16 * TRAINED + 4 * TRAINED)


def test_fsdp2_that_keeps_blocks_gathered_holds_all_of_them() -> None:
    engine = Engine("fsdp2", {"reshard_after_forward": False})
    share = share_of(engine, rehearsal(), Task(4, 10, is_half=True))
    assert share.components["engine"] == BF16 * TRAINED + (BF16 + 4) * 300


def test_state_of_8_bits_is_not_widened() -> None:
    task = Task(4, 10, is_half=True, keeps_state_small=True)
    share = share_of(Engine("zero2", config("ds_config_zero2.json")), rehearsal(), task)
    assert share.components["optimizer"] == 4 * TRAINED // 4 + 2 * BF16 * TRAINED // 4


def test_the_peak_moves_where_an_engine_makes_another_moment_the_largest() -> None:
    """One process needs most at the loss; ZeRO-2 without buckets in the update, for its gradients in float32."""
    engine = Engine("zero2", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1}})
    assert share_of(engine, rehearsal(), Task(2, 10, is_half=True)).peak_at == "optimizer"


def test_an_engine_without_formulas_is_refused_by_name() -> None:
    engine = find_engine({"deepspeed": {"train_batch_size": 8}})
    with pytest.raises(ConfigError, match=r'^--deepspeed {"train_batch_size": 8}: zero_optimization\.stage is 0'):
        share_of(engine, rehearsal(), Task(2, 10))
