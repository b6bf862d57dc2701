"""Recipes: order of rules, group sizes that do not fit, and JSON."""

import pytest

from llmq.errors import LlmqError
from llmq.recipe import Layer, Recipe, Rule
from llmq.spec import ActSpec, QuantSpec

LAYERS = [Layer(f"model.layers.{i}.{name}", (64, k)) for i in range(2) for name, k in (("self_attn.q_proj", 128), ("mlp.down_proj", 192), ("mlp.odd", 172))]


def specs(recipe):
    return {plan.layer.name.removeprefix("model.layers."): None if plan.spec is None else str(plan.spec) for plan in recipe.plan(LAYERS)}


def test_first_match_wins():
    recipe = Recipe(rules=(Rule.parse("*.0.*q_proj=keep"), Rule.parse("*q_proj=w8"), Rule.parse("re:down_proj$=ternary-g64"), Rule.parse("*=w4g128")))
    assert specs(recipe) == {
        "0.self_attn.q_proj": None, "0.mlp.down_proj": "ternary-g64", "0.mlp.odd": None, "1.self_attn.q_proj": "w8", "1.mlp.down_proj": "ternary-g64", "1.mlp.odd": None,
    }  # fmt: skip


def test_group_sizes_that_do_not_fit_are_noted():
    notes = {plan.layer.name: plan.note for plan in Recipe.uniform("w4g128").plan(LAYERS)}
    assert notes["model.layers.0.self_attn.q_proj"] == ""
    assert notes["model.layers.0.mlp.down_proj"] == "group size 64 instead of 128, which does not divide K = 192"
    assert notes["model.layers.0.mlp.odd"].startswith("kept in full precision")


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(LlmqError, match=r"'\*\.dwon_proj' matches none of the 6 linear layers; their names look like model\.layers\.0"):
        Recipe(rules=(Rule.parse("*.dwon_proj=w8"), Rule("*", QuantSpec()))).plan(LAYERS)


@pytest.mark.parametrize("text", ["w8", "=w8", "*=w9", "*.q_proj", "re:(=w8"])
def test_unreadable_rules(text):
    with pytest.raises(LlmqError):
        Rule.parse(text)


def test_json_round_trip_and_fingerprint():
    recipe = Recipe(rules=(Rule.parse("*.q_proj=keep"), Rule.parse("*=w3g64-asym")), order="act", samples=7, activations=ActSpec("int8-token"))
    again = Recipe.from_json(__import__("json").loads(__import__("json").dumps(recipe.to_json())))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint() != Recipe().fingerprint()
    with pytest.raises(LlmqError, match="unknown keys smaples"):
        Recipe.from_json({"smaples": 3})


@pytest.mark.parametrize("options", [{"samples": 0}, {"sequence_length": 1}, {"damping": 0.0}, {"damping": 2.0}])
def test_impossible_settings(options):
    with pytest.raises(LlmqError):
        Recipe(**options)
