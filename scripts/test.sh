#!/usr/bin/env bash
# Installs llmq with its development tools into .venv and runs linters, type checker and the tests
# that are neither slow nor for a GPU.
#
#   bash scripts/test.sh               as a pull request has to pass it
#   bash scripts/test.sh --slow        the slow tests instead
#   bash scripts/test.sh --coverage    also the share of lines that ran; below 90% is a failure
#
# Other arguments go to pytest.
set -euo pipefail
MARKS="not gpu and not slow"
ARGUMENTS=()
for argument in "$@"; do
    case $argument in
        --slow) MARKS="slow and not gpu" ;;
        --coverage) ARGUMENTS+=(--cov --cov-report=term:skip-covered) ;;
        *) ARGUMENTS+=("$argument") ;;
    esac
done
. "$(dirname "$0")/setup.sh" "[dev]"
ruff check .
ruff format --check .
mypy
# Two processes of one thread each: most of the time is Python's, which one process has on one core.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python -m pytest --numprocesses 2 --dist loadfile -m "$MARKS" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
