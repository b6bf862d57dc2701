"""What config.json says of layers is found by the names that engines look up: those in the
checkpoint, and of a module of experts its own or that of its first expert."""

import json
import re

import pytest
from conftest import make_model

import llmq
from llmq.formats.engine_names import alike_experts, with_modules
from llmq.formats.registry import format_named
from llmq.formats.save import checkpoint_config
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Layer, LayerPlan, Recipe, Rule

W4, W8 = QuantSpec.parse("w4g32"), QuantSpec.parse("w8g32")
LEAVES = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
}
KINDS = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)]


def by_compressed(settings, kind, layer):
    """As vLLM finds what experts are: by the layers of the first; None where they are ignored."""
    module, leaves = LEAVES[kind]
    found = []
    for leaf in leaves:
        name = f"model.layers.{layer}.{module}.experts.0.{leaf}"
        groups = settings["config_groups"].values()
        bits = [each["weights"]["num_bits"] for each in groups if name in each["targets"]]
        found.append(None if name in settings["ignore"] else bits[0])
    assert len(set(found)) == 1
    return found[0]


def by_gptq(settings, kind, layer):
    """As vLLM finds it: the first pattern that matches the beginning of the module's name."""
    name = f"model.layers.{layer}.{LEAVES[kind][0]}.experts"
    for pattern, overrides in settings["dynamic"].items():
        if re.match(pattern[2:], name):
            return None if pattern[:2] == "-:" else overrides["bits"]
    return settings["bits"]


def by_awq(settings, kind, layer):
    name = f"model.layers.{layer}.{LEAVES[kind][0]}.experts"
    return None if any(each in name for each in settings["modules_to_not_convert"]) else 4


FOUND_BY = {"compressed-tensors": by_compressed, "gptq": by_gptq, "awq": by_awq}


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


CASES = [("compressed-tensors", W8), ("gptq", W8), ("gptq", None), ("awq", None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "spec"), CASES)
def test_rules_about_experts_are_found_by_their_stored_names(kind, format, spec, tmp_path):
    """The experts of the first block otherwise than most layers, or kept: by `quantize` of a
    folder, by `export`, and by `save` of a model in memory."""
    source, out, memory, again = (tmp_path / name for name in ("in", "out", "memory", "again"))
    make_model(kind, num_hidden_layers=2).save_pretrained(source)
    rules = (Rule("*.0.mlp.experts.*", spec), Rule("*", W4))
    recipe = Recipe(rules=rules, method="rtn")
    llmq.quantize(source, out, recipe, format=format)
    model = llmq.load(source)
    llmq.quantize(model, recipe)
    llmq.save(model, memory, format=format)
    llmq.export(out, again, format)
    for folder in (out, memory, again):
        assert FOUND_BY[format](settings(folder), kind, 0) == (spec and spec.bits)
        assert FOUND_BY[format](settings(folder), kind, 1) == 4
    assert settings(memory) == settings(out)


def test_experts_of_a_module_are_one_layer_where_they_are_alike():
    names = [f"a.experts.{number}.w1" for number in (0, 1)]
    assert alike_experts({**dict.fromkeys(names, W4), "a.other": W8}) == {"a.experts": W4}
    assert alike_experts({names[0]: W4, names[1]: W8}) == {}
    stored = {"a.experts.0.w1": "b.experts.0.up", "c": "d"}
    assert with_modules(stored) == {**stored, "a.experts": "b.experts"}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_router_by_both_names_takes_no_expert_along(format):
    """What GPTQ says of kept modules is a pattern for all layers."""
    specs = {f"model.layers.0.mlp.experts.0.{leaf}": W4 for leaf in ("gate_proj", "up_proj")}
    stored = {name: name.replace(".mlp.", ".block_sparse_moe.") for name in specs}
    stored["model.layers.0.mlp.gate"] = "model.layers.0.block_sparse_moe.gate"
    plans = [LayerPlan(Layer(name, (32, 32)), spec) for name, spec in specs.items()]
    config = checkpoint_config(
        format_named(format),
        plans,
        act_order=False,
        activations=ActSpec(),
        kept=["model.layers.0.mlp.gate"],
        stored=stored,
    )
    if format == "gptq":
        kept = [re.compile(pattern[2:]) for pattern in config["dynamic"] if pattern[:2] == "-:"]
        experts = [name for name in stored.values() if "experts" in name]
        assert not any(pattern.match(name) for pattern in kept for name in experts)
        for name in ("model.layers.0.mlp.gate", stored["model.layers.0.mlp.gate"]):
            assert any(pattern.match(name) for pattern in kept)
    else:
        assert config["ignore"] == ["model.layers.0.mlp.gate", stored["model.layers.0.mlp.gate"]]
