"""Layers that are solved side by side get the codes, scales and zero points that each gets alone,
bit for bit."""

import pytest
import torch

from llmq.grid.spec import QuantSpec
from llmq.ptq.methods import gptq as module
from llmq.ptq.methods.gptq import GPTQOptions, gptq, gptq_together
from llmq.ptq.stats import LayerStats


def measured(k, *, scale=1.0, dead=0, cross=False):
    """Statistics of 300 correlated rows, with so many columns that are always zero."""
    x = torch.randn(300, k) @ (torch.eye(k) + 0.5 * torch.randn(k, k) / k**0.5)
    x = x * torch.rand(k).exp() * scale
    x[:, :dead] = 0
    stats = LayerStats(k, cross=cross)
    stats.add(x, x + 0.1 * torch.randn_like(x) if cross else None)
    return stats.finish()


def same(result, expected):
    ours, alone = result.tensor, expected.tensor
    assert torch.equal(ours.packed, alone.packed)
    assert torch.equal(ours.scale, alone.scale)
    assert (ours.zero is None) == (alone.zero is None)
    assert ours.zero is None or torch.equal(ours.zero, alone.zero)
    assert (ours.g_idx is None) == (alone.g_idx is None)
    assert (result.damping, result.n_dead, result.fallback) == (
        expected.damping,
        expected.n_dead,
        expected.fallback,
    )
    if expected.errors is not None:
        assert torch.equal(result.errors.result, expected.errors.result)
        assert torch.equal(result.errors.rounding, expected.errors.rounding)


def check(n, k, text, options, stats, monkeypatch=None):
    spec = QuantSpec.parse(text)
    weights = [torch.randn(n, k) * 0.02 for _ in stats]
    alone = [gptq(w, own, spec, options) for w, own in zip(weights, stats, strict=True)]
    before = [own.hessian.clone() for own in stats]
    together = gptq_together(weights, stats, spec, options)
    for result, expected in zip(together, alone, strict=True):
        same(result, expected)
    for own, hessian in zip(stats, before, strict=True):
        assert torch.equal(own.hessian, hessian)  # its damping is taken back


CASES = [
    (64, 256, "w4g128", GPTQOptions()),
    (32, 192, "w4g128", GPTQOptions()),  # a short last group, somewhere along the way
    (64, 160, "w3g32-asym", GPTQOptions(order="static")),
    (32, 320, "w4", GPTQOptions(order="none", alpha=1.0)),
]
MORE = [
    (96, 256, "w4g64", GPTQOptions(order="act")),
    (64, 256, "w2g64-asym", GPTQOptions(alpha=0.5)),
    (64, 128, "ternary-g32", GPTQOptions(sweeps=1)),
    (24, 128, "w4g128", GPTQOptions()),  # rows that fill no vector
    (32, 128, "w4-tensor", GPTQOptions()),
    (512, 256, "w8g128", GPTQOptions(search=False)),
    (32, 200, "w4g48", GPTQOptions(order="static", sweeps=0)),
]
MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("n", "k", "text", "options"), [*CASES, *MORE])
def test_side_by_side_as_alone(n, k, text, options):
    stats = [measured(k, dead=3 * (i == 1), cross=options.alpha > 0) for i in range(4)]
    stats.append(stats[0])  # as experts without rows share what all tokens say
    check(n, k, text, options, stats)


def test_batches_and_layers_that_fall_back(monkeypatch):
    monkeypatch.setattr(module, "ROWS_TOGETHER", 96)
    stats = [measured(64) for _ in range(5)]
    stats[1].hessian.fill_(-1.0)
    check(32, 64, "w4g32", GPTQOptions(), stats)


@pytest.mark.parametrize("n", [24, 64])
def test_how_many_go_together(n):
    """Few columns and rows in one call, one large layer alone."""
    spec = QuantSpec.parse("w4g128")
    assert module._n_together(torch.empty(n, 256), spec, GPTQOptions()) == (1 if n % 32 else 64)
    assert module._n_together(torch.empty(4096, 4096), spec, GPTQOptions()) == 1
