"""A run killed with SIGKILL continues where it stopped and gives the same bytes as one that was
never disturbed."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmq.errors import LlmqError, LlmqWarning
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.ptq.stage import Stage
from llmq.recipe import Recipe
from llmq.storage.files import MANIFEST

# Runs the command line with small batches and kills the process at the n-th call of one function
# (0: never).
_KILLER = """
import importlib, os, signal, sys
module, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
*path, attribute = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, calls = getattr(owner, attribute), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, attribute, killing)
import llmq.ptq.streams
llmq.ptq.streams.BATCH_BYTES = 200_000
import llmq.storage.packing
llmq.storage.packing.MAX_SHARD_BYTES = 80_000
from llmq.commands.cli import main
sys.exit(main(sys.argv[4:]))
"""
NEVER = ("llmq.storage.files", "publish", 0)
KILLS = [
    ("llmq.ptq.capture", "BlockRecorder.run", 2),  # while the embeddings are computed
    ("llmq.ptq.methods.gptq", "gptq", 6),  # in the middle of block 1
    ("llmq.storage.partial_checkpoint", "PartialCheckpoint.finish_block", 2),  # block 1, not named
    ("llmq.storage.files", "sync", 12),  # inside a write
    ("llmq.storage.packing", "_write", 12),  # inside the first shard
    ("llmq.storage.packing", "merge", 2),  # the first shard has its name, its blocks are gone
    ("llmq.storage.files", "write_manifest", 1),  # all but the last file
]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


@pytest.fixture
def arguments(model_folder, calibration_file):
    folder = model_folder(num_hidden_layers=3)
    return [
        "quantize",
        str(folder),
        "{out}",
        "--group-size",
        "32",
        "--samples",
        "30",
        "--sequence-length",
        "32",
        "--calibration",
        str(calibration_file),
        "--format",
        "gptq",
        "--inputs",
        "full-precision",
    ]


def run(arguments, out, kill=NEVER, by="SIGKILL"):
    command = [
        sys.executable,
        "-c",
        _KILLER.replace("SIGKILL", by),
        kill[0],
        kill[1],
        str(kill[2]),
        *[argument.format(out=out) for argument in arguments],
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "method", "kills", "options"),
    [
        ("full-precision", "gptq", KILLS, []),
        ("both", "gptq", KILLS[1:3], []),
        ("both", "gptq", KILLS[1:4], ["--max-ram", "2"]),  # hidden states are gone with a process
        ("both", "smoothquant+gptq", KILLS[1:2], []),
    ],
)
def test_killed_anywhere_resumes_to_the_same_bytes(
    arguments, tmp_path, inputs, method, kills, options
):
    arguments = [*arguments[:-1], inputs, "--method", method]
    reference = tmp_path / "reference"
    assert run(arguments, reference).returncode == 0
    arguments += options
    expected = digests(reference)
    assert len(expected) == 3
    for i, kill in enumerate(kills):
        out = tmp_path / f"out-{i}"
        killed = run(arguments, out, kill)
        assert killed.returncode == -signal.SIGKILL, (kill, killed.stderr)
        assert not out.exists(), kill
        resumed = run(arguments, out)
        assert resumed.returncode == 0, (kill, resumed.stderr)
        assert digests(out) == expected, kill
        assert (out / MANIFEST).is_file()
        assert not list(tmp_path.glob(f".out-{i}*")), kill
        assert kill is KILLS[0] or "resuming after block" in resumed.stderr, kill


@pytest.mark.slow
def test_block_wise_tuning_resumes_to_the_same_bytes(arguments, tmp_path):
    weak_start = tmp_path / "weak-start.json"
    weak_start.write_text(json.dumps({"search": False, "sweeps": 0, "damping": 1.0}))
    tuned = [
        *arguments,
        "--recipe",
        str(weak_start),
        "--bits",
        "2",
        "--method",
        "blockwise",
        "--iterations",
        "60",
        "--learning-rate",
        "0.05",
    ]
    assert run(tuned, tmp_path / "reference").returncode == 0
    assert (
        run(tuned, tmp_path / "out", ("llmq.ptq.methods.blockwise", "tune_block", 2)).returncode
        == -signal.SIGKILL
    )  # GPTQ of block 1 done, its tuning not begun
    resumed = run(tuned, tmp_path / "out")
    assert "resuming after block 0" in resumed.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")
    starts, ends = (
        [
            block[key]
            for block in json.loads((tmp_path / "out" / "report.json").read_text())["tuned_blocks"]
        ]
        for key in ("start_error", "tuned_error")
    )
    assert all(
        end < start for start, end in zip(starts, ends, strict=True)
    )  # or there would be no training to repeat


@pytest.mark.slow
def test_sigterm_says_how_to_go_on(arguments, tmp_path):
    stopped = run(arguments, tmp_path / "out", KILLS[1], by="SIGTERM")
    assert stopped.returncode == 130
    assert stopped.stderr.endswith(
        "llmq: interrupted; the same command continues where it stopped\n"
    )
    assert (tmp_path / ".out.llmq-partial").is_dir()


def interrupted(model_folder, calibration_file, out, recipe, **options):
    def stop(report):
        raise KeyboardInterrupt

    folder = model_folder()
    job = prepare(str(folder), recipe, calibration=str(calibration_file))
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job, out, on_block=stop, **options)
    return folder


def test_hidden_states_in_memory_are_computed_again_and_change_nothing(
    model_folder, calibration_file, tmp_path
):
    recipe = Recipe.uniform("w4g32", samples=16, sequence_length=32)
    out, memory = tmp_path / "out", {"max_ram": 10**9}
    folder = interrupted(model_folder, calibration_file, out, recipe, **memory)
    job = prepare(str(folder), recipe, calibration=str(calibration_file))
    assert not list((tmp_path / ".out.llmq-partial").glob("inputs-*.bin"))
    with pytest.warns(LlmqWarning, match="computed again from the finished blocks"):
        report = quantize_folder(job, out, **memory)
    assert report["resumed_at_block"] == 1
    assert report["hidden_states"]["memory_bytes"] > 0
    assert report["hidden_states"]["written_bytes"] == 0
    in_files = quantize_folder(job, tmp_path / "in-files")["hidden_states"]
    assert in_files["memory_bytes"] == 0
    assert in_files["written_bytes"] > report["hidden_states"]["memory_bytes"]
    assert digests(out) == digests(tmp_path / "in-files")


def test_what_an_interrupted_block_recorded_is_recorded_again(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    """The block is run again from its inputs: rows of the full-precision model that lie there from
    before are neither read nor appended to."""
    recipe, folder = Recipe.uniform("w4g32", samples=4, sequence_length=32), model_folder()
    quantize_folder(
        prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "reference"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(
                prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "out"
            )
    assert list(tmp_path.glob(".out*/exact-*.bf16"))
    quantize_folder(
        prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "out"
    )
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")


def test_other_settings_do_not_continue_an_interrupted_run(
    model_folder, calibration_file, tmp_path
):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32)
    folder = interrupted(model_folder, calibration_file, tmp_path / "out", recipe)
    other = Recipe.uniform("w4g64", samples=4, sequence_length=32)
    with pytest.raises(
        LlmqError,
        match=(
            r"interrupted run with another recipe \(rules: .*'group_size': 32.* there, "
            r".*'group_size': 64.* now\)"
        ),
    ):
        quantize_folder(
            prepare(str(folder), other, calibration=str(calibration_file)), tmp_path / "out"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # changes no byte
    try:
        again = quantize_folder(
            prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "out"
        )
    finally:
        torch.set_num_threads(threads)
    assert again["resumed_at_block"] == 1


@contextmanager
def files_of_at_most(n_bytes):
    """A limit on the size of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_what_is_finished(model_folder, tmp_path):
    """The blocks fit, the last shard does not."""
    job = prepare(str(model_folder()), Recipe.uniform("w4g32", method="rtn"))
    with (
        files_of_at_most(300_000),
        pytest.raises(
            LlmqError,
            match=(
                r"00002\.tmp: cannot be written .*File too large.*continues where "
                r"it stopped"
            ),
        ),
    ):
        quantize_folder(job, tmp_path / "out")
    assert quantize_folder(job, tmp_path / "out")["resumed_at_block"] == 2


def test_no_space_for_activations_keeps_what_is_finished(model_folder, calibration_file, tmp_path):
    folder = model_folder(vocab_size=2048)
    job = prepare(
        str(folder),
        Recipe.uniform("w4g32", samples=40, sequence_length=64),
        calibration=str(calibration_file),
    )
    with (
        files_of_at_most(600_000),
        pytest.raises(
            LlmqError, match=r"\.out\.llmq-partial.*File too large.*continues where it stopped"
        ),
    ):  # inputs are 40 x 64 x 64 x 4 bytes
        quantize_folder(job, tmp_path / "out")
    assert quantize_folder(job, tmp_path / "out")["resumed_at_block"] == 0


def test_a_disk_that_will_not_do_is_refused_at_the_start(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    job = prepare(
        str(model_folder()),
        Recipe.uniform("w4g32", samples=4, sequence_length=32),
        calibration=str(calibration_file),
    )
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        LlmqError,
        match=r"0\.00 GB are free, and output and activations need about 0\.00 GB; make space",
    ):
        quantize_folder(job, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_killed_with_the_output_in_place_leaves_nothing_in_the_end(
    model_folder, tmp_path, monkeypatch
):
    job = prepare(str(model_folder()), Recipe.uniform("w4g32", method="rtn"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "llmq.storage.partial_checkpoint.PartialCheckpoint.remove",
            lambda self: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(job, tmp_path / "out")
    assert (tmp_path / ".out.llmq-partial").exists()
    with pytest.raises(LlmqError, match="exists already"):
        quantize_folder(job, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_two_runs_cannot_share_an_output(model_folder, calibration_file, tmp_path):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32)
    folder = model_folder()
    job = prepare(str(folder), recipe, calibration=str(calibration_file))

    def intrude(report):
        with pytest.raises(LlmqError, match="another llmq is working"):
            quantize_folder(
                prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "out"
            )

    quantize_folder(job, tmp_path / "out", on_block=intrude)
