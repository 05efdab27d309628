"""``python -m scripts.quantize``: perplexity, files, other libraries, training on the result, and refused arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import EncodeOptions, UnweightedExample
from loading.checkpoint import load_checkpoint, load_model
from quantize.calibration import draw_samples
from qwen_model.register import register_qwen
from scripts import make_tiny_qwen, quantize
from tests.commands import finetune_here, limited_file_size, names_in, read_json, run_here, run_well
from tests.golden import REPO
from tests.models import (
    TINY,
    change_json,
    copy_checkpoint,
    copy_in_bfloat16,
    write_conversations,
    write_later_checkpoint,
)

IDENTITY = REPO / "examples" / "identity.json"
FAMILIES = ("qwen", "qwen2", "qwen3")
# Largest allowed factor of the perplexity. 4 bits cost such a small model much, 8 bits nothing.
MAX_RATIO = {4: 1.6, 8: 1.01}


class Quantised(NamedTuple):
    """A folder written by the command, and the text it printed."""

    folder: Path
    output: str

    @property
    def perplexities(self) -> tuple[float, float]:
        match = re.search(
            r"perplexity: ([\d.]+) before, ([\d.]+) after, on the [\d,]+ answer tokens of \d", self.output
        )
        assert match, self.output
        return float(match[1]), float(match[2])


def write_base(folder: Path, family: str) -> Path:
    """Write a random model wide enough for every format: NF4 needs 64 inputs."""
    if family == "qwen":
        copy_checkpoint(folder, hidden_size=64, kv_channels=16, intermediate_size=256, initializer_range=0.1)
    else:
        write_later_checkpoint(folder, family)
        change_json(folder / "config.json", hidden_size=64, head_dim=16, intermediate_size=128)
    register_qwen()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train a tiny model of each family on the identity set, so that quantisation errors raise its perplexity."""
    folder, made = tmp_path_factory.mktemp("trained"), dict[str, Path]()

    def train(family: str) -> Path:
        if family not in made:
            base = write_base(folder / f"{family}-base", family)
            finetune_here(
                "--model_name_or_path", base, "--data_path", IDENTITY, "--output_dir", folder / family,
                "--max_steps", 150, "--per_device_train_batch_size", 8, "--learning_rate", 3e-3,
                "--lr_scheduler_type", "constant", "--save_strategy", "no",
            )  # fmt: skip
            made[family] = folder / family
        return made[family]

    return train


@pytest.fixture(scope="module")
def quantised(
    trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, int], Quantised]:
    """Quantise each combination once, in this process, with groups of 32."""
    folder, made = tmp_path_factory.mktemp("quantised"), dict[tuple[str, str, int], Quantised]()

    def make(family: str, format_: str, bits: int) -> Quantised:
        if (family, format_, bits) not in made:
            target = folder / f"{family}-{format_}-{bits}"
            group_size = [] if format_ == "nf4" else ["--group_size", 32]
            printed: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("builtins.print", lambda *values, **_: printed.extend(map(str, values)))
                code = run_here(
                    quantize.main,
                    "quantize",
                    [
                        *("--model_name_or_path", trained(family), "--data_path", IDENTITY, "--output_dir", target),
                        *("--format", format_, "--bits", bits, *group_size, "--samples", 60),
                    ],
                )
            assert code == 0, printed
            made[family, format_, bits] = Quantised(target, "\n".join(printed))
        return made[family, format_, bits]

    return make


@pytest.mark.parametrize(
    ("family", "format_", "bits"),
    [
        (family, *kind)
        if family == "qwen" or kind == ("gptq", 4)
        else pytest.param(family, *kind, marks=pytest.mark.long)
        for family in FAMILIES
        for kind in (("gptq", 4), ("gptq", 8), ("awq", 4), ("nf4", 4))
    ],
)
def test_perplexity_stays_low(
    quantised: Callable[[str, str, int], Quantised], family: str, format_: str, bits: int
) -> None:
    result = quantised(family, format_, bits)
    before, after = result.perplexities
    assert ("calibrated: on " in result.output) == (format_ != "nf4")
    assert before < 4, "the model was trained, so that the perplexity can rise"
    assert after < MAX_RATIO[bits] * before


@pytest.mark.parametrize("family", FAMILIES)
def test_printed_perplexities_are_those_of_the_folders(
    quantised: Callable[[str, str, int], Quantised], trained: Callable[[str], Path], family: str
) -> None:
    """Compute them again from the logits of the whole models, on the conversations held out with the same seed."""
    source, result = trained(family), quantised(family, "gptq", 4)
    samples = draw_samples(load_checkpoint(str(source)), [str(IDENTITY)], 60, EncodeOptions(), "auto", 42)
    for folder, printed in zip((source, result.folder), result.perplexities, strict=True):
        assert perplexity(folder, samples.held_out) == pytest.approx(printed, rel=1e-3)


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_report_says_what_quantising_cost(
    quantised: Callable[[str, str, int], Quantised], trained: Callable[[str], Path], format_: str
) -> None:
    result = quantised("qwen2", format_, 4)
    report = read_json(result.folder / "quantization_report.json")
    before, after, nearest = (report["perplexity"][name] for name in ("before", "after", "nearest"))
    assert (before, after) == pytest.approx(result.perplexities, abs=1e-4)
    change = report["change"]["after"]
    assert change["value"] == pytest.approx(after / before - 1)
    assert change["low"] < change["value"] < change["high"]
    assert f"change:     {change['value']:+.1%}, 95 % interval" in result.output
    assert f"rounded to nearest: {nearest / before - 1:+.1%}, 95 % interval" in result.output
    samples = draw_samples(load_checkpoint(str(trained("qwen2"))), [str(IDENTITY)], 60, EncodeOptions(), "auto", 42)
    assert report["held_out"] == {"conversations": 16, "answer_tokens": samples.held_out_tokens}
    assert "held-out conversations, too few for a certain figure: 2,000 are needed" in result.output
    worst = report["worst_layer"]
    assert report["layer_errors"][worst] == max(report["layer_errors"].values()) and len(report["layer_errors"]) == 14
    assert f"worst:      {worst}, whose outputs changed by " in result.output


@torch.no_grad()
def perplexity(folder: Path, examples: list[UnweightedExample]) -> float:
    model = load_model(load_checkpoint(str(folder)), torch.float32)
    losses: list[float] = []
    for example in examples:
        likelihoods = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].log_softmax(-1)
        targets = enumerate(example["labels"][1:])
        losses += [-float(likelihoods[i, target]) for i, target in targets if target != IGNORE_INDEX]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format_", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4), ("nf4", 4)])
def test_written_folder_is_a_complete_checkpoint(
    quantised: Callable[[str, str, int], Quantised],
    trained: Callable[[str], Path],
    family: str,
    format_: str,
    bits: int,
) -> None:
    source, folder = trained(family), quantised(family, format_, bits).folder
    tokenizer = {"qwen.tiktoken"} if family == "qwen" else {"tokenizer.json"}
    required = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} | tokenizer
    assert required <= set(names_in(folder))
    assert not [name for name in names_in(folder.parent) if "partial" in name]
    assert read_json(folder / "generation_config.json") == read_json(source / "generation_config.json")
    config = read_json(folder / "config.json")
    written = config.pop("quantization_config")
    assert config == read_json(source / "config.json")
    expected = {
        "gptq": {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": bits == 8},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }[format_]
    assert expected.items() <= written.items()
    old, new = load_checkpoint(str(source)), load_checkpoint(str(folder))
    assert new.quantization is not None and (new.quantization.method, new.quantization.bits) == (format_, bits)
    text = "What is <|im_end|>? 你好"
    assert new.tokenizer(text)["input_ids"] == old.tokenizer(text)["input_ids"]
    assert new.family == old.family


AGREEMENT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig
from qwen_model.register import register_qwen
from safetensors.torch import save_file

register_qwen()
torch.compiler.set_stance("force_eager")  # gptqmodel compiles each layer, which would take most of the time
target, *folders = sys.argv[1:]
logits = {}
for folder in folders:
    method, bits = folder.split("-")[-2:]
    # The plain layer; other layers of that library round the inputs to fewer bits.
    settings = GPTQConfig(int(bits), backend="gptq_torch") if method == "gptq" else AwqConfig(backend="torch_awq")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    kinds = {type(layer).__module__.split(".")[0] for layer in model.modules() if hasattr(layer, "qweight")}
    assert kinds == {"gptqmodel"}, kinds
    with torch.no_grad():
        logits[folder] = model(input_ids=torch.arange(3, 63)[None]).logits
save_file(logits, target)
"""


def test_gptqmodel_computes_the_same_logits(quantised: Callable[[str, str, int], Quantised], tmp_path: Path) -> None:
    """transformers with gptqmodel's float16 layers; in a separate process, as importing gptqmodel patches others."""
    kinds = [("qwen", "gptq", 4), ("qwen", "awq", 4), ("qwen2", "gptq", 8), ("qwen3", "awq", 4)]
    made = [quantised(*kind) for kind in kinds]
    run_well("-c", AGREEMENT, tmp_path / "logits.safetensors", *(each.folder for each in made))
    theirs = load_file(tmp_path / "logits.safetensors")
    assert len(theirs) == len(made) == 4
    for folder, logits in theirs.items():
        model = load_model(load_checkpoint(folder), torch.float32)
        with torch.no_grad():
            ours = model(input_ids=torch.arange(3, 63)[None]).logits
        assert (ours - logits).norm() / ours.norm() < 5e-3, folder


@pytest.mark.parametrize(("format_", "bits"), [("gptq", 4), ("awq", 4)])
def test_adapter_trains_on_the_result(
    quantised: Callable[[str, str, int], Quantised], tmp_path: Path, format_: str, bits: int
) -> None:
    run_log = finetune_here(
        "--model_name_or_path", quantised("qwen", format_, bits).folder, "--data_path", IDENTITY,
        "--output_dir", tmp_path / "adapter", "--use_lora", "--q_lora", "--trainable_embeddings", "none",
        "--max_steps", 30, "--per_device_train_batch_size", 8, "--learning_rate", 3e-3, "--logging_steps", 10,
        "--save_strategy", "no",
    )  # fmt: skip
    losses = [row["loss"] for row in run_log.trainer_state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0], losses
    assert "adapter_model.safetensors" in names_in(tmp_path / "adapter")


def test_defaults_on_the_command_line(tmp_path: Path) -> None:
    """On a model that is wide enough for groups of 128, in a separate process."""
    make_tiny_qwen.main(["--output", str(tmp_path / "model")])
    flags = ("--model_name_or_path", tmp_path / "model", "--data_path", IDENTITY, "--output_dir", tmp_path / "out")
    result = run_well("-m", "scripts.quantize", *flags, "--bits", "4", "--group_size", "128")
    count = len(read_json(IDENTITY))
    assert f"--samples 128: the data contains {count} conversations, {count - count // 4} calibrate" in result.stderr
    assert "Quantising:" not in result.stderr  # bars are for terminals
    before, after = Quantised(tmp_path / "out", result.stdout).perplexities
    assert after < 1.2 * before
    assert result.stdout.startswith(f"calibrated: on {count - count // 4} conversations, ")
    assert f"written:    {tmp_path / 'out'} (GPTQ, 4 bits, groups of 128)" in result.stdout
    noise = ("gptqmodel", "Traceback", "Warning")
    assert not [line for line in result.stderr.splitlines() if any(word in line for word in noise)]


def test_unquantised_tensors_keep_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = copy_in_bfloat16(tmp_path / "base")
    data = write_conversations(tmp_path / "data.json")
    flags = ("--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", "--format", "awq")
    assert run_here(quantize.main, "quantize", [*flags, "--group_size", 32]) == 0
    dtypes = {
        name.rpartition(".")[2]: tensor.dtype
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert dtypes["weight"] == dtypes["bias"] == torch.bfloat16
    assert dtypes["scales"] == torch.float16
    assert load_checkpoint(str(tmp_path / "out")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--bits", "8", "--format", "awq"],
            "--bits 8 is not supported with --format awq. Give --bits 4, or --format gptq",
        ),
        (["--bits", "8", "--format", "nf4"], "--bits 8 is not supported with --format nf4"),
        (["--bits", "3"], "--bits: invalid choice: 3"),
        (["--format", "nf4", "--group_size", "64"], "--group_size 64 has no effect with --format nf4. Remove it"),
        (["--group_size", "64"], "--group_size 64 does not divide the 32 inputs of attn.c_attn. Give --group_size 32"),
        (["--format", "nf4"], "--format nf4 needs layers with a multiple of 64 inputs on a CPU, attn.c_attn has 32"),
        (["--samples", "0"], "--samples 0 is too few"),
        (["--model_max_length", "0"], "--model_max_length 0 is not positive"),
        (["--group_size", "32", "--model_max_length", "100000"], "--model_max_length 100000 is more than the "),
        (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
        (["--group_size", "32", "--data_path", "none.json"], "--data_path none.json: there is no such file"),
        (
            ["--group_size", "32", "--model_max_length", "5"],
            "none of the conversations can be used, at least 2 are needed",
        ),
    ],
)
def test_invalid_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    given = ["--model_name_or_path", TINY, "--data_path", IDENTITY, "--output_dir", tmp_path / "out", *flags]
    assert run_here(quantize.main, "quantize", given) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quantize: error: ")]
    assert message in line
    assert names_in(tmp_path) == []


def test_quantised_model_is_refused(
    quantised: Callable[[str, str, int], Quantised], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantised("qwen2", "awq", 4).folder
    given = ["--model_name_or_path", source, "--data_path", IDENTITY, "--output_dir", tmp_path / "out"]
    assert run_here(quantize.main, "quantize", given) == 2
    error = capsys.readouterr().err
    assert f"{source}: its weights are already quantised (AWQ, 4 bits, groups of 32). Give the unquantised" in error
    assert names_in(tmp_path) == []


def test_output_folder_that_is_not_free_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    given = ["--model_name_or_path", TINY, "--data_path", "none.json", "--output_dir", tmp_path / "out"]
    assert run_here(quantize.main, "quantize", given) == 2
    # The missing data file is not reported.
    assert f"quantize: error: --output_dir {tmp_path / 'out'} is not empty" in capsys.readouterr().err
    assert names_in(tmp_path / "out") == ["notes.txt"]


def test_missing_library_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("checkpoints.model_config.importlib.util.find_spec", lambda name: None)
    base = write_base(tmp_path / "base", "qwen")
    given = ["--model_name_or_path", base, "--data_path", IDENTITY, "--output_dir", tmp_path / "out", "--format", "nf4"]
    assert run_here(quantize.main, "quantize", given) == 2
    assert "--format nf4 needs bitsandbytes, which is not installed. " in capsys.readouterr().err


def test_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--model_name_or_path",
        TINY,
        "--data_path",
        IDENTITY,
        "--output_dir",
        tmp_path / "out",
        "--group_size",
        32,
    ]
    with limited_file_size(20_000):
        assert run_here(quantize.main, "quantize", given) == 1
    assert "cannot write" in capsys.readouterr().err
    assert names_in(tmp_path) == []
