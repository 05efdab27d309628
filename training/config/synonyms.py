"""Names that other toolkits and libraries give to flags of this one, for hints. They are not accepted as flags."""

from __future__ import annotations

_NAMES: dict[str, str] = {
    "model_name_or_path": "model model_name model_path model_id model_id_or_path base_model base_model_name "
    "pretrained_model pretrained_model_name_or_path checkpoint ckpt_path",
    "model_hub": "use_hf hub use_modelscope_hub",
    "cache_dir": "model_cache_dir",
    "chat_template": "chat_template_path custom_chat_template chat_template_file jinja_template",
    "attn_implementation": "flash_attn attn_impl use_flash_attn use_flash_attention flash_attention attention "
    "use_flash_attention_2",
    "loss": "loss_type",
    "data_path": "data dataset datasets dataset_name dataset_path dataset_dir data_files data_file train_file "
    "train_data train_dataset training_data train_path train_data_path custom_train_dataset_path",
    "eval_data_path": "eval_dataset val_dataset validation_dataset eval_file validation_file val_file eval_data "
    "test_file valid_data eval_path custom_val_dataset_path",
    "eval_split": "val_size split_dataset_ratio test_size val_set_size validation_split validation_split_percentage "
    "dataset_test_ratio",
    "data_format": "dataset_format formatting dataset_type",
    "system_message": "system system_prompt default_system",
    "label_mask": "train_on_inputs train_on_prompt mask_history loss_scale assistant_only_loss completion_only_loss "
    "mask_inputs roles_to_train train_on_eos",
    "thinking": "enable_thinking use_thinking train_thinking",
    "split_turns": "split_multi_turn split_conversations",
    "model_max_length": "cutoff_len max_seq_length max_seq_len max_length max_len sequence_len sequence_length "
    "seq_length seq_len block_size context_length max_source_length max_tokens",
    "truncation": "truncation_strategy truncation_side",
    "on_bad_record": "strict",
    "packing": "neat_packing sample_packing pack_sequences pack_dataset pack multipack_sampler multipack",
    "padding_free": "remove_padding use_remove_padding use_padding_free flattening unpad_inputs",
    "use_lora": "lora finetuning_type train_type tuner_type sft_type use_peft peft tuner tuner_backend peft_type",
    "q_lora": "qlora use_qlora load_in_4bit quantization_bit quant_bits bits quantize",
    "quant_type": "quantization_type bnb_4bit_quant_type quant_method quantization_method",
    "lora_r": "lora_rank rank r lora_dim adapter_rank",
    "lora_alpha": "alpha lora_scale lora_scaling",
    "lora_dropout": "dropout lora_dropout_p",
    "lora_target_modules": "lora_target target_modules lora_modules lora_target_linear target_module lora_layers",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "use_rslora": "peft_use_rslora rslora rank_stabilized_lora",
    "use_dora": "peft_use_dora dora",
    "init_lora_weights": "init_weights peft_init_lora_weights lora_init pissa_init use_pissa use_olora",
    "loraplus_lr_ratio": "lorap_lr_ratio lora_plus_ratio loraplus_ratio",
    "neftune_noise_alpha": "neftune_alpha noise_alpha neftune",
    "lora_weight_path": "adapter adapters adapter_path adapter_name_or_path lora_path lora_model_dir resume_adapter "
    "adapter_file lora_checkpoint peft_model_id resume_from_adapter",
    "trainable_embeddings": "additional_target modules_to_save lora_modules_to_save train_embeddings lora_embeddings",
    "pure_bf16": "bf16_full full_bf16 torch_dtype dtype precision",
    "output_dir": "output out_dir save_dir output_path save_path out logging_output_dir",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size bs per_device_batch_size "
    "train_micro_batch_size_per_gpu",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_acc "
    "accumulate_grad_batches grad_accumulation_steps",
    "learning_rate": "lr base_lr peak_lr max_lr",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs epoch train_epochs",
    "max_steps": "steps num_steps iters max_iters num_training_steps max_train_steps",
    "lr_scheduler_type": "lr_scheduler scheduler schedule lr_schedule scheduler_type",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping clip_grad_norm gradient_clip_val",
    "optim": "optimizer",
    "gradient_checkpointing": "use_gradient_checkpointing checkpointing disable_gradient_checkpointing",
    "gradient_checkpointing_kwargs": "activation_offloading",
    "save_steps": "save_interval save_every checkpointing_steps saves_per_epoch",
    "eval_steps": "eval_interval eval_every val_check_interval evals_per_epoch",
    "logging_steps": "log_interval log_steps log_every",
    "resume_from_checkpoint": "resume auto_resume resume_from resume_training resume_only_model "
    "auto_resume_from_checkpoints",
    "train_sampling_strategy": "shuffle train_dataloader_shuffle dataset_shuffle length_grouped",
    "dataloader_num_workers": "num_workers",
    "dataset_num_proc": "num_proc preprocessing_num_workers",
    "data_cache_dir": "dataset_cache_dir tokenized_path dataset_prepared_path",
    "report_to": "use_wandb wandb wandb_project logger tracker",
    "deepspeed": "deepspeed_config zero_stage ds_config",
    "seed": "random_seed",
    "overwrite_output_dir": "overwrite force",
    "dry_run": "preview print_only",
    "plan": "estimate estimate_memory memory_plan",
}  # fmt: skip

# What is no flag here.
_EXPLAINED: dict[str, str] = {
    "template": "the chat format is read from the checkpoint",
    "prompt_template": "the chat format is read from the checkpoint",
    "model_type": "the architecture is read from the checkpoint",
    "stage": "it always fine-tunes on conversations",
    "task": "it always fine-tunes on conversations",
    "max_samples": "--data_path FILE#N draws N records",
    "num_samples": "--data_path FILE#N draws N records",
    "mix_strategy": "--data_path FILE@xF repeats a file, --data_mixing orders them",
    "merge_lora": "merge_lora.py merges the adapter of a run",
    "device": "CUDA_VISIBLE_DEVICES selects GPUs; --use_cpu",
    "device_map": "CUDA_VISIBLE_DEVICES selects GPUs; --use_cpu",
    "gpus": "CUDA_VISIBLE_DEVICES selects GPUs",
}  # fmt: skip

_FLAG_OF = {synonym: flag for flag, synonyms in _NAMES.items() for synonym in synonyms.split()}


def flag_meant(name: str) -> str | None:
    """Return the flag that another toolkit calls ``name``."""
    return _FLAG_OF.get(name.lower())


def explain_missing(name: str) -> str:
    """Return why there is no flag ``name``, in parentheses and with a leading space; empty if nothing is known."""
    reason = _EXPLAINED.get(name.lower())
    return f" ({reason})" if reason else ""
