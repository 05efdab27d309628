#!/bin/sh
# All parameters on all GPUs of one host or several, sharded by PyTorch's FSDP2:
#   sh finetune/finetune_fsdp.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Tunes all parameters on all GPUs of one host or several; PyTorch (FSDP2) shares weights, gradients and optimizer
out to them."
processes=many
engine="--fsdp_config fsdp_config.json"
arguments="
    --fsdp
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    --learning_rate 1e-5
"
. "$(dirname -- "$0")/common.sh"
