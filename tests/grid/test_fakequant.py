"""The differentiable quantizer: the value is the stored weight bit for bit, the gradients are the
formulas of its module, written out a second time with plain loops."""

import pytest
import torch

from llmq.grid import rounding
from llmq.grid.fakequant import fake_quantize_ste, lsq_factor
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

SPECS = [
    "w4g32",
    "w3g32-asym",
    "w2g32-asym",
    "w8",
    "w4-tensor",
    "w2-tensor-asym",
    "ternary-g32",
    "w3g48",
]


def parts(text, *, n=5, k=96, shrink=0.6):
    """A weight with many clipped entries, and scale and zero as continuous masters: off the grid of
    what can be stored."""
    spec = QuantSpec.parse(text)
    weight = torch.randn(n, k)
    scale, zero = rounding.choose_scale(weight, spec)
    scale = scale * shrink * (1 + 1e-4 * torch.rand_like(scale))
    zero = None if zero is None else zero + torch.rand_like(zero) - 0.5
    return weight, scale, zero, spec


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("k", [96, 100])
def test_value_is_the_stored_weight_bit_for_bit(text, k):
    weight, scale, zero, spec = parts(text, k=k)
    value = fake_quantize_ste(weight, scale, zero, spec)
    stored_scale, stored_zero = (
        rounding.round_scale(scale, spec),
        None if zero is None else rounding.round_zero(zero, spec),
    )
    stored = QuantizedTensor.from_codes(
        rounding.quantize(weight, stored_scale, stored_zero, spec), stored_scale, stored_zero, spec
    )
    stored.validate("weight")
    assert torch.equal(value, stored.dequantize())
    assert torch.equal(value, rounding.fake_quantize(weight, stored_scale, stored_zero, spec))


def expected_gradients(weight, scale, zero, spec, upstream):
    """The table of `llmq.grid.fakequant`, one weight at a time."""
    scale, zero = (
        rounding.round_scale(scale, spec),
        None if zero is None else rounding.round_zero(zero, spec),
    )
    to_weight, to_scale, to_zero = (
        torch.zeros_like(weight),
        torch.zeros_like(scale),
        torch.zeros_like(scale),
    )
    size = spec.columns_per_group(weight.shape[1])
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            at = (0, 0) if spec.group_size == 0 else (i, j // size)
            s, z = scale[at], spec.levels.offset if zero is None else zero[at]
            v = weight[i, j] / s
            unclamped = torch.round(v) + z
            g = upstream[i, j]
            if 0 <= unclamped <= spec.levels.max:
                to_weight[i, j] = g
                to_scale[at] += g * (torch.round(v) - v)
            else:
                to_scale[at] += g * (unclamped.clamp(0, spec.levels.max) - z)
                to_zero[at] -= g * s
    return to_weight, to_scale, to_zero


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("k", [96, 100])
def test_gradients_are_the_table(text, k):
    weight, scale, zero, spec = parts(text, k=k)
    upstream = torch.randn_like(weight)
    leaves = [weight, scale] + ([] if zero is None else [zero])
    for leaf in leaves:
        leaf.requires_grad_()
    fake_quantize_ste(weight, scale, zero, spec).backward(upstream)
    with torch.no_grad():
        to_weight, to_scale, to_zero = expected_gradients(weight, scale, zero, spec, upstream)
    assert torch.equal(weight.grad, to_weight)
    assert 0 < float((to_weight != 0).float().mean()) < 1  # both sides of the range were met
    # Sums of up to n * k float32 terms of magnitude up to the largest code: 2^-24 each, times the
    # root of their number, with a margin of 16.
    tolerance = 16 * 2**-24 * weight.numel() ** 0.5 * spec.levels.max
    torch.testing.assert_close(scale.grad, to_scale, rtol=0, atol=tolerance)
    if zero is not None:
        torch.testing.assert_close(zero.grad, to_zero, rtol=0, atol=tolerance)
        assert bool((to_zero != 0).any())


@pytest.mark.parametrize("text", ["w2g32-asym", "w4g32"])
def test_clipped_directions_agree_with_finite_differences(text):
    """Where every weight is clipped nothing is rounded, so the derivative is no estimate: it must
    be the slope of the value itself."""
    spec = QuantSpec.parse(text)
    spec = QuantSpec(spec.code, 32, spec.symmetric, scale_dtype="float32")
    weight = torch.randn(3, 64).sign() * (20 + torch.rand(3, 64))
    scale, zero = torch.rand(3, 2) + 0.5, None if spec.symmetric else torch.full((3, 2), 1.0)
    upstream = torch.randn_like(weight)
    scale.requires_grad_()
    fake_quantize_ste(weight, scale, zero, spec).backward(upstream)
    step = 2**-6
    with torch.no_grad():
        slope = (
            fake_quantize_ste(weight, scale + step, zero, spec)
            - fake_quantize_ste(weight, scale - step, zero, spec)
        ) / (2 * step)
    torch.testing.assert_close(
        scale.grad, (slope * upstream).reshape(3, 2, 32).sum(-1), rtol=1e-4, atol=1e-4
    )


def test_the_edge_of_the_range():
    """4 bits, scale 1, levels -8 .. 7: half a step beyond the last level still belongs to it, and
    more is clipped."""
    spec = QuantSpec("int4", -1, scale_dtype="float32")
    weight = torch.tensor([[-9.0, -8.5, -8.4, 7.4, 7.5, 7.6]], requires_grad=True)
    value = fake_quantize_ste(weight, torch.ones(1, 1), None, spec)
    value.sum().backward()
    assert value.tolist() == [[-8, -8, -8, 7, 7, 7]]
    assert weight.grad.tolist() == [[0, 1, 1, 1, 1, 0]]


def test_scale_gradient_is_a_factor_and_frozen_parts_get_none():
    weight, scale, _, spec = parts("w4g32")
    gradients = []
    for factor in (1.0, lsq_factor(spec, *weight.shape)):
        leaf = scale.clone().requires_grad_()
        fake_quantize_ste(weight, leaf, None, spec, factor).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * (32 * 7) ** -0.5)
    assert weight.grad is None
