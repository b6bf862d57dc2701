"""What the options offer is what there is."""

from llmq.commands.options import BITS
from llmq_kernels import CODES


def test_bits_are_those_of_the_table_of_codes():
    widths = {str(code.bits) for code in CODES.values() if code.levels == 1 << code.bits}
    assert set(BITS) == {*widths, "ternary"}
