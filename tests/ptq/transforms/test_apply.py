"""Runs with a transform: the result is that of a model whose scale has moved, everywhere."""

import json

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.ptq.stats import LayerStats
from llmq.recipe import Recipe

LENGTH = 32


def recipe(method, spec="w8", **options):
    return Recipe.uniform(spec, method=method, samples=64, sequence_length=LENGTH, **options)


def quantized(folder, out, calibration_file, recipe):
    quantize_folder(
        prepare(str(folder), recipe, calibration=str(calibration_file), format="llmq"), out
    )
    return llmq.load(out, dtype="float32"), json.loads((out / "report.json").read_text())


def divergence(folder, model):
    tokens = torch.randint(2, 2000, (8, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = llmq.load(folder, dtype="float32")(tokens).logits.log_softmax(-1)
        found = model(tokens).logits.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_static_ranges_lose_less(outlier_folder, tmp_path, calibration_file):
    activations = llmq.ActSpec("int8-static")
    kl = {}
    for method in ("rtn", "smoothquant+rtn"):
        own = recipe(method, activations=activations)
        model, report = quantized(outlier_folder, tmp_path / method, calibration_file, own)
        kl[method] = divergence(outlier_folder, model)
    assert kl["smoothquant+rtn"] < 0.5 * kl["rtn"]
    assert all(layer["error"] is not None for layer in report["layers"])  # ranges were measured
    assert report["method"] == "smoothquant+rtn"
    assert [moved["block"] for moved in report["transforms"]] == [0, 1]
    for moved in report["transforms"]:
        assert not moved["left"]
        givers = {pair["giver"]: pair for pair in moved["pairs"]}
        assert len(givers) == 4
        assert givers["mlp.up_proj"]["largest"] > 4 * givers["mlp.up_proj"]["smallest"]


@pytest.mark.parametrize("method", ["gptq", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_8_bits_stay_the_model(outlier_folder, tmp_path, calibration_file, method):
    own = recipe(f"smoothquant+{method}", iterations=2)
    model, report = quantized(outlier_folder, tmp_path / "out", calibration_file, own)
    assert divergence(outlier_folder, model) < 1e-4
    stored = llmq.load(outlier_folder).model.layers[0].input_layernorm.weight
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, stored.float())
    assert report["kept_layers"] == []


def test_rows_of_the_full_precision_model_move_too(
    outlier_folder, tmp_path, calibration_file, monkeypatch
):
    """Nothing is lost before block 0, so both streams enter its first layers alike: what each layer
    reads of the full-precision model stands in the units of the transformed one."""
    differences = []
    add = LayerStats.add

    def compare(self, x, y=None, weights=None):
        if y is not None and y.shape == x.shape and len(differences) < 1:
            differences.append(float((x - y).norm() / x.norm()))
        add(self, x, y, weights)

    monkeypatch.setattr(LayerStats, "add", compare)
    quantized(outlier_folder, tmp_path / "out", calibration_file, recipe("smoothquant+gptq"))
    assert differences[0] < 4e-3  # they are kept in bfloat16


def test_what_cannot_move_is_reported(model_folder, tmp_path, calibration_file):
    folder = model_folder("gpt2")
    _, report = quantized(folder, tmp_path / "out", calibration_file, recipe("smoothquant+rtn"))
    assert all(layer["error"] is None for layer in report["layers"])  # nothing to measure
    (moved, _) = report["transforms"]
    assert moved["pairs"] == []
    assert set(moved["left"]) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert "in proportion" in moved["left"]["mlp.c_proj"]


def test_text_is_needed():
    model = make_model()
    with pytest.raises(LlmqError, match=r"method smoothquant\+rtn needs calibration text"):
        llmq.quantize(model, recipe=recipe("smoothquant+rtn"))


def test_a_model_in_memory(tmp_path, outlier_folder):
    model = llmq.load(outlier_folder, dtype="float32")
    tokens = torch.randint(2, 2000, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    own = recipe("smoothquant+rtn", activations=llmq.ActSpec("int8-static"))
    llmq.ptq.in_memory.quantize(model, own, tokens)
    assert divergence(outlier_folder, model) < 0.1


def test_budgets_of_bits_are_refused(outlier_folder, tmp_path, calibration_file):
    with pytest.raises(LlmqError, match="use --method gptq"):
        llmq.quantize(
            str(outlier_folder),
            tmp_path / "out",
            recipe("smoothquant+gptq"),
            str(calibration_file),
            bpw=5,
        )
