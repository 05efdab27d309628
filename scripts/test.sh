#!/usr/bin/env bash
# Runs the tests in the toolkit's own environment:  bash scripts/test.sh [pytest arguments]
# Without arguments the whole suite, in two processes (a file's tests in one of them); with arguments what they say.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
sh scripts/setup_env.sh .venv requirements_dev.txt constraints.txt
if [ $# -eq 0 ]; then
    # In the order of the files: the long ones of tests/recipe begin, the quick ones fill the gaps.
    set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"
