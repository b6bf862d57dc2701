"""What each expert gets of a call, and one token beside many."""

import pytest
import torch
from torch import nn

from llmq.models.experts import Layout, Routed, Sorted, UnfusedExperts


class Fused(nn.Module):
    """Six experts of 16 x 8."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(6, 32, 8) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(6, 8, 16) * 0.3)
        self.act_fn = nn.SiLU()


@pytest.mark.parametrize("own_inputs", [False, True])
def test_sorted_choices_say_what_masks_say(own_inputs):
    index = torch.rand(20, 7).topk(3).indices  # 6 stands for no expert
    x = torch.randn(20, 3 if own_inputs else 1, 4)
    plain, known = Routed(x, index), Routed(x, index, Sorted.of(index))
    for expert in range(9):
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        expected = x[tokens, slots if own_inputs else 0]
        for share in (plain.share(expert), known.share(expert)):
            assert torch.equal(share.tokens, tokens)
            assert torch.equal(share.slots, slots)
            assert torch.equal(share.x, expected)


def test_one_token_as_in_a_batch():
    """The same bits, in the order of the experts, a number beyond the last one included."""
    module = UnfusedExperts(Fused(), Layout())
    x, weights = torch.randn(5, 8).double(), torch.rand(5, 3)
    module.double()
    index = torch.tensor([[5, 0, 2], [1, 3, 4], [6, 2, 1], [0, 1, 2], [4, 6, 3]])
    whole = module(x, index, weights)
    for i in range(len(x)):
        one = module(x[i : i + 1], index[i : i + 1], weights[i : i + 1])
        assert torch.allclose(one, whole[i : i + 1], rtol=1e-12, atol=1e-12)
