"""Recipes: order of rules, group sizes that do not fit, and JSON."""

import json
import math

import pytest

from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Layer, Recipe, Rule

LAYERS = [
    Layer(f"model.layers.{i}.{name}", (64, k))
    for i in range(2)
    for name, k in (("self_attn.q_proj", 128), ("mlp.down_proj", 192), ("mlp.odd", 172))
]


def specs(recipe):
    return {
        plan.layer.name.removeprefix("model.layers."): None if plan.spec is None else str(plan.spec)
        for plan in recipe.plan(LAYERS)
    }


def test_first_match_wins():
    recipe = Recipe(
        rules=(
            Rule.parse("*.0.*q_proj=keep"),
            Rule.parse("*q_proj=w8"),
            Rule.parse("re:down_proj$=ternary-g64"),
            Rule.parse("*=w4g128"),
        )
    )
    assert specs(recipe) == {
        "0.self_attn.q_proj": None,
        "0.mlp.down_proj": "ternary-g64",
        "0.mlp.odd": None,
        "1.self_attn.q_proj": "w8",
        "1.mlp.down_proj": "ternary-g64",
        "1.mlp.odd": None,
    }


def test_group_sizes_that_do_not_fit_are_noted():
    notes = {plan.layer.name: plan.note for plan in Recipe.uniform("w4g128").plan(LAYERS)}
    assert notes["model.layers.0.self_attn.q_proj"] == ""
    assert (
        notes["model.layers.0.mlp.down_proj"]
        == "group size 64 instead of 128, which does not divide K = 192"
    )
    assert notes["model.layers.0.mlp.odd"].startswith("kept in full precision")


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(
        LlmqError,
        match=r"'\*\.dwon_proj' matches none of the 6 linear layers; their names look like "
        r"model\.layers\.0",
    ):
        Recipe(rules=(Rule.parse("*.dwon_proj=w8"), Rule("*", QuantSpec()))).plan(LAYERS)


@pytest.mark.parametrize("text", ["w8", "=w8", "*=w9", "*.q_proj", "re:(=w8"])
def test_unreadable_rules(text):
    with pytest.raises(LlmqError):
        Rule.parse(text)


def test_json_round_trip():
    recipe = Recipe(
        rules=(Rule.parse("*.q_proj=keep"), Rule.parse("*=w3g64-asym")),
        order="act",
        samples=7,
        activations=ActSpec("int8-token"),
    )
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(LlmqError, match="unknown keys smaples"):
        Recipe.from_json({"smaples": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "at least 1 sample"),
        ({"samples": 2.5}, r"samples 2\.5: expected a whole number"),
        ({"samples": True}, "samples True: expected a whole number"),
        ({"sequence_length": 1}, "of 2 tokens"),
        ({"seed": "a"}, "seed 'a': expected a whole number"),
        ({"seed": 1 << 63}, "seed 9223372036854775808: expected"),
        ({"seed": -1}, "seed -1: expected"),
        ({"damping": 0.0}, "damping"),
        ({"damping": 2.0}, "damping"),
        ({"alpha": "x"}, "alpha 'x': expected a finite number"),
        ({"alpha": math.nan}, "alpha nan: expected a finite number"),
        ({"alpha": 1.5}, r"alpha 1\.5: expected .* from 0 to 1"),
        ({"search": "yes"}, "search 'yes': expected true or false"),
        ({"order": "desc"}, "unknown order 'desc': expected group, static, none or act"),
        ({"inputs": "fp"}, "unknown inputs 'fp': expected quantized, full-precision or both"),
        (
            {"activation_range": ["mse"]},
            "unknown activation range .* expected minmax, percentile or mse",
        ),
        ({"autocast": 1}, "autocast 1: expected true, false or null"),
    ],
)
def test_impossible_settings(options, message):
    for make in (lambda: Recipe(**options), lambda: Recipe.from_json(options)):
        with pytest.raises(LlmqError, match=message):
            make()


@pytest.mark.parametrize(
    "data",
    [
        [],
        "gptq",
        {"rules": 3},
        {"rules": [["*"]]},
        {"rules": [[5, None]]},
        {"rules": [["*", {"bits": 4}]]},
        {"activations": {"kinds": "none"}},
        {"activations": None},
    ],
)
def test_json_that_is_no_recipe(data):
    with pytest.raises(LlmqError, match="recipe: "):
        Recipe.from_json(data)


@pytest.mark.parametrize(
    "data",
    [
        {"rules": [["*", {"group_size": value}]]}
        for value in (32.0, True, "32", None, [], 10**20, -2)
    ]
    + [{"rules": [["*", {"code": value}]]} for value in (4, None, [], "int7")]
    + [{"rules": [["*", {"symmetric": value}]]} for value in (1, 0.0, "true", None)]
    + [{"rules": [["*", {"scale_dtype": value}]]} for value in (16, "float64", {})]
    + [{"damping": value} for value in (10**400, "0.01", None, [0.01], True)]
    + [{"samples": value} for value in (2.0, "2", None, 10**30)]
    + [{"activations": {"kv_bits": value}} for value in (8.0, "8", True, [])]
    + [{"activations": {"kind": value}} for value in (None, 8, "int4", [])]
    + [{"method": []}, {"method": {}}, {"rules": {}}, {"rules": [[None, None]]}],
    ids=str,
)
def test_values_of_other_types_are_refused_in_a_line(data):
    with pytest.raises(LlmqError) as caught:
        Recipe.from_json(data)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("method", ["rtn", "gptq", "blockwise", "smoothquant+blockwise"])
def test_some_defaults_go_by_the_method(method):
    recipe = Recipe.uniform("w3g64", method=method)
    expected = (0.5, "fisher", 36) if "blockwise" in method else (0.1, "equal", 0)
    assert (recipe.damping, recipe.token_weights, recipe.scale_steps) == expected
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_defaults_follow_another_method_and_choices_stay():
    recipe = Recipe.uniform("w3g64", damping=0.3).changed(method="blockwise", scale_steps=7)
    assert (recipe.damping, recipe.token_weights, recipe.scale_steps) == (0.3, "fisher", 7)
    assert [recipe.is_default(name) for name in ("damping", "token_weights")] == [False, True]
    back = recipe.changed(method="gptq")
    assert (back.damping, back.token_weights, back.scale_steps) == (0.3, "equal", 7)
    assert recipe.changed() == recipe


def test_damping_goes_by_the_weights_of_tokens():
    recipe = Recipe.uniform("w3g64", token_weights="fisher")
    assert recipe.damping == 0.5
    assert recipe.is_default("damping")
    assert recipe.changed(token_weights="equal").damping == 0.1
    assert Recipe.uniform("w3g64", method="blockwise", token_weights="equal").damping == 0.1
    assert Recipe.uniform("w3g64", damping=0.2).changed(token_weights="fisher").damping == 0.2


def test_null_is_no_value_of_them_in_a_file():
    with pytest.raises(LlmqError, match=r"scale_steps null: leave it out .* the method, 36"):
        Recipe.from_json({"method": "blockwise", "scale_steps": None})
