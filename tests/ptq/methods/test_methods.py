"""The registry of methods: every name has its file, and each refuses what does not go with it."""

import subprocess
import sys

import pytest

from llmq.errors import LlmqError
from llmq.ptq.methods import METHODS, method_named, method_of, needs_text
from llmq.recipe import Recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method(name):
    recipe = Recipe(method=name)
    method = method_of(recipe)
    assert method is method_named(name)
    assert method.needs(recipe).text == needs_text(recipe)
    assert method.solve_bytes((8, 16)) > 0
    tunes = method.needs(recipe).tuning
    assert bool(method.tuning_bytes([(8, 16)], _Windows())) == tunes


class _Windows:
    n_sequences, length, n_tokens = 4, 32, 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "expected the method rtn, .* or blockwise, got 'awq'"),
        (
            {"method": "smoothquant"},
            r"got 'smoothquant', which comes before a method: smoothquant\+gptq",
        ),
        ({"method": "gptq+rtn"}, "unknown transform 'gptq' before rtn; expected smoothquant"),
        ({"method": "smoothquant+smoothquant+rtn"}, "expected each transform once"),
        (
            {"init": "rtn"},
            "what method blockwise starts from, and the method is gptq; give --method blockwise, "
            "or --init gptq",
        ),
        ({"method": "rtn", "order": "act"}, "rtn has no order of columns: leave out --act-order"),
        ({"method": "blockwise", "order": "act"}, "needs groups of consecutive columns"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(LlmqError, match=message):
        method_of(Recipe(**options))


def test_names_cost_nothing():
    """The command line reads them for --help."""
    program = "import sys, llmq.ptq.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
