"""Which changes are proposed, in which order, and what is said if none helps. A formula replaces the rehearsal."""

from __future__ import annotations

from typing import Any

import pytest

from planning import expectation
from planning.advice import advise, changes_of
from planning.devices import DEVICES, GIB, RESERVE_GIB
from planning.expectation import Expectation, Machine, Planner
from planning.memory import Moment
from planning.rehearsal import BatchShape, ParameterSize, Rehearsal
from planning.report import gib as size_text
from planning.report import render, to_json
from tests.models import TINY
from training.config.args import RunArguments
from training.config.parsing import parse_args

WEIGHTS, ROW = 8, 4  # GiB: all weights, activations of a row without checkpointing


def rehearse(args: RunArguments, batch: BatchShape, **_: Any) -> Rehearsal:
    """8 GiB of weights in 16 bits, of which LoRA trains an eighth; 4 GiB of activations per row."""
    get, lora = args.trainer_value, args.lora
    kwargs = get("gradient_checkpointing_kwargs") or {}
    kept = 1 - 0.75 / kwargs.get("every_n_layers", 1) if get("gradient_checkpointing") else 1
    kept = 0.05 if kwargs.get("offload") else kept
    width = 1 if args.options.pure_bf16 or lora.use_lora else 2
    trained = WEIGHTS / 8 if lora.use_lora else WEIGHTS * width
    if lora.use_lora and lora.trainable_embeddings == "full":
        trained *= 2
    state = trained * (0.5 if "8bit" in get("optim") else 2)
    sizes = {
        "weights": WEIGHTS * width / (4 if lora.q_lora else 1), "adapter": trained if lora.use_lora else 0,
        "gradients": trained, "optimizer": state, "activations": ROW * kept * len(batch.lengths),
    }  # fmt: skip
    components = {name: int(size * GIB) for name, size in sizes.items() if size}
    name = "modules_to_save.weight" if lora.trainable_embeddings == "full" and lora.use_lora else "h.0.weight"
    tensors = (ParameterSize(name, int(trained * GIB / 2), int(trained * GIB), True, None),)
    return Rehearsal(
        peak_bytes=sum(components.values()), components=components, peak_at="backward",
        moments={"backward": Moment("backward", "", components)}, resident=components, tensors=tensors,
        flops_forward=10**15, flops_backward=2 * 10**15, parameters=4 * GIB, trained_parameters=GIB, seconds_taken=1.0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectation, "rehearse", rehearse)


def plan(gib: float, *words: object, gpus: int = 1) -> tuple[Planner, Expectation]:
    flags = ["--model_name_or_path", TINY, "--model_max_length", 64, "--plan", "--bf16", *words]
    planner = Planner(Machine(DEVICES["A100"], gib + RESERVE_GIB, gpus), hidden_size=32)
    return planner, planner.expect(parse_args(list(map(str, flags))))


def proposals(gib: float, *words: object, gpus: int = 1) -> list[tuple[str, ...]]:
    return [proposal.changes for proposal in advise(*plan(gib, *words, gpus=gpus)).proposals]


LORA = ("--use_lora", "--trainable_embeddings", "none", "--gradient_checkpointing", "False")


def test_what_fits_is_said_to_fit() -> None:
    assert plan(20, *LORA)[1].fits and not plan(19, *LORA)[1].fits  # 8 + 4 + 2 x 4


def test_fewer_rows_come_first_and_keep_the_rows_of_a_step() -> None:
    """The run takes 20 GiB; with one row it takes 16."""
    first, *others = proposals(16, *LORA)
    assert first == ("--per_device_train_batch_size 1 --gradient_accumulation_steps 16",)
    assert all(change[0].startswith("--gradient_checkpointing") for change in others) and len(others) == 2


def test_an_odd_number_of_rows_is_divided_too() -> None:
    changes = [change.flags for change in changes_of(plan(1, *LORA, "--per_device_train_batch_size", 9)[1])]
    assert changes[:2] == [
        "--per_device_train_batch_size 3 --gradient_accumulation_steps 24",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 72",
    ]


def test_checkpointing_of_some_blocks_is_proposed_before_that_of_all() -> None:
    changes = [change.flags for change in changes_of(plan(1, *LORA)[1]) if change.kind in ("checkpointing", "offload")]
    assert changes == [
        "--gradient_checkpointing --gradient_checkpointing_kwargs '{\"every_n_layers\": 4}'",
        "--gradient_checkpointing --gradient_checkpointing_kwargs '{\"every_n_layers\": 2}'",
        "--gradient_checkpointing",
        "--gradient_checkpointing --gradient_checkpointing_kwargs '{\"offload\": true}'",
    ]


def test_checkpointing_that_is_on_is_not_proposed_again() -> None:
    on = ("--use_lora", "--trainable_embeddings", "none")
    changes = [change.flags for change in changes_of(plan(1, *on)[1]) if change.kind in ("checkpointing", "offload")]
    assert changes == ["--gradient_checkpointing_kwargs '{\"offload\": true}'"]


def test_a_change_that_cannot_help_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 GiB of weights, adapter and state stay whatever the rows; all engines share a rehearsal."""
    rehearsed: list[RunArguments] = []

    def note(args: RunArguments, batch: BatchShape, **_: Any) -> Rehearsal:
        rehearsed.append(args)
        return rehearse(args, batch)

    planner, base = plan(11, *LORA)
    monkeypatch.setattr(expectation, "rehearse", note)
    advice = advise(planner, base)
    assert advice.proposals and "GPUs" in advice.proposals[0].changes[0]
    assert [(args.lora.q_lora, args.options.pure_bf16) for args in rehearsed] == [(True, False), (False, True)]


def test_embeddings_are_proposed_as_rows_only_where_they_train_in_full() -> None:
    texts = [change.flags for change in changes_of(plan(1, *LORA)[1])]
    assert "--trainable_embeddings chatml_tokens" not in texts and "--q_lora" in texts
    full = ("--use_lora", "--trainable_embeddings", "full")
    assert "--trainable_embeddings chatml_tokens" in [change.flags for change in changes_of(plan(1, *full)[1])]


def test_all_parameters_are_proposed_in_fewer_bits_and_never_as_q_lora() -> None:
    kinds = {change.kind for change in changes_of(plan(1)[1])}
    assert {"optim", "pure_bf16", "engine"} <= kinds and "q_lora" not in kinds


def test_several_gpus_divide_the_state() -> None:
    """Full training takes 64 GiB and activations; a quarter of them fits on each of four GPUs with ZeRO-3 or FSDP2."""
    assert any(
        "zero3" in text for change in proposals(35, "--per_device_train_batch_size", 1, gpus=4) for text in change
    )


def test_changes_are_combined_if_none_of_them_is_enough_alone() -> None:
    """Rows alone leave 12 + 4 GiB, Q-LoRA alone 6 + 8."""
    [changes] = proposals(7.9, *LORA, gpus=1)[:1]
    assert len(changes) > 1 and changes[0].startswith("--per_device_train_batch_size 1")


def test_a_model_that_no_change_makes_fit_is_said_in_one_line_with_the_smallest_figure() -> None:
    planner, base = plan(0.001, *LORA)
    advice = advise(planner, base)
    assert advice.proposals == () and advice.smallest.share.peak_bytes < base.share.peak_bytes
    last = render(base, "title", advice)[-1]
    assert last.startswith("No change makes it fit into 1.001 GiB: the least is ") and "\n" not in last
    assert last.endswith("more --gpus or a smaller --model_max_length or --lora_r")


def test_sizes_of_a_table_have_one_unit() -> None:
    assert [size_text(size, peak=3 * GIB) for size in (3 * GIB, GIB / 512)] == ["3.00 GiB", "<0.01 GiB"]
    assert [size_text(size, peak=GIB / 4) for size in (GIB / 4, GIB / 512)] == ["256.00 MiB", "2.00 MiB"]


def test_the_table_has_the_peak_its_components_and_the_time_at_the_stated_share() -> None:
    _, run = plan(80, *LORA)
    text = "\n".join(render(run, "title", None))
    assert "20.00 GiB of 81 GiB: fits" in text and "activations 8.00 GiB" in text
    assert "192 s per step at 40% (--share 0.4) of 312 TFLOP/s" in text  # 8 x 3e15 / (0.4 x 312e12)


def test_json_has_every_figure() -> None:
    planner, base = plan(16, *LORA)
    values = to_json(base, "title", advise(planner, base), "command")
    assert values["run"]["peak_bytes"] == 20 * GIB and not values["run"]["fits"]
    assert values["proposals"][0]["fits"] and values["proposals"][0]["peak_bytes"] == 16 * GIB
    assert values["run"]["moments_of_one_process"]["backward"]["weights"] == 8 * GIB
