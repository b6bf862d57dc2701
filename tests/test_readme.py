"""Every command of the README and of the quickstart runs, in the order in which it stands there."""

import io
import re
import shlex
import shutil
import subprocess
import sys
from argparse import SUPPRESS
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hub_models import hub_of_this_process

from llmq.commands.catalog import command_parsers
from llmq.commands.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# Parts of it that became too long for it, with their commands.
PARTS = ("llmq/qat/README.md", "llmq/inference/README.md", "kernels/README.md")
MOST_WORDS = 1500
OF_SCRIPTS = {"--slow", "--train", "--eval"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text=README):
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def run(command):
    """Run an `llmq` command as it stands, but for fewer samples and windows: the time of the test,
    not the meaning of the command."""
    arguments = shlex.split(command)[1:]
    if arguments[0] == "quantize" and "--samples" not in arguments:
        arguments += ["--samples", "8"]
    if arguments[0] in ("eval", "compare", "report", "advise", "sweep"):
        arguments += ["--max-windows", "8"]
    if arguments[0] == "report":
        arguments += ["--max-new-tokens", "2"]
    if "--iterations" in arguments:
        arguments += ["--iterations", "2"]
    if arguments[0] == "qat":
        arguments += ["--train", "README.md"]
    if arguments[0] == "bench":
        arguments += ["--device", "cpu", "--shapes", "128x128", "--rows", "1", "--repeats", "1"]
    with hub_of_this_process() if arguments[0] == "push" else nullcontext():
        assert main(arguments) == 0, command


@pytest.fixture
def hub_with_the_example(tmp_path, model_folder, monkeypatch):
    """A Hub cache in which the README's example is a small model, so that its commands run as they
    stand."""
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    shutil.copytree(
        model_folder("qwen3", hidden_size=128, dtype=torch.bfloat16, max_position_embeddings=64),
        snapshot,
    )
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.slow
@pytest.mark.usefixtures("hub_with_the_example")
def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))  # of chat
    shutil.copy(ROOT / "README.md", tmp_path)
    ran = [command for command in commands() if command.startswith("llmq ")]
    assert len(ran) >= 24
    for part in PARTS:
        ran += [
            command
            for command in commands((ROOT / part).read_text())
            if command.startswith("llmq ")
        ]
    for command in dict.fromkeys(ran):
        run(command)
    scripts = [command.split()[1] for command in commands() if command.startswith("bash ")]
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.slow
def test_python_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    kl = float(capsys.readouterr().out.splitlines()[-1])
    assert 0 < kl < 0.1, "the divergence that the example ends with"


@pytest.mark.slow
def test_commands_of_the_quickstart(tmp_path):
    program = (ROOT / "scripts" / "quickstart.sh").read_text()
    steps = [
        re.sub(r"--max-windows \d+", "", line.removeprefix("run ")).replace(
            '"$OUT"', str(tmp_path / "out")
        )
        for line in program.splitlines()
        if line.startswith("run llmq")
    ]
    assert [step.split()[1] for step in steps] == [
        "quantize",
        "eval",
        "eval",
        "compare",
        "generate",
    ]
    for step in steps:
        run(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "quantize.py tiny example --samples 4",
        "eval_perplexity.py tiny --max-characters 20000",
        "generate.py tiny --max-new-tokens 4",
        "benchmark_cpu.py --n 256 --k 256 --copies 1 --repeats 1 --rows 1 40",
        "quality_table.py tiny results --text code=bundled:8 --window-length 256 --samples 8 "
        "--spec w4g128 --tool rtn --tool gptq",
        "qat_finetune.py tiny example --train {readme} --steps 2 --batch-size 2 --sequence-length "
        "32",
        "qat_table.py tiny results --train {readme} --steps 2 --batch-size 2 --sequence-length 32 "
        "--scheme w4a8kv8 w8a8 --ptq rtn --init rtn --text code=bundled:4",
        "benchmark_qat.py tiny --batch-size 1 --sequence-length 16 --repeats 1 --turns 1",
        "benchmark_writing.py tiny --batch-size 2 --length 8 --turns 1",
        "check_gpu.py tiny --device cpu --samples 8 --sequence-length 32 --steps 2 --processes",
        "measure_ranks.py tiny results --ranks 1 2 -- --samples 8 --sequence-length 32",
        "measure_memory.py --depths 1 --width 128 --intermediate 256 --vocabulary 2048 --samples "
        "2 --sequence-length 32",
    ],
)
def test_scripts(command, tmp_path):
    script, *arguments = command.format(readme=ROOT / "README.md").split()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_five_minutes_are_enough_and_every_heading_is_listed():
    assert len(README.split()) <= MOST_WORDS
    headings = re.findall(r"^## (.*)$", README, re.M)
    listed = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", README)
    assert [name for name, _ in listed] == headings
    assert [anchor for _, anchor in listed] == [name.lower().replace(" ", "-") for name in headings]


def test_what_is_linked_to_exists():
    for path in [ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "llmq").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
        local = [link for link in links if "://" not in link]
        assert [link for link in local if not (path.parent / link).exists()] == [], path


def test_no_line_is_longer_than_a_hundred_columns():
    """But for rows of tables, which cannot be broken."""
    for path in [ROOT / "README.md", *ROOT.glob(".github/*.md"), *(ROOT / "llmq").rglob("*.md")]:
        prose = [line for line in path.read_text().splitlines() if not line.startswith("|")]
        assert max(map(len, prose)) <= 100, path


def test_every_option_of_the_readme_exists():
    known = {
        option
        for parser in command_parsers().values()
        for action in parser._actions
        if action.help != SUPPRESS
        for option in action.option_strings
    }
    text = re.sub(r"`python scripts/[^`]*`|^python scripts.*$", "", README, flags=re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named - known <= OF_SCRIPTS
