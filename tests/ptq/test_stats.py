"""Second moments of a layer's inputs: the mean over all rows, summed by a tree that neither threads
nor processes can change."""

import pytest
import torch

from llmq.activations.ranges import RangeObserver
from llmq.grid.spec import QuantSpec
from llmq.ptq.leaves import N_LEAVES, leaves_of
from llmq.ptq.methods.gptq import gptq
from llmq.ptq.stats import LayerStats, _Moments, output_error


def test_hessian_is_a_running_mean_and_drops_rows_that_are_not_finite():
    x = torch.randn(30, 8)
    whole, parts = LayerStats(8), LayerStats(8)
    whole.add(x)
    for part in x.split([7, 13, 10]):
        parts.add(part[None])
    assert torch.allclose(whole.hessian, 2 * x.T @ x / 30, atol=1e-5)
    assert torch.allclose(parts.hessian, whole.hessian, atol=1e-5)
    poisoned = x.clone()
    poisoned[3, 2], poisoned[9, 1] = float("nan"), float("inf")
    stats = LayerStats(8)
    stats.add(poisoned)
    assert (stats.n_tokens, stats.n_dropped) == (28, 2)
    kept = torch.cat([x[:3], x[4:9], x[10:]])
    assert torch.allclose(stats.hessian, 2 * kept.T @ kept / 28, atol=1e-5)


def test_hessian_of_many_columns_is_accumulated_in_blocks():
    x = torch.randn(40, 600)
    stats = LayerStats(600)
    stats.add(x[:30])
    stats.add(x[30:])
    whole = stats.finish().hessian
    assert torch.allclose(whole, 2 * x.T @ x / 40, atol=1e-5)
    assert torch.equal(whole[:256, 256:], whole[256:, :256].T)


def test_output_error_is_the_mean_squared_difference(stats):
    x, difference = torch.randn(500, 12), torch.randn(5, 12)
    layer = LayerStats(12)
    layer.add(x)
    assert output_error(difference, layer.hessian) == pytest.approx(
        float((x @ difference.T).square().sum(1).mean()), rel=1e-4
    )


def moments(k, chunks):
    """One branch: its chunks one after the other."""
    found = _Moments(torch.zeros(k, k), torch.zeros(k, k))
    for x, y in chunks:
        found.add(x, y, keeps_energy=False)
    return found


def merged(branches):
    """Branches merged in pairs, as processes that have whole subtrees would."""
    if len(branches) == 1:
        return branches[0]
    half = len(branches) // 2
    left, right = merged(branches[:half]), merged(branches[half:])
    left.merge(right)
    return left


@pytest.mark.parametrize("n_chunks", [1, 2, 4, 8, 16, 24, 40])
def test_the_tree_is_that_of_the_number_of_chunks(n_chunks):
    """Bit for bit what subtrees give that were summed apart; rows of unequal number."""
    generator = torch.Generator().manual_seed(n_chunks)
    k = 24
    chunks = [
        (torch.randn(3 + i % 4, k, generator=generator), torch.randn(3 + i % 4, k))
        for i in range(n_chunks)
    ]
    stats = LayerStats(k, cross=True, chunks=leaves_of(n_chunks))
    for x, y in chunks:
        stats.add(x, y)
    assert stats.n_tokens == sum(len(x) for x, _ in chunks)
    per_branch = max(1, n_chunks // N_LEAVES)
    branches = [
        moments(k, chunks[start : start + per_branch]) for start in range(0, n_chunks, per_branch)
    ]
    expected = merged(branches)
    stats.finish()
    lower = torch.ones(k, k).tril().bool()
    assert torch.equal(stats.hessian[lower], expected.hessian[lower])
    rows, exact = torch.cat([x for x, _ in chunks]), torch.cat([y for _, y in chunks])
    missing = 2 * (exact - rows).T @ rows / len(rows)
    torch.testing.assert_close(stats.cross, missing, rtol=1e-4, atol=1e-5)


def test_few_branches_are_alive_at_a_time():
    stats, most = LayerStats(8, chunks=leaves_of(64)), 0
    for _ in range(64):
        stats.add(torch.randn(4, 8))
        most = max(most, len(stats._waiting))
    assert most == 3


def test_any_number_of_threads_gives_the_same_bits():
    """Large enough for all of them to take part."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(16, 512, 640, generator=generator), torch.randn(768, 640)
    results, before = [], torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        stats = LayerStats(640, cross=True, chunks=leaves_of(16))
        for chunk in x:
            stats.add(chunk, chunk.roll(1, 0))
        result = gptq(weight, stats.finish(), QuantSpec.parse("w3g64-asym"))
        error = output_error(result.tensor.dequantize() - weight, stats.hessian)
        results.append((stats.hessian, stats.cross, result.tensor.dequantize(), error))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:3], results[0][:3], strict=True))
        assert other[3] == results[0][3]


def test_a_weight_of_two_is_a_row_twice():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 6, 4, 8, generator=generator)
    weights = torch.ones(6, 4)
    weights[1], weights[3] = 2, 0
    weighted = LayerStats(8, cross=True, chunks=leaves_of(6))
    repeated = LayerStats(8, cross=True, chunks=leaves_of(6))
    for index in range(6):
        weighted.add(x[index], y[index], weights[index])
        for _ in range(int(weights[index, 0])):
            repeated.add(x[index], y[index])
    weighted.finish(), repeated.finish()
    torch.testing.assert_close(weighted.hessian, repeated.hessian)
    torch.testing.assert_close(weighted.cross, repeated.cross)


def test_ranges_of_activations_know_no_weights():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    found = []
    for weights in (None, torch.tensor([0.5, 2.0, 1.0, 0.5])):
        ranges = RangeObserver()
        LayerStats(8, ranges=ranges).add(x, weights=weights)
        found.append(ranges.range("minmax"))
    assert torch.equal(found[0], found[1])


def test_rows_that_are_not_finite_take_their_weights_along():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([0.5, 2.0, 1.0, 0.5])
    expected = LayerStats(8)
    expected.add(x[[0, 2, 3]], weights=weights[[0, 2, 3]])
    x[1, 0] = torch.nan
    stats = LayerStats(8)
    stats.add(x, weights=weights)
    assert stats.n_dropped == 1
    assert torch.equal(stats.finish().hessian, expected.finish().hessian)
