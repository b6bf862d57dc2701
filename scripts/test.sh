#!/usr/bin/env bash
# Installs llmq with its development tools into .venv and runs linters, type checker and all tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh" "[dev]"
ruff check .
ruff format --check . 
mypy
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false python -m pytest -m "not gpu" "$@"
