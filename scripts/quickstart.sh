#!/usr/bin/env bash
# The whole workflow on the CPU, without downloading weights: train a LoRA adapter of a tiny random Qwen v1 model on
# examples/identity.json, merge it, and ask the merged model the first question of that file. Exit code 1 if it does not
# give the answer in the file.
#   bash scripts/quickstart.sh
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
data=examples/identity.json
work=build/quickstart

run() {
    { printf '\n+' && printf ' %q' "$@" && printf '\n'; } >&2
    "$@"
}

run sh scripts/setup_env.sh .venv requirements_finetune.txt constraints.txt
export PATH="$PWD/.venv/bin:$PATH"

# Create the tiny model again only if its inputs have changed.
if [ ! -f "$work/tiny-qwen/config.json" ] ||
    [ -n "$(find examples scripts/make_tiny_qwen.py -newer "$work/tiny-qwen/config.json")" ]; then
    rm -rf "$work/tiny-qwen"
    run python -m scripts.make_tiny_qwen --output "$work/tiny-qwen"
fi

rm -rf "$work/adapter" "$work/merged"
run python finetune.py --model_name_or_path "$work/tiny-qwen" --data_path "$data" --output_dir "$work/adapter" \
    --use_lora --lora_r 32 --lora_alpha 64 --lora_dropout 0 \
    --num_train_epochs 40 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 \
    --learning_rate 5e-3 --warmup_steps 0.05 --weight_decay 0 --gradient_checkpointing False \
    --model_max_length 512 --logging_steps 10 --save_strategy no
run python merge_lora.py --adapter "$work/adapter" --output "$work/merged"

# First question of the file and its answer, each terminated by NUL because texts may have several lines.
{
    IFS= read -r -d '' question
    IFS= read -r -d '' expected
} < <(python -c '
import json, sys

turns = json.load(open(sys.argv[1], encoding="utf-8"))[0]["conversations"]
first = next(index for index, turn in enumerate(turns) if turn["from"] == "user")
print(turns[first]["value"], turns[first + 1]["value"], sep="\0", end="\0")
' "$data")
answer=$(run python -m scripts.ask --model_name_or_path "$work/merged" "$question")

printf '\nQuestion: %s\nAnswer:   %s\n' "$question" "$answer"
if [ "$answer" != "$expected" ]; then
    printf 'quickstart.sh: error: the merged model gave another answer than the training data: %s\n' "$expected" >&2
    exit 1
fi
cat <<'EOF'

The merged model gives the answer in the training data. With real weights and your own conversations:

    sh finetune/finetune_lora_single_gpu.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
EOF
