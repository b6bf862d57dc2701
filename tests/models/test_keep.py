"""What is kept in full precision by default, and what a rule about it changes."""

import pytest
from conftest import make_model

from llmq.errors import LlmqError
from llmq.models.arch import quantizable_layers
from llmq.models.keep import is_extra_layer, reason_to_keep
from llmq.models.site import sites_in
from llmq.ptq.job import prepare
from llmq.recipe import Layer, Recipe, Rule

RATES = ("in_proj_a", "in_proj_b")


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate",
        "mlp.gate.wg",
        "feed_forward.router",
        "router.proj",
        "block_sparse_moe.router.layer",
        "mlp.shared_expert_gate",
        "linear_attn.in_proj_ba",
        "linear_attn.a_proj",
        "self_attn.f_b_proj",
        "mamba.dt_proj",
        "self_attn.indexer.wq_b",
        "self_attn.compressor.indexer.kv_proj",
        "altup.modality_router",
    ],
)
def test_layers_that_say_where_and_how_much_are_kept(name):
    assert reason_to_keep(name)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate_proj",
        "mlp.experts.3.gate_proj",
        "mlp.shared_expert.gate_proj",
        "self_attn.kv_b_proj",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "linear_attn.in_proj_qkvz",
        "linear_attn.g_proj",
        "mamba.in_proj",
        "per_layer_input_gate",
        "laurel.linear_left",
    ],
)
def test_layers_that_hold_most_weights_are_not(name):
    assert not reason_to_keep(name)


def plans_of(*rules):
    layers = quantizable_layers(make_model("qwen3_5_text"))
    plans = Recipe(rules=tuple(map(Rule.parse, rules)), method="rtn").plan(layers)
    return {plan.layer.name.removeprefix("model.layers.0.linear_attn."): plan for plan in plans}


def test_a_rule_about_all_layers_leaves_them_and_says_why():
    plans = plans_of("*=w4g32")
    for name in RATES:
        assert plans[name].spec is None
        assert "the rates at which a state decays" in plans[name].note
        assert f"'*.{name}=w8'" in plans[name].note
        assert not plans[name].differs
    assert plans["in_proj_qkv"].spec is not None


@pytest.mark.parametrize("pattern", ["*.in_proj_a", "re:in_proj_[ab]$", "*.0.*.in_proj_a"])
def test_a_rule_about_them_alone_quantizes_them(pattern):
    plan = plans_of(f"{pattern}=w8", "*=w4g32")["in_proj_a"]
    assert str(plan.spec) == "w8"
    assert not plan.note


def test_a_rule_about_others_as_well_does_not():
    plans = plans_of("*.linear_attn.*=w8", "*=w4g32")
    assert plans["in_proj_a"].spec is None
    assert str(plans["in_proj_z"].spec) == "w8"


def test_strict_is_about_other_layers(model_folder):
    folder = model_folder("qwen3_5_text")
    job = prepare(str(folder), Recipe.uniform("w4g32", method="rtn"), strict=True)
    assert {f"model.layers.0.linear_attn.{name}" for name in RATES} <= job.notes.keys()
    with pytest.raises(LlmqError, match=r"--strict: .* layers would differ"):
        prepare(str(folder), Recipe.uniform("w4g128", method="rtn"), strict=True)


def test_layers_without_a_rule_stay_without_a_note():
    layers = [Layer("a.gate", (8, 64), kept="it is small"), Layer("a.up_proj", (64, 64))]
    plans = Recipe(rules=(Rule.parse("*.up_proj=w8"),)).plan(layers)
    assert [plan.note for plan in plans] == ["", ""]


def test_linear_by_class_is_not_linear_by_what_it_computes():
    from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

    router = Llama4Router(Llama4TextConfig(num_local_experts=4, hidden_size=32))
    assert not list(sites_in(router))


def test_layers_behind_the_last_and_of_several_tokens_are_extra():
    config = make_model().config
    extra = ["mtp.fc.weight", "model.mtp_layers.0.weight", "model.layers.2.mlp.up_proj.weight"]
    assert all(is_extra_layer(name, config) for name in extra)
    assert not is_extra_layer("model.layers.1.mlp.up_proj.weight", config)
