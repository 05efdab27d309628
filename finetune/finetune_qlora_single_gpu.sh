#!/bin/sh
# Q-LoRA on one GPU, or on the CPU if there is none, for a quantised (GPTQ, AWQ) or unquantised model:
#   sh finetune/finetune_qlora_single_gpu.sh -m /path/to/Qwen-7B-Chat-Int4 -d /path/to/conversations.json
summary="Trains a LoRA adapter over quantised weights on one GPU (on the CPU if there is none). GPTQ and AWQ models are
used as they are; others are quantised to NF4 while loading."
needs=requirements_qlora.txt
processes=one
engine=
arguments="--use_lora --q_lora"
. "$(dirname -- "$0")/common.sh"
