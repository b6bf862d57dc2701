"""What SmoothQuant multiplies weights with."""

import torch

from llmq.ptq.transforms.smoothquant import TRANSFORM


def test_largest_inputs_and_weights_meet_halfway():
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(16, generator=generator) * 100 + 0.1
    weight = torch.randn(32, 16, generator=generator)
    factors = TRANSFORM.factors(largest, weight)
    of_weights = (weight * factors).abs().amax(dim=0)
    torch.testing.assert_close(largest / factors, of_weights)


def test_channels_without_inputs_or_weights_stay():
    weight = torch.ones(2, 3)
    weight[:, 2] = 0
    factors = TRANSFORM.factors(torch.tensor([4.0, 0.0, 9.0]), weight)
    assert factors.tolist() == [2.0, 1.0, 1.0]
