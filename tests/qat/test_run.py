"""Fine-tuning as a whole: from a folder to a folder, killed and continued, on two processes, and
with everything that can go wrong."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.commands.cli import main
from llmq.commands.engine_lines import engine_lines
from llmq.commands.qat import advice, budget_line
from llmq.errors import LlmqWarning, VerificationError
from llmq.evaluation.perplexity import evaluate
from llmq.inference.module import quantized_modules
from llmq.models.source import load_config
from llmq.qat import job as qat_job
from llmq.qat import run as run_module
from llmq.qat import ship as ship_module
from llmq.qat import trainer as trainer_module
from llmq.qat.job import prepare_job
from llmq.qat.settings import QATSettings, Scheme
from llmq.qat.student import Student
from llmq.qat.trainer import last_checkpoint
from llmq.storage import seals

_KILLER = """
import os, signal, sys
from llmq.qat.trainer import QATTrainer
from llmq.qat import run
original, last = QATTrainer.compute_loss, sys.argv[1]
def killing(self, *args, **kwargs):
    if self.state.global_step == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
if last == "ship":
    run.ship = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
elif last != "never":
    QATTrainer.compute_loss = killing
from llmq.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def arguments(model_folder, calibration_file):
    folder = model_folder()
    shape = [
        "--sequence-length",
        "32",
        "--batch-size",
        "4",
        "--max-steps",
        "6",
        "--log-every",
        "1",
        "--precision",
        "fp32",
        "--init",
        "rtn",
        "--group-size",
        "32",
    ]
    return [
        "qat",
        str(folder),
        "OUT",
        "--train",
        str(calibration_file),
        "--lr-weights",
        "1e-3",
        "--device",
        "cpu",
        *shape,
    ]


FAST = ("--lr-weights", "1e-2")  # enough for weights to reach another code of a wide grid


def at(arguments, out, *more):
    return [*(str(out) if argument == "OUT" else argument for argument in arguments), *more]


def phases_file(folder, **phases):
    """A recipe file with phases of the run."""
    path = folder / "phases.json"
    path.write_text(json.dumps({"qat": {"phases": phases}}))
    return str(path)


def losses(out):
    return [
        (row["step"], row["loss"], row["kl"])
        for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in row
    ]


@pytest.mark.parametrize(
    ("scheme", "options", "fmt"),
    [
        ("w4", [*FAST], "compressed-tensors"),
        (
            "w2",
            ["--precision", "bf16", "--gradient-checkpointing", "--init", "hqq", *FAST],
            "compressed-tensors",
        ),
        (
            "ternarya8kv8",
            ["--quantizer", "absmean", "--recipe", {"gradual": 0.5, "activations": 0.5}],
            "llmq",
        ),
        pytest.param(
            *("w2a8", ["--activations", "int8-static", "--quantizer", "seq"], "llmq"),
            marks=pytest.mark.slow,
        ),
        ("w8a8kv4", ["--activations", "int8-static", "--init", "gptq", "--kv-before-rope"], "llmq"),
    ],
)
def test_from_a_folder_to_a_folder(scheme, options, fmt, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    if "--recipe" in options:
        options = [*options[:-1], phases_file(tmp_path, **options[-1])]
    assert main(at(arguments, out, "--scheme", scheme, "--json", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"shipped: {report['shipped']}" in shown
    assert report["format"] == fmt
    assert report["engines"][0]["reads"]
    assert engine_lines(report["engines"]) in shown
    assert (
        {len(score["text_sha256"]) for score in report["held_out"].values()}
        == {len(score["tokenizer_sha256"]) for score in report["held_out"].values()}
        == {64}
    )
    assert report["shipped"] == (
        "trained"
        if report["held_out"]["trained"]["perplexity"] < report["held_out"]["start"]["perplexity"]
        and not report["trained_worse_in"]
        else "start"
    )
    own = report["held_out"][report["shipped"]]
    ratio = own["perplexity"] / report["held_out"]["full_precision"]["perplexity"]
    assert own["perplexity_ratio"] == pytest.approx(ratio)
    low, high = own["perplexity_ratio_ci95"]
    assert low <= ratio <= high
    card = (out / "README.md").read_text()
    assert f"{ratio:.4f} ({low:.4f} to {high:.4f})" in card
    assert "| method | `qat`, 6 steps of" in card
    assert f"-> {own['perplexity']:.3f}" in card
    assert report["stored_bytes"] == (out / "model.safetensors").stat().st_size
    assert all(
        losses["first"]["n_positions"] == report["held_out"]["start"]["windows"]
        for losses in report["held_out_by_class"].values()
    )
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert {"kl", "ce", "grad_norm", "flip_rate", "zero_fraction", "clip_fraction"} <= training[
        -1
    ].keys()
    assert sum("held_out_perplexity" in row for row in rows) == 6
    assert any(row.get("flip_rate", 0) > 0 for row in rows)
    assert not list(tmp_path.glob(".out*"))
    config = load_config(out).quantization_config
    assert config["quant_method"] == fmt
    # What was measured is what is on the disk: the score of the held-out text again, from the
    # folder.
    model = llmq.load(out, dtype="float32")
    assert torch.isfinite(model(input_ids=torch.arange(2, 20)[None]).logits).all()
    assert (
        main(
            [
                "compare",
                str(arguments[1]),
                str(out),
                "--sequence-length",
                "32",
                "--max-windows",
                "4",
                "--json",
            ]
        )
        == 0
    )


def test_the_start_is_shipped_when_training_made_it_worse(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        trainer_module.QATTrainer,
        "compute_loss",
        lambda self, model, inputs, **kwargs: -10 * model(**inputs)["loss"],
    )
    out = tmp_path / "out"
    assert main(at(arguments, out, "--lr-weights", "0.05")) == 0
    assert "the PTQ start, because training" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["shipped"] == "start"
    assert "; training did not beat it: it is the start" in (out / "README.md").read_text()
    llmq.load(out)


def test_the_start_is_shipped_when_one_kind_of_position_became_worse(
    arguments, tmp_path, capsys, monkeypatch
):
    """All but the first position gain, by a measurement that is made up here."""
    score = ship_module._score

    def favourable(*args):
        scores, by_class = score(*args)
        trained = by_class.losses["start"] - 0.1
        trained[:, 0] += 0.2
        scores["trained"] = replace(scores["trained"], value=scores["start"].value - 1)
        losses = {**by_class.losses, "trained": trained}
        return scores, replace(by_class, losses=losses)

    monkeypatch.setattr(ship_module, "_score", favourable)
    out = tmp_path / "out"
    assert main(at(arguments, out)) == 0
    assert "worse at some positions (first)" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (report["shipped"], report["trained_worse_in"]) == ("start", ["first"])


@pytest.mark.slow
def test_killed_and_continued_is_never_disturbed(arguments, tmp_path):
    """Killed at a random step, and once more when all are done."""
    options = [
        "--save-every",
        "2",
        "--log-every",
        "2",
        "--recipe",
        phases_file(tmp_path, gradual=0.5),
        "--scheme",
        "w4a8",
        "--activations",
        "int8-static",
        "--init",
        "gptq",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    random_step = str(random.randrange(6))
    for out, kills in ((whole, ["never"]), (broken, [random_step, "ship", "never"])):
        for kill in kills:
            done = subprocess.run(
                [sys.executable, "-c", _KILLER, kill, *at(arguments, out, *options)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == (0 if kill == "never" else -signal.SIGKILL), (
                f"{kill}: {done.stderr}"
            )
    assert losses(broken) == losses(whole), f"killed at step {random_step}"
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(arguments, tmp_path):
    """Gradients are averaged over processes, so losses agree up to the order of float32 sums: 1e-4
    relative after six steps of 1e-3."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    single = [
        sys.executable,
        "-m",
        "llmq",
        *at(
            arguments,
            one,
            "--batch-size",
            "8",
            "--scheme",
            "ternarya8",
            "--activations",
            "int8-static",
            "--init",
            "gptq",
        ),
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29517",
    ]
    double = [
        *launch,
        "-m",
        "llmq",
        *at(
            arguments,
            two,
            "--json",
            "--scheme",
            "ternarya8",
            "--activations",
            "int8-static",
            "--init",
            "gptq",
        ),
    ]
    for command in (single, double):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["shipped"], "one object, of the main process"
    for (step, loss, kl), (other_step, other_loss, other_kl) in zip(
        losses(one), losses(two), strict=True
    ):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-4)
        assert kl == pytest.approx(other_kl, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    arguments, tmp_path, capsys, monkeypatch
):
    forward = Student.forward
    calls = []

    def broken(self, input_ids):
        outputs = forward(self, input_ids)
        calls.append(1)
        return {**outputs, "loss": outputs["loss"] * float("nan")} if len(calls) == 4 else outputs

    monkeypatch.setattr(Student, "forward", broken)
    out = tmp_path / "out"
    assert main(at(arguments, out, "--save-every", "2")) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 4: the loss is nan" in message
    assert "checkpoint-2" in message
    assert not out.exists()
    monkeypatch.setattr(Student, "forward", forward)
    # Another run in its place is refused, and says what differs; the same one goes on.
    assert main(at(arguments, out, "--save-every", "2", "--lr-scales", "1e-2")) == 2
    assert "lr_scales: None there, 0.01 now" in capsys.readouterr().err
    assert main(at(arguments, out, "--save-every", "2")) == 0
    assert [step for step, _, _ in losses(out)] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_weight(
    arguments, tmp_path, capsys, monkeypatch
):
    forward, calls = Student.forward, []

    def broken(self, input_ids):
        outputs = forward(self, input_ids)
        calls.append(1)
        if len(calls) == 4:
            outputs["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return outputs

    monkeypatch.setattr(Student, "forward", broken)
    assert main(at(arguments, tmp_path / "out", "--save-every", "2")) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 4: the gradient holds NaN" in message
    assert "checkpoint-2" in message
    monkeypatch.undo()
    assert main(at(arguments, tmp_path / "out", "--save-every", "2")) == 0


def test_only_a_sealed_checkpoint_that_is_as_it_was_is_continued_from(tmp_path):
    for step, is_sealed in ((2, True), (10, True), (11, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("state")
        if is_sealed:
            seals.seal_folder(folder, trainer_module.SEAL)
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("stale")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None
    with pytest.warns(LlmqWarning, match="checkpoint-11: is not as it was"):
        trainer_module.drop_unsound(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}


def test_what_is_scored_is_what_is_stored(
    arguments, model_folder, calibration_file, tmp_path, capsys
):
    """Embeddings and norms of a bfloat16 model are trained in float32 and stored in bfloat16."""
    arguments[1] = str(model_folder(name="half", dtype=torch.bfloat16))
    assert main(at(arguments, tmp_path / "out", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    settings = QATSettings(Scheme.parse("w4"), sequence_length=32, batch_size=4)
    held_out = prepare_job(arguments[1], settings, train=str(calibration_file)).held_out
    assert (
        evaluate(llmq.load(tmp_path / "out", dtype="float32"), held_out).value
        == report["held_out"][report["shipped"]]["perplexity"]
    )


def test_tensorboard_logs_are_kept(arguments, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which the Trainer writes with")
    assert main(at(arguments, tmp_path / "out", "--report-to", "tensorboard")) == 0
    assert list((tmp_path / "out" / "runs").rglob("events*"))


def test_generated_text(arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [*arguments]
    arguments[arguments.index("--train") + 1] = "generated"
    assert (
        main(
            at(
                arguments,
                out,
                "--max-steps",
                "2",
                "--sequence-length",
                "12",
                "--init",
                "gptq",
                "--json",
            )
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["train"] == {"source": "generated", "windows": [8, 12]}
    assert report["settings"]["loss"]["ce"] == 0
    assert report["held_out"]["start"]["tokens"] == 11, "one window beside the eight"
    assert report["verdict"] is None


def test_a_start_with_too_many_fallbacks_is_not_trained_from(
    arguments, tmp_path, capsys, monkeypatch
):
    quantize_folder = run_module.quantize_folder

    def falls_back(job, out, **options):
        quantize_folder(job, out, **options)
        raise VerificationError("7 of 14 layers fell back to plain rounding")

    monkeypatch.setattr(run_module, "quantize_folder", falls_back)
    for _ in range(2):  # the second attempt does not find the start of the first
        assert main(at(arguments, tmp_path / "out")) == 1
        assert "fell back" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(at(arguments, tmp_path / "out")) == 0


def test_the_start_is_calibrated_on_windows_that_are_trained_on(arguments, calibration_file):
    job = prepare_job(
        arguments[1],
        QATSettings(Scheme.parse("w4"), sequence_length=32, batch_size=4),
        train=str(calibration_file),
    )
    trained, held_out = (
        {tuple(window) for window in windows.tolist()}
        for windows in (job.windows, job.held_out.tokens)
    )
    calibration = {tuple(window) for window in run_module._calibration(job).tokens.tolist()}
    assert calibration <= trained
    assert held_out - trained, "windows that could have been among them"


def test_a_run_is_not_continued_with_other_weights(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        run_module,
        "train",
        lambda *args, **options: (_ for _ in ()).throw(VerificationError("stopped")),
    )
    assert main(at(arguments, tmp_path / "out")) == 1
    os.utime(tmp_path.parent / arguments[1] / "model.safetensors", (1, 1))
    assert main(at(arguments, tmp_path / "out")) == 2
    assert "holds a run with other settings (weights of the model" in capsys.readouterr().err


def test_code_flips_are_counted_from_the_start(arguments, tmp_path):
    assert main(at(arguments, tmp_path / "out", "--log-every", "6", "--lr-weights", "0.02")) == 0
    (row,) = [
        row
        for row in map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert row["flip_rate"] > 0


def test_a_picture_of_the_log(arguments, tmp_path):
    picture = tmp_path / "log.svg"
    assert main(at(arguments, tmp_path / "out", "--plot", str(picture))) == 0
    text = picture.read_text()
    parts = ("cross entropy, nats", "KL divergence, nats", "held-out text, full precision")
    assert [part for part in parts if part not in text] == []


def test_budget(arguments, calibration_file):
    """Estimates that follow from the settings: tokens and steps exactly, memory and operations in
    proportion."""
    settings = QATSettings(
        Scheme.parse("w4"), sequence_length=32, batch_size=4, accumulation=2, max_steps=10
    )
    budget, wider = (
        prepare_job(arguments[1], each, train=str(calibration_file)).budget()
        for each in (settings, replace(settings, batch_size=8))
    )
    n_parameters = sum(parameter.numel() for parameter in make_model().parameters())
    assert (budget["tokens"], budget["steps"]) == (10 * 2 * 4 * 32, 10)
    assert 16 * n_parameters < budget["bytes"] < 24 * n_parameters
    assert wider["flops"] == 2 * budget["flops"]
    assert wider["activation_bytes"] > budget["activation_bytes"]
    job = prepare_job(arguments[1], settings, train=str(calibration_file))
    half = replace(job, settings=replace(job.settings, optimizer="adamw_torch_8bit")).budget()
    assert budget["bytes"] - half["bytes"] == 6 * n_parameters
    low = prepare_job(arguments[1], replace(settings, lora_rank=4), train=str(calibration_file))
    sides = sum(sum(plan.layer.shape) for plan in low.plans if plan.spec is not None)
    quantized = [(plan.layer.shape, plan.spec) for plan in low.plans if plan.spec is not None]
    n_added = 4 * sides + sum(n * -(-k // spec.group_size) for (n, k), spec in quantized)
    assert budget["bytes"] - low.budget()["bytes"] == 12 * n_parameters - (4 + 12) * n_added
    line = budget_line(prepare_job(arguments[1], settings, train=str(calibration_file)))
    assert "2,560 tokens in 10 steps" in line
    assert f" h in {job.settings.precision} on this CPU" in line


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "n_steps", "told"),
    [
        (64, 1, 150, "150 steps of 2,048 tokens: smaller ones learn more from as much text, such "
         "as --batch-size 32 --max-steps 300"),
        (32, 1, 150, None),  # small already
        (64, 1, 300, None),  # enough of them
        (64, 2, 150, None),
        (64, 1, 19, None),  # a trial
        (4, 1, 49, "49 steps are too few for weights to get from one code to another, so scales, "
         "norms and embeddings learn alone: take more of them, with a smaller --batch-size or more "
         "text"),
        (4, 1, 52, None),
    ],
)  # fmt: skip
def test_few_large_steps_are_advised_against(
    arguments, calibration_file, batch_size, accumulation, n_steps, told
):
    settings = QATSettings(
        Scheme.parse("w4"),
        sequence_length=32,
        batch_size=batch_size,
        accumulation=accumulation,
        max_steps=n_steps,
    )
    assert advice(prepare_job(arguments[1], settings, train=str(calibration_file))) == told


def test_text_without_held_out_windows_says_that_nothing_was_compared(arguments, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("def f(x):\n    return x\n" * 20)
    arguments[arguments.index("--train") + 1] = str(short)
    assert main(at(arguments, tmp_path / "out")) == 0
    assert "fewer than 10 windows" in capsys.readouterr().out
    assert "\nNot measured. `llmq compare BASE out`" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "w5"], "unknown scheme 'w5'"),
        (["--sequence-length", "4096"], "positions for 128 tokens only"),
        (["--batch-size", "100000"], "one step needs 100000"),
        (["--max-tokens", "40"], "both set the length of the run"),
        (["--train", "generated", "--kl", "0"], "give --kl or --ce"),
        (["--kl", "0", "--ce", "0"], "give --kl or --ce"),
        (["--scheme", "w2", "--quantizer", "seq", "--asymmetric"], "have no zero point"),
        (
            ["--scheme", "w3", "--quantizer", "absmean"],
            "layers.0.self_attn.q_proj: quantizer absmean is for ternary codes",
        ),
        (
            ["--scheme", "ternary", "--quantizer", "absmean", "--rule", "*.layers.1.*=w8"],
            "layers.1.self_attn.q_proj: quantizer absmean is for ternary codes",
        ),
        (["--rule", "*=keep"], "none of the 14 linear layers would be quantized"),
        (["--report-to", "nobody"], "--report-to nobody: expected none"),
        (["--plot", "loss.xyz"], "expected a file that ends in"),
        (["--quantizer", "ste", "--init", "gptq"], "give --init rtn"),
        (["--log-every", "3", "--save-every", "4"], "no multiple of --log-every"),
        (["--activations", "int8-static"], "write w4a8"),
        (["--train", "missing.txt"], "no such file"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--rule", "*.nothing=w8"], "matches none"),
        (["--optimizer", "sgd"], "--optimizer sgd: expected adamw_torch or adamw_torch_fused"),
    ],
)
def test_bad_input(options, message, arguments, tmp_path, capsys):
    assert main(at(arguments, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not list(tmp_path.glob("*out*")), "nothing is left behind"


@pytest.mark.parametrize("bits", ["4", "2"])
def test_a_result_is_stored_as_that_of_ptq(bits, arguments, tmp_path):
    """Whatever opens one opens the other: settings, engines, and tensors by name, dtype, shape."""
    trained, rounded = tmp_path / "trained", tmp_path / "rounded"
    assert main(at(arguments, trained, "--scheme", f"w{bits}")) == 0
    grid = ["--bits", bits, "--group-size", "32", *(["--asymmetric"] if bits == "2" else [])]
    assert main(["quantize", arguments[1], str(rounded), *grid, "--method", "rtn"]) == 0
    kinds = []
    for out in (trained, rounded):
        config = json.loads((out / "config.json").read_text())
        stored = load_file(out / "model.safetensors")
        shapes = {name: (each.dtype, each.shape) for name, each in stored.items()}
        engines = json.loads((out / "report.json").read_text())["engines"]
        reads = {each["engine"]: each["reads"] for each in engines}
        kinds.append((config, reads, shapes))
    assert kinds[0] == kinds[1]


def test_an_optimizer_that_is_not_installed_is_named_at_the_start(
    arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(qat_job, "find_spec", lambda name: None)
    assert main(at(arguments, tmp_path / "out", "--optimizer", "adamw_torch_8bit")) == 2
    assert "needs torchao, which is not installed: pip install torchao" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_split_weights(engine, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert main(at(arguments, tmp_path / "out")) == 2
    assert (
        f"not with accelerate's {engine}; launch it without, and give --shard"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*out*")), "nothing is left behind"


def test_a_vocabulary_of_the_same_size_with_other_tokens(arguments, model_folder, tmp_path, capsys):
    teacher = model_folder(name="teacher")
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    assert main(at(arguments, tmp_path / "out", "--teacher", str(teacher))) == 2
    assert "other tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*")), "nothing is left behind"


def test_another_vocabulary(arguments, model_folder, tmp_path, capsys):
    teacher = model_folder(name="teacher", vocab_size=1024)
    assert main(at(arguments, tmp_path / "out", "--teacher", str(teacher))) == 2
    assert "vocabulary of 1024" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*")), "nothing is left behind"


def test_scales_of_tiny_weights_are_held_through_training(arguments, tmp_path, capsys):
    """Float16 would make them zero, in the start and in what is trained from it."""
    path, name = Path(arguments[1]) / "model.safetensors", "model.layers.0.mlp.gate_proj"
    tensors = load_file(path)
    tensors[f"{name}.weight"] *= 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    assert main(at(arguments, out, "--lr-weights", "1e-9")) == 0
    report = json.loads((out / "report.json").read_text())
    assert "scales in bfloat16" in report["notes"][name]
    module = quantized_modules(llmq.load(out, dtype="float32"))[name]
    original = tensors[f"{name}.weight"].float()
    difference = module.qtensor().dequantize() - original
    assert module.spec.scale_dtype == "bfloat16"
    assert float(difference.norm() / original.norm()) < 0.3
