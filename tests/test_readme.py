"""Every command of the README runs, in the order in which it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    return [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def environment(tmp_path):
    """A Hub cache in which the README's example is a small model, so that its commands run as they stand."""
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
def test_commands(tmp_path, model_folder):
    import torch

    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    shutil.copytree(model_folder("qwen3", hidden_size=128, dtype=torch.bfloat16, max_position_embeddings=64), snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    shutil.copy(ROOT / "README.md", tmp_path)
    ran = [command for command in commands() if command.startswith("llmq ")]
    assert len(ran) >= 14
    for command in ran:
        arguments = shlex.split(command)
        if arguments[1] == "quantize" and "--samples" not in arguments:
            arguments += ["--samples", "8"]  # the time of the test, not the meaning of the command
        if arguments[1] in ("eval", "compare"):
            arguments += ["--max-windows", "8"]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_python_example(tmp_path):
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 1


@pytest.mark.slow
def test_scripts_and_the_commands_of_the_quickstart(tmp_path):
    for command in commands():
        if command.startswith("bash "):
            assert (ROOT / command.split()[1]).is_file()
    program = (ROOT / "scripts" / "quickstart.sh").read_text()
    steps = [line.removeprefix("run ") for line in program.splitlines() if line.startswith("run llmq")]
    assert [step.split()[1] for step in steps] == ["quantize", "eval", "eval", "compare", "generate"]
    for step in steps:
        arguments = shlex.split(step.replace('"$OUT"', str(tmp_path / "out")))
        arguments = ["4" if previous == "--max-windows" else argument for previous, argument in zip(["", *arguments], arguments, strict=False)]
        arguments += ["--samples", "8"] if arguments[1] == "quantize" else []
        done = subprocess.run(arguments, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (step, done.stderr)
    for script in (["quantize.py", "tiny", "example", "--samples", "4"], ["eval_perplexity.py", "example", "--max-characters", "20000"], ["generate.py", "example", "--max-new-tokens", "4"],
                   ["benchmark_cpu.py", "--n", "256", "--k", "256", "--copies", "1", "--repeats", "1", "--rows", "1", "40"],
                   ["quality_table.py", "tiny", "--seeds", "1", "--samples", "8", "--specs", "w4g128", "--max-windows", "8"],
                   ["measure_memory.py", "--depths", "1", "--width", "128", "--intermediate", "256", "--vocabulary", "2048", "--samples", "2", "--sequence-length", "32"]):  # fmt: skip
        done = subprocess.run([sys.executable, ROOT / "scripts" / script[0], *script[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (script, done.stderr)
