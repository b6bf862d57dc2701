"""Scales are stored in a dtype that holds them, or the format is refused by name; a layer that lost
its output is named."""

import json
import warnings

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError, LlmqWarning
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.ptq.scales import fitting_spec, lost_share
from llmq.recipe import Recipe

LAYER = "model.layers.1.mlp.gate_proj"
TOKENS = torch.randint(2, 2048, (4, 32), generator=torch.Generator().manual_seed(1))


def scaled(folder, factor):
    """The folder with one layer's weights times a factor, and the next one's divided by it, so that
    the model computes about the same."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LAYER}.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("spec", "magnitude", "expected"),
    [
        ("w4g32", 1.0, "float16"),
        ("w4g32", 1e-4, "float16"),
        ("w8", 1e-2, "float16"),
        ("w8", 1e-4, "float32"),
        ("w4g32", 1e-7, "bfloat16"),
        ("w3g64-asym", 1e-7, "bfloat16"),
        ("ternary-g32", 1e-7, "bfloat16"),
        ("w2h-g64", 1e-8, "bfloat16"),
        ("w4-tensor", 1e-8, "bfloat16"),
        ("w4g32", 1e6, "bfloat16"),
        ("w8", 1e8, "float32"),
    ],
)
def test_the_first_dtype_that_holds_the_scales(spec, magnitude, expected):
    weight = torch.randn(24, 128) * magnitude
    spec = fitting_spec(weight, QuantSpec.parse(spec))
    assert spec.scale_dtype == expected
    ours, usual = (
        float((QuantizedTensor.quantize(w, s).dequantize() - w).norm() / w.norm())
        for w, s in (
            (weight, spec),
            (weight / magnitude, QuantSpec.parse(str(spec))),
        )
    )
    assert ours == pytest.approx(usual, rel=0.05)


def test_groups_without_weight_decide_nothing():
    """Zeros, and a row that is nothing beside the others: float16 stays, for the engines that read
    no other."""
    weight = torch.randn(24, 128)
    weight[3] *= 1e-9
    weight[5] = 0
    weight[7, :32] = 0
    assert fitting_spec(weight, QuantSpec("int4", 32)).scale_dtype == "float16"
    assert lost_share(torch.zeros(4, 64), QuantSpec("int4", 32)) == 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq", "blockwise"])
def test_a_layer_of_tiny_weights_keeps_its_output(
    method, model_folder, calibration_file, tmp_path, capsys
):
    folder, out = scaled(model_folder(), 1e-6), tmp_path / "out"
    arguments = ["--samples", "4", "--sequence-length", "32", "--group-size", "32"]
    arguments += ["--calibration", str(calibration_file), "--method", method, "--iterations", "2"]
    assert main(["quantize", folder, str(out), *arguments]) == 0
    assert f"note: {LAYER}: scales in bfloat16" in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["format"] == "compressed-tensors"  # which has no dtype of its own for scales
    assert report["layers_with_large_error"] == []
    (layer,) = [layer for layer in report["layers"] if layer["name"] == LAYER]
    measured = layer["weight_error"] if method == "rtn" else layer["error"]
    assert 0 < measured < 0.1
    module = quantized_modules(llmq.load(out, dtype="float32"))[LAYER]
    x = torch.randn(8, 64)
    expected = x @ module.qtensor().dequantize().T
    assert torch.allclose(module(x), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_a_format_with_float16_scales_is_refused_by_name(format, model_folder):
    folder = scaled(model_folder(), 1e-6)
    with pytest.raises(LlmqError, match=f"format {format} cannot hold {LAYER} .scales in bfloat16"):
        prepare(folder, Recipe.uniform("w4g32", method="rtn"), format=format)
    assert prepare(folder, Recipe.uniform("w4g32", method="rtn"), format="llmq").notes[LAYER]


def test_weights_that_overflow_are_held_too(model_folder, tmp_path):
    folder = scaled(model_folder(), 1e8)
    report = quantize_folder(
        prepare(folder, Recipe.uniform("w4g32", method="rtn")), tmp_path / "out"
    )
    assert report["layers_with_large_error"] == []
    assert "scales in bfloat16" in report["notes"][LAYER]


def test_in_memory_the_change_is_warned_of(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(1e-6)
    with pytest.warns(LlmqWarning, match=f"1 layers differ .* {LAYER}: scales in bfloat16"):
        llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    assert quantized_modules(model)[LAYER].spec.scale_dtype == "bfloat16"
    with pytest.raises(LlmqError, match="its scales are float16, not bfloat16"):
        llmq.save(model, tmp_path / "out", format="gptq")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LlmqWarning)
        llmq.quantize(make_model(), Recipe.uniform("w4g32", method="rtn"))


def test_layers_that_lost_their_output_are_named(model_folder, tmp_path, capsys):
    """One scale per tensor, where one weight is so far beyond all others that these become zero."""
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"][0, 0] = 3.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    rules = ["--rule", f"{LAYER}=w4-tensor", "--rule", "*=w8"]
    assert main(["quantize", str(folder), str(out), "--method", "rtn", *rules]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["layers_with_large_error"] == [LAYER]
    assert f"1 layers lost more than half of their output: {LAYER}" in capsys.readouterr().out
