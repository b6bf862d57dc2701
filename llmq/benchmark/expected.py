"""How long a product should take on a GPU, from bytes, instructions and programs: what a measured
time is held against, and what is known of a shape before there is one.

A product waits for whichever is slower, memory or its programs. Programs of one multiprocessor
share its four schedulers and its tensor cores; how much memory they have asked for at a time is the
pipelines' tiles, and the time that a tile is under way bounds what arrives. The constants of a card
are fitted to measurements (`scripts/kernel_times.py --fit`), instructions and registers were
counted in machine code (`tests/kernels/machine_code.json`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from llmq_kernels.triton.choices import CHIPS, Chip, Choice, Problem

SCHEDULERS, LANES = 4, 32  # of a multiprocessor; of a warp
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
SPLITS = (1, 2, 4, 8)
CUBLAS_TILES = ((64, 128), (128, 128), (128, 256), (256, 128))
Step = tuple[float, int]  # instructions per packed word, registers of a thread

GEMV_INSTRUCTIONS = 48  # per packed word, for one row of x
# By rows of a tile, of each kind; the folded weight of 128 rows and more is a step of its own.
STEPS: dict[str, dict[int, Step]] = {
    "float": {16: (23.62, 79), 64: (37.25, 102), 128: (33.0, 156)},
    "int8": {16: (15.38, 50), 128: (23.5, 134)},
}


@dataclass(frozen=True)
class Card:
    """Constants of a GPU. clock: Hz. products: bfloat16
    operations per second of its tensor cores. overlap: the share of them that the unpacking does
    not hide. bandwidth: bytes per second that packed words arrive with at best, and dense ones, in
    a copy. latency: seconds from a tile's request to its arrival. launch, cublas_launch: seconds
    around one kernel. next_launch, quantizer: what a second kernel adds, and that of the
    activations before it."""

    chip: Chip
    clock: float
    products: float
    overlap: float
    bandwidth: float
    copy_bandwidth: float
    latency: float
    launch: float
    next_launch: float
    quantizer: float
    cublas_launch: float


CARDS = {
    "NVIDIA H100 80GB HBM3": Card(
        chip=CHIPS["sm_90"],
        clock=1.755e9,
        products=7.87e14,
        overlap=0.84,
        bandwidth=2.08e12,
        copy_bandwidth=2.93e12,
        latency=1.2e-6,
        launch=4.04e-6,
        next_launch=0.44e-6,
        quantizer=1.87e-6,
        cublas_launch=4.81e-6,
    )
}


def bfloat16_seconds(n: int, k: int, m: int, card: Card) -> float:
    """A dense product `[M, K] @ [N, K].T` by cuBLAS, with the best of its tiles."""
    n_bytes = 2 * (n * k + m * k + m * n)
    best = min(
        _dense_tiles(n, k, m, tile, split, card) for tile in CUBLAS_TILES for split in SPLITS
    )
    return card.cublas_launch + max(n_bytes / card.copy_bandwidth, best)


def _dense_tiles(n: int, k: int, m: int, tile: tuple[int, int], split: int, card: Card) -> float:
    block_m, block_n = tile
    rounds = ceil(ceil(m / block_m) * ceil(n / block_n) * split / card.chip.processors)
    operations = 2 * block_m * block_n * k / split
    added = card.next_launch if split > 1 else 0.0
    return rounds * operations * card.chip.processors / card.products + added


def seconds(problem: Problem, choice: Choice, card: Card) -> float:
    """A product with packed weights."""
    n, k, m = problem.n, problem.k, problem.m
    if choice.method == "dequantize":
        n_bytes = packed_bytes(problem) + 2 * n * k
        unpacking = card.launch + n_bytes / card.copy_bandwidth
        return unpacking + bfloat16_seconds(n, k, m, card)
    arriving = (packed_bytes(problem) + 2 * m * (k + n)) / _arrival(problem, choice, card)
    found = card.launch + max(arriving, _work(problem, choice, card))
    if choice.split_k > 1:  # sums are written and read once, in float32
        found += card.next_launch + 2 * 4 * choice.split_k * m * n / card.copy_bandwidth
    if problem.kind == "int8":  # 16-bit activations are read, bytes are written
        found += card.quantizer + 3 * m * k / card.copy_bandwidth
    return found


def packed_bytes(problem: Problem) -> float:
    """Codes, and float16 scales of groups."""
    scales = 16 / problem.group if problem.group else 0
    return problem.n * problem.k * (problem.bits + scales) / 8


def programs(problem: Problem, choice: Choice) -> int:
    return ceil(problem.n / choice.block_n) * ceil(problem.m / choice.block_m) * choice.split_k


def step(problem: Problem, choice: Choice) -> Step:
    """Instructions and registers of the nearest tile that was counted, not above it."""
    counted = STEPS[problem.kind]
    return counted[max((rows for rows in counted if rows <= choice.block_m), default=16)]


def _per_processor(problem: Problem, choice: Choice, card: Card) -> int:
    return ceil(programs(problem, choice) / card.chip.processors)


def _work(problem: Problem, choice: Choice, card: Card) -> float:
    """Seconds of the busiest multiprocessor: unpacking, and what of the products it does not
    hide."""
    columns = problem.k / choice.split_k
    words = choice.block_n * columns * problem.bits / 32
    is_gemv = choice.method == "gemv"
    instructions = GEMV_INSTRUCTIONS * problem.m if is_gemv else step(problem, choice)[0]
    unpacking = words * instructions / LANES / (SCHEDULERS * card.clock)
    operations = 0.0 if is_gemv else 2 * max(choice.block_m, 16) * choice.block_n * columns
    peak = card.products * (2 if problem.kind == "int8" else 1) / card.chip.processors
    n_programs = _per_processor(problem, choice, card)
    return n_programs * (unpacking + card.overlap * operations / peak)


def _arrival(problem: Problem, choice: Choice, card: Card) -> float:
    """Bytes per second that arrive: the pipelines of the programs that run at a time hold what is
    under way."""
    if choice.method == "gemv":  # many small programs, each with loads of its own under way
        return card.bandwidth
    tile = choice.block_n * choice.block_k * problem.bits / 8
    x_tile = choice.block_m * choice.block_k * (1 if problem.kind == "int8" else 2)
    _, n_registers = step(problem, choice)
    resident = max(
        1,
        min(
            REGISTERS // (n_registers * LANES * choice.warps),
            WARPS // choice.warps,
            int(card.chip.shared_bytes // (choice.stages * (tile + x_tile) + 1024)),
        ),
    )
    busy = min(card.chip.processors, programs(problem, choice))
    running = min(resident, _per_processor(problem, choice, card))
    return min(card.bandwidth, busy * running * choice.stages * tile / card.latency)
