"""Recipes in the forms that people write them."""

import pytest
from transformers import LlamaConfig

from llmq.api.recipes import recipe_of
from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Recipe, Rule

W4 = QuantSpec("int4", 128)
W8 = QuantSpec("int8", -1)
INT8 = ActSpec("int8-token")
# Of models that are calibrated on 128 x 2048 and on 128 x 64 tokens.
WIDE = LlamaConfig(hidden_size=4096, max_position_embeddings=2048)
SHORT = LlamaConfig(hidden_size=64, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("text", "spec", "activations"),
    [
        ("w4g128", W4, ActSpec()),
        ("w4", QuantSpec("int4", -1), ActSpec()),  # a spec before it is a scheme
        ("W4A16", W4, ActSpec()),
        ("W8A16", W8, ActSpec()),
        ("W8A8", W8, INT8),
        ("W4A8", W4, INT8),
        ("W3A16", QuantSpec("int3", 128), ActSpec()),
        ("W2A16", QuantSpec("int2", 64, symmetric=False), ActSpec()),
        ("w4a8kv8", W4, ActSpec("int8-token", 8)),
    ],
)
def test_specs_and_schemes(text, spec, activations):
    expected = Recipe((Rule("*", spec),), activations=activations)
    assert recipe_of(text, WIDE) == expected == Recipe.uniform(text)


def test_rules_go_before_the_spec_wherever_it_stands():
    down, first = Rule.parse("*.down_proj=w8"), Rule.parse("*.layers.0.*=keep")
    texts = ["*.down_proj=w8", "*.layers.0.*=keep"]
    for recipe in (["W4A8", *texts], [*texts, "W4A8"], [texts[0], "W4A8", first]):
        found = recipe_of(recipe, WIDE)
        assert found.rules == (down, first, Rule("*", W4))
        assert found.activations == INT8
    assert recipe_of(texts[0], WIDE).rules == (down, Rule("*", W4))  # as on the command line
    assert recipe_of([texts[0], "*=w8"], WIDE).rules == (down, Rule("*", W8))


def test_recipes_specs_names_and_files(tmp_path):
    recipe = Recipe.uniform("w8", samples=3)
    assert recipe_of(recipe, SHORT) is not None
    assert recipe_of(recipe, SHORT) == recipe  # what it says of lengths stays
    assert recipe_of(W8, SHORT) == Recipe((Rule("*", W8),), sequence_length=64)
    assert recipe_of("w8a8", SHORT).activations == INT8
    path = tmp_path / "mine.yaml"
    path.write_text("method: rtn\nrules: ['*=w8']\n")
    found = recipe_of(str(path), SHORT, seed=3)
    assert (found.method, found.seed, found.sequence_length) == ("rtn", 3, 64)


def test_options_go_before_the_recipe():
    for recipe in ("w4g128", Recipe.uniform("w4g128")):
        found = recipe_of(recipe, WIDE, method="rtn", samples=None, sequence_length=9)
        assert (found.method, found.samples, found.sequence_length) == ("rtn", 128, 9)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (["w4g128", "w8"], "2 specs for all layers"),
        ("w7", "or a scheme such as W4A16"),
        ("W4A4", "cannot read the quantization 'W4A4'"),
        ("*.down_proj=W8A8", "activations are treated alike in all layers; give .* w8"),
        ("nowhere.yaml", "not a recipe"),
    ],
)
def test_what_is_no_recipe(recipe, message):
    with pytest.raises(LlmqError, match=message):
        recipe_of(recipe, WIDE)
