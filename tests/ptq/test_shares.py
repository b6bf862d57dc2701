"""What processes take that share a run, from shapes alone; what they really send is held against it
in `test_ranks.py`."""

import json

import pytest

from llmq.commands.cli import main
from llmq.ptq.job import prepare
from llmq.ptq.shares import Share
from llmq.recipe import Recipe


@pytest.fixture
def job(model_folder, calibration_file):
    recipe = Recipe.uniform("w4g32", samples=16, sequence_length=32)
    return prepare(str(model_folder("llama")), recipe, calibration=str(calibration_file))


def test_one_process_is_the_whole(job):
    alone, two, eight = (Share.of(job, n) for n in (1, 2, 8))
    assert alone.sent_bytes == 0
    assert eight.sent_bytes == 7 * two.sent_bytes
    assert alone.work_bytes == 2 * two.work_bytes == 8 * eight.work_bytes
    assert alone.first_disk_bytes - alone.work_bytes == two.first_disk_bytes - two.work_bytes
    assert alone.flops > two.flops > eight.flops > alone.flops / 8


def test_what_is_planned_for_gpus(model_folder, calibration_file, capsys):
    folder = str(model_folder("llama"))
    text = ["--calibration", str(calibration_file), "--samples", "16", "--sequence-length", "32"]
    line = ["plan", folder, *text, "--nodes", "2", "--gpus", "2", "--gpu-memory", "1MB"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["processes"]
    assert found["n_processes"] == 4
    assert found["gpu_memory_bytes"] == 1_000_000
    assert found["fits"] == (found["peak_bytes"] <= 1_000_000)
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "each of 4 processes" in shown
    assert "sent between them" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "3 processes: expected 1, 2, 4 or 8"),
        (["--gpus", "2", "--processes", "2"], "give one"),
        (["--gpus", "2", "--method", "rtn"], "method rtn: not on 2 processes"),
    ],
)
def test_what_cannot_be_shared(options, message, model_folder, calibration_file, capsys):
    text = [] if "rtn" in options else ["--calibration", str(calibration_file)]
    assert main(["plan", str(model_folder("llama")), *text, *options]) == 2
    assert message in capsys.readouterr().err
