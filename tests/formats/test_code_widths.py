"""Codes of every width of the table go through a whole model; formats that cannot hold one say
so."""

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.module import quantized_modules
from llmq.recipe import Recipe, Rule

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))


def tensors(model):
    return {name: module.qtensor() for name, module in quantized_modules(model).items()}


@torch.no_grad()
def test_five_and_six_bits_are_quantized_saved_and_loaded_as_they_were(tmp_path):
    model = make_model()
    specs = {"5": QuantSpec("int5", 32, symmetric=False), "6": QuantSpec("int6", -1)}
    rules = (Rule("*.mlp.*", specs["5"]), Rule("*", specs["6"]))
    llmq.quantize(model, Recipe(rules=rules, method="gptq"), TOKENS)
    model.save_pretrained(tmp_path / "out")
    again = llmq.load(tmp_path / "out")
    expected, found = tensors(model), tensors(again)
    assert {tensor.spec for tensor in found.values()} == set(specs.values())
    for name, tensor in expected.items():
        assert found[name].spec == tensor.spec
        assert torch.equal(found[name].packed, tensor.packed)
        assert torch.equal(found[name].dequantize(), tensor.dequantize())
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert all(module.backend == "reference" for module in quantized_modules(again).values())


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2", "bitnet"])
@pytest.mark.parametrize(("text", "told"), [("w5g32", "not (5|w5)"), ("w6g32", "not (6|w6)")])
def test_other_formats_refuse_these_widths(fmt, text, told, tmp_path):
    model = make_model()
    activations = ActSpec("int8-token" if fmt == "bitnet" else "none")
    rules = (Rule("*", QuantSpec.parse(text)),)
    llmq.quantize(model, Recipe(rules=rules, method="rtn", activations=activations))
    with pytest.raises(LlmqError, match=told):
        llmq.save(model, tmp_path / "out", format=fmt)


def test_a_width_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(LlmqError, match=r"bits 2, 3, 4, 5, 6, 8\)"):
        QuantSpec.parse("w7g128")
