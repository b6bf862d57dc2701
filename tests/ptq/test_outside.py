"""Embeddings and head that are quantized with the blocks."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.grid import rounding
from llmq.grid.spec import QuantSpec
from llmq.inference.embedding import QuantEmbedding, quantized_tables
from llmq.inference.module import QuantLinear
from llmq.models.source import Source
from llmq.ptq.job import prepare
from llmq.ptq.outside import fitting_outside, plan_outside, quantize_table
from llmq.ptq.run import quantize_folder
from llmq.recipe import Layer, LayerPlan, Recipe
from llmq.storage.partial_checkpoint import PartialCheckpoint

TOKENS = torch.arange(1, 25)[None]
W8 = QuantSpec.parse("w8")


def recipe(**options):
    sizes = {"samples": 6, "sequence_length": 32}
    return Recipe.uniform("w4g32", **{"method": "rtn", "embeddings": W8, **sizes, **options})


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tied", "options"),
    [
        ("llama", True, {}),
        ("llama", False, {"head": QuantSpec.parse("w4g64")}),
        ("gemma3_text", True, {}),
        pytest.param("gpt2", True, {}, marks=pytest.mark.slow),
        pytest.param("gpt_neox", False, {"head": W8}, marks=pytest.mark.slow),
        pytest.param("llama", False, {"embeddings": None, "head": W8}, marks=pytest.mark.slow),
    ],
)
def test_a_folder_is_the_model_in_memory_and_the_dequantized_copy(
    family, tied, options, model_folder, tmp_path
):
    folder = model_folder(family, tie_word_embeddings=tied)
    out, chosen = tmp_path / "out", recipe(**options)
    report = quantize_folder(prepare(str(folder), chosen), out)
    assert report["format"] == "llmq"
    assert json.loads((out / "report.json").read_text())["outside"] == report["outside"]
    loaded = llmq.load(out, dtype="float32", verify=True)
    in_memory = make_model(family, tie_word_embeddings=tied)
    llmq.quantize(in_memory, chosen)
    got = loaded(TOKENS).logits
    assert torch.equal(got, in_memory(TOKENS).logits)

    dense = make_model(family, tie_word_embeddings=tied)
    llmq.quantize(dense, recipe(embeddings=None))
    found = quantized_tables(loaded)
    assert [(name, role) for name, (role, _) in found.items()] == [
        (each["name"], each["role"]) for each in report["outside"]
    ]
    for name, (_, qtensor) in found.items():
        dense.get_submodule(name).weight.copy_(qtensor.dequantize())
    torch.testing.assert_close(got, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert len(found) == len(report["outside"])
    stored = load_file(out / "model.safetensors")
    assert sum(len(tensor) == 2048 for key, tensor in stored.items() if "packed" in key) == len(
        found
    )


def test_codes_and_values_are_those_of_the_one_rounding():
    weight = make_model().get_input_embeddings().weight.detach()
    for spec in (W8, QuantSpec.parse("w4g32-asym")):
        table = quantize_table(weight, spec)
        zero = None if table.zero is None else table.zero.float()
        values = rounding.fake_quantize(weight, table.scale.float(), zero, spec)
        assert torch.equal(table.dequantize(), values)


def test_scales_that_float16_does_not_hold_are_stored_in_what_does():
    weight = make_model().get_input_embeddings().weight.detach()
    plan = LayerPlan(Layer("wte", (2048, 64)), QuantSpec.parse("w4g32"), role="embeddings")
    (fine,) = fitting_outside([plan], lambda name: weight)
    (small,) = fitting_outside([plan], lambda name: weight * 1e-7)
    assert fine == plan
    assert small.spec.scale_dtype == "bfloat16"
    assert "scales in bfloat16" in small.note


def test_what_cannot_be_is_refused_and_what_differs_is_noted(model_folder):
    tied = make_model(tie_word_embeddings=True)
    with pytest.raises(LlmqError, match=r"one tensor .model.embed_tokens, tie_word_embeddings"):
        plan_outside(tied, recipe(head=QuantSpec.parse("w4g64")))
    (plan,) = plan_outside(tied, recipe(embeddings=None, head=W8))
    assert (plan.role, plan.spec) == ("embeddings and head", W8)
    with pytest.raises(LlmqError, match="one per row"):
        plan_outside(tied, recipe(embeddings=QuantSpec.parse("w8-tensor")))
    (plan,) = plan_outside(tied, recipe(embeddings=QuantSpec.parse("w4g128")))
    assert "group size 64 instead of 128" in plan.note
    with pytest.raises(LlmqError, match=r"format gptq cannot hold model.embed_tokens .w8."):
        prepare(str(model_folder()), recipe(), format="gptq")


@torch.no_grad()
def test_blocks_are_measured_behind_the_stored_embeddings(model_folder, calibration_file, tmp_path):
    folder = model_folder(tie_word_embeddings=True)
    losses = {}
    for spec in (None, "w2g64"):
        out = tmp_path / str(spec)
        embeddings = None if spec is None else QuantSpec.parse(spec)
        chosen = recipe(method="gptq", embeddings=embeddings)
        report = quantize_folder(
            prepare(str(folder), chosen, calibration=str(calibration_file), format="llmq"), out
        )
        losses[spec] = report["held_out"][0]["kl_mean"]
    assert losses["w2g64"] > 2 * losses[None]
    first = "model.layers.0.self_attn.q_proj.packed"
    stored = [load_file(tmp_path / each / "model.safetensors")[first] for each in ("None", "w2g64")]
    assert not torch.equal(*stored)


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_is_interrupted_gives_the_same_bytes(
    n, model_folder, calibration_file, tmp_path, monkeypatch
):
    folder = model_folder(tie_word_embeddings=True)

    def run(out):
        job = prepare(str(folder), recipe(method="gptq"), calibration=str(calibration_file))
        return quantize_folder(job, out)

    expected = run(tmp_path / "whole")
    original, calls = PartialCheckpoint.finish_block, []

    def interrupted(self, *args, **kwargs):
        calls.append(args[0])
        if len(calls) == n:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PartialCheckpoint, "finish_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    report = run(tmp_path / "parts")
    assert calls[0] == 2  # what lies outside of two blocks
    assert report["outside"] == expected["outside"]
    names = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_command_line_plans_quantizes_inspects_and_compares(model_folder, tmp_path, capsys):
    folder, out = str(model_folder(tie_word_embeddings=True)), str(tmp_path / "out")
    assert main(["plan", folder, "--method", "rtn"]) == 0
    assert "--embeddings w8 makes it" in " ".join(capsys.readouterr().out.split())
    options = ["--method", "rtn", "--embeddings", "w8", "--json"]
    assert main(["plan", folder, *options]) == 0
    planned = json.loads(capsys.readouterr().out)
    part = next(each for each in planned["parts"] if each["name"] == "embeddings and head")
    assert part["spec"] == "w8"
    assert main(["quantize", folder, out, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outside"][0]["n_bytes"] == part["planned_bytes"]
    assert report["bits_per_weight"] < 16
    assert main(["inspect", out]) == 0
    assert "embeddings and head  w8" in capsys.readouterr().out
    sizes = ["--sequence-length", "32", "--max-windows", "2", "--json"]
    assert main(["compare", folder, out, *sizes]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl_mean"] < 1
    assert main(["eval", out, *sizes, "--head-bits", "8"]) == 2
    assert "stored quantized (w8)" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("method: rtn\nembeddings: w4g64\n")
    assert main(["plan", folder, "--recipe", str(tmp_path / "r.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["embeddings"]["code"] == "int4"
    assert main(["plan", folder, "--embeddings", "w9"]) == 2
    assert "--embeddings: cannot read" in capsys.readouterr().err


@torch.no_grad()
def test_the_python_api_and_its_own_ways_of_saving(tmp_path):
    model = make_model(tie_word_embeddings=True)
    llmq.quantize(model, "w4g32", method="rtn", embeddings="w8")
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    expected = model(TOKENS).logits
    llmq.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for name in ("saved", "pretrained"):
        loaded = llmq.load(tmp_path / name)
        assert torch.equal(loaded(TOKENS).logits, expected)
        assert loaded.config.tie_word_embeddings
        assert loaded.get_input_embeddings().is_tied
    with pytest.raises(LlmqError, match=r"format gptq cannot hold model.embed_tokens"):
        llmq.save(model, tmp_path / "other", format="gptq")
    with pytest.raises(LlmqError, match="head: cannot read"):
        llmq.quantize(make_model(), "w4g32", method="rtn", head="int8")


def test_a_table_that_is_damaged_is_refused(tmp_path):
    from safetensors.torch import save_file

    model = make_model(tie_word_embeddings=True)
    llmq.quantize(model, "w4g32", method="rtn", embeddings="w8")
    llmq.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.scale"][3] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LlmqError, match=r"embed_tokens\.scale: 1 values are NaN or infinite"):
        llmq.load(tmp_path / "saved")
    del tensors["model.embed_tokens.scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "saved" / "llmq-manifest.json").unlink(missing_ok=True)
    with pytest.raises(LlmqError, match=r"scale.* is missing|missing keys"):
        llmq.load(tmp_path / "saved")


def test_a_folder_of_two_tensors_says_that_they_are_not_tied(model_folder, tmp_path):
    """As other tools write it: a config that says tied, and a head of its own."""
    model = make_model(tie_word_embeddings=False)
    llmq.quantize(model, "w4g32", method="rtn", embeddings="w8", head="w4g32")
    llmq.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (tmp_path / "saved" / "llmq-manifest.json").unlink(missing_ok=True)
    loaded = llmq.load(tmp_path / "saved")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert Source.open(tmp_path / "saved").config.tie_word_embeddings  # the file's own
