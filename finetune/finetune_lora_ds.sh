#!/bin/sh
# LoRA on all GPUs of one host or several, with DeepSpeed's ZeRO-2:
#   sh finetune/finetune_lora_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Tunes LoRA adapters on all GPUs of one host or several; DeepSpeed (ZeRO-2) shares gradients and optimizer out to
them (needs: pip install -r requirements_distributed.txt). merge_lora.py folds the result into its base."
processes=many
engine="--deepspeed ds_config_zero2.json"
arguments="
    --use_lora
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --learning_rate 3e-4
"
. "$(dirname -- "$0")/common.sh"
