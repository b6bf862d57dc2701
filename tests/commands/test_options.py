"""What the options offer is what there is."""

from llmq.commands.catalog import command_parsers
from llmq.commands.options import BITS
from llmq.formats import load
from llmq.text.windows import BOS_POLICIES
from llmq_kernels import CODES


def test_bits_are_those_of_the_table_of_codes():
    widths = {str(code.bits) for code in CODES.values() if code.levels == 1 << code.bits}
    assert set(BITS) == {*widths, "ternary"}


def test_words_are_those_of_the_functions_that_take_them():
    parser = command_parsers()["eval"]
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["bos"] == BOS_POLICIES
    assert set(choices["dtype"]) == set(load._DTYPES)
