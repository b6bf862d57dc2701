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
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false python -m pytest -m "$MARKS" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
