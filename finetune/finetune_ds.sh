#!/bin/sh
# Full-parameter training on all GPUs of one or several hosts, sharded by DeepSpeed ZeRO-3:
#   sh finetune/finetune_ds.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains all parameters on all GPUs of one or several hosts. DeepSpeed ZeRO-3 shards weights, gradients and
optimizer state."
needs=requirements_distributed.txt
processes=many
engine="--deepspeed ds_config_zero3.json"
arguments=
. "$(dirname -- "$0")/common.sh"
