"""Fine-tuning of mixtures of experts, from a folder to a folder."""

import json

import pytest
import torch
from conftest import EXPERT_CONFIGS
from safetensors import safe_open

import llmq
from llmq.commands.cli import main
from llmq.inference.module import quantized_modules

KINDS = [
    kind if kind == "mixtral" else pytest.param(kind, marks=pytest.mark.slow)
    for kind in EXPERT_CONFIGS
]


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_trained_and_stored_as_rounding_stores_it(
    kind, tmp_path, model_folder, calibration_file
):
    folder, out = model_folder(kind), tmp_path / "out"
    shape = ["--sequence-length", "32", "--batch-size", "4", "--max-steps", "4", "--log-every", "1"]
    options = ["--init", "rtn", "--group-size", "32", "--precision", "fp32", "--device", "cpu"]
    rate = ["--lr-weights", "3e-3"]
    text = ["--train", str(calibration_file)]
    assert main(["qat", str(folder), str(out), *text, *shape, *options, *rate]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]

    rounded = tmp_path / "rounded"
    llmq.quantize(folder, rounded, "w4g32", method="rtn")
    assert names(out) == names(rounded)
    trained = quantized_modules(llmq.load(out, dtype="float32"))
    start = quantized_modules(llmq.load(rounded, dtype="float32"))
    experts = [name for name in start if ".experts." in name]
    assert len(experts) > 4
    moved = [
        name
        for name in experts
        if not torch.equal(trained[name].qtensor().dequantize(), start[name].qtensor().dequantize())
    ]
    assert len(moved) > len(experts) / 2
