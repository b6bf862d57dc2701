"""Low-rank changes of masters, trained through the quantizer."""

import copy

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.qat.weights import fake_quant_modules, merge_lora
from llmq.recipe import Recipe


def prepared(rank=4, recipe="w3g32-asym"):
    torch.manual_seed(0)
    return llmq.prepare_qat(make_model(), Recipe.uniform(recipe, method="rtn"), lora_rank=rank)


def changed(model):
    """With changes that move codes."""
    for module in fake_quant_modules(model).values():
        step = float(module.quantizer.stored(module.weight)[0].detach().mean())
        torch.nn.init.normal_(module.lora.up, std=step)
    return model


def test_it_starts_from_the_codes_of_the_start():
    low, full = prepared(), prepared(None)
    for name, module in fake_quant_modules(full).items():
        other = fake_quant_modules(low)[name]
        assert torch.equal(other.qtensor().packed, module.qtensor().packed)
        assert torch.equal(other.master(), module.weight)


def test_only_the_changes_and_scales_are_trained():
    model = prepared()
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"up", "down", "scale", "zero"}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    for module in fake_quant_modules(model).values():
        assert module.weight.grad is None
        assert module.lora.up.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merged_is_what_was_trained_bit_for_bit(dtype):
    """Under autocast, too: the change is float32 there as well."""
    model = changed(prepared())
    ids = torch.arange(16)[None]

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            return model(ids).logits

    expected = logits(model)
    frozen = copy.deepcopy(model)
    packed = llmq.freeze(frozen)
    merge_lora(model)
    assert torch.equal(logits(model), expected)
    for name, module in fake_quant_modules(model).items():
        assert module.lora is None
        assert torch.equal(module.qtensor().dequantize(), packed[name].dequantize())


def test_what_is_no_rank():
    with pytest.raises(LlmqError, match="LoRA rank 0: expected at least 1, such as 16"):
        prepared(0)
