"""Two processes learn what one does."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import finetune_here, logged_losses, names_in, read_json, read_log, run_well
from tests.models import CONVERSATIONS, TINY, write_conversations


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_ranks_of_two_equal_one_rank_of_four(tmp_path: Path, mode: str) -> None:
    """Ragged conversations, so that the ranks' shares differ in targets; as many as fill the last step."""
    data = write_conversations(tmp_path / "train.json")
    held_out = write_conversations(tmp_path / "eval.json", CONVERSATIONS[:4])

    def arguments(output: str, batch: int) -> list[object]:
        lora = ["--use_lora", "--lora_dropout", 0] if mode == "lora" else []
        return [
            "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", held_out, "--output_dir",
            tmp_path / output, "--per_device_train_batch_size", batch, "--num_train_epochs", 2, "--learning_rate", 1e-3,
            "--logging_steps", 1, "--save_strategy", "no", "--eval_strategy", "epoch",
            "--per_device_eval_batch_size", batch, *lora,
        ]  # fmt: skip

    finetune_here(*arguments("one", 4))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    result = run_well(*torchrun, "finetune.py", *arguments("two", 2))
    assert result.stderr.count("INFO Fine-tuning") == 1  # the first process speaks for all

    one, two = tmp_path / "one", tmp_path / "two"
    assert len(logged_losses(one)) == 4
    assert logged_losses(two) == pytest.approx(logged_losses(one), rel=1e-5)
    assert logged_losses(two, "eval_loss") == pytest.approx(logged_losses(one, "eval_loss"), rel=1e-5)
    assert [row["tokens"] for row in read_log(two)] == [row["tokens"] for row in read_log(one)]
    assert names_in(two) == names_in(one)
    file = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    expected, found = load_file(one / file), load_file(two / file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name
    summaries = [read_json(folder / "run_summary.json") for folder in (one, two)]
    assert summaries[0]["trained_tokens"] == summaries[1]["trained_tokens"]
    assert summaries[0]["steps"] == summaries[1]["steps"] == 4
