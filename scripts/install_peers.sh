#!/usr/bin/env bash
# The tools that scripts/quality_table.py measures beside llmq, each in a virtual environment of its
# own, since they need other versions of the same libraries.
#
#   bash scripts/install_peers.sh DIR              # all of the table below
#   bash scripts/install_peers.sh DIR autoround    # some
#   python scripts/quality_table.py MODEL WORK_DIR --peers DIR --tool autoround
#
# On Linux the package index has torch with gigabytes of GPU libraries. The builds for CPUs come
# with PIP_EXTRA_INDEX_URL set to the index that PyTorch's installation page names for them.
set -euo pipefail
PYTHON=${PYTHON:-python3}
# As quality_table.py calls it, then what it is made of: versions that were measured together.
declare -A PEERS=(
    [llm-compressor]="torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1"
    [autoround]="torch==2.13.0 transformers==5.24.0 auto-round==0.16.1"
    [gptqmodel]="torch==2.14.1 transformers==5.23.0 gptqmodel==7.7.0"
)
if [ $# -eq 0 ]; then
    echo "expected DIR, and names of ${!PEERS[*]} or none for all" >&2
    exit 2
fi
DIR=$1
shift
NAMES=("$@")
[ $# -gt 0 ] || NAMES=("${!PEERS[@]}")
for name in "${NAMES[@]}"; do
    if [ -z "${PEERS[$name]:-}" ]; then
        echo "$name: expected one of ${!PEERS[*]}" >&2
        exit 2
    fi
done
for name in "${NAMES[@]}"; do
    echo "== $name: ${PEERS[$name]}"
    "$PYTHON" -m venv "$DIR/$name"
    # shellcheck disable=SC2086
    "$DIR/$name/bin/python" -m pip install --quiet --disable-pip-version-check ${PEERS[$name]}
done
