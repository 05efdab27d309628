#!/bin/sh
# LoRA on one GPU, or on the CPU if there is none:
#   sh finetune/finetune_lora_single_gpu.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains a LoRA adapter on one GPU (on the CPU if there is none). merge_lora.py merges it into its base."
processes=one
engine=
arguments="
    --use_lora
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --learning_rate 3e-4
"
. "$(dirname -- "$0")/common.sh"
