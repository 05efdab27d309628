#!/usr/bin/env bash
# Runs the tests in the toolkit's own environment:  bash scripts/test.sh [pytest arguments]  (default: the whole suite)
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
sh scripts/setup_env.sh .venv requirements_dev.txt constraints.txt
exec .venv/bin/python -m pytest "$@"
