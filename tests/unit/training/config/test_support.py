"""What becomes of every flag of transformers: each of ``--help_all`` works, has no effect, or is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from errors import ConfigError
from tests.commands import Recorder, finetune_here
from tests.models import TINY, write_conversations
from training.checks import check_args
from training.config.optimizers import OPTIMIZERS
from training.config.parsing import parse_args
from training.config.schedules import SCHEDULES
from training.config.support import NO_EFFECT, OBJECTS, REFUSED, WORKS
from training.config.trainer_flags import trainer_flags, transformers_flags
from training.training_arguments import build_training_arguments

# Values of flags, tried in a short run each: every line is one run.
RUNS = {
    "optimizer": "--learning_rate 1e-3 --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-6 "
    "--optim adamw_torch --max_grad_norm 0.5 --warmup_steps 1 --lr_scheduler_type cosine_with_min_lr "
    '--lr_scheduler_kwargs {"min_lr":1e-5} --label_smoothing_factor 0.1 --seed 3 --data_seed 4 --output_dir {out}',
    "arguments of the optimizer": "--optim sgd --optim_args momentum=0.9,nesterov=true --neftune_noise_alpha 5 "
    "--num_train_epochs 1 --dataloader_drop_last --average_tokens_across_devices False --torch_empty_cache_steps 1",
    "precision and memory": "--bf16 --gradient_checkpointing --gradient_checkpointing_kwargs "
    '{"every_n_layers":2} --per_device_train_batch_size 2 --gradient_accumulation_steps 2 '
    '--accelerator_config {"non_blocking":true} --dataloader_pin_memory False --use_cpu',
    "logging": "--logging_steps 1 --logging_strategy steps --logging_first_step --log_level error "
    "--log_level_replica error --log_on_each_node False --include_num_input_tokens_seen non_padding --run_name here "
    "--report_to none --debug underflow_overflow --disable_tqdm False --local_rank 0",
    "evaluation": "--eval_data_path {data} --eval_strategy steps --eval_steps 1 --eval_delay 1 --eval_on_start "
    "--per_device_eval_batch_size 3 --metric_for_best_model token_accuracy --greater_is_better True "
    "--load_best_model_at_end --save_strategy steps --save_steps 1 --save_total_limit 1 --save_on_each_node",
    "saving": "--save_strategy epoch --save_only_model --train_sampling_strategy sequential --ignore_data_skip "
    "--ddp_timeout 60 --ddp_find_unused_parameters False --ddp_bucket_cap_mb 5 --ddp_broadcast_buffers False "
    "--ddp_static_graph False",
}
# Where the other flags are tried.
ELSEWHERE = {
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
         "dataloader_multiprocessing_context"), "test_workers",
    ),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "test_torch_compile"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "tests/recipe/test_engines.py"),
    "resume_from_checkpoint": "tests/recipe/test_resume.py",
    "full_determinism": "test_full_determinism",
    "optim_target_modules": "test_every_optimizer_trains_or_is_refused_before_loading, with its packages",
    "auto_find_batch_size": "test_longest_batch",
    "fp16": "needs a GPU",
    "tf32": "needs a GPU",
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "needs a service of trackio"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "train.json")


def command(data: Path, output: Path, *flags: object) -> list[object]:
    return ["--model_name_or_path", TINY, "--data_path", data, "--output_dir", output, *flags]


def train(data: Path, output: Path, *flags: object) -> Recorder:
    """Train two steps, unless the flags say otherwise; every loss must be finite."""
    common = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--save_strategy", "no")
    log = finetune_here(*command(data, output, "--max_steps", 2, *common, *flags))
    assert log.losses() and all(map(math.isfinite, log.losses()))
    return log


def faults(data: Path, output: Path, *flags: object) -> str:
    """Return the message that refuses the flags before anything is loaded; empty if nothing does."""
    try:
        check_args(parse_args([str(word) for word in command(data, output, *flags)]))
    except ConfigError as error:
        return str(error)
    return ""


def test_every_flag_of_the_installed_transformers_has_a_row() -> None:
    rows = [*WORKS, *NO_EFFECT, *REFUSED]
    assert len(rows) == len(set(rows))
    assert set(trainer_flags()) - set(rows) == set()
    tried = {word.removeprefix("--") for words in RUNS.values() for word in words.split() if word.startswith("--")}
    assert set(WORKS) - tried - ELSEWHERE.keys() == {"max_steps"}  # which every run has


@pytest.mark.parametrize("name", RUNS)
def test_flags_that_work(name: str, data: Path, tmp_path: Path) -> None:
    pairs = [f"--{pair}".split() for pair in RUNS[name].removeprefix("--").split(" --")]
    words = [
        word for pair in pairs if pair[0].removeprefix("--") in trainer_flags() or "{" in pair[-1] for word in pair
    ]
    words = [word.replace("{data}", str(data)).replace("{out}", str(tmp_path)) for word in words]
    train(data, tmp_path / "run", *words)


def other_value(name: str) -> str:
    """Return a value of a flag that is not its default."""
    flag = trainer_flags()[name]
    for kind, value in (("bool", str(not flag.default)), ("int", "7"), ("float", "7"), ("dict", "{}"), ("str", "x")):
        if kind in flag.kinds:
            return next((choice for choice in flag.choices if choice != flag.default), value)
    return "loss"


@pytest.mark.parametrize("name", [name for name in NO_EFFECT if name in trainer_flags()])
def test_a_flag_without_effect_is_named_and_not_passed_on(
    name: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = command(data, tmp_path / "new", f"--{name}", other_value(name))
    args = parse_args([str(word) for word in words])
    with caplog.at_level("WARNING", "training"):
        check_args(args)
    lines = [record.getMessage() for record in caplog.records]
    is_harmless = name == "do_train"
    assert lines == ([] if is_harmless else [f"--{name} has no effect: {NO_EFFECT[name]}"])
    default = build_training_arguments(parse_args([str(word) for word in command(data, tmp_path / "new")]))
    assert getattr(build_training_arguments(args), name) == getattr(default, name)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in trainer_flags()])
def test_a_refused_flag_is_refused_before_loading(name: str, data: Path, tmp_path: Path) -> None:
    message = faults(data, tmp_path / "new", f"--{name}", other_value(name))
    assert message.startswith(f"--{name} {other_value(name)} is not supported: {REFUSED[name].reason}. ")
    assert faults(data, tmp_path / "new", f"--{name}", str(trainer_flags()[name].default)) == ""


# ---------------------------------------------------------------------------------------- optimizers and schedules


@pytest.mark.parametrize("name", transformers_flags()["optim"].choices)
def test_every_optimizer_trains_or_is_refused_before_loading(name: str, data: Path, tmp_path: Path) -> None:
    flags: list[object] = ["--optim", name, "--learning_rate", 1e-3, "--lr_scheduler_type", "constant"]
    optimizer = OPTIMIZERS[name]
    if optimizer.needs_targets:
        flags += ["--optim_target_modules", "all-linear", "--optim_args", "rank=4"]
    if name in ("schedule_free_adamw", "schedule_free_sgd"):
        # They would divide by a fraction of the steps, which is the default.
        assert f"--optim {name} warms up over whole steps" in faults(data, tmp_path / "new", *flags)
        flags += ["--warmup_steps", 1]
    message = faults(data, tmp_path / "new", *flags)
    package, module = optimizer.package
    missing = bool(module) and importlib.util.find_spec(module) is None
    if optimizer.refused or missing or (optimizer.needs_gpu and not torch.cuda.is_available()):
        assert f"--optim {name} " in message, message
        assert optimizer.refused or not missing or package in message
        return
    assert message == ""
    if optimizer.compiles:  # for a minute
        return
    losses = train(data, tmp_path / "run", *flags, "--max_steps", 4).losses()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", transformers_flags()["lr_scheduler_type"].choices)
def test_every_schedule_trains(name: str, data: Path, tmp_path: Path) -> None:
    schedule, flags = SCHEDULES[name], list[object](["--lr_scheduler_type", name, "--learning_rate", 1e-3])
    if schedule.one_of:
        key = schedule.one_of[0]
        assert f"--lr_scheduler_type {name} needs {key}. Give --lr_scheduler_kwargs" in faults(data, tmp_path, *flags)
        flags += ["--lr_scheduler_kwargs", f'{{"{key}": {1 if key.startswith("num") else 1e-6}}}']
    if schedule.needs_evaluations:
        assert f"--lr_scheduler_type {name} needs evaluations. " in faults(data, tmp_path, *flags)
        flags += ["--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", 1]
        flags += ["--lr_scheduler_kwargs", '{"min_lr": 1e-6}']
        rates = [row["lr"] for row in train(data, tmp_path / "run", *flags).rows if "lr" in row]
    else:
        assert faults(data, tmp_path / "new", *flags) == ""
        args = build_training_arguments(parse_args([str(word) for word in command(data, tmp_path, *flags)]))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 2, 5, args.lr_scheduler_kwargs)
        rates = []
        for _ in range(5):
            optimizer.step()
            scheduler.step()
            rates += scheduler.get_last_lr()
    assert all(0 <= rate <= 1e-3 for rate in rates) and max(rates) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim adamw_torch --optim_args momentum=0.9",
         "--optim_args momentum=0.9: --optim adamw_torch has no argument momentum. It takes none: remove --optim_args"),
        ("--optim sgd --optim_args momentun=0.9", "--optim_args momentun=0.9: --optim sgd has no argument momentun "
         "(did you mean momentum?). It takes momentum, dampening, nesterov"),
        ("--optim sgd --optim_args momentum", "--optim_args momentum: 'momentum' is not name=value. "
         "Write name=value,name=value"),
        ("--optim sgd --optim_args momentum=much", "--optim_args momentum=much: momentum is 'much', not a number. "
         "Give a number"),
        ("--optim sgd --optim_args nesterov=true", "--optim_args nesterov=true: nesterov needs a momentum. "
         "Add momentum=0.9"),
        ("--optim rmsprop --optim_args centered=maybe", "--optim_args centered=maybe: centered is 'maybe', not true or "
         "false. Give true or false"),
        ("--optim lomo --max_grad_norm 1", "--optim lomo is not supported: it updates parameters within the backward "
         "pass, so gradients cannot be clipped, accumulated or checked for NaN, and a checkpoint lacks its state. "
         "Choose another optimizer"),
        ("--optim adamw_torch --optim_target_modules all-linear", "--optim_target_modules all-linear has no effect "
         "with --optim adamw_torch. Remove it, or choose galore_adamw or apollo_adamw"),
        ('--lr_scheduler_type constant --lr_scheduler_kwargs {"min_lr":0}', "--lr_scheduler_kwargs: "
         "--lr_scheduler_type constant has no argument min_lr. Remove --lr_scheduler_kwargs"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycle":1}', "--lr_scheduler_kwargs: "
         "--lr_scheduler_type cosine has no argument num_cycle (did you mean num_cycles?). Known are num_cycles"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":"1"}', "--lr_scheduler_kwargs: num_cycles is "
         '"1", not a number from 1e-09 to 1e+09. Correct it'),
        ('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0,"min_lr_rate":0}',
         "--lr_scheduler_kwargs: min_lr and min_lr_rate exclude each other. Give one of them"),
        ("--lr_scheduler_type polynomial --learning_rate 1e-8", "--lr_scheduler_type polynomial: its lowest rate, "
         "lr_end 1e-07, is above --learning_rate 1e-08. Give --lr_scheduler_kwargs '{\"lr_end\": 1e-09}'"),
        ("--eval_strategy steps --eval_split 0.5 --greater_is_better True", "--greater_is_better True selects the "
         "worst model: the best loss is the lowest. Remove --greater_is_better"),
        ("--dataloader_persistent_workers", "--dataloader_persistent_workers needs --dataloader_num_workers. "
         "Give 1 or more workers"),
        ("--seed -1", "--seed -1 is out of range. Give 0 to 4294967295"),
        ('--gradient_checkpointing_kwargs {"every":2}', "--gradient_checkpointing_kwargs: there is no setting every. "
         f"Known are {', '.join(OBJECTS['gradient_checkpointing_kwargs'])}"),
        ('--accelerator_config {"split_batches":true}', "--accelerator_config: split_batches is true, not false (leave "
         "it out). Correct it"),
        ("--torch_compile_backend tvm", "--torch_compile_backend tvm is not supported for training. "
         "Give one of inductor, aot_eager, eager, cudagraphs"),
        ("--torch_compile_mode fast", "--torch_compile_mode fast is unknown. "
         "Give one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"),
    ],
)  # fmt: skip
def test_arguments_that_transformers_would_refuse_late_or_ignore(
    flags: str, message: str, data: Path, tmp_path: Path
) -> None:
    assert faults(data, tmp_path / "new", *flags.split()) == message


def test_torch_compile_gives_the_losses_of_a_run_without_it(data: Path, tmp_path: Path) -> None:
    """With the lean loss, which is not compiled itself. inductor would compile C++ for a minute."""
    flags: tuple[Any, ...] = ("--max_steps", 1, "--gradient_checkpointing", "False")
    compiled = train(data, tmp_path / "compiled", "--torch_compile_backend", "eager", *flags).losses()
    assert compiled == pytest.approx(train(data, tmp_path / "plain", *flags).losses(), rel=1e-4)


def test_inductor_without_a_compiler_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    message = faults(data, tmp_path / "new", "--torch_compile", "--use_cpu")
    assert message == (
        "--torch_compile True needs a C++ compiler (g++), which is not installed. Install it, or remove the flag"
    )


def test_workers(data: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path / "run", "--dataloader_num_workers", 1, "--dataloader_persistent_workers",
        "--dataloader_prefetch_factor", 2, "--dataloader_multiprocessing_context", "fork",
    )  # fmt: skip


def test_full_determinism(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "0")  # restored after the test
    try:
        losses = [train(data, tmp_path / run, "--full_determinism").losses() for run in ("one", "two")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1]


def test_schedule_free_optimizers_are_refused_with_deepspeed(data: Path, tmp_path: Path) -> None:
    """It never switches them between their forms for training and for evaluation."""
    flags = ("--optim", "schedule_free_adamw", "--deepspeed", '{"zero_optimization": {"stage": 2}}')
    message = (
        "--optim schedule_free_adamw is not supported with --deepspeed. Remove --deepspeed. Choose another optimizer"
    )
    assert message in faults(data, tmp_path / "new", *flags)
