"""The scripts of a developer: they parse, call one another, and say what other tools are to run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_good_shell(name):
    done = subprocess.run(["bash", "-n", ROOT / "scripts" / name], capture_output=True, text=True)
    assert done.stderr == ""


def test_versions_are_refused_before_anything_is_installed():
    script = ROOT / "scripts" / "test_versions.sh"
    done = subprocess.run(["bash", script, "2.13.0"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "torch, transformers and Triton" in done.stderr) == (2, True)


def test_a_pull_request_runs_what_a_developer_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert "bash scripts/test.sh" in [step.get("run") for step in job["steps"]]
    script = (ROOT / "scripts" / "test.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool = hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "")
        assert re.search(rf"^{re.escape(tool.split(' --')[0])}\b", script, re.M), hook["id"]


def test_every_tool_of_a_developer_is_pinned():
    pinned = {line.partition("==")[0] for line in (ROOT / "scripts" / "constraints.txt").open()}
    project = (ROOT / "pyproject.toml").read_text()
    (dev,) = re.findall(r"^dev = \[(.*)\]$", project, re.M)
    required = re.findall(r'"([\w-]+)>=', project.partition("[project.scripts]")[0])
    optional = {"lm-eval", "gguf", "setuptools"}
    assert set(re.findall(r'"([\w-]+)>=', dev)) <= pinned
    assert set(required) - optional <= pinned


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--intermediate 256", "--intermediate 64 --experts 4"])
def test_memory_is_measured_block_by_block(options):
    shape = "--depths 2 --width 128 --vocabulary 2048 --samples 2 --sequence-length 32"
    command = [sys.executable, "scripts/measure_memory.py", *shape.split(), *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(-?\d+) MB above \((-?\d+) after 1, (-?\d+) after 2\)", done.stdout)
    assert found is not None, done.stdout
    whole, first, second = map(int, found.groups())
    assert first <= second <= whole + 1
