"""Training the scales of all blocks in the folder of a run: codes as they were, nothing kept that
is worse, and a killed run that goes on with the same scales."""

import json

import pytest
import torch
from conftest import make_model

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.load import load
from llmq.inference.module import quantized_modules
from llmq.ptq import scale_run
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.ptq.scale_tuning import ScaleOptions
from llmq.ptq.sink import FolderSink
from llmq.recipe import Recipe

STEPS = 6


def recipe(**options):
    """Scales by range are too large at 2 bits, so there is something to gain."""
    settings = {"method": "gptq", "search": False, "sweeps": 0, "scale_steps": STEPS}
    windows = {"samples": 64, "sequence_length": 32}
    return Recipe.uniform("w2g32", **{**settings, **windows, **options})


def quantized(folder, calibration_file, out, **options):
    job = prepare(str(folder), recipe(**options), calibration=str(calibration_file))
    steps = []
    report = quantize_folder(job, out, on_step=lambda what, done, total: steps.append(done))
    return report, steps


@pytest.fixture(scope="module")
def without(tmp_path_factory, tokenizer, calibration_file):
    """A model, and what GPTQ alone makes of it."""
    folder = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    report, steps = quantized(folder / "model", calibration_file, folder / "out", scale_steps=0)
    assert report["scale_tuning"] is None
    assert steps == []
    return folder


def scales_and_codes(folder):
    tensors = {name: module.qtensor() for name, module in quantized_modules(load(folder)).items()}
    return (
        {name: tensor.scale for name, tensor in tensors.items()},
        {name: tensor.codes() for name, tensor in tensors.items()},
    )


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def tuned(without, calibration_file):
    """The same model with its scales trained: the folder, the report and the steps."""
    out = without / "tuned"
    return out, *quantized(without / "model", calibration_file, out)


def test_the_divergence_falls_and_codes_stay(without, tuned):
    out, report, steps = tuned
    found = report["scale_tuning"]
    assert steps == list(range(1, STEPS + 1))
    assert found["kept"]
    assert found["worse_in"] == []
    assert found["steps"] == STEPS
    assert found["steps_skipped"] == 0
    assert found["checked_sequences"] == 8
    assert found["kl"] < found["kl_start"]
    assert found["by_class"]["first"]["n_positions"] == 8
    scales, codes = scales_and_codes(out)
    old_scales, old_codes = scales_and_codes(without / "out")
    assert all(torch.equal(codes[name], old_codes[name]) for name in codes)
    assert not any(torch.equal(scales[name], old_scales[name]) for name in scales)


def test_what_is_worse_is_not_kept(without, calibration_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scale_run, "ScaleOptions", lambda **given: ScaleOptions(learning_rate=1.0, **given)
    )
    report, _ = quantized(without / "model", calibration_file, tmp_path / "out")
    found = report["scale_tuning"]
    assert not found["kept"]
    assert found["kl"] > found["kl_start"]
    assert weights(tmp_path / "out") == weights(without / "out")


@pytest.fixture
def killed(without, calibration_file, tmp_path, monkeypatch):
    """A run that was killed when one of two blocks had its trained scales: its work folder."""
    store, stored = FolderSink.replace_block, []

    def store_one(self, index, block, about):
        if stored:
            raise KeyboardInterrupt
        stored.append(index)
        store(self, index, block, about)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "replace_block", store_one)
        with pytest.raises(KeyboardInterrupt):
            quantized(without / "model", calibration_file, tmp_path / "out")
    assert stored == [0]
    return tmp_path / ".out.llmq-partial"


def test_a_killed_run_goes_on_with_the_same_scales(
    without, tuned, calibration_file, tmp_path, killed
):
    report, steps = quantized(without / "model", calibration_file, tmp_path / "out")
    assert steps == []  # nothing is trained again
    assert report["resumed_at_block"] == 2
    assert report["scale_tuning"]["kept"]
    assert weights(tmp_path / "out") == weights(tuned[0])


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("00000.safetensors", "block 0 is done again"),
        ("00001.json", "after scales were trained on all of it"),
        ("scales.safetensors", "after scales were trained on all of it"),
    ],
)
def test_what_is_lost_is_made_again(lost, told, without, tuned, calibration_file, tmp_path, killed):
    """Behind block 0 nothing can be solved as it was: it gives other outputs by now."""
    (killed / "blocks" / lost).unlink()
    with pytest.warns(LlmqWarning, match=told):
        report, _ = quantized(without / "model", calibration_file, tmp_path / "out")
    assert report["resumed_at_block"] == 0
    assert weights(tmp_path / "out") == weights(tuned[0])


def test_what_cannot_be_done_is_said(model_folder, calibration_file, capsys, tmp_path):
    folder = str(model_folder())
    with pytest.raises(LlmqError, match="method rtn reads none; use --method gptq"):
        prepare(folder, recipe(method="rtn"))
    with pytest.raises(LlmqError, match=r"scale steps -1: expected 0 .* to 1000000"):
        recipe(scale_steps=-1)
    with pytest.raises(LlmqError, match="quantize its folder"):
        llmq.quantize(load(folder), recipe(), [[1, 2, 3] * 20])


def test_a_model_in_memory_goes_without_unless_it_was_asked_for(model_folder):
    model, tokens = load(str(model_folder())), [[1, 2, 3] * 20]
    with pytest.warns(LlmqWarning, match=r"36 scale steps: .* so method blockwise goes without"):
        reports = llmq.quantize(model, "w2g32", tokens, method="blockwise")
    assert len(reports) == 2


def test_the_command_line_says_what_came_of_it(model_folder, calibration_file, tmp_path, capsys):
    arguments = [str(model_folder()), "--calibration", str(calibration_file), "--samples", "16"]
    arguments += ["--sequence-length", "32", "--bits", "2", "--group-size", "32", "--asymmetric"]
    plans = []
    for steps in ("0", "1000"):
        assert main(["plan", *arguments, "--json", "--scale-steps", steps]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["planned_seconds"] < plans[1]["planned_seconds"]
    assert plans[0]["planned_work_bytes"] < plans[1]["planned_work_bytes"]
    assert plans[0]["planned_peak_bytes"] <= plans[1]["planned_peak_bytes"]
    arguments += ["--scale-steps", str(STEPS)]
    assert main(["quantize", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 0
    shown = capsys.readouterr()
    assert "scales, all blocks" in shown.out
    assert f"scales {STEPS}/{STEPS}" in shown.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["scale_steps"] == STEPS
