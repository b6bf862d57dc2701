#!/usr/bin/env bash
# From a clone to a quantized model: installs llmq into .venv, quantizes the bundled model to INT4
# with GPTQ, measures it before and after, reloads it and generates text.
set -euo pipefail
. "$(dirname "$0")/setup.sh" "[cpu]"
OUT=${1:-$(mktemp -d)/tiny-int4}
run() { printf '\n$ %s\n' "$*"; "$@"; }
run llmq quantize tiny "$OUT"
run llmq eval tiny --max-windows 200
run llmq eval "$OUT" --max-windows 200
run llmq compare tiny "$OUT" --max-windows 100
run llmq generate "$OUT" --prompt "def read_lines(path):" --max-new-tokens 60
printf '\nThe quantized model is in %s\n' "$OUT"
