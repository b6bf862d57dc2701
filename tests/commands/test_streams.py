"""Streams that cannot be written to, and what is written to those that can: exit codes stay right,
messages stay lines."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.commands import cli
from llmq.models.source import resolve


class Full(io.TextIOBase):
    """A stream to a disk without space."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
@pytest.mark.parametrize(
    "streams", ["2>/dev/full", "2>&-", ">/dev/full", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"]
)
def test_full_and_closed_streams_change_no_exit_code(streams, tmp_path):
    command = f"{sys.executable} -m llmq nothing --json {streams}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if done.stdout:
        assert "unknown command nothing" in json.loads(done.stdout)["error"]


def test_a_full_stderr_does_not_lose_a_result(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Full())
    arguments = ["eval", "tiny", "--sequence-length", "16", "--max-windows", "2", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_a_full_stdout_is_told_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["inspect", "tiny"]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_want_of_memory_is_a_line(error, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("llmq.commands.inspect.run", fail)
    assert cli.main(["inspect", "tiny", "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("llmq: out of memory")
    assert (err.count("\n"), "fewer --samples" in err) == (1, True)
    assert json.loads(out)["error"] == err.removeprefix("llmq: ").rstrip("\n")


def test_names_from_files_are_shown_and_not_obeyed(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    save_file({"a\x1b[31m\nb": torch.ones(1)}, folder / "model.safetensors")
    for path in (folder, tmp_path / "no\x1b[31m\u202ename"):
        assert cli.main(["plan", str(path), "--method", "rtn"]) == 2
        line = capsys.readouterr().err.rstrip("\n")
        assert line.isprintable()
        assert len(line) <= 406
    assert cli.main(["inspect", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out
