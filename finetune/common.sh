# Sourced by the launchers in this folder after they have set
#   summary          text for -h
#   arguments        finetune.py arguments of their mode (words without spaces); the rest are finetune.py's defaults
#   processes        one, or many: one per GPU, on one host or several
#   needs            requirements file of optional packages, or empty
#   engine           flag of an engine and its config file in this folder, or empty
# Reads the launcher's options and runs finetune.py from the current folder, so that relative paths work as typed.
# POSIX sh, because /bin/sh is dash on many machines.
set -eu

launcher=$(basename -- "$0")
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
usage="Usage: sh $0 -m MODEL -d DATA [-o OUTPUT] [--preview] [-- finetune.py arguments]"
arguments="$arguments --resume_from_checkpoint auto"
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

# One line without control characters, which a name may contain.
fail() {
    printf '%s: error: %s' "$launcher" "$*" | LC_ALL=C tr '[:cntrl:]' '?' >&2
    echo >&2
    exit 2
}

# Print a path as the user would type it in the current folder.
shown() {
    case $1 in "$PWD"/*) printf %s "${1#"$PWD"/}" ;; *) printf %s "$1" ;; esac
}

# run_code CODE WORD...: run Python code that imports this checkout, not the current folder; the words are sys.argv[1:].
run_code() {
    code=$1
    shift
    "$python" -c "import sys; sys.path[0] = sys.argv.pop(1); $code" "$root" "$@"
}

show_help() {
    cat <<EOF
$usage

$summary${needs:+
Needs: $(shown "$python") -m pip install -r $(shown "$root/$needs") -c $(shown "$root/constraints.txt")}

  -m, --model MODEL    checkpoint folder, or model id on a hub
  -d, --data DATA      training conversations or texts: .json, .jsonl, .txt (also .gz) or .parquet, or a folder of them
  -o, --output OUTPUT  output folder (default: output_qwen)
  --preview            show what the run would train on, and exit; -- may be followed by flags of scripts.preview_data
  -h, --help           show this help

finetune.py gets
$(printf '%s\n' "${engine:+${engine%% *} $root/finetune/${engine#* }}" "$arguments" | sed '/^ *$/d; s/^ */  /')
and its own defaults for this mode are
$(run_code 'from training.config import defaults; print(defaults.describe("--use_lora" in sys.argv[1]))' "$arguments" 2>/dev/null)
Arguments after -- override all of them.
On a GPU --bf16 True is added (--fp16 True if the GPU has no bf16), unless you give a precision. Without a GPU the
run uses the CPU in float32. CUDA_VISIBLE_DEVICES selects the GPU$([ "$processes" = one ] && echo ' (default: the first)' || echo s).
EOF
    [ "$processes" = one ] || cat <<EOF

Environment:
  GPUS_PER_NODE    number of processes on this host (default: its visible GPUs; without a GPU NPROC, else 1)
  NNODES           number of hosts (default: 1); with several, run this command on each host and set
    NODE_RANK      rank of this host, from 0
    MASTER_ADDR    name or address of host 0, reachable from all hosts
    MASTER_PORT    free port of host 0 (default: 6001; on a single host any free port)
  MAX_RESTARTS     how often all processes are restarted from the last checkpoint after a failure (default: 0)
  OMP_NUM_THREADS  threads per process (default: the host's cores divided by its processes)
EOF
}

model=
data=
output=output_qwen
preview=
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
    --preview)
        preview=yes
        shift
        ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option '$1'. finetune.py's own arguments go after --; see sh $0 -h" ;;
    esac
done
[ -n "$model" ] || fail "-m MODEL is missing. $usage"
[ -n "$data" ] || fail "-d DATA is missing. $usage"

if [ "$processes" = one ]; then
    # One GPU even if the host has more: with several visible GPUs it would be a different job (data parallelism).
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
else
    . "$root/finetune/many.sh"
    check_environment
fi

# Old GPUs emulate bf16 and are faster in fp16.
machine=$("$python" -c '
import os, torch
gpus = torch.cuda.device_count()
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
bf16 = bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
print(gpus, cores, "" if not gpus else "--bf16 True" if bf16 else "--fp16 True")
' 2>/dev/null) || fail "$(shown "$python") cannot import torch. Make an environment: sh $(shown "$root/scripts/setup_env.sh")"
read -r gpus cores precision <<EOF
$machine
EOF
for argument in "$@"; do
    case $argument in --bf16* | --fp16* | --pure_bf16*) precision= ;; esac
done

# $arguments and $precision are split into words.
# shellcheck disable=SC2086
set -- --model_name_or_path "$model" --data_path "$data" --output_dir "$output" \
    ${engine:+"${engine%% *}" "$root/finetune/${engine#* }"} $arguments $precision "$@"
[ "$processes" = one ] || count_processes
if [ -n "$preview" ]; then
    [ "$processes" = one ] || set -- --processes "$((hosts * count))" "$@"
    run_code 'import runpy; runpy.run_module("scripts.preview_data", run_name="__main__", alter_sys=True)' "$@"
elif [ "$processes" = many ]; then
    run_many "$@"
else
    exec "$python" "$root/finetune.py" "$@"
fi
