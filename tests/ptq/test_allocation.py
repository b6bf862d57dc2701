"""The choice of a spec per layer is the best one within the budget, and never above it."""

import itertools
import random
import time

import pytest

from llmq.errors import LlmqError
from llmq.ptq import allocation
from llmq.ptq.allocation import Item, allocate, least_bytes


def some_items(rng: random.Random, n: int, largest: int = 40) -> list[Item]:
    items = []
    for _ in range(n):
        k = rng.randint(1, 4)
        costs = tuple(rng.choice([rng.random(), 0.5]) for _ in range(k))
        items.append(Item(costs, tuple(rng.randint(0, largest) for _ in range(k))))
    return items


def totals(items, choice):
    """Cost and bytes of a choice."""
    pairs = list(zip(items, choice, strict=True))
    cost = sum(item.costs[number] for item, number in pairs)
    return cost, sum(item.n_bytes[number] for item, number in pairs)


def brute_force(items, budget):
    every = itertools.product(*(range(len(item.costs)) for item in items))
    found = (totals(items, choice) for choice in every)
    return min(cost for cost, n_bytes in found if n_bytes <= budget)


def budgets(items):
    least = least_bytes(items)
    return range(least, sum(max(item.n_bytes) for item in items) + 2, 7)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_costs_less(seed):
    rng = random.Random(seed)
    items = some_items(rng, rng.randint(1, 5))
    for budget in budgets(items):
        cost, n_bytes = totals(items, allocate(items, budget))
        assert n_bytes <= budget
        assert cost == pytest.approx(brute_force(items, budget))


@pytest.mark.parametrize("seed", range(12))
def test_with_a_coarse_unit_it_stays_within_and_loses_at_most_a_unit_per_item(seed, monkeypatch):
    monkeypatch.setattr(allocation, "MAX_UNITS", 20)
    rng = random.Random(seed)
    items = some_items(rng, 5)
    unit, before = allocation._unit(items), float("inf")
    for budget in budgets(items):
        cost, n_bytes = totals(items, allocate(items, budget))
        assert n_bytes <= budget
        assert cost <= before + 1e-12, "a larger budget costs more"
        before = cost
        if budget - unit * len(items) >= least_bytes(items):
            assert cost <= brute_force(items, budget - unit * len(items)) + 1e-12


def test_of_equal_costs_the_smallest_is_taken():
    assert allocate([Item((1.0, 1.0, 1.0), (30, 10, 20))], 100) == [1]


def test_a_budget_below_the_smallest_choice_is_refused_with_what_that_takes():
    items = [Item((1.0, 0.5), (10, 20)), Item((1.0, 0.5), (7, 9))]
    with pytest.raises(LlmqError, match=r"16 bytes.* takes 17 bytes"):
        allocate(items, 16)
    assert allocate(items, 17) == [0, 0]


def test_a_large_model_takes_less_than_a_moment():
    rng = random.Random(0)
    items = []
    for _ in range(300):
        n_weights = rng.choice([1024, 4096, 14336]) * 4096
        sizes = tuple(n_weights * bits // 8 + n_weights // 64 for bits in (2, 3, 4, 5, 6, 8))
        items.append(Item(tuple(rng.random() * 4.0**-i for i in range(6)), sizes))
    budget = least_bytes(items) * 3 // 2
    started = time.monotonic()
    choice = allocate(items, budget)
    assert time.monotonic() - started < 5
    assert budget * 0.999 < totals(items, choice)[1] <= budget
