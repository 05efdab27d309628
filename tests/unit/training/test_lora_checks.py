"""The method of an adapter: values, names and combinations that are refused, with the fix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from tests.golden import SMALL
from tests.models import TINY, copy_checkpoint
from training.checks import check_args
from training.config.parsing import parse_args

INITS = "Choose from true, gaussian, orthogonal, pissa, olora, pissa_niter_N with N from 1 to 99"
DEEPSPEED = '{"zero_optimization": {"stage": %d}%s}'
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def check(tmp_path: Path, *flags: object, model: Path = TINY) -> None:
    valid = ["--model_name_or_path", model, "--data_path", SMALL / "train.json", "--output_dir", tmp_path / "new"]
    check_args(parse_args([str(flag) for flag in (*valid, "--use_lora", *flags)]))


def refuses(message: str, tmp_path: Path, *flags: object, model: Path = TINY) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check(tmp_path, *flags, model=model)


def save_adapter_config(folder: Path, **values: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["w1"], "bias": "none", **values}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_every_method_and_their_combinations_pass(tmp_path: Path) -> None:
    for init in ("true", "Gaussian", "orthogonal", "pissa", "pissa_niter_16", "OLoRA"):
        check(tmp_path, "--init_lora_weights", init)
    check(tmp_path, "--use_dora", "--use_rslora", "--loraplus_lr_ratio", 16, "--trainable_embeddings", "full")
    check(tmp_path, "--lora_rank_pattern", '{"h.0.attn.c_attn": 8, "w[12]": 4}', "--lora_alpha_pattern", '{"w1": 0.5}')
    check(tmp_path, "--packing", "--neftune_noise_alpha", 5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_lora_weights", "pisa"], f"--init_lora_weights pisa is unknown (did you mean pissa?). {INITS}"),
        (["--init_lora_weights", "pissa_niter_0"],
         f"--init_lora_weights pissa_niter_0 is unknown. {INITS}"),
        (["--init_lora_weights", "eva"],
         "--init_lora_weights eva is not supported: it reads activations of the training data before the first step. "
         f"{INITS}"),
        (["--init_lora_weights", "loftq"],
         "--init_lora_weights loftq is not supported: it changes the quantised weights, so the adapter would fit no "
         f"other copy of them. {INITS}"),
        (["--init_lora_weights", "false"],
         "--init_lora_weights false is not supported: B would begin at random, and the model as another one than its "
         f"base. {INITS}"),
        (["--init_lora_weights", "orthogonal", "--lora_r", 7],
         "--init_lora_weights orthogonal needs even ranks, not 7. Give 8, or another initialisation"),
        (["--init_lora_weights", "pissa", "--use_dora"],
         "--init_lora_weights pissa and --use_dora both change how a layer is computed. Give one of them"),
        (["--neftune_noise_alpha", "1e300"],
         "--neftune_noise_alpha 1e+300 is out of range. Give 0 to 1000, such as 5"),
        (["--loraplus_lr_ratio", 0],
         "--loraplus_lr_ratio 0 is out of range. Give more than 0, such as 16; 1 is off"),
        (["--loraplus_lr_ratio", -2],
         "--loraplus_lr_ratio -2 is out of range. Give more than 0, such as 16; 1 is off"),
        (["--lora_rank_pattern", '{"w1": 0}'],
         "--lora_rank_pattern: 'w1' is 0. Give a whole number from 1 to 100000"),
        (["--lora_rank_pattern", '{"w1": "8"}'],
         "--lora_rank_pattern: 'w1' is '8'. Give a whole number from 1 to 100000"),
        (["--lora_alpha_pattern", '{"w1": -1}'],
         "--lora_alpha_pattern: 'w1' is -1. Give a number above 0, up to 1e+09"),
        (["--lora_rank_pattern", '{"q_proj": 4}'],
         "--lora_rank_pattern: 'q_proj' matches no adapted layer. Write the end of a name, such as 'h.0.attn.c_attn'"),
        (["--lora_rank_pattern", '{"w1": 4}', "--lora_target_modules", "w2"],
         "--lora_rank_pattern: 'w1' matches no adapted layer. Write the end of a name, such as 'h.0.mlp.w2'"),
        (["--lora_alpha_pattern", '{"(": 4}'],
         "--lora_alpha_pattern: alpha_pattern contains '(', which is not a regular expression (missing ), "
         "unterminated subpattern at position 7). Write the modules' names instead"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(flags: list[object], message: str, tmp_path: Path) -> None:
    refuses(message, tmp_path, *flags)


def test_numbers_and_objects_must_be_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^command line: --loraplus_lr_ratio nan: expected a number"):
        check(tmp_path, "--loraplus_lr_ratio", "nan")
    with pytest.raises(ConfigError, match=r"^command line: --lora_rank_pattern \[1\]: expected a JSON object"):
        check(tmp_path, "--lora_rank_pattern", "[1]")


def test_slow_patterns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.patterns.SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"^--lora_rank_pattern: rank_pattern contains .* more than 0\.2 seconds"):
        check(tmp_path, "--lora_rank_pattern", r'{"(([a-z]+\\.?)+)+!": 4}')


def test_methods_need_use_lora(tmp_path: Path) -> None:
    for flag in ("--use_dora", "--init_lora_weights pissa", "--loraplus_lr_ratio 2.0"):
        message = (
            f"{flag} needs --use_lora: without it all parameters are trained. "
            f"Add --use_lora, or remove {flag.split()[0]}"
        )
        refuses(message, tmp_path, "--use_lora", "False", *flag.split())


def test_engines_that_a_method_cannot_use_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero_2, zero_3 = DEEPSPEED % (2, ""), DEEPSPEED % (3, "")
    message = (
        "--init_lora_weights olora is not supported with DeepSpeed ZeRO-2, whose checkpoints lack its first values. "
        "Train with DDP (no engine), or remove it"
    )
    refuses(message, tmp_path, "--init_lora_weights", "olora", "--deepspeed", zero_2)
    message = (
        "--use_dora is not supported with DeepSpeed ZeRO-3: the norms of the weights need all of each weight. "
        "Remove it, or use ZeRO-2 or DDP"
    )
    refuses(message, tmp_path, "--use_dora", "--deepspeed", zero_3)
    check(tmp_path, "--use_dora", "--loraplus_lr_ratio", 4, "--deepspeed", zero_2)
    message = (
        "--loraplus_lr_ratio 4: the optimizer of the file of --deepspeed has a single learning rate. "
        "Remove optimizer from the file: --optim and --learning_rate do the same"
    )
    own_optimizer = DEEPSPEED % (2, ', "optimizer": {"type": "AdamW"}')
    refuses(message, tmp_path, "--loraplus_lr_ratio", 4, "--deepspeed", own_optimizer)


def test_quantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    check(tmp_path, "--q_lora", "--use_dora")
    message = (
        "--init_lora_weights pissa: a part of quantised weights has the error of their quantisation, which it would "
        "not repair. Remove it, or --q_lora"
    )
    refuses(message, tmp_path, "--q_lora", "--init_lora_weights", "pissa")
    packed = copy_checkpoint(tmp_path / "int4", quantization_config=GPTQ)
    check(tmp_path, "--q_lora", "--use_dora", model=packed)


def test_a_continued_adapter_has_its_method_already(tmp_path: Path) -> None:
    plain, dora = save_adapter_config(tmp_path / "plain"), save_adapter_config(tmp_path / "dora", use_dora=True)
    continued = ("--lora_weight_path", plain)
    refuses(
        f"--init_lora_weights pissa: the adapter of --lora_weight_path {plain} has its values already. "
        "Remove one of them",
        tmp_path, *continued, "--init_lora_weights", "pissa",
    )  # fmt: skip
    message = "--use_dora True: the adapter of --lora_weight_path has False. Remove --use_dora, or train a new adapter"
    refuses(message, tmp_path, *continued, "--use_dora")
    message = (
        "--lora_rank_pattern {'w1': 4}: the adapter of --lora_weight_path has None. "
        "Remove --lora_rank_pattern, or train a new adapter"
    )
    refuses(message, tmp_path, *continued, "--lora_rank_pattern", '{"w1": 4}')
    check(tmp_path, "--lora_weight_path", dora, "--use_dora")
    with pytest.raises(ConfigError, match="--use_dora is not supported with DeepSpeed ZeRO-3"):
        check(tmp_path, "--lora_weight_path", dora, "--deepspeed", DEEPSPEED % (3, ""))


def test_pattern_is_compiled_although_no_layer_is_known(tmp_path: Path) -> None:
    """A plan needs no file of a checkpoint but its config."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((TINY / "config.json").read_bytes())
    message = "--lora_rank_pattern: rank_pattern contains '(', which is not a regular expression"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check(tmp_path, "--lora_rank_pattern", '{"(": 4}', model=tmp_path / "model")
