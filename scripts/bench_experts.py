"""What a block of experts costs beside one dense layer of as many weights.

    python scripts/bench_experts.py

Both are solved by GPTQ with the recipe's defaults, in turns, on one thread: 64 experts of 512 x 256
side by side and one layer of 32768 x 256, and with --alone the experts one by one, too. Prints
seconds of the CPU (medians) and their ratio, which is to stay below 1.5."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llmq.grid.spec import QuantSpec
from llmq.ptq.methods.gptq import gptq, gptq_together
from llmq.ptq.stats import LayerStats


def measured(k: int, n_rows: int) -> LayerStats:
    """Statistics of correlated inputs."""
    stats = LayerStats(k)
    stats.add(torch.randn(n_rows, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5))
    return stats.finish()


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def solves(
    weights: Tensor, stats: list[LayerStats], spec: QuantSpec, alone: bool
) -> dict[str, Callable[[], object]]:
    """What is compared. weights: `[E, N, K]`."""
    experts = list(weights)
    found: dict[str, Callable[[], object]] = {
        "dense": lambda: gptq(weights.flatten(0, 1), stats[0], spec),
        "experts": lambda: gptq_together(experts, stats, spec),
    }
    if alone:
        found["one by one"] = lambda: [
            gptq(weight, own, spec) for weight, own in zip(experts, stats, strict=True)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 256), metavar=("N", "K"))
    parser.add_argument("--spec", default="w4g128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="also one by one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, k = args.shape
    stats = [measured(k, 4 * k) for _ in range(args.experts)]
    weights = 0.02 * torch.randn(args.experts, n, k)
    calls = solves(weights, stats, QuantSpec.parse(args.spec), args.alone)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            seconds[name].append(cpu_seconds(call))
    dense = statistics.median(seconds["dense"])
    print(f"dense {args.experts * n} x {k}, experts {args.experts} of {n} x {k}, {args.spec}")
    for name, values in seconds.items():
        value = statistics.median(values)
        print(f"{name:12}{value:8.2f} s{value / dense:8.2f} of dense")


if __name__ == "__main__":
    main()
