#!/usr/bin/env bash
# Installs llmq with its development tools into .venv and runs linters, type checker and the tests that are neither slow nor for a GPU. --slow: the slow ones instead. Other arguments go to pytest.
set -euo pipefail
MARKS="not gpu and not slow"
ARGUMENTS=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then
        MARKS="slow and not gpu"
    else
        ARGUMENTS+=("$argument")
    fi
done
. "$(dirname "$0")/setup.sh" "[dev]"
ruff check .
ruff format --check .
mypy
# Two processes of one thread each: most of the time is Python's, which one process has on one core.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python -m pytest --numprocesses 2 --dist loadfile -m "$MARKS" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
