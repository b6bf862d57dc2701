"""Code for the engines that the table says read a result: no other, and none left out."""

import ast

import pytest

from llmq.cards.usage import usages
from llmq.formats.engine_rules import Result
from llmq.formats.engines import ENGINES, readings
from llmq.grid.spec import ActSpec, QuantSpec

RESULTS = [
    ("compressed-tensors", "w4g128", "none"),
    ("compressed-tensors", "w2g64-asym", "none"),
    ("compressed-tensors", "w8", "int8-token"),
    ("gptq", "w4g128", "none"),
    ("gptq_v2", "w3g64-asym", "none"),
    ("awq", "w4g64-asym", "none"),
    ("bitnet", "ternary-tensor", "none"),
    ("llmq", "ternary-g64", "none"),
    ("gguf", "w4g32", "none"),
]


@pytest.mark.parametrize(("fmt", "spec", "activations"), RESULTS)
def test_exactly_those_that_read_it(fmt, spec, activations):
    parsed = QuantSpec.parse("ternary" if spec == "ternary-tensor" else spec)
    specs = {"model.layers.0.mlp.down_proj": parsed}
    found = readings(Result(fmt, specs, ActSpec(activations)))
    told = usages([reading.to_json() for reading in found], "a folder")
    named = [name for usage in told for name in usage.engines]
    assert named == [*dict.fromkeys(named)]
    assert set(named) == {reading.engine for reading in found if reading.reads}
    for usage in told:
        assert '"a folder"' in usage.code
        if usage.language == "python":
            ast.parse(usage.code)


def test_every_engine_of_the_table_has_code():
    every = [{"engine": each.name, "version": each.version, "reads": True} for each in ENGINES]
    told = usages(every, "x")
    assert {name for usage in told for name in usage.engines} == {each.name for each in ENGINES}
    titles = [usage.title for usage in told]
    assert titles[0] == "llmq"
    assert "transformers 5.23 with compressed-tensors 0.20" in titles[1]
    assert "vLLM 0.32, vLLM on a CPU 0.32" in titles


def test_a_model_that_takes_pictures_has_a_class_of_its_own():
    engine = {"engine": "transformers", "version": "5", "reads": True}
    (usage,) = usages([engine], "x", "image-text-to-text")
    assert "AutoModelForImageTextToText.from_pretrained" in usage.code
    (usage,) = usages([engine], "x", "text-generation")
    assert "AutoModelForCausalLM.from_pretrained" in usage.code
