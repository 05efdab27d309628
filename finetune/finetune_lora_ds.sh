#!/bin/sh
# LoRA on all GPUs of one or several hosts, with DeepSpeed ZeRO-2:
#   sh finetune/finetune_lora_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains a LoRA adapter on all GPUs of one or several hosts. DeepSpeed ZeRO-2 shards gradients and optimizer state
(needs: pip install -r requirements_distributed.txt -c constraints.txt). merge_lora.py merges the adapter into its base."
processes=many
engine="--deepspeed ds_config_zero2.json"
arguments="
    --use_lora
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --learning_rate 3e-4
"
. "$(dirname -- "$0")/common.sh"
