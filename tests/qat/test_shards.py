"""A model in training that lies in parts: every parameter of it, with the numbers of one process,
and continued by another number of them."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.qat.settings import QATSettings, Scheme

# Every process of a run tells how much of the model it holds and dies at a step, where one is
# given, so that there is nothing behind the last checkpoint.
_PROGRAM = """
import os, sys
from torch.distributed.tensor import DTensor
from llmq.qat.trainer import QATTrainer
create, loss, last = QATTrainer.create_optimizer, QATTrainer.compute_loss, int(sys.argv[1])
def telling(self, *args):
    optimizer = create(self, *args)
    grouped = [each for group in optimizer.param_groups for each in group["params"]]
    assert all(isinstance(each, DTensor) for each in grouped)
    assert {id(each) for each in grouped} == {id(each) for each in self.model.parameters()}
    held = sum(each.to_local().numel() for each in grouped)
    whole = sum(each.numel() for each in grouped)
    print(f"holds {held / whole:.2f}", file=sys.stderr)
    return optimizer
def dying(self, *args, **kwargs):
    if self.state.global_step == last:
        os._exit(9)
    return loss(self, *args, **kwargs)
QATTrainer.create_optimizer, QATTrainer.compute_loss = telling, dying
from llmq.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(model_folder, calibration_file):
    """A function: the command line that fine-tunes a model of a kind into a folder."""

    folder_of = cache(lambda kind: model_folder(kind, kind))

    def make(kind, out, *more):
        return [
            *("qat", str(folder_of(kind)), str(out), "--train", str(calibration_file)),
            *("--sequence-length", "32", "--max-steps", "6", "--log-every", "1", "--init", "rtn"),
            *("--lr-weights", "1e-3", "--precision", "fp32", "--device", "cpu", *more),
        ]

    return make


@pytest.fixture
def launched(tmp_path):
    """A function: what `torchrun` made of a command on n processes, all of which die at a step."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)

    def launch(n, *line, dies_at=-1):
        start = [*LAUNCHER, f"--nproc-per-node={n}", str(program), str(dies_at)]
        return subprocess.run(
            [*start, *line], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )

    return launch


def losses(out):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [[row["loss"], row["kl"], row["grad_norm"]] for row in rows if "loss" in row]


def shares(out):
    """Telemetry and perplexity of held-out windows."""
    rows = list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))
    names = ("flip_rate", "zero_fraction", "clip_fraction")
    return [[row[name] for name in names] for row in rows if "loss" in row], [
        row["held_out_perplexity"] for row in rows if "held_out_perplexity" in row
    ]


def checked(launched, command, kind, tmp_path, *options):
    """Gradients are sums of the same numbers in another order: float32 over six steps."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(kind, one, "--batch-size", "8", *options)) == 0
    done = launched(2, *command(kind, two, "--batch-size", "4", "--shard", *options))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("holds 0.5") == 2
    assert len(losses(one)) == 6
    for row, other in zip(losses(one), losses(two), strict=True):
        assert other == pytest.approx(row, rel=1e-3)
    of_codes, perplexities = shares(one)
    other_codes, other_perplexities = shares(two)
    assert other_perplexities == pytest.approx(perplexities, rel=1e-3)
    for row, other in zip(of_codes, other_codes, strict=True):
        assert other == pytest.approx(row, rel=0.02, abs=1e-4)


def test_two_processes_with_a_half_each_are_one_with_twice_the_batch(launched, command, tmp_path):
    checked(launched, command, "llama", tmp_path, "--group-size", "32", "--scheme", "w4a8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ["--scheme", "ternary", "--group-size", "0"]),  # a scale that has but one row
        ("llama", ["--scheme", "w2", "--gradient-checkpointing"]),
        ("llama", ["--scheme", "w4a8", "--activations", "int8-static"]),
        ("gemma3_text", ["--group-size", "32"]),  # tied embeddings
        ("mixtral", ["--group-size", "32"]),  # experts that get no tokens
    ],
)
def test_any_kind_in_halves(kind, options, launched, command, tmp_path):
    checked(launched, command, kind, tmp_path, *options)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "then"), [(2, 4), (4, 2)])
def test_another_number_of_processes_goes_on(n, then, launched, command, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"

    def line(folder, n):
        more = ("--batch-size", str(8 // n), "--save-every", "2", "--group-size", "32", "--shard")
        return command("llama", folder, *more)

    died = launched(n, *line(out, n), dies_at=4)
    assert died.returncode != 0
    assert not out.exists()
    done = launched(then, *line(out, then))
    assert done.returncode == 0, done.stderr
    assert launched(n, *line(whole, n)).returncode == 0
    for row, other in zip(losses(out), losses(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


def test_one_process_has_nothing_to_split_over(command, tmp_path, capsys):
    assert main(command("llama", tmp_path / "out", "--group-size", "32", "--shard")) == 2
    assert "there is one process" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("other", [{"lora_rank": 4}, {"precision": "fp16"}])
def test_what_does_not_go_with_it(other):
    with pytest.raises(LlmqError, match="not made for each other"):
        QATSettings(Scheme.parse("w4"), shard=True, **other)
