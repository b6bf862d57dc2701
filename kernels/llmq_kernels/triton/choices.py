"""The choices there are for a product: which kernel, which tile sizes, what a chip has room for, a
rule of thumb for each chip, and the candidates that tuning measures.

Nothing here imports Triton; candidates that cannot fit into the shared memory of a chip are left
out by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Chip:
    """arch: as compilers name it. processors: multiprocessors or compute units. shared_bytes:
    shared memory that one program may have."""

    arch: str
    processors: int
    shared_bytes: int
    name: str = ""

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


CHIPS: dict[str, Chip] = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10),
        Chip("sm_89", 128, 99 << 10),
        Chip("sm_90", 132, 227 << 10),
        Chip("sm_100", 148, 227 << 10),
        Chip("gfx942", 304, 64 << 10),
    )
}
# M up to which the fused kernel is the default. Estimates, not measurements: cuBLAS behind a
# dequantization reaches about the same share of its own speed on every chip, while the fused kernel
# loses most where its multiplications are weakest. Tuning replaces them.
FUSED_MAX_ROWS = {"sm_80": 256, "sm_89": 128, "sm_90": 512, "sm_100": 512, "gfx942": 128}
GEMV_MAX_ROWS = 4
METHODS = ("gemv", "gemm", "dequantize")


@dataclass(frozen=True)
class Problem:
    """kind: "float" or "int8" activations. bits: of a code. group: columns per scale, 0 for one
    scale per row. dtype: of x. m: rows of x, as `bucket` rounds them."""

    kind: str
    bits: int
    group: int
    dtype: str
    n: int
    k: int
    m: int

    @property
    def key(self) -> str:
        return f"{self.kind}/w{self.bits}/g{self.group}/{self.dtype}/{self.n}x{self.k}/m{self.m}"


@dataclass(frozen=True)
class Choice:
    """method: "gemv", "gemm", or "dequantize" (and cuBLAS). block_m tokens by block_n rows of W by
    block_k columns per step; split_k programs share K; warps and stages (of the load pipeline) per
    program. fold: scales are multiplied into the weight before the product (`triton/gemm`). early:
    a kernel is launched while the one that it waits for still runs (from Hopper on)."""

    method: str
    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    fold: bool = False
    early: bool = False


def bucket(m: int) -> int:
    """M rounded up to a power of two, so that few kernels are compiled and tuned; 4096 stands for
    all above."""
    return min(1 << max(m - 1, 0).bit_length(), 4096)


def tile_columns(group: int) -> int:
    """The largest step in K that never crosses a group."""
    return next(size for size in (128, 64, 32) if group % size == 0)


def shared_bytes(problem: Problem, choice: Choice) -> int:
    """An upper estimate of the shared memory of a GEMM: the pipeline's tiles and, before Hopper,
    sometimes a tile of unpacked weights; or the output tile on its way out."""
    x_bytes = 1 if problem.kind == "int8" else 2
    tiles = (
        choice.block_n * choice.block_k * problem.bits // 8
        + choice.block_m * choice.block_k * x_bytes
    )
    return (
        max(
            choice.stages * tiles + choice.block_n * choice.block_k * x_bytes,
            choice.block_m * choice.block_n * 4,
        )
        + 1024
    )


def fits(problem: Problem, choice: Choice, chip: Chip) -> bool:
    """Whether a choice can be right for a problem: tiles that end with groups and rows, and fit
    into the chip's shared memory."""
    if choice.method == "gemv":
        return problem.kind == "float" and problem.m <= GEMV_MAX_ROWS
    if choice.method == "dequantize":
        return problem.kind == "float"
    padded = -(-problem.k // 128) * 128
    return (
        problem.group % choice.block_k == 0
        and padded % choice.block_k == 0
        and choice.block_m >= 16
        and choice.split_k <= padded // choice.block_k
        and shared_bytes(problem, choice) <= chip.shared_bytes
    )


FOLD_MIN_ROWS = 64  # rows of x from which a second accumulator costs more than rounded weights
SPLIT_MAX_ROWS = 512
_ON_WGMMA = ("sm_90", "sm_100")


def _split(problem: Problem, chip: Chip, block_m: int, block_n: int, block_k: int) -> int:
    """Split K until there are about two programs per multiprocessor, while each keeps four tiles to
    walk along. A workspace of M x N floats per split costs traffic, so never for large M."""
    programs = -(-problem.n // block_n) * -(-problem.m // block_m)
    split = 1
    while (
        split < 8
        and problem.m <= SPLIT_MAX_ROWS
        and 2 * programs * split < 3 * chip.processors
        and problem.k // block_k >= 8 * split
    ):
        split *= 2
    return split


def _folds(problem: Problem) -> bool:
    return problem.kind == "float" and problem.group > 0 and problem.m >= FOLD_MIN_ROWS


def _early(problem: Problem, chip: Chip) -> bool:
    """On an H100 it saves up to 1.4 us with few rows, and costs as much with 64."""
    return chip.arch in _ON_WGMMA and problem.m <= (16 if problem.kind == "int8" else 4)


def default_choice(problem: Problem, chip: Chip) -> Choice:
    """A choice without measurements."""
    m = problem.m
    if problem.kind == "float" and m <= GEMV_MAX_ROWS and chip.arch not in _ON_WGMMA:
        # A warp reads 512 bytes of one row at a time (4 bits: 1024 columns); four rows per program,
        # one for each warp.
        block_k = 1024 if problem.bits != 2 else 2048
        return Choice("gemv", m, 4, block_k, warps=4, stages=1)
    if problem.kind == "float" and m > FUSED_MAX_ROWS[chip.arch]:
        return Choice("dequantize")
    choice = _default_gemm(problem, chip)
    while not fits(problem, choice, chip):
        choice = (
            replace(choice, stages=choice.stages - 1)
            if choice.stages > 2
            else replace(choice, block_m=choice.block_m // 2)
        )
    return choice


def _default_gemm(problem: Problem, chip: Chip) -> Choice:
    m = problem.m
    # Before Hopper, sums, weights and x all lie in the registers of a warp: of the larger tiles,
    # Triton 3.6 or 3.9 spills at 64 x 128 and 128 x 128. At 64 x 64 neither does with 8 warps;
    # with 4 it is one for INT4.
    wide = chip.arch in _ON_WGMMA
    # Groups of integer sums need a second accumulator, and with zero points sums of x beside it.
    large = (wide or chip.is_amd) and not (problem.kind == "int8" and problem.group)
    block_m = min(max(m, 16), 128 if large else 64)
    block_n = 128 if wide and m >= 64 else 64
    block_k = tile_columns(problem.group)
    is_crowded = problem.kind == "float" and not wide and not chip.is_amd
    return Choice(
        "gemm",
        block_m,
        block_n,
        block_k,
        split_k=_split(problem, chip, block_m, block_n, block_k),
        warps=8 if block_m * block_n >= (64 if is_crowded else 128) * 64 else 4,
        stages=2 if chip.is_amd else 4 if m <= 32 else 3,
        fold=_folds(problem),
        early=_early(problem, chip),
    )


# --- what is measured -----------------------------------------------------------------------------


def candidates(problem: Problem, chip: Chip) -> Iterator[Choice]:
    """What tuning measures: the default first, then some dozens of others that fit the chip."""
    default = default_choice(problem, chip)
    seen = {default}
    yield default
    for choice in _variations(problem, chip):
        if choice not in seen and fits(problem, choice, chip):
            seen.add(choice)
            yield choice


def _variations(problem: Problem, chip: Chip) -> Iterator[Choice]:
    if problem.kind == "float" and problem.m <= GEMV_MAX_ROWS:
        for block_n, block_k, warps in (
            (2, 1024, 2),
            (4, 1024, 4),
            (8, 1024, 4),
            (16, 512, 4),
            (4, 2048, 4),
            (8, 512, 4),
        ):
            yield Choice("gemv", problem.m, block_n, block_k, 1, warps, 1)
    if problem.kind == "float" and problem.m >= 64:
        yield Choice("dequantize")
    for shape in _shapes(problem, chip):
        for split_k in _splits(problem, chip, shape):
            choice = replace(shape, split_k=split_k)
            yield choice
            # Only a kernel that another one waits for can be overtaken.
            if chip.arch in _ON_WGMMA and (split_k > 1 or problem.kind == "int8"):
                yield replace(choice, early=True)


def _splits(problem: Problem, chip: Chip, shape: Choice) -> list[int]:
    """Of K: what the rule has, half as many and twice as many, each with two tiles at least."""
    base = _split(problem, chip, shape.block_m, shape.block_n, shape.block_k)
    tiles = -(-problem.k // shape.block_k)
    more = 2 * base if problem.m <= 128 else base
    return [
        split_k
        for split_k in sorted({max(base // 2, 1), base, more})
        if split_k == 1 or (problem.m <= SPLIT_MAX_ROWS and split_k <= 8 and split_k * 2 <= tiles)
    ]


def _shapes(problem: Problem, chip: Chip) -> Iterator[Choice]:
    """Tiles of the GEMM, before K is split. On chips whose tensor cores read x from shared memory
    tiles can be larger and pipelines deeper."""
    if chip.arch not in _ON_WGMMA:
        yield from _small_shapes(problem, chip)
    elif problem.m <= 32:
        yield from _few_rows(problem)
    else:
        yield from _many_rows(problem)


def _small_shapes(problem: Problem, chip: Chip) -> Iterator[Choice]:
    block_k, m = tile_columns(problem.group), problem.m
    limits = (16, 32) if m <= 32 else (64, 128)
    for block_m in sorted({min(max(m, 16), limit) for limit in limits}):
        for block_n, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (2, 3) if chip.is_amd else (3, 5):
                yield Choice("gemm", block_m, block_n, block_k, 1, warps, stages, _folds(problem))


def _few_rows(problem: Problem) -> Iterator[Choice]:
    block_k, is_int8 = tile_columns(problem.group), problem.kind == "int8"
    for block_m in sorted({max(problem.m, 16), 16}):
        for block_n, warps in ((64, 4), (128, 8), (128, 4)) if is_int8 else ((64, 4), (128, 8)):
            for stages in (4, 5) if is_int8 else (3, 4, 5):
                yield Choice("gemm", block_m, block_n, block_k, 1, warps, stages)
    if is_int8 and problem.group == 0 and problem.k % 256 == 0:
        for block_n, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (3, 4, 5):
                yield Choice("gemm", max(problem.m, 16), block_n, 256, 1, warps, stages)


def _many_rows(problem: Problem) -> Iterator[Choice]:
    block_k, is_int8 = tile_columns(problem.group), problem.kind == "int8"
    deep = (3, 4, 5) if is_int8 else (3, 4)
    for block_m, block_n, warps in (
        (64, 64, 4),
        (64, 128, 8),
        (64, 128, 4),
        (128, 64, 4),
        (128, 128, 8),
        (128, 128, 4),
        (256, 64, 4),
        (256, 128, 8),
    ):
        if block_m > max(problem.m, 64) or (block_m == 64 and problem.m > 512):
            continue
        for stages in deep:
            shape = Choice("gemm", block_m, block_n, block_k, 1, warps, stages)
            if block_m <= 128:
                yield shape
            if _folds(problem):
                yield replace(shape, fold=True)


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device. The CPU stands for the interpreter and gets Hopper's choices, so
    that these are what the interpreter checks."""
    if device.type == "cpu":
        return CHIPS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        base = CHIPS.get(arch, CHIPS["gfx942"])
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        base = (
            CHIPS.get(arch)
            or CHIPS[
                "sm_100"
                if properties.major == 10
                else "sm_90"
                if properties.major == 9
                else "sm_89"
                if (properties.major, properties.minor) > (8, 0)
                else "sm_80"
            ]
        )
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or base.shared_bytes
    return Chip(
        base.arch, properties.multi_processor_count, min(shared, base.shared_bytes), properties.name
    )
