#!/bin/sh
# Full-parameter training on one GPU, or on the CPU if there is none:
#   sh finetune/finetune_single_gpu.sh -m /path/to/Qwen-1_8B-Chat -d /path/to/conversations.json
summary="Trains all parameters on one GPU (on the CPU if there is none)."
processes=one
engine=
arguments="
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    --learning_rate 1e-5
"
. "$(dirname -- "$0")/common.sh"
