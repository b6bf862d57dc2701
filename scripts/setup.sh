# Sourced by the other scripts: a virtual environment in .venv with llmq and the pinned versions.
# Usage: . scripts/setup.sh EXTRAS
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv
fi
# shellcheck disable=SC1091
. .venv/bin/activate
# torch first and by its exact version: a range may bring a build with gigabytes of GPU libraries.
# Where a GPU is present, a torch that is installed already is kept.
INSTALL=(python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt)
python -c "import torch" 2>/dev/null || "${INSTALL[@]}" torch
"${INSTALL[@]}" -e ".$1"
