#!/bin/sh
# Full-parameter training on all GPUs of one or several hosts, sharded by DeepSpeed ZeRO-3:
#   sh finetune/finetune_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains all parameters on all GPUs of one or several hosts. DeepSpeed ZeRO-3 shards weights, gradients and
optimizer state (needs: pip install -r requirements_distributed.txt -c constraints.txt)."
processes=many
engine="--deepspeed ds_config_zero3.json"
arguments="
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    --learning_rate 1e-5
"
. "$(dirname -- "$0")/common.sh"
