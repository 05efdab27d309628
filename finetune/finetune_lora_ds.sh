#!/bin/sh
# LoRA on all GPUs of one or several hosts, with DeepSpeed ZeRO-2:
#   sh finetune/finetune_lora_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains a LoRA adapter on all GPUs of one or several hosts. DeepSpeed ZeRO-2 shards gradients and optimizer state.
merge_lora.py merges the adapter into its base."
needs=requirements_distributed.txt
processes=many
engine="--deepspeed ds_config_zero2.json"
arguments="--use_lora"
. "$(dirname -- "$0")/common.sh"
