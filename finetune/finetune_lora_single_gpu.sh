#!/bin/sh
# LoRA on one GPU, or on the CPU if there is none:
#   sh finetune/finetune_lora_single_gpu.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains a LoRA adapter on one GPU (on the CPU if there is none). merge_lora.py merges it into its base."
needs=
processes=one
engine=
arguments="--use_lora"
. "$(dirname -- "$0")/common.sh"
