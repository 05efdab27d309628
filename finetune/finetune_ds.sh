#!/bin/sh
# All parameters on all GPUs of one host or several, sharded by DeepSpeed's ZeRO-3:
#   sh finetune/finetune_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Tunes all parameters on all GPUs of one host or several; DeepSpeed (ZeRO-3) shares weights, gradients and
optimizer out to them (needs: pip install -r requirements_distributed.txt)."
processes=many
engine="--deepspeed ds_config_zero3.json"
arguments="
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    --learning_rate 1e-5
"
. "$(dirname -- "$0")/common.sh"
