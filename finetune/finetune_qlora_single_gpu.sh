#!/bin/sh
# Q-LoRA on one GPU, or on the CPU where there is none; the model may be quantised (GPTQ, AWQ) or not:
#   sh finetune/finetune_qlora_single_gpu.sh -m /path/to/Qwen-7B-Chat-Int4 -d /path/to/conversations.json
summary="Tunes LoRA adapters over quantised weights on one GPU (on the CPU where there is none). GPTQ and AWQ models
are taken as they are, others are quantised to NF4 while they are loaded (needs: pip install bitsandbytes)."
# warmup_steps below 1 is a share of all steps.
arguments="
    --use_lora --q_lora
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
