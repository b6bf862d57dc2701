"""Rungs as they are written."""

import pytest

from llmq.errors import LlmqError
from llmq.grid.scheme import parse_treatment
from llmq.ladder.rungs import SPECS, USUAL, Rung, read_rungs


def test_a_spec_alone_is_by_gptq():
    assert Rung.parse("w3g64-asym") == Rung("w3g64-asym", "gptq")
    assert str(Rung.parse("w8:smoothquant+rtn")) == "w8:smoothquant+rtn"
    assert Rung.parse("w8:smoothquant+rtn").folder_name == "w8-smoothquant-rtn"


@pytest.mark.parametrize(
    ("text", "message"), [("w9", "w9"), ("w4:gpqt", "did you mean gptq"), ("", "expected")]
)
def test_what_is_no_rung(text, message):
    with pytest.raises(LlmqError, match=message):
        Rung.parse(text)


def test_none_twice_and_not_none():
    assert read_rungs(["w8:rtn", "w8:rtn", "w4g128"]) == [Rung("w8", "rtn"), Rung("w4g128", "gptq")]
    with pytest.raises(LlmqError, match="no rungs: give some"):
        read_rungs([])


def test_the_usual_ones_go_from_large_to_small():
    rungs = read_rungs(list(USUAL))
    specs = [parse_treatment(spec)[0] for spec in SPECS]
    bits = [
        spec.bits + (16 + (0 if spec.symmetric else spec.bits)) / max(spec.group_size, 16)
        for spec in specs[1:]
    ]
    assert bits == sorted(bits, reverse=True)
    assert [rung.spec for rung in rungs][:3] == ["w8", "w4g64", "w4g64"]
