"""Every Triton kernel on the CPU: the tests of test_triton_kernels.py once more, in Triton's
interpreter. It is chosen by an environment variable before Triton is imported, hence the process of
its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton (pip install '.[triton]')")
HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", HERE / "test_triton_kernels.py"],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-4000:]
    assert int(passed[1]) > 100
