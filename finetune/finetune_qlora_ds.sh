#!/bin/sh
# Q-LoRA on all GPUs of one or several hosts, for a quantised (GPTQ, AWQ) or unquantised model:
#   sh finetune/finetune_qlora_ds.sh -m /path/to/Qwen-7B-Chat-Int4 -d /path/to/conversations.json
summary="Trains a LoRA adapter over quantised weights on all GPUs of one or several hosts. Each GPU holds the whole model
(plain data parallelism: gradients and optimizer state of an adapter are too small to shard). GPTQ and AWQ models are
used as they are; others are quantised to NF4 while loading."
needs=requirements_qlora.txt
processes=many
engine=
arguments="--use_lora --q_lora"
. "$(dirname -- "$0")/common.sh"
