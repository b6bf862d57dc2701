"""The solver: equal to rounding when columns do not talk to each other, better than rounding when
they do, honest when it cannot work."""

import itertools

import pytest
import torch

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.methods.gptq import (
    GPTQOptions,
    column_order,
    errors_left,
    factor_of_reversed,
    gptq,
)
from llmq.ptq.stats import LayerStats, output_error

SPECS = [
    "w4g128",
    "w4g32",
    "w3g64-asym",
    "w2g64-asym",
    "w8",
    "w4-tensor",
    "ternary-g32",
    "ternary-tensor",
    "w4g48",
]
ORDERS = ["group", "static", "none", "act"]


def identity_stats(k):
    stats = LayerStats(k)
    stats.hessian = torch.eye(k)
    return stats


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("order", ORDERS)
def test_identity_hessian_gives_plain_rounding(text, order):
    weight, spec = torch.randn(24, 256), QuantSpec.parse(text)
    result = gptq(
        weight, identity_stats(256), spec, GPTQOptions(order=order, search=False, sweeps=0)
    ).tensor
    result.validate("weight")
    rounded = QuantizedTensor.quantize(weight, spec)
    assert torch.equal(result.codes(), rounded.codes())
    assert torch.equal(result.dequantize(), rounded.dequantize())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("search", [False, True])
def test_beats_rounding_on_correlated_inputs(text, order, search, stats):
    weight, spec, layer = torch.randn(48, 256), QuantSpec.parse(text), stats(256)
    ours = gptq(weight, layer, spec, GPTQOptions(order=order, search=search)).tensor
    errors = [
        output_error(tensor.dequantize() - weight, layer.hessian)
        for tensor in (ours, QuantizedTensor.quantize(weight, spec))
    ]
    assert errors[0] < errors[1]


def test_first_column_update_matches_the_formula(stats):
    """One column rounded, the others free: the remaining columns must minimise the output error
    exactly."""
    layer, weight = stats(16), torch.randn(4, 16)
    factor = factor_of_reversed(layer.hessian.flip(0, 1))
    assert torch.allclose(factor.T @ factor @ layer.hessian, torch.eye(16), atol=1e-3)
    error = (weight[:, 0] - weight[:, 0].round()) / factor[0, 0]
    updated = weight - error[:, None] * factor[0]
    assert torch.allclose(updated[:, 0], weight[:, 0].round(), atol=1e-5)
    change = updated - weight
    free = torch.linalg.solve(layer.hessian[1:, 1:], -layer.hessian[1:, :1] @ change[:, :1].T).T
    assert torch.allclose(change[:, 1:], free, atol=1e-3)


def test_only_act_order_stores_g_idx(stats):
    weight, layer = torch.randn(16, 128), stats(128)
    for order in ORDERS:
        g_idx = gptq(weight, layer, QuantSpec("int4", 32), GPTQOptions(order=order)).tensor.g_idx
        assert (g_idx is not None) == (order == "act")
    assert (
        torch.bincount(
            gptq(weight, layer, QuantSpec("int4", 32), GPTQOptions(order="act")).tensor.g_idx
        ).tolist()
        == [32] * 4
    )


@pytest.mark.parametrize("text", ["w4g64", "w2g64-asym", "w8"])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_solved_in_blocks_are_rows_solved_alone(text, order, stats, monkeypatch):
    weight, layer, spec = torch.randn(40, 128), stats(128), QuantSpec.parse(text)
    layer.cross = torch.randn(128, 128) * 0.01
    before = layer.hessian.clone()
    options = GPTQOptions(order=order, alpha=0.5)
    alone = [gptq(part, layer, spec, options).tensor for part in weight.split(16)]
    monkeypatch.setattr("llmq.ptq.solver.ROW_BLOCK_BYTES", 16 * weight[0].nbytes)
    whole = gptq(weight, layer, spec, options).tensor
    whole.validate("weight")
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in alone]))
    assert (whole.g_idx is not None) == (order == "act" and spec.n_groups(128) > 1)
    assert torch.equal(layer.hessian, before)


def test_one_scale_for_all_rows_is_solved_at_once(stats, monkeypatch):
    weight, layer, spec = torch.randn(40, 128), stats(128), QuantSpec.parse("w4-tensor")
    whole = gptq(weight, layer, spec).tensor
    monkeypatch.setattr("llmq.ptq.solver.ROW_BLOCK_BYTES", 1)
    assert torch.equal(gptq(weight, layer, spec).tensor.dequantize(), whole.dequantize())


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations_and_group_order_keeps_groups_whole(order):
    importance = torch.rand(100)
    columns = column_order(importance, 32, order)
    assert sorted(columns.tolist()) == list(range(100))
    if order == "group":
        groups = (columns // 32).tolist()
        assert sum(a != b for a, b in itertools.pairwise(groups)) == 3


def test_dead_columns_are_counted_and_cost_nothing(stats):
    layer = stats(64)
    layer.hessian[:, 5] = 0
    layer.hessian[5, :] = 0
    result = gptq(torch.randn(8, 64), layer, QuantSpec("int4", 32))
    assert result.n_dead == 1
    assert result.fallback is None
    assert torch.all(result.tensor.dequantize()[:, 5] == 0)
    assert float(layer.hessian[5, 5]) == 0


def test_damping_rises_before_it_falls_back():
    k = 64
    direction = torch.randn(k)
    stats = LayerStats(k)
    stats.hessian = torch.outer(direction, direction) - 0.05 * float(
        direction.square().median()
    ) * torch.eye(k)
    raised = gptq(torch.randn(4, k), stats, QuantSpec("int4", 32), GPTQOptions(damping=0.01))
    assert raised.fallback is None
    assert raised.damping == pytest.approx(0.1)
    patient = gptq(torch.randn(4, k), stats, QuantSpec("int4", 32), GPTQOptions(damping=1e-5))
    assert (patient.fallback, patient.damping) == (None, pytest.approx(0.1))
    stats.hessian = (
        torch.eye(k) - 3 * torch.outer(direction, direction) / direction.square().sum() + 0.1
    )
    stats.hessian[0, 1] = stats.hessian[1, 0] = 50.0
    weight = torch.randn(4, k)
    fallen = gptq(weight, stats, QuantSpec("int4", 32), GPTQOptions(search=False))
    assert fallen.fallback
    assert torch.equal(
        fallen.tensor.packed, QuantizedTensor.quantize(weight, QuantSpec("int4", 32)).packed
    )


def test_a_column_that_is_most_of_the_trace_changes_nothing_for_other_groups(stats):
    """As where attention rests on one token. Damping by the mean would answer to it alone."""
    layer, weight = stats(64), torch.randn(16, 64)
    layer.hessian[:32, 32:] = layer.hessian[32:, :32] = 0
    found = {}
    for curvature in (100.0, 1e5):
        layer.hessian[0, 0] = curvature * float(layer.hessian.diagonal()[1:].max())
        options = GPTQOptions(order="none")
        found[curvature] = gptq(weight, layer, QuantSpec("int4", 32), options).tensor
    assert torch.equal(found[100.0].codes()[:, 32:], found[1e5].codes()[:, 32:])
    assert torch.equal(found[100.0].scale[:, 1], found[1e5].scale[:, 1])


def test_the_error_left_of_a_rounding_is_that_of_the_best_repair(stats):
    """With the columns behind free, the curvature of a column is the Schur complement."""
    hessian, order = stats(24).hessian, torch.randperm(24)
    factor = factor_of_reversed(hessian[order][:, order].flip(0, 1))
    left = errors_left(factor, order)
    for position in (0, 11, 23):
        free = order[position + 1 :]
        column = order[position]
        ties = hessian[column, free]
        repaired = ties @ torch.linalg.solve(hessian[free][:, free], ties) if len(free) else 0
        assert float(left[column]) == pytest.approx(
            float(hessian[column, column] - repaired), rel=1e-3
        )


@pytest.mark.parametrize("projected", [False, True])
def test_correction_restores_the_full_precision_outputs(projected):
    """Inputs that are a linear map away from the full-precision ones: with alpha 1 and fine codes,
    the outputs become those of the full-precision layer."""
    torch.manual_seed(0)
    exact, weight = torch.randn(4000, 48), torch.randn(16, 48)
    degraded = exact @ (torch.eye(48) + 0.05 * torch.randn(48, 48))
    stats = LayerStats(48, cross=True, projection=weight if projected else None)
    for x, y in zip(degraded.split(500), exact.split(500), strict=True):
        stats.add(x, y @ weight.T if projected else y)
    stats.finish()
    missing = 2 * (exact - degraded).T @ degraded / 4000
    torch.testing.assert_close(stats.pull(weight), weight @ missing, rtol=1e-3, atol=1e-4)
    errors = {}
    for alpha in (0.0, 0.25, 1.0):
        tensor = gptq(
            weight, stats, QuantSpec("int8", -1), GPTQOptions(alpha=alpha, damping=1e-4)
        ).tensor
        errors[alpha] = float(
            (degraded @ tensor.dequantize().T - exact @ weight.T).square().mean()
            / (exact @ weight.T).square().mean()
        )
    assert errors[1.0] < 0.01 * errors[0.0]
    assert errors[1.0] < errors[0.25] < errors[0.0]
