"""A folder in another format: the same values bit for bit, or rounded anew and said so, or
refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.export import export
from llmq.formats.layers import StoredLayers
from llmq.grid.spec import ActSpec
from llmq.models.source import Source
from llmq.recipe import Recipe

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))


def folder(out: Path, spec: str, format: str = "llmq", model_type: str = "llama") -> Path:
    model = make_model(model_type)
    recipe = Recipe.uniform(spec, method="rtn")
    if spec == "ternary-tensor":
        activations = ActSpec("int8-token")
        recipe = Recipe.uniform(spec, method="rtn", activations=activations)
    llmq.quantize(model, recipe)
    llmq.save(model, out, format=format)
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    layers = StoredLayers.of(Source.open(path))
    return {name: layers.layer(name).dequantize() for name in layers.packed}


def same_weights(first: Path, second: Path) -> bool:
    before, after = weights(first), weights(second)
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "format", "after"),
    [
        ("w4g32", "gptq", "w4g32"),
        ("w3g32-asym", "compressed-tensors", "w3g32-asym"),
        ("ternary-g32", "compressed-tensors", "w2g32"),
        ("w4g32-asym", "awq", "w4g32-asym"),
        ("ternary-g32", "gptq", "w2g32"),
        ("ternary-tensor", "bitnet", "ternary-tensor"),
        ("w5g32", "gptq", "w8g32"),
    ],
)
def test_values_are_the_same_bit_for_bit(spec, format, after, tmp_path):
    first = folder(tmp_path / "first", spec)
    report = export(Source.open(first), tmp_path / "second", format)
    assert report.is_exact
    assert {layer.after for layer in report.layers} == {after}
    assert same_weights(first, tmp_path / "second")
    models = [llmq.load(path)(TOKENS).logits for path in (first, tmp_path / "second")]
    assert torch.equal(*models)
    others = [load_file(path / "model.safetensors") for path in (first, tmp_path / "second")]
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(others[0][norm], others[1][norm])


def test_biases_and_ties_come_along(tmp_path):
    first = folder(tmp_path / "first", "w4g32", model_type="qwen2")
    export(Source.open(first), tmp_path / "second", "gptq")
    with torch.no_grad():
        expected = llmq.load(first)(TOKENS).logits
        assert torch.equal(llmq.load(tmp_path / "second")(TOKENS).logits, expected)


def test_layers_of_one_group_size_where_the_format_has_one_for_all(tmp_path):
    model = make_model()
    recipe = Recipe.from_json({"method": "rtn", "rules": ["*.mlp.*=w4g64", "*=w4g32"]})
    llmq.quantize(model, recipe)
    llmq.save(model, tmp_path / "first", format="llmq")
    report = export(Source.open(tmp_path / "first"), tmp_path / "second", "awq")
    assert report.is_exact
    assert {layer.after for layer in report.layers} == {"w4g32"}
    assert same_weights(tmp_path / "first", tmp_path / "second")


def test_what_does_not_fit_is_refused_or_rounded_anew_and_counted(tmp_path, capsys):
    first = folder(tmp_path / "first", "w2h-g32")
    command = ["export", str(first), str(tmp_path / "second"), "--format", "gptq", "--json"]
    assert main(command) == 2
    refusal = capsys.readouterr().err
    assert "whole zero points only" in refusal
    assert "--allow-requantize" in refusal
    assert not (tmp_path / "second").exists()
    assert main([*command, "--allow-requantize"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["exact"]
    assert result["n_requantized"] == result["n_layers"] == 14
    before, after = weights(first), weights(tmp_path / "second")
    errors = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    assert result["max_relative_error"] == pytest.approx(max(errors))
    assert all("whole zero points only" in reason for reason in result["requantized"].values())
    assert result["types"]["I32"] == 3 * 14  # qweight, qzeros, g_idx


def test_an_order_of_columns_is_given_up_only_when_that_is_allowed(tmp_path):
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", order="act"), TOKENS.repeat(4, 2))
    llmq.save(model, tmp_path / "first", format="gptq")
    source = Source.open(tmp_path / "first")
    with pytest.raises(LlmqError, match=r"no order of columns .*--allow-requantize"):
        export(source, tmp_path / "second", "awq")
    assert export(source, tmp_path / "v2", "gptq_v2").is_exact
    assert same_weights(tmp_path / "first", tmp_path / "v2")
    assert not export(source, tmp_path / "second", "awq", allow_requantize=True).is_exact


def test_activations_that_a_format_cannot_say_are_refused(tmp_path):
    first = folder(tmp_path / "first", "ternary-tensor")
    with pytest.raises(LlmqError, match="cannot say that activations are quantized"):
        export(Source.open(first), tmp_path / "second", "gptq")


def test_quantized_embeddings_are_refused_where_readers_take_none(tmp_path):
    command = ["quantize", "tiny", str(tmp_path / "q"), "--method", "rtn", "--embeddings", "w8"]
    assert main(command) == 0
    with pytest.raises(LlmqError, match=r"cannot hold model\.embed_tokens \(w8\) exactly"):
        llmq.export(tmp_path / "q", tmp_path / "x", "gptq")
    llmq.export(tmp_path / "q", tmp_path / "x", "llmq")
    assert same_weights(tmp_path / "q", tmp_path / "x")


def test_a_model_in_full_precision_is_refused(tmp_path):
    with pytest.raises(LlmqError, match=r"is not quantized; 'llmq quantize'"):
        llmq.export("tiny", tmp_path / "out", "gptq")
    with pytest.raises(LlmqError, match="format 'zip': expected one of compressed-tensors"):
        llmq.export("tiny", tmp_path / "out", "zip")


def test_an_interrupted_export_continues(tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.formats.export.PART_BYTES", 10_000)
    first = folder(tmp_path / "first", "w4g32")
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 3 and len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(Source.open(first), tmp_path / "second", "gptq", on_part=stop)
    assert not (tmp_path / "second").exists()
    written: list[str] = []
    original = llmq.formats.export.convert

    def counted(name, *args):
        written.append(name)
        return original(name, *args)

    monkeypatch.setattr("llmq.formats.export.convert", counted)
    report = export(Source.open(first), tmp_path / "second", "gptq")
    assert 0 < len(written) < len(report.layers) == 14
    assert same_weights(first, tmp_path / "second")


def test_the_report_of_the_run_comes_along(tmp_path):
    assert main(["quantize", "tiny", str(tmp_path / "q"), "--method", "rtn", "--bits", "4"]) == 0
    export(Source.open(tmp_path / "q"), tmp_path / "x", "llmq")
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    assert report["method"] == "rtn"
    assert report["format"] == report["exported"]["format"] == "llmq"
    assert main(["inspect", str(tmp_path / "x")]) == 0
    assert main(["verify", str(tmp_path / "x")]) == 0
