#!/bin/sh
# Q-LoRA on all GPUs of one host or several; the model may be quantised (GPTQ, AWQ) or not:
#   sh finetune/finetune_qlora_ds.sh -m /path/to/Qwen-7B-Chat-Int4 -d /path/to/conversations.json
summary="Tunes LoRA adapters over quantised weights on all GPUs of one host or several; each holds the whole model (plain
data parallelism: the adapters' gradients and optimizer are too small to be worth sharing out). GPTQ and AWQ models are
taken as they are, others are quantised to NF4 while they are loaded (needs: pip install bitsandbytes)."
processes=many
engine=
arguments="
    --use_lora --q_lora
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --learning_rate 3e-4
"
. "$(dirname -- "$0")/common.sh"
