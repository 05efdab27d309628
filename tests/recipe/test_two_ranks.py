"""Two ranks train, and answer held-out questions, like one process with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoints.names import EVAL_SAMPLES
from tests.commands import PLAIN, finetune_here, free_port, logged_losses, names_in, read_json, read_log, run_well
from tests.models import CONVERSATIONS, TINY, write_conversations, write_later_checkpoint


@pytest.mark.parametrize(
    ("mode", "model_type"),
    [("full, joined", "qwen2"), ("weighted, packed", "qwen"), ("weighted, packed", "qwen3_5_text")],
)
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path, mode: str, model_type: str) -> None:
    """The conversations differ in length, so the ranks differ in targets; they fill the last step.

    Rank 1 gets one evaluation example less: none counts twice. In ``weighted, packed`` each answer has a weight of its
    own, so the ranks' sums of weights differ as well, and the packs do not fill the last step: of 7 (Qwen v1) rank 1
    gets one there, of 6 (Qwen3.5) none. In ``full, joined`` a rank computes one row where the other computes two, on a
    model with buffers, which DDP broadcasts.
    """
    is_full = mode == "full, joined"
    data = write_conversations(
        tmp_path / "train.json", [*CONVERSATIONS[:7], CONVERSATIONS[3] * 3] if is_full else CONVERSATIONS
    )
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    held_out = write_conversations(tmp_path / "eval.json", CONVERSATIONS[:3])
    for path in () if is_full else (data, held_out):
        records = json.loads(path.read_text(encoding="utf-8"))
        for number, record in enumerate(records):
            record["conversations"][1]["weight"] = 0.25 + number
        path.write_text(json.dumps(records), encoding="utf-8")

    def arguments(output: str, batch: int, accumulation: int) -> list[object]:
        lora = [] if is_full else ["--use_lora", "--lora_dropout", 0, "--packing", "--model_max_length", 80]
        return [
            *PLAIN, "--model_name_or_path", model, "--data_path", data, "--eval_data_path", held_out, "--output_dir",
            tmp_path / output, "--per_device_train_batch_size", batch, "--num_train_epochs", 2, "--learning_rate", 1e-3,
            "--logging_steps", 1, "--save_strategy", "no", "--eval_strategy", "epoch",
            "--per_device_eval_batch_size", batch * accumulation, "--gradient_accumulation_steps", accumulation,
            "--include_num_input_tokens_seen", "all", "--eval_generate", 3, "--eval_max_new_tokens", 4, *lora,
        ]  # fmt: skip

    finetune_here(*arguments("one", 4, 1))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    result = run_well(*torchrun, "finetune.py", *arguments("two", 1, 2) if is_full else arguments("two", 2, 1))
    assert result.stderr.count("INFO Fine-tuning") == 1  # rank 0 logs for all
    assert ("2 micro-batches of a step are joined to about 1." in result.stderr) == is_full

    one, two = tmp_path / "one", tmp_path / "two"
    assert len(logged_losses(one)) == 4
    assert logged_losses(two) == pytest.approx(logged_losses(one), rel=1e-5)
    assert logged_losses(two, "eval_loss") == pytest.approx(logged_losses(one, "eval_loss"), rel=1e-5)
    for name in ("token_accuracy", "eval_token_accuracy", "padding"):
        assert len(logged_losses(one, name)) >= 2
    for name in ("token_accuracy", "eval_token_accuracy"):
        assert logged_losses(two, name) == pytest.approx(logged_losses(one, name), abs=1e-6)
    assert (two / EVAL_SAMPLES).read_bytes() == (one / EVAL_SAMPLES).read_bytes()
    assert logged_losses(two, "eval_chrf") == logged_losses(one, "eval_chrf")
    for name in ("tokens", "samples"):
        assert [row[name] for row in read_log(two)] == [row[name] for row in read_log(one)]
    assert names_in(two) == names_in(one)
    file = "model.safetensors" if is_full else "adapter_model.safetensors"
    expected, trained = load_file(one / file), load_file(two / file)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (trained[name] - tensor).abs().max() <= 1e-5, name
    summaries = [read_json(folder / "run_summary.json") for folder in (one, two)]
    assert summaries[0]["trained_tokens"] == summaries[1]["trained_tokens"]
    assert summaries[0]["steps"] == summaries[1]["steps"] == 4
