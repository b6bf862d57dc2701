#!/usr/bin/env bash
# The format, model and kernel tests with other versions of torch, transformers and Triton, each set
# in a virtual environment of its own under a temporary folder.
#
#   bash scripts/test_versions.sh                        # every set of the table below
#   bash scripts/test_versions.sh 2.13.0 5.17.0 3.6.0    # one set: torch, transformers, Triton
#   PYTEST_ARGUMENTS="-k gptq" bash scripts/test_versions.sh
#
# On Linux the package index has torch with gigabytes of GPU libraries. The builds for CPUs come
# with PIP_EXTRA_INDEX_URL set to the index that PyTorch's installation page names for them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
# torch, transformers, Triton; "newest" is what the index has.
SETS=(
    "2.11.0 5.17.0 3.6.0"
    "2.13.0 5.17.0 3.9.0"
    "2.13.0 5.23.0 3.9.0"
    "2.13.0 newest 3.9.0"
)
if [ $# -eq 3 ]; then
    SETS=("$*")
elif [ $# -ne 0 ]; then
    echo "expected no argument, or the versions of torch, transformers and Triton; got: $*" >&2
    exit 2
fi
FOLDER=$(mktemp -d -t llmq-versions-XXXXXX)
trap 'rm -rf "$FOLDER"' EXIT

# What is fixed for all sets, and what a set asks for. Triton 3.6's interpreter makes scalars of
# arrays of one element, which NumPy refuses from 2.4 on, so that set gets an older NumPy.
write_constraints() {
    local torch=$1 transformers=$2 triton=$3
    local varied='^(torch|transformers|triton|numpy|tokenizers|huggingface-hub)=='
    grep -vE "$varied" scripts/constraints.txt
    echo "torch==$torch"
    echo "triton==$triton"
    [ "$transformers" = newest ] || echo "transformers==$transformers"
    case $triton in 3.[0-6].*) echo "numpy<2.4" ;; esac
}

# The result of one set goes to the table that is printed at the end.
run_set() {
    local name="torch $1, transformers $2, Triton $3" venv="$FOLDER/venv"
    printf '\n== %s\n' "$name"
    "$PYTHON" -m venv --clear "$venv"
    write_constraints "$@" >"$FOLDER/constraints.txt"
    local install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    install+=(-c "$FOLDER/constraints.txt")
    # torch first, or a dependency may bring another one before the constraint is read.
    if ! { "${install[@]}" torch && "${install[@]}" --upgrade -e ".[dev]"; }; then
        RESULTS+=("cannot be installed: $name")
        return 1
    fi
    local found
    found=$("$venv/bin/python" -m pip list --format freeze |
        grep -E '^(torch|transformers|triton|numpy)==' | tr '\n' ' ')
    # shellcheck disable=SC2086
    if HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONPATH= \
        "$venv/bin/python" -m pytest --quiet --numprocesses 2 --dist loadfile \
        -m "not gpu and not slow" tests/formats tests/models tests/kernels \
        ${PYTEST_ARGUMENTS:-}; then
        RESULTS+=("good: $found")
    else
        RESULTS+=("FAILED: $found")
        return 1
    fi
}

RESULTS=()
STATUS=0
for versions in "${SETS[@]}"; do
    # shellcheck disable=SC2086
    run_set $versions || STATUS=1
done
printf '\n'
printf '%s\n' "${RESULTS[@]}"
exit "$STATUS"
