"""One group size for all layers of a rule, where a format's readers take no other."""

import pytest
from conftest import make_model

from llmq.errors import LlmqError
from llmq.ptq.group_sizes import with_one_group_size
from llmq.ptq.job import prepare
from llmq.recipe import Layer, Recipe, Rule

LAYERS = [Layer("a.q", (64, 192)), Layer("a.down", (64, 256)), Layer("b.up", (64, 256))]


def sizes(*rules):
    recipe = Recipe(rules=tuple(map(Rule.parse, rules)), method="rtn")
    plans = with_one_group_size(recipe.plan(LAYERS), recipe)
    return {plan.layer.name: plan.spec and plan.spec.group_size for plan in plans}, plans


def test_all_layers_of_a_rule_take_the_size_that_one_of_them_needs():
    found, plans = sizes("*=w4g128")
    assert set(found.values()) == {64}
    assert len({plan.note for plan in plans}) == 1  # one note, of all of them
    assert "64 instead of 128" in plans[0].note


def test_another_rule_has_its_own_size():
    found, plans = sizes("b.*=w8g128", "*=w4g128")
    assert found == {"a.q": 64, "a.down": 64, "b.up": 128}
    assert not plans[-1].note


def test_what_fits_or_is_kept_stays():
    assert sizes("*=w4g64")[0] == {"a.q": 64, "a.down": 64, "b.up": 64}
    assert sizes("a.q=keep", "*=w4g128")[0] == {"a.q": None, "a.down": 128, "b.up": 128}
    assert sizes("*=w4")[0] == {"a.q": -1, "a.down": -1, "b.up": -1}


@pytest.mark.parametrize(
    ("format", "expected"), [("awq", {32}), ("gptq", {32}), ("llmq", {32, 64})]
)
def test_only_formats_whose_readers_need_it_ask_for_it(format, expected, tmp_path):
    make_model(intermediate_size=160).save_pretrained(tmp_path)
    job = prepare(str(tmp_path), Recipe.uniform("w4g64", method="rtn"), format=format)
    assert {plan.spec.group_size for plan in job.plans} == expected


def test_act_order_needs_a_format_by_name(model_folder):
    recipe = Recipe.uniform("w4g32", method="gptq", order="act", samples=2, sequence_length=8)
    with pytest.raises(LlmqError, match=r"vLLM.*do not read.*--format gptq for llmq.*GPTQModel"):
        prepare(str(model_folder()), recipe, calibration="tiny")
