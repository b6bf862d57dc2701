"""One model quantized by several processes: the bytes of one, and nothing lost when one dies."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache

import pytest
import torch

from llmq.commands.cli import main
from llmq.ptq.ranks import Ranks, _packed
from llmq.storage.files import digest

# A process dies at a block that the first one has begun, too: what was before it is sealed.
_KILLER = """
import os, signal, sys, time
from pathlib import Path
from llmq.ptq import engine
original, (rank, block) = engine._run_block, map(int, sys.argv[1:3])
def killing(setup, sink, index):
    begun = Path(__file__).with_name(f"begun-{index}")
    if setup.ranks.is_first:
        begun.touch()
    if (setup.ranks.rank, index) == (rank, block):
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(setup, sink, index)
engine._run_block = killing
from llmq.commands.cli import main
sys.exit(main(sys.argv[3:]))
"""

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launched(n, *command, program=("-m", "llmq"), timeout=240):
    """What `torchrun` made of a command on n processes."""
    return subprocess.run(
        [*LAUNCHER, f"--nproc-per-node={n}", *program, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT,
    )


def test_tensors_travel_as_their_own_bytes():
    whole = torch.arange(10_000, dtype=torch.bfloat16)
    sent = {"part": whole[5:10], "none": whole[:0], "number": torch.tensor(3.5), "name": "x"}
    packed = _packed(sent)
    assert len(packed) < 1000
    found = pickle.loads(packed.numpy().tobytes())
    assert found["name"] == "x"
    for name in ("part", "none", "number"):
        assert torch.equal(found[name], sent[name])
        assert found[name].dtype == sent[name].dtype
        assert found[name].shape == sent[name].shape


def alone(*command):
    """The same of one process, with as many threads: here another test may have left others."""
    line = [sys.executable, "-m", "llmq", *command]
    subprocess.run(line, check=True, capture_output=True, env=ENVIRONMENT, timeout=240)


@pytest.fixture
def command(model_folder, calibration_file):
    """A function: the command line that quantizes a model of a kind into a folder."""
    folder_of = cache(lambda kind: model_folder(kind, kind, **MODELS.get(kind, {})))

    def make(kind, out):
        text = ["--calibration", str(calibration_file), "--samples", "21"]
        grid = ["--bits", "3", "--group-size", "32", "--asymmetric", "--sequence-length", "32"]
        return ["quantize", str(folder_of(kind)), str(out), *text, *grid]

    return make


PER_LAYER_INPUTS = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 2048,
    "hidden_size_per_layer_input": 32,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
}
MODELS = {"gemma4_text": PER_LAYER_INPUTS}
METHODS = {
    "gptq": [],
    "blockwise": ["--method", "blockwise", "--iterations", "3"],
    "static": ["--activations", "int8-static"],
}
CASES = [("mixtral", "blockwise", 2)]  # its attention is that of dense models
# every sequence of gemma4_text has arguments of its own
MANY = [
    *(
        (kind, "gptq", n)
        for kind in ("llama", "mixtral", "qwen3_moe", "gpt_oss")
        for n in (2, 4, 8)
    ),
    *((kind, "static", 4) for kind in ("llama", "mixtral")),
    *((kind, "blockwise", n) for kind in ("llama", "mixtral", "gemma4_text") for n in (2, 4)),
]


def checked(command, kind, method, n, tmp_path, capsys):
    one, many = tmp_path / "one", tmp_path / "many"
    _, model, _, *options = [*command(kind, one), *METHODS[method]]
    alone("quantize", model, str(one), *options)
    capsys.readouterr()
    assert main(["plan", model, *options, "--processes", str(n), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["processes"]
    done = launched(n, "quantize", model, str(many), *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"]["n"] == n
    assert report["processes"]["sent_bytes"] == pytest.approx(planned["sent_bytes"], rel=0.05)
    assert digest(one / "model.safetensors") == digest(many / "model.safetensors")
    of_one = json.loads((one / "report.json").read_text())
    assert of_one["processes"] == {"n": 1, "sent_bytes": 0}
    assert report["layers"] == of_one["layers"]
    assert report["experts"] == of_one["experts"]
    assert not list(tmp_path.glob(".many*"))


@pytest.mark.parametrize(("kind", "method", "n"), CASES)
def test_many_processes_give_the_bytes_of_one(kind, method, n, command, tmp_path, capsys):
    checked(command, kind, method, n, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "n"), [case for case in MANY if case not in CASES])
def test_any_number_of_processes(kind, method, n, command, tmp_path, capsys):
    checked(command, kind, method, n, tmp_path, capsys)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_dies_and_another_number_goes_on(rank, command, tmp_path):
    one, many, program = tmp_path / "one", tmp_path / "many", tmp_path / "killer.py"
    program.write_text(_KILLER)
    alone(*command("llama", one))
    started = time.monotonic()
    done = launched(2, str(rank), "1", *command("llama", many), program=[str(program)])
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert f"rank      : {rank}" in done.stderr
    assert "exitcode  : -9" in done.stderr
    assert not many.exists()
    assert main([*command("llama", many), "--json"]) == 0
    report = json.loads((many / "report.json").read_text())
    assert report["resumed_at_block"] == 1
    assert digest(one / "model.safetensors") == digest(many / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_time(seed, command, tmp_path):
    """A process of four, somewhere between its first import and its last block."""
    one, many, program = tmp_path / "one", tmp_path / "many", tmp_path / "told.py"
    program.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        f"(Path({str(tmp_path)!r}) / ('pid-' + os.environ['RANK'])).write_text(str(os.getpid()))\n"
        "from llmq.commands.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    alone(*command("mixtral", one))
    chance = random.Random(seed)
    pid = tmp_path / f"pid-{chance.randrange(4)}"
    line = [*LAUNCHER, "--nproc-per-node=4", str(program), *command("mixtral", many)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, env=ENVIRONMENT)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 15))
    with suppress(ProcessLookupError):  # it may be done
        os.kill(int(pid.read_text()), signal.SIGKILL)
    running.communicate(timeout=60)
    if not many.exists():
        done = launched(2, *command("mixtral", many))
        assert done.returncode == 0, done.stderr
    assert digest(one / "model.safetensors") == digest(many / "model.safetensors")
    assert not list(tmp_path.glob(".many*"))


@pytest.mark.slow
def test_no_space_for_one_of_them(command, tmp_path):
    """What was finished is kept, and one process goes on from there."""
    one, many, program = tmp_path / "one", tmp_path / "many", tmp_path / "full.py"
    program.write_text(
        "import errno, os, sys\nfrom llmq.ptq import engine\noriginal = engine._run_block\n"
        "def full(setup, sink, index):\n"
        "    if setup.ranks.rank == 1 and index == 1:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', 'inputs.bin')\n"
        "    return original(setup, sink, index)\n"
        "engine._run_block = full\n"
        "from llmq.commands.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    alone(*command("llama", one))
    done = launched(2, *command("llama", many), program=[str(program)])
    assert done.returncode != 0
    assert "inputs.bin" in done.stderr
    assert "No space left on device" in done.stderr
    assert main(command("llama", many)) == 0
    assert json.loads((many / "report.json").read_text())["resumed_at_block"] == 1
    assert digest(one / "model.safetensors") == digest(many / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rtn", "--activations", "int8-static"], "method rtn: not on 2 processes"),
        (["--samples", "4"], "4 calibration sequences for 2 processes: expected at least 8"),
        (["--bpw", "3.5"], "--bpw and --max-bytes: not on 2 processes"),
    ],
)
def test_what_one_process_alone_can_do(options, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llmq.ptq.ranks.started", lambda: Ranks(0, 2))
    line = command("llama", tmp_path / "out")
    if "--bpw" in options:
        line = [each for each in line if each not in ("--bits", "3")]
    assert main([*line, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_other_files_are_found_at_the_start(command, model_folder, tmp_path):
    """The second process sees another model under the name."""
    line = command("llama", tmp_path / "out")
    other = model_folder("llama", "other")
    program = tmp_path / "other.py"
    program.write_text(
        "import os, sys\nif os.environ['RANK'] == '1':\n"
        f"    sys.argv[2] = {str(other)!r}\n"
        "from llmq.commands.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = launched(2, *line, program=[str(program)])
    assert done.returncode != 0
    assert "process 1 of 2 has another model than process 0" in done.stderr
