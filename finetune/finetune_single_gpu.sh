#!/bin/sh
# All parameters on one GPU, or on the CPU where there is none:
#   sh finetune/finetune_single_gpu.sh -m /path/to/Qwen-1_8B-Chat -d /path/to/conversations.json
summary="Tunes all parameters on one GPU (on the CPU where there is none)."
# warmup_steps below 1 is a share of all steps.
arguments="
    --num_train_epochs 5
    --per_device_train_batch_size 1
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 16
    --save_strategy steps --save_steps 1000 --save_total_limit 10
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.01
    --weight_decay 0.1 --adam_beta2 0.95
    --logging_steps 1 --report_to none
    --model_max_length 512 --lazy_preprocess True
    --gradient_checkpointing True
"
. "$(dirname -- "$0")/common.sh"
