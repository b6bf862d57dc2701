"""Give mutated inputs to the commands, many in one process, and judge what comes out. Run as a
program by `fuzz.campaign`, because an input that kills the process is a finding, too.

A command may end well or refuse (exit codes 0, 1, 2). It may not raise, take longer than 10 s of
processor time, wait for anything, print a message of more than a line or with control characters,
or leave files behind."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from fuzz import folders, mutate

CPU_SECONDS = 10
WALL_SECONDS = 60  # of a machine with other work
MEMORY_BYTES = 14 << 30
OUT = "out"


class Hang(KeyboardInterrupt):
    """Raised by the timers; no boundary may swallow it."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Hang


@contextlib.contextmanager
def _timers() -> Iterator[None]:
    signal.signal(signal.SIGPROF, _stop)
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    # Native code that never returns to Python is ended with the process.
    faulthandler.dump_traceback_later(WALL_SECONDS + 30, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def make_input(random: Random, bases: Path, root: Path) -> list[str]:
    """Put one mutated input below `root` and return the command that reads it."""
    kind = random.choices(["folder", "recipe", "text", "values"], [80, 7, 8, 5])[0]
    command = random.choices(
        ["plan", "inspect", "eval", "generate", "compare", "quantize", "qat"],
        [18, 18, 20, 20, 8, 15, 1],
    )[0]
    names = folders.UNQUANTIZED if command in ("plan", "quantize", "qat") else folders.FOLDERS
    name = random.choice(list(names))
    if kind == "folder" and random.random() < 0.1:
        name = random.choice(list(folders.FOLDERS))
    model = root / "model"
    shutil.copytree(bases / name, model)
    evaluation = [
        "--data",
        str(bases / "text.txt"),
        "--sequence-length",
        "16",
        "--max-windows",
        "2",
    ]
    recipe = ["--method", "rtn", "--bits", "4", "--group-size", "32"]
    if kind == "folder":
        mutate.mutate_folder(random, model)
    elif kind == "recipe":
        written = Path(shutil.copyfile(bases / "recipe.json", root / "recipe.json"))
        mutate.mutate_json(random, written)
        if random.random() < 0.3:  # most JSON is YAML, too
            written = Path(shutil.move(written, root / "recipe.yaml"))
        recipe = ["--recipe", str(written), "--calibration", str(bases / "text.txt")]
        command = random.choice(["plan", "plan", "quantize"])
    elif kind == "text":
        source = bases / random.choice(["text.txt", "rows.jsonl", "rows.json", "rows.parquet"])
        text = Path(shutil.copyfile(source, root / source.name))
        mutate.mutate_text(random, text)
        if random.random() < 0.5:
            command = "eval"
            evaluation[1] = str(text)
        else:
            command = "plan"
            recipe = ["--method", "gptq", "--samples", "2", "--sequence-length", "16"]
            recipe += ["--calibration", str(text)]
    if command in ("plan", "quantize") and kind in ("recipe", "text"):
        name = random.choice(folders.UNQUANTIZED)
        shutil.rmtree(model)
        shutil.copytree(bases / name, model)
    given = folders.argument(name, model)
    training = ["--train", str(bases / "text.txt"), "--sequence-length", "16", "--held-out", "0"]
    training += ["--max-steps", "1", "--batch-size", "1", "--init", "rtn", "--precision", "fp32"]
    argv = {
        "plan": ["plan", given, *recipe],
        "inspect": ["inspect", given],
        "eval": ["eval", given, *evaluation],
        "generate": ["generate", given, "--prompt", "the fox", "--max-new-tokens", "2"],
        "compare": ["compare", str(bases / "plain"), given, *evaluation],
        "quantize": ["quantize", given, str(root / OUT), *recipe],
        "qat": ["qat", given, str(root / OUT), *training, "--device", "cpu"],
    }[command]
    if kind == "values":
        _mutate_values(random, argv)
    return [*argv, "--json"] if random.random() < 0.5 else argv


def _mutate_values(random: Random, argv: list[str]) -> None:
    position = random.randrange(1, len(argv))
    values = ["", "-1", "0", "nan", "1e400", "9" * 400, "x", mutate.HOSTILE_TEXT.replace("\0", "")]
    values += ["re:(a|aa)+$=w4", "re:(=w4", "*=w5", "/dev/zero", "[" * 500, "y" * 5000]
    argv[position] = random.choice(values)
    if random.random() < 0.5:
        options = ["--rule", "--damping", "--dtype", "--bos", "--head-bits", "--seed", "--kv-bits"]
        argv += [random.choice(options), random.choice(values)]


def judge(argv: list[str], code: Any, out: str, err: str) -> list[str]:
    """What is wrong with the answer of a command that returned."""
    faults = []
    if code not in (0, 1, 2):
        faults.append(f"exit code {code}")
    messages = [line for line in err.splitlines() if line.startswith("llmq: ")]
    if code in (1, 2) and not messages:
        faults.append("no message")
    for line in messages:
        said = line.removeprefix("llmq: ").removeprefix("warning: ")
        if len(said) > 400 or not said.isprintable():
            faults.append(f"message of {len(said)} characters: {said[:60]!r}")
    if code == 2 and len([line for line in messages if "warning:" not in line]) > 1:
        faults.append("more than one message")
    if "Traceback (most recent call last)" in err:
        faults.append("a traceback on stderr")
    if "--json" in argv:
        lines = out.splitlines()
        try:
            json.loads(lines[-1] if lines else "")
        except ValueError:
            faults.append(f"no JSON on stdout: {out[-60:]!r}")
    return faults


def left_behind(
    argv: list[str], root: Path, before: set[str], temporary: Path, code: Any
) -> list[str]:
    """Files that a command made and should have removed. It runs in `root`."""
    made = {path.name for path in root.iterdir()} - before
    is_output = argv[:1] in (["quantize"], ["qat"]) and len(argv) > 2 and code in (0, 1)
    allowed = {Path(argv[2]).name} if is_output else set()
    faults = [f"left {name}" for name in sorted(made - allowed)]
    faults += [f"left in the temporary folder: {path.name}" for path in temporary.iterdir()]
    faults += ["left a child process"] if multiprocessing.active_children() else []
    return faults


def run_one(seed: str, bases: Path, scratch: Path) -> dict[str, Any]:
    """One input by its seed. The result has `outcome`: ok, refused, traceback, hang or fault."""
    from llmq.commands import cli

    random = Random(seed)
    root = Path(tempfile.mkdtemp(dir=scratch))
    temporary = scratch / "temporary"
    temporary.mkdir(exist_ok=True)
    argv = make_input(random, bases, root)
    before = {path.name for path in root.iterdir()}
    out, err = io.StringIO(), io.StringIO()
    result: dict[str, Any] = {"seed": seed, "command": argv[0] or "none", "argv": argv}
    started = time.process_time()
    tempfile.tempdir = str(temporary)
    os.chdir(root)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _timers():
            code = cli.main(argv)
        faults = judge(argv, code, out.getvalue(), err.getvalue())
        faults += left_behind(argv, root, before, temporary, code)
        result |= {"outcome": "ok" if code == 0 else "refused", "code": code}
        if code == 130:
            result |= {"outcome": "hang"}
        elif faults:
            result |= {"outcome": "fault", "faults": faults}
    except SystemExit as error:
        result |= {"outcome": "refused", "code": error.code}
    except Hang:
        result |= {"outcome": "hang", "trace": traceback.format_exc(limit=-4)}
    except BaseException:
        result |= {"outcome": "traceback", "trace": traceback.format_exc()}
    result["seconds"] = round(time.process_time() - started, 2)
    result["stderr"] = err.getvalue()[-600:]
    if result["outcome"] not in ("fault", "traceback", "hang"):
        del result["argv"]
    tempfile.tempdir = None
    os.chdir(scratch)
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    return result


def main() -> None:
    """drive.py BASES SCRATCH JOURNAL SEED FIRST LAST"""
    bases, scratch, journal = map(Path, sys.argv[1:4])
    seed, first, last = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.dup2(os.open(scratch / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    with journal.open("a", buffering=1) as file:
        for index in range(first, last):
            file.write(json.dumps({"starts": index}) + "\n")
            file.write(json.dumps(run_one(f"{seed}-{index}", bases, scratch)) + "\n")


if __name__ == "__main__":
    main()
