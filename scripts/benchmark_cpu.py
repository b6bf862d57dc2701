"""The CPU backends beside torch's bfloat16 linear, in one run: speed-up by rows of x, for INT4 (group 128), INT8 weights and INT8 weights and activations.

    python scripts/benchmark_cpu.py

Candidates take turns, so that a slower minute of the machine hits all of them; several copies of each weight take turns, so that weights come from memory and not from a small
cache. The table shows ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llmq_kernels import CODES, PackedWeight, PreparedWeight, pack

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def packed_weight(weight: Tensor, bits: int, group_size: int, activations: str = "none") -> PackedWeight:
    """A symmetric weight with scales from its ranges."""
    n, k = weight.shape
    code = CODES[f"int{bits}"]
    grouped = weight.view(n, k // group_size, group_size)
    scale = (2 * grouped.abs().amax(-1) / code.max).half()
    codes = (grouped / scale.float()[..., None]).round().add(code.offset).clamp(0, code.max).to(torch.uint8)
    return PackedWeight(pack(codes.view(n, k), bits), scale, None, None, code, group_size, (n, k), activations)


def candidates(n: int, k: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """One copy of each competitor."""
    weight = torch.randn(n, k) * 0.02
    dense = weight.bfloat16()
    prepared = {
        "INT4 g128": PreparedWeight(packed_weight(weight, 4, 128), torch.bfloat16, torch.device("cpu")),
        "INT8": PreparedWeight(packed_weight(weight, 8, k), torch.bfloat16, torch.device("cpu")),
        "INT8, INT8 activations": PreparedWeight(packed_weight(weight, 8, k, "int8-token"), torch.bfloat16, torch.device("cpu")),
    }
    functions: dict[str, Callable[[Tensor], Tensor]] = {"bfloat16": lambda x: torch.nn.functional.linear(x, dense)}
    return functions | {f"{name} ({p.backend.name})": p.linear for name, p in prepared.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    copies = [candidates(args.n, args.k) for _ in range(args.copies)]
    names = list(copies[0])
    results = {}
    for m in args.rows:
        x = torch.randn(m, args.k).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(args.repeats + 2):
            for name in names:
                function = copies[repeat % len(copies)][name]
                started = time.perf_counter()
                function(x)
                if repeat >= 2:
                    times[name].append(time.perf_counter() - started)
        results[m] = {name: statistics.median(values) for name, values in times.items()}
    if args.json:
        print(json.dumps({"n": args.n, "k": args.k, "threads": torch.get_num_threads(), "seconds": results}))
        return
    print(f"{args.n} x {args.k}, {torch.get_num_threads()} threads, torch {torch.__version__}; speed-up over bfloat16\n")
    print("| M | bfloat16, ms | " + " | ".join(names[1:]) + " |\n|" + "---|" * (len(names) + 1))
    for m, row in results.items():
        print(f"| {m} | {row['bfloat16'] * 1e3:.2f} | " + " | ".join(f"{row['bfloat16'] / row[name]:.2f}" for name in names[1:]) + " |")


if __name__ == "__main__":
    main()
