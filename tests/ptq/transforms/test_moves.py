"""Moving scale changes nothing that a block computes, and where it can move is found by trying."""

import pytest
import torch
from conftest import families, make_model

from llmq.models.arch import find_blocks, linear_weight
from llmq.models.site import sites_in
from llmq.ptq.capture import BlockRecorder, shared_inputs
from llmq.ptq.transforms.moves import Move, find_move


def opened(model_type, **overrides):
    """Block 0 of a small model, its layers in groups, its call, and hidden states of one
    sequence."""
    model = make_model(model_type, **overrides)
    _, blocks = find_blocks(model)
    tokens = torch.randint(2, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, calls = BlockRecorder(model, blocks).run(tokens)
    layers = {site.name: blocks[0].get_submodule(site.name) for site in sites_in(blocks[0])}
    with torch.no_grad():
        groups = shared_inputs(blocks[0], layers, calls[0], hidden)
    return blocks[0], groups, calls[0], hidden


def moves_of(block, groups, call, hidden):
    layers = [layer for group in groups for layer in group]
    with torch.no_grad():
        found = [find_move(block, group, layers, call, hidden) for group in groups]
    return {move.giver: move for move in found if move is not None}


# What gives the inputs of layers, and what a norm adds to its weight.
EXPECTED = {
    "llama": {
        "input_layernorm": 0.0,
        "self_attn.v_proj": None,
        "post_attention_layernorm": 0.0,
        "mlp.up_proj": None,
    },
    "gemma": {
        "input_layernorm": 1.0,
        "self_attn.v_proj": None,
        "post_attention_layernorm": 1.0,
        "mlp.up_proj": None,
    },
    "opt": {"self_attn.v_proj": None, "fc1": None},  # norms with a bias; ReLU lets scale through
    "gpt2": {},  # GELU does not, and q, k and v are one layer
    "phi3": {"input_layernorm": 0.0, "post_attention_layernorm": 0.0},
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_moves_are_found(model_type):
    moves = moves_of(*opened(model_type))
    assert {name: move.offset for name, move in moves.items()} == EXPECTED[model_type]


def test_a_value_head_that_several_heads_read():
    move = moves_of(*opened("llama"))["self_attn.v_proj"]
    assert (move.repeats, move.width) == (2, 32)


def test_a_tensor_that_a_router_reads_too_is_left():
    moves = moves_of(*opened("mixtral"))
    assert "post_attention_layernorm" not in moves


@pytest.mark.parametrize("model_type", families("llama", "gemma"))
def test_nothing_changes_but_the_weights(model_type):
    block, groups, call, hidden = opened(model_type)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    moves = moves_of(block, groups, call, hidden)
    assert all(torch.equal(state[name], tensor) for name, tensor in block.state_dict().items())
    with torch.no_grad():
        before = call.run(block, hidden.clone())
        for move in moves.values():
            n = linear_weight(block.get_submodule(move.takers[0])).shape[1] // move.repeats
            factors = torch.linspace(0.2, 5, n)
            columns = move.apply(block, factors, torch.bfloat16)
            assert columns.shape == (n * move.repeats,)
            assert (columns.max() / columns.min()) > 10
        after = call.run(block, hidden.clone())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_takers_make_up_for_the_rounding_of_a_norm():
    norm, layer = torch.nn.RMSNorm(16), torch.nn.Linear(16, 4, bias=False)
    block = torch.nn.ModuleDict({"norm": norm, "layer": layer}).requires_grad_(False)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    before = layer(norm(x))
    Move("norm", ("layer",), 0.0, width=16).apply(block, torch.linspace(0.3, 3, 16), torch.bfloat16)
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    torch.testing.assert_close(layer(norm(x)), before)


def test_a_norm_that_is_zero_somewhere():
    norm, layer = torch.nn.RMSNorm(4), torch.nn.Linear(4, 4, bias=False)
    block = torch.nn.ModuleDict({"norm": norm, "layer": layer}).requires_grad_(False)
    norm.weight[1] = 0
    columns = Move("norm", ("layer",), 0.0, width=4).apply(
        block, torch.full((4,), 2.0), torch.float32
    )
    assert columns.tolist() == [2, 1, 2, 2]
    assert norm.weight.tolist() == [0.5, 0, 0.5, 0.5]


def test_columns_of_one_output_stand_together():
    move = Move("v", ("o",), None, repeats=2, width=3)  # two value heads of three, read twice
    columns = torch.arange(12.0)[None]
    assert move.gathered(columns).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert move.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
