#!/bin/sh
# LoRA on one GPU, or on the CPU where there is none:
#   sh finetune/finetune_lora_single_gpu.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
summary="Tunes LoRA adapters on one GPU (on the CPU where there is none); merge_lora.py folds the result into its base."
# warmup_steps below 1 is a share of all steps.
arguments="
    --use_lora
    --num_train_epochs 5
    --per_device_train_batch_size 2
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8
    --save_strategy steps --save_steps 1000 --save_total_limit 10
    --learning_rate 3e-4 --lr_scheduler_type cosine --warmup_steps 0.01
    --weight_decay 0.1 --adam_beta2 0.95
    --logging_steps 1 --report_to none
    --model_max_length 512 --lazy_preprocess True
    --gradient_checkpointing True
"
. "$(dirname -- "$0")/common.sh"
