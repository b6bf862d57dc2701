"""The table of engines, of mixtures of experts: as measured with small ones of Mixtral's and of
Qwen3-MoE's kind (llmq/formats/README.md)."""

import json

import pytest

import llmq
from llmq.commands.cli import main
from llmq.formats.engine_rules import Result
from llmq.formats.engines import readings, refused_by
from llmq.grid.spec import ActSpec, QuantSpec

W4, W8 = QuantSpec.parse("w4g64"), QuantSpec.parse("w8")
LEAVES = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def result(kind, format, spec=W4, activations="none", **others):
    """Two experts of one layer, and what reads their module. others: specs by last name."""
    module, leaves = LEAVES[kind]
    specs = {"model.layers.0.self_attn.o_proj": spec}
    for number in range(2):
        specs |= {
            f"model.layers.0.{module}.{number}.{leaf}": others.get(leaf, spec) for leaf in leaves
        }
    return Result(format, specs, ActSpec(activations))


def reading(*args, **options):
    return {each.engine for each in readings(result(*args, **options)) if each.reads}


GPU = {"vLLM", "SGLang"}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize(
    ("format", "options", "expected"),
    [
        ("compressed-tensors", {}, {"llmq", "transformers + compressed-tensors", *GPU}),
        ("compressed-tensors", {"spec": W8, "activations": "int8-token"}, {"llmq", *GPU}),
        ("compressed-tensors", {"activations": "int8-token"}, {"llmq"}),
        ("gptq", {}, {"llmq", "GPTQModel", *GPU}),
        ("awq", {}, {"llmq", "GPTQModel", *GPU}),
        ("llmq", {}, {"llmq"}),
    ],
)
def test_who_reads_experts(kind, format, options, expected):
    """GPTQModel knows experts by the names of transformers' class only."""
    unknown = {"GPTQModel"} if kind == "mixtral" else set()
    assert reading(kind, format, **options) == expected - unknown


def test_reasons_are_told():
    reasons = {each.engine: each.reason for each in readings(result("mixtral", "gptq"))}
    assert "experts.0.w1: it looks for experts under the names gate_proj" in reasons["GPTQModel"]
    assert "random numbers" in reasons["transformers + gptqmodel"]
    assert "AMX" in reasons["vLLM on a CPU"]
    reasons = {each.engine: each.reason for each in readings(result("qwen3_moe", "awq"))}
    assert "before it unpacks AWQ" in reasons["mlx-lm"]


@pytest.mark.parametrize("spec", [W8, None])
def test_experts_that_differ_are_named(spec):
    for format in ("gptq", "compressed-tensors"):
        told = refused_by(result("qwen3_moe", format, down_proj=spec))
        assert "vLLM, SGLang" in told
        assert f"experts.0.down_proj ({spec or 'kept'}) are one layer of experts there" in told


def test_experts_that_are_kept_are_as_before():
    kept = dict.fromkeys(LEAVES["qwen3_moe"][1])
    assert {"transformers + gptqmodel", "vLLM on a CPU"} <= reading("qwen3_moe", "gptq", **kept)


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_quantize_export_and_inspect_say_the_same(kind, model_folder, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    options = ["--method", "rtn", "--group-size", "-1", "--format", "gptq", "--json"]
    assert main(["quantize", str(model_folder(kind)), str(out), *options]) == 0
    written = json.loads(capsys.readouterr().out)["engines"]
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"] == written
    said = {each["engine"]: each["reads"] for each in written}
    assert said["GPTQModel"] == (kind == "qwen3_moe")
    assert not said["transformers + gptqmodel"]
    report = llmq.export(out, again, "gptq")
    assert [each.to_json() for each in report.engines] == written
