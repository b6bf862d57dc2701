"""Patterns: the same meaning as `re` and `fnmatch`, in bounded time."""

import fnmatch
import re
import time

import pytest

from llmq import patterns
from llmq.errors import LlmqError
from llmq.formats.gptq_settings import settings_of
from llmq.recipe import Layer, Recipe, Rule

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.10.self_attn.q_proj", "lm_head", "", "a[b]"]
EVIL = "re:(a|aa)+$"


@pytest.mark.parametrize(
    "pattern",
    [r"model\.layers\.(0|1)\.", "q_proj$", r"\d{1,2}", ".*", "", "^lm_head$", r"a\[b\]", "[]a]{2}"],
)
def test_expressions_mean_what_re_makes_of_them(pattern):
    for name in NAMES:
        assert patterns.searches(pattern, name, "rule") == bool(re.search(pattern, name))
        assert patterns.matches(pattern, name, "rule") == bool(re.match(pattern, name))


@pytest.mark.parametrize(
    "pattern", ["*", "*.0.*", "model.layers.?.*", "a[[]b]", "[!l]*", "lm_head"]
)
def test_shell_patterns_mean_what_fnmatch_makes_of_them(pattern):
    for name in NAMES:
        assert patterns.matches_shell(pattern, name, "rule") == fnmatch.fnmatchcase(name, pattern)


def test_a_pattern_that_takes_too_long_is_refused():
    layers = [Layer("a" * 60 + "!", (64, 64))]
    started = time.perf_counter()
    with pytest.raises(LlmqError, match=r"takes more than 1 s"):
        Recipe(rules=(Rule(EVIL, None),)).plan(layers)
    with pytest.raises(LlmqError, match=r"dynamic: the pattern .* takes more"):
        settings_of("a" * 60 + "!", {"dynamic": {"+:(a|aa)+$": {"bits": 8}}})
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(((a{1000}){1000}){1000})", "stands for 1001001001 characters"),
        ("(a{1000}[)]){1000}", "stands for"),
        ("a{99999999999999999999}", "stands for"),
        ("(?x)(a{1000}#)\n){1000}", "not a regular expression"),
        ("(" * 400 + ")" * 400, "not a regular expression"),
        ("(", "not a regular expression"),
        (r"\p{L}", "not a regular expression"),
        ("a" * 1001, "a pattern of 100. characters"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_before_it_is_compiled(pattern, message):
    with pytest.raises(LlmqError, match=message):
        Rule(f"re:{pattern}", None)
