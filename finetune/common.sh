# Read by the launchers beside it, after they have set
#   arguments        the finetune.py arguments of their mode (words without spaces), each can be given again after --
#   summary          one line for -h
# It reads the launcher's options and runs finetune.py from the current folder, so that relative paths mean what the
# user sees. POSIX sh: dash is /bin/sh on many machines.
set -eu

launcher=$(basename -- "$0")
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
usage="Usage: sh $0 -m MODEL -d DATA [-o OUTPUT] [-- finetune.py arguments]"

fail() {
    echo "$launcher: error: $*" >&2
    exit 2
}

show_help() {
    cat <<EOF
$usage

$summary

  -m, --model MODEL    checkpoint folder
  -d, --data DATA      conversations to train on (.json or .jsonl)
  -o, --output OUTPUT  folder for the result (default: output_qwen)
  -h, --help           this text

Everything after -- goes to finetune.py and wins over these defaults:
$(printf '%s\n' "$arguments" | sed '/^ *$/d; s/^ */  /')
On a GPU also --bf16 True (or --fp16 True where it has no bf16), unless a precision is given; without a GPU the CPU
trains in fp32. CUDA_VISIBLE_DEVICES chooses the GPU (default: the first).
EOF
}

model=
data=
output=output_qwen
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        show_help
        exit 0
        ;;
    -m | --model | -d | --data | -o | --output)
        case ${2:--} in -*) fail "$1 needs a value. See sh $0 -h" ;; esac
        case $1 in
        -m | --model) model=$2 ;;
        -d | --data) data=$2 ;;
        -o | --output) output=$2 ;;
        esac
        shift 2
        ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option '$1'. finetune.py's own arguments go after --; see sh $0 -h" ;;
    esac
done
if [ -z "$model" ] || [ -z "$data" ]; then
    echo "$usage" >&2
    exit 2
fi

python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

precision=auto
for argument in "$@"; do
    case $argument in --bf16* | --fp16* | --pure_bf16*) precision= ;; esac
done
# One GPU, also where there are more: several visible ones would be a different job (data parallelism).
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
if [ -n "$precision" ]; then
    # Old GPUs only emulate bf16; they are faster in fp16.
    precision=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("--bf16 True" if torch.cuda.is_bf16_supported(including_emulation=False) else "--fp16 True")
' 2>/dev/null) || fail "$python cannot import torch. Make an environment: sh $root/scripts/setup_env.sh"
fi

# $arguments and $precision are lists of words.
# shellcheck disable=SC2086
exec "$python" "$root/finetune.py" --model_name_or_path "$model" --data_path "$data" --output_dir "$output" \
    $arguments $precision "$@"
