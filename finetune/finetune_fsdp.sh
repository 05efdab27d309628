#!/bin/sh
# Full-parameter training on all GPUs of one or several hosts, sharded by PyTorch FSDP2:
#   sh finetune/finetune_fsdp.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Trains all parameters on all GPUs of one or several hosts. PyTorch FSDP2 shards weights, gradients and optimizer
state."
needs=
processes=many
engine="--fsdp_config fsdp_config.json"
arguments="--fsdp"
. "$(dirname -- "$0")/common.sh"
