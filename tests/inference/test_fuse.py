"""Fused layers compute what the single ones did."""

import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor, stack_rows
from llmq.inference.fuse import SharedPart, fuse_shared_inputs
from llmq.inference.module import quantized_modules, swap


def quantized(family="llama", spec=QuantSpec("int4", 32), **other_specs):
    """A model with all linear layers of its blocks rounded to nearest. other_specs: by the last
    part of a layer's name."""
    model = make_model(family, dtype=torch.bfloat16)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    swap(
        model,
        {
            name: QuantizedTensor.quantize(
                model.get_submodule(name).weight.detach().float(),
                other_specs.get(name.rpartition(".")[2], spec),
            )
            for name in names
        },
    )
    return model


TOKENS = torch.arange(1, 9)[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral"])
@torch.no_grad()
def test_q_k_v_and_gate_up_become_one_and_logits_stay(family):
    model = quantized(family)
    expected = model(TOKENS).logits
    groups = fuse_shared_inputs(model)
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ] * 2
    assert torch.equal(model(TOKENS).logits, expected), "every row is computed as before"
    assert torch.equal(model(TOKENS).logits, expected), "nothing of the first call is left"


@torch.no_grad()
def test_only_what_is_quantized_alike_is_fused():
    model = quantized(v_proj=QuantSpec("int8", -1))
    expected = model(TOKENS).logits
    groups = fuse_shared_inputs(model)
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [
        ["q_proj", "k_proj"],
        ["gate_proj", "up_proj"],
    ] * 2
    assert torch.equal(model(TOKENS).logits, expected)


def test_quantized_modules_are_counted_once_and_saving_is_refused():
    model = quantized()
    fuse_shared_inputs(model)
    assert len(quantized_modules(model)) == 2 * 4
    assert sum(isinstance(module, SharedPart) for module in model.modules()) == 2 * 5
    with pytest.raises(LlmqError, match="load the folder again"):
        model.state_dict()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", 32),
        QuantSpec("int3", 32, symmetric=False),
        QuantSpec("ternary", 0),
        QuantSpec("int8", -1),
    ],
    ids=str,
)
def test_stacked_rows_have_the_values_of_their_parts(spec):
    parts = [QuantizedTensor.quantize(torch.randn(n, 96), spec) for n in (5, 16, 3)]
    whole = stack_rows(parts)
    whole.validate("stacked")
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_unlike_rows_are_not_stacked():
    parts = [
        QuantizedTensor.quantize(torch.randn(4, 64), QuantSpec(code, 32))
        for code in ("int4", "int3")
    ]
    with pytest.raises(LlmqError, match="w3g32"):
        stack_rows(parts)
