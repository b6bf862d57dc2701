"""Packed weights beside torch's bfloat16 linear and other projects' kernels, on whichever device:
rows of a table, one per shape, kind of weight and number of rows of x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq.benchmark import rivals, timing
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq_kernels import PackedWeight, PreparedWeight, packed_width
from llmq_kernels.triton import backend, choices, tuning

# Llama-3-8B's layers, and two squares.
GPU_SHAPES = ((4096, 4096), (8192, 8192), (6144, 4096), (28672, 4096), (4096, 14336))
CPU_SHAPES = ((4096, 4096),)
GPU_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CPU_ROWS = (1, 4, 16, 64)
GPU_WEIGHTS = ("w4g128", "ternary+a8")
CPU_WEIGHTS = ("w4g128", "w8", "w8+a8")


_ACTIVATIONS = {"": "none", "a8": "int8-token", "a8g": "int8-group"}


@dataclass(frozen=True)
class Kind:
    """What is measured: a spec in its short text form, with "+a8" for INT8 activations per token
    and "+a8g" for those per token and group, which `--compute int8` has on a CPU."""

    text: str

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec.parse(self.text.partition("+")[0])

    @property
    def activations(self) -> str:
        suffix = self.text.partition("+")[2]
        if suffix not in _ACTIVATIONS:
            raise LlmqError(f"{self.text}: expected a spec with nothing, +a8 or +a8g behind it")
        return _ACTIVATIONS[suffix]


def random_weight(kind: Kind, n: int, k: int, device: torch.device) -> PackedWeight:
    """Random codes (all codes of the kind), scales of about 0.01."""
    spec = kind.spec
    words = torch.randint(
        -(1 << 31), 1 << 31, (n, packed_width(k, spec.bits)), dtype=torch.int64, device=device
    ).to(torch.int32)
    if spec.code == "ternary":
        words &= ~((words & 0x55555555) << 1)  # no code 3
    shape = (n, spec.n_groups(k)) if spec.group_size else (1, 1)
    scale = (torch.rand(shape, device=device) * 0.01 + 0.005).half()
    zero = (
        None
        if spec.symmetric
        else torch.randint(0, spec.levels.levels, shape, device=device, dtype=torch.uint8)
    )
    return PackedWeight(
        words, scale, zero, None, spec.levels, spec.columns_per_group(k), (n, k), kind.activations
    )


def weight_bytes(weight: PackedWeight) -> int:
    """What a product has to read of the weight."""
    return sum(
        tensor.nbytes for tensor in (weight.packed, weight.scale, weight.zero) if tensor is not None
    )


def calls(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[timing.Call]:
    """Each function with x bound."""
    return [partial(function, x) for function in functions]


def prepared_copies(kind: Kind, n: int, k: int, device: torch.device) -> list[PreparedWeight]:
    """As many copies as keep the cache cold."""
    first = random_weight(kind, n, k, device)
    count = timing.copies_for(weight_bytes(first), device)
    return [
        PreparedWeight(weight, torch.bfloat16, device)
        for weight in (first, *(random_weight(kind, n, k, device) for _ in range(count - 1)))
    ]


@torch.no_grad()
def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kinds: Sequence[Kind],
    device: torch.device,
    *,
    repeats: int = 20,
) -> Iterator[dict[str, Any]]:
    """One dictionary per shape, M and kind: seconds of llmq and of bfloat16, their ratio, share of
    the copy bandwidth, and the seconds of other projects' kernels that are installed."""
    bandwidth = timing.copy_bandwidth(device)
    for n, k in shapes:
        dense = [
            torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.01
            for _ in range(timing.copies_for(2 * n * k, device))
        ]
        linears = [partial(torch.nn.functional.linear, weight=weight) for weight in dense]
        inputs = {m: torch.randn(m, k, device=device, dtype=torch.bfloat16) for m in rows}
        baseline = {
            m: timing.seconds(calls(linears, x), device, repeats) for m, x in inputs.items()
        }
        others = (
            rivals.seconds(n, k, inputs, device, repeats)
            if any(kind.text == "w4g128" for kind in kinds)
            else {}
        )
        del dense, linears
        for kind in kinds:
            copies = prepared_copies(kind, n, k, device)
            functions = [prepared.linear for prepared in copies]
            for m, x in inputs.items():
                own = timing.seconds(calls(functions, x), device, repeats)
                moved = weight_bytes(copies[0].weight) + x.nbytes + 2 * m * n
                row = {
                    "n": n,
                    "k": k,
                    "m": m,
                    "weights": kind.text,
                    "backend": copies[0].backend.name,
                    "seconds": own,
                    "bf16_seconds": baseline[m],
                    "ratio": baseline[m] / own,
                }
                row |= {
                    "share_of_copy_bandwidth": moved / own / bandwidth,
                    "copy_bytes_per_second": bandwidth,
                    "choice": choice_of(copies[0], x),
                }
                yield row | {"others": others.get(m, {}) if kind.text == "w4g128" else {}}


def choice_of(prepared: PreparedWeight, x: Tensor) -> str | None:
    """The tiles that were used, where the Triton kernels ran."""
    if not prepared.backend.name.startswith("triton"):
        return None
    return str(tuning.choose(backend.problem_of(x, prepared.weight), choices.chip_of(x.device)))
