"""Training that starts from a model whose scale has moved: it computes what the source does, and
what is trained are the weights that the start has rounded."""

import json

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq.commands.cli import main
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.qat import smoothing
from llmq.recipe import Recipe
from llmq.text import documents

LENGTH = 32
STATIC = llmq.ActSpec("int8-static")
TRANSFORMED = Recipe.uniform(
    "w8", method="smoothquant+rtn", samples=16, sequence_length=LENGTH, activations=STATIC
)


@pytest.fixture
def tokens(outlier_folder, calibration_file):
    job = prepare(str(outlier_folder), TRANSFORMED, calibration=str(calibration_file))
    return job.tokens.tokens


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def smoothed(folder, tokens, target):
    job = prepare(str(folder), TRANSFORMED, calibration=documents.TokenSet(tokens, "text", ""))
    smoothing.write_smoothed(job.source, TRANSFORMED, job.plans, tokens, target, "cpu")
    return target


def test_scale_has_moved_and_nothing_else_has_changed(outlier_folder, tokens, tmp_path):
    target = smoothed(outlier_folder, tokens, tmp_path / "smoothed")
    before, after = llmq.load(outlier_folder, dtype="float32"), llmq.load(target, dtype="float32")
    torch.testing.assert_close(logits(after, tokens), logits(before, tokens), rtol=0, atol=1e-3)
    stored = load_file(target / "model.safetensors")
    was = load_file(outlier_folder / "model.safetensors")
    assert stored.keys() == was.keys()
    changed = {name for name in was if not torch.equal(stored[name].float(), was[name].float())}
    assert {name.rpartition("layers.")[2] for name in changed if "layers.0" in name} == {
        *(f"0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *("0.input_layernorm.weight", "0.post_attention_layernorm.weight"),
    }
    layers = {name for name in changed if "norm" not in name}
    assert {stored[name].dtype for name in layers} == {torch.float32}
    assert {stored[name].dtype for name in stored if name not in layers} == {torch.bfloat16}
    assert [each["block"] for each in smoothing.moved_in(target)] == [0, 1]


@pytest.mark.parametrize(
    "kind",
    ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3_text", "gpt2"))],
)
def test_other_models_compute_what_they_did(kind, model_folder, calibration_file, tmp_path):
    """With experts, of which nothing moves; with norms that add one; where nothing can move."""
    path = model_folder(kind)
    job = prepare(str(path), TRANSFORMED, calibration=str(calibration_file))
    target = smoothed(path, job.tokens.tokens, tmp_path / "smoothed")
    before, after = llmq.load(path, dtype="float32"), llmq.load(target, dtype="float32")
    was, found = (logits(each, job.tokens.tokens) for each in (before, after))
    torch.testing.assert_close(found, was, rtol=0, atol=2e-3 * float(was.abs().max()))
    pairs = [pair for each in smoothing.moved_in(target) for pair in each["pairs"]]
    assert bool(pairs) == (kind != "gpt2")
    assert not any("experts" in name for pair in pairs for name in pair["takers"])


def test_rounding_it_is_what_ptq_with_the_transform_gives(outlier_folder, tokens, tmp_path):
    """Of the first block, behind which PTQ measures what is quantized."""
    target = smoothed(outlier_folder, tokens, tmp_path / "smoothed")
    text = documents.TokenSet(tokens, "text", "")
    outs = {}
    for name, path, method in (
        ("apart", target, "rtn"),
        ("at once", outlier_folder, "smoothquant+rtn"),
    ):
        own = Recipe.uniform("w8", method=method, samples=16, sequence_length=LENGTH)
        job = prepare(str(path), own, calibration=text, format="llmq")
        quantize_folder(job, tmp_path / name)
        outs[name] = load_file(tmp_path / name / "model.safetensors")
    first = [name for name in outs["apart"] if "layers.0." in name]
    assert first
    for name in first:
        assert torch.equal(outs["apart"][name], outs["at once"][name]), name


def test_training_starts_where_the_start_is(outlier_folder, tokens):
    """Masters are those of the moved weights: the model in training computes with the very codes
    that rounding the moved model gives."""
    model, exact = (
        llmq.load(outlier_folder, dtype="float32"),
        llmq.load(outlier_folder, dtype="float32"),
    )
    plain = Recipe.uniform("w8", method="rtn", activations=STATIC)
    rounded = llmq.prepare_qat(llmq.load(outlier_folder, dtype="float32"), plain, tokens)
    llmq.prepare_qat(model, TRANSFORMED, tokens)
    source = logits(exact, tokens)
    lost = [float((logits(each, tokens) - source).square().mean()) for each in (model, rounded)]
    assert lost[0] < 0.2 * lost[1]
    masters = model.model.layers[0].mlp.down_proj.weight.detach()
    moved = masters.norm(dim=0) / exact.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert moved[:4].min() > 4 * moved[4:].max()


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_from_a_folder_to_a_folder(method, outlier_folder, calibration_file, tmp_path, capsys):
    out = tmp_path / "out"
    line = [
        "qat",
        str(outlier_folder),
        str(out),
        "--train",
        str(calibration_file),
        "--scheme",
        "w8a8",
    ]
    line += ["--activations", "int8-static", "--init", f"smoothquant+{method}"]
    line += ["--sequence-length", "32", "--batch-size", "4", "--max-steps", "2", "--device", "cpu"]
    assert main([*line, "--precision", "fp32"]) == 0
    assert "scale moved into 14 layers" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert [each["block"] for each in report["transforms"]] == [0, 1]
    found = {name: score["perplexity"] for name, score in report["held_out"].items()}
    assert found["start"] < 1.02 * found["full_precision"]
    assert llmq.load(out, verify=True).config.dtype == torch.bfloat16
    assert not list(tmp_path.glob(".out*"))
