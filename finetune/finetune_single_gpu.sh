#!/bin/sh
# Full-parameter training on one GPU, or on the CPU if there is none:
#   sh finetune/finetune_single_gpu.sh -m /path/to/Qwen-1_8B-Chat -d /path/to/conversations.json
summary="Trains all parameters on one GPU (on the CPU if there is none)."
needs=
processes=one
engine=
arguments=
. "$(dirname -- "$0")/common.sh"
