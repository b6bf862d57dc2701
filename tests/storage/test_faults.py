"""Killed or without power at any point, and with a bit turned over in anything that is kept: the
same command gives the same weights. `python tests/faults.py` runs all of it with a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "faults.py"


def run(*arguments: str, timeout: int) -> dict:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, row in report.items():
        assert row["failed"] == {}, name
        assert row["tried"] == row["same bytes"] > 0, name
    return report


def test_some_points_of_every_command():
    report = run(
        "--points", "1", "--flips", "1", "--only", "quantize, gptq", "qat", "export", timeout=900
    )
    assert {row["tried"] for row in report.values()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "quantize, gptq",
        "quantize, block-wise",
        "quantize, scales of all blocks",
        "qat",
        "qat, generated text",
        "export",
    ],
)
def test_forty_points_of_every_command(command):
    report = run("--points", "40", "--only", command, timeout=7200)
    assert [row["tried"] >= 40 for row in report.values()][:2] == [True, True]
