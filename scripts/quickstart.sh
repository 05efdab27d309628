#!/usr/bin/env bash
# The main job from nothing to a taught answer, on the CPU and without a download of weights: a tiny random Qwen v1 model
# learns the conversations of examples/identity.json by LoRA, the adapter is merged, the merged model is asked the first
# question of the file. Exit code 1 if it does not give the answer it was taught.
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

# The tiny model is made again only after a change of what it is made from.
if [ ! -f "$work/tiny-qwen/config.json" ] ||
    [ -n "$(find examples scripts/make_tiny_qwen.py -newer "$work/tiny-qwen/config.json")" ]; then
    rm -rf "$work/tiny-qwen"
    run python -m scripts.make_tiny_qwen --output "$work/tiny-qwen"
fi

rm -rf "$work/adapter" "$work/merged"
run python finetune.py --model_name_or_path "$work/tiny-qwen" --data_path "$data" --output_dir "$work/adapter" \
    --use_lora --lora_r 32 --lora_alpha 64 --lora_dropout 0 \
    --num_train_epochs 40 --per_device_train_batch_size 16 \
    --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0 \
    --model_max_length 512 --logging_steps 10 --save_strategy no --report_to none
run python merge_lora.py --adapter "$work/adapter" --output "$work/merged"

# The first question of the file and its answer, each ended by a NUL as texts may have several lines.
{
    IFS= read -r -d '' question
    IFS= read -r -d '' taught
} < <(python -c '
import json, sys

turns = json.load(open(sys.argv[1], encoding="utf-8"))[0]["conversations"]
first = next(index for index, turn in enumerate(turns) if turn["from"] == "user")
print(turns[first]["value"], turns[first + 1]["value"], sep="\0", end="\0")
' "$data")
answer=$(run python -m scripts.ask --model_name_or_path "$work/merged" "$question")

printf '\nQuestion: %s\nAnswer:   %s\n' "$question" "$answer"
if [ "$answer" != "$taught" ]; then
    printf 'quickstart.sh: error: the merged model was taught another answer: %s\n' "$taught" >&2
    exit 1
fi
cat <<'EOF'

The merged model gives the answer it was taught. With real weights and your own conversations, the same is

    sh finetune/finetune_lora_single_gpu.sh -m /path/to/Qwen-7B-Chat -d /path/to/conversations.json
EOF
