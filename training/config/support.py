"""What becomes of each of transformers' flags here. A flag that is not listed, of a newer version, is passed on.

``NO_EFFECT`` and ``REFUSED`` give the reason, which ``--help_all`` shows. ``WORKS`` are tried by
``tests/unit/training/config/test_support.py``, which fails for a flag without a row.
"""

from __future__ import annotations

from typing import NamedTuple

from checkpoints.json_rules import BOOLEAN, Rule, one_of, whole


class Refusal(NamedTuple):
    """Why values other than the default are refused, and what to do instead."""

    reason: str
    fix: str = ""


_NO_METRICS = "evaluations report loss and token accuracy, without keeping outputs"
_NO_HUB = "results are not pushed to a hub"
_TRAINED_PRECISION = "evaluations use the precision of training"

# Accepted and not passed to transformers; a value other than the default is warned of.
NO_EFFECT: dict[str, str] = {
    "batch_eval_metrics": _NO_METRICS,
    "bf16_full_eval": _TRAINED_PRECISION,
    "ddp_backend": "processes use NCCL on GPUs and gloo on CPUs",
    "do_eval": "--eval_strategy decides whether evaluations run",
    "do_predict": "scripts.ask answers with the trained model",
    "do_train": "it always trains",
    "eval_accumulation_steps": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_use_gather_object": _NO_METRICS,
    "fp16_full_eval": _TRAINED_PRECISION,
    "hub_always_push": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_revision": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_token": _NO_HUB,
    "include_for_metrics": _NO_METRICS,
    "label_names": "the labels are always those of the data",
    "length_column_name": "lengths are those of the tokenised conversations",
    "liger_kernel_config": "Liger's kernels are not supported",
    "logging_nan_inf_filter": "a loss that is NaN or infinite ends the run",
    "prediction_loss_only": _NO_METRICS,
    "remove_unused_columns": "data files may have any further fields",
    "restore_callback_states_from_checkpoint": "a resumed run always restores them",
    "skip_memory_metrics": "log lines contain the peak memory",
}

REFUSED: dict[str, Refusal] = {
    "dataloader_in_order": Refusal("the order of conversations depends on the seed alone"),
    "push_to_hub": Refusal(_NO_HUB, "Upload the result: hf upload ORGANIZATION/NAME FOLDER"),
    "use_cache": Refusal("training has no use for the keys and values of earlier tokens"),
    "use_liger_kernel": Refusal(
        "its kernels replace the forward pass, which computes the loss here",
        "Leave it out: the default loss needs no logits either",
    ),
}

# Accepted and done here, not by transformers: its search for a batch size changes what a step trains.
OURS = ("auto_find_batch_size",)

_OFF = Rule("false (leave it out)", lambda value: value is False)

# Rules for the keys of flags that take an object.
OBJECTS: dict[str, dict[str, Rule]] = {
    "gradient_checkpointing_kwargs": {
        "use_reentrant": BOOLEAN, "every_n_layers": whole(1, 10**6), "offload": BOOLEAN, "preserve_rng_state": BOOLEAN,
        "determinism_check": one_of("default", "none"), "early_stop": BOOLEAN,
    },
    "accelerator_config": {
        "non_blocking": BOOLEAN, "even_batches": BOOLEAN, "use_seedable_sampler": BOOLEAN, "split_batches": _OFF,
        "dispatch_batches": _OFF, "use_configured_state": _OFF,
    },
}  # fmt: skip

WORKS = (
    "accelerator_config", "adam_beta1", "adam_beta2", "adam_epsilon", "auto_find_batch_size",
    "average_tokens_across_devices", "bf16",
    "data_seed", "dataloader_drop_last", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed",
    "disable_tqdm", "eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "fp16", "fsdp", "fsdp_config",
    "full_determinism", "gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "greater_is_better", "ignore_data_skip", "include_num_input_tokens_seen", "label_smoothing_factor",
    "learning_rate", "load_best_model_at_end", "local_rank", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_grad_norm", "max_steps", "metric_for_best_model", "neftune_noise_alpha", "num_train_epochs", "optim",
    "optim_args", "optim_target_modules", "output_dir", "per_device_eval_batch_size", "per_device_train_batch_size",
    "project", "report_to", "resume_from_checkpoint", "run_name", "save_on_each_node", "save_only_model", "save_steps",
    "save_strategy", "save_total_limit", "seed", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "train_sampling_strategy", "use_cpu", "warmup_steps", "weight_decay",
)  # fmt: skip
