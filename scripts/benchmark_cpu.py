"""The CPU backends beside torch's bfloat16 linear and its int4pack operator, in one run: speed-up
by rows of x.

    python scripts/benchmark_cpu.py --threads 1

Candidates take turns, so that a slower minute of the machine hits all of them; several copies of
each weight take turns, so that weights come from memory and not from a small cache. The table shows
ratios of medians."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels import CODES, PackedWeight, PreparedWeight, pack
from llmq_kernels.core.timing import medians

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Candidate:
    """A weight and how it is multiplied. group_size: columns per scale, 0 for one per row. backend:
    None for what llmq chooses."""

    code: str
    group_size: int
    activations: str = "none"
    backend: str | None = None


CANDIDATES = {
    "INT4 by int4pack": Candidate("int4", 128, backend="cpu-int4"),
    "INT4": Candidate("int4", 128),
    "INT3": Candidate("int3", 128),
    "INT2": Candidate("int2", 128),
    "INT8": Candidate("int8", 0),
    "INT4, INT8 per group": Candidate("int4", 128, "int8-group"),
    "ternary, INT8 per group": Candidate("ternary", 0, "int8-group"),
    "ternary, INT8 per token": Candidate("ternary", 0, "int8-token"),
    "INT8, INT8 per token": Candidate("int8", 0, "int8-token"),
}


def packed_weight(
    weight: Tensor, code_name: str, group_size: int, activations: str = "none"
) -> PackedWeight:
    """A symmetric weight with scales from its ranges."""
    (n, k), code = weight.shape, CODES[code_name]
    group_size = group_size or k
    grouped = weight.view(n, k // group_size, group_size)
    scale = (2 * grouped.abs().amax(-1) / code.max).half()
    codes = (
        (grouped / scale.float()[..., None])
        .round()
        .add(code.offset)
        .clamp(0, code.max)
        .to(torch.uint8)
    )
    return PackedWeight(
        pack(codes.view(n, k), code.bits), scale, None, None, code, group_size, (n, k), activations
    )


def prepared(weight: Tensor, candidate: Candidate) -> PreparedWeight:
    """The candidate's weight in the layout of its backend."""
    if candidate.backend:
        os.environ["LLMQ_BACKEND"] = candidate.backend
    try:
        return PreparedWeight(
            packed_weight(weight, candidate.code, candidate.group_size, candidate.activations),
            torch.bfloat16,
            torch.device("cpu"),
        )
    finally:
        os.environ.pop("LLMQ_BACKEND", None)


def competitors(
    n: int, k: int, names: Sequence[str], copies: int
) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """`copies` functions of x for each name, and those of the bfloat16 linear."""
    weights = [torch.randn(n, k) * 0.02 for _ in range(copies)]
    result: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "bfloat16": [_linear(weight.bfloat16()) for weight in weights]
    }
    for name in names:
        ready = [prepared(weight, CANDIDATES[name]) for weight in weights]
        result[f"{name} ({ready[0].backend.name})"] = [one.linear for one in ready]
    return result


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(x, weight)


def _bound(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help=(
            "count processor time instead of the clock on the wall, for one thread on a machine "
            "that others use, too"
        ),
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=tuple(CANDIDATES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time: counts one thread; give --threads 1, too")
    clock = time.thread_time if args.cpu_time else time.perf_counter

    functions = competitors(args.n, args.k, args.candidates, args.copies)
    results = {}
    for m in args.rows:
        x = torch.randn(m, args.k).bfloat16()
        results[m] = medians(
            {
                name: [_bound(function, x) for function in copies]
                for name, copies in functions.items()
            },
            args.repeats,
            clock=clock,
        )
    if args.json:
        print(
            json.dumps(
                {"n": args.n, "k": args.k, "threads": torch.get_num_threads(), "seconds": results}
            )
        )
        return
    print(
        f"{args.n} x {args.k}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"speed-up over bfloat16{' in processor time' if args.cpu_time else ''}\n"
    )
    print("| M | " + " | ".join(map(str, results)) + " |\n|" + "---|" * (len(results) + 1))
    print(
        "| bfloat16, ms | "
        + " | ".join(f"{row['bfloat16'] * 1e3:.2f}" for row in results.values())
        + " |"
    )
    for name in list(functions)[1:]:
        print(
            f"| {name} | "
            + " | ".join(f"{row['bfloat16'] / row[name]:.2f}" for row in results.values())
            + " |"
        )


if __name__ == "__main__":
    main()
