#!/usr/bin/env bash
# Run the tests in the toolkit's own environment:  bash scripts/test.sh [pytest arguments]
# Without arguments all tests but those marked long run in three processes, each test file in one of them: much of their
# time is waiting for others.
# With --long in front: the tests marked long (whole runs in further modes), which CI leaves out.
# With --nightly in front: the tests on a real small model, tests/nightly (at most 40 minutes). The model is downloaded,
# or read from QWEN_SMALL_MODEL=DIR, which python -m scripts.make_small_qwen has written.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules
sh scripts/setup_env.sh .venv requirements_dev.txt constraints.txt
if [ "${1:-}" = --nightly ]; then
    shift
    case "${1:-}" in
        tests/nightly*) ;;
        *) set -- tests/nightly "$@" ;;
    esac
elif [ "${1:-}" = --long ]; then
    shift
    set -- -m long --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
elif [ $# -eq 0 ]; then
    # In file order: the long tests in tests/recipe start first, and the short ones fill the gaps.
    set -- --numprocesses 3 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"
