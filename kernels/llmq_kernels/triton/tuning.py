"""Which kernel with which tile sizes: measured where a measurement exists, a rule of thumb for the
chip where none does.

A problem is (integer or floating-point activations, code, group, dtype, N, K, M rounded up to a
power of two). Its choice is looked up in this order: what this process has tuned; the user's file
in `~/.cache/llmq/tuned/` (or `$LLMQ_CACHE_DIR/tuned/`); the file of this GPU in the package,
`tuned/<gpu>.json`, which only ever holds measured entries; the nearest problem that was measured,
its split of K moved to this one; `default_choice`. No lookup measures anything, so a first call
costs one compilation. Measuring (`llmq/benchmark/tuner`) comes before graphs are captured, never
with a forward pass. Whether to dequantize and leave the product to cuBLAS is one of
the candidates: the crossover in M is measured per GPU, N and K like every other choice.

Nothing here imports Triton; candidates that cannot fit into the shared memory of a chip are left
out by arithmetic."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmq_kernels.core.cache import Unsafe, cache_dir, private_folder, read_private, write_private
from llmq_kernels.core.errors import tell


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
    program. fold: scales are multiplied into the weight before the product (`triton/gemm`)."""

    method: str
    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    fold: bool = False


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
    # Triton 3.6 or 3.9 spills at 64 x 128 and 128 x 128, at 64 x 64 neither does.
    wide = chip.arch in _ON_WGMMA
    # Groups of integer sums need a second accumulator, and with zero points sums of x beside it.
    large = (wide or chip.is_amd) and not (problem.kind == "int8" and problem.group)
    block_m = min(max(m, 16), 128 if large else 64)
    block_n = 128 if wide and (m <= 16 or m >= 64) else 64
    block_k = tile_columns(problem.group)
    warps = 8 if block_m * block_n >= 128 * 64 else 4
    stages = 2 if chip.is_amd else 6 if wide and m <= 16 else 4 if m <= 32 else 3
    split = _split(problem, chip, block_m, block_n, block_k)
    return Choice("gemm", block_m, block_n, block_k, split, warps, stages, _folds(problem))


def candidates(problem: Problem, chip: Chip) -> Iterator[Choice]:
    """What `tune` measures: the default first, then some dozens of others that fit the chip."""
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
        base = _split(problem, chip, shape.block_m, shape.block_n, shape.block_k)
        tiles = -(-problem.k // shape.block_k)
        more = 2 * base if problem.m < 128 else base
        for split_k in sorted({max(base // 2, 1), base, more}):
            if split_k == 1 or (problem.m <= SPLIT_MAX_ROWS and split_k * 2 <= tiles):
                yield replace(shape, split_k=split_k)


def _shapes(problem: Problem, chip: Chip) -> Iterator[Choice]:
    """Tiles of the GEMM, before K is split. On chips whose tensor cores read x from shared memory
    tiles can be larger and pipelines deeper."""
    block_k, m = tile_columns(problem.group), problem.m
    if chip.arch not in _ON_WGMMA:
        limits = (16, 32) if m <= 32 else (64, 128)
        for block_m in sorted({min(max(m, 16), limit) for limit in limits}):
            for block_n, warps in ((64, 4), (128, 4), (128, 8)):
                for stages in (2, 3) if chip.is_amd else (3, 5):
                    yield Choice(
                        "gemm", block_m, block_n, block_k, 1, warps, stages, _folds(problem)
                    )
        return
    if m <= 32:
        for block_m in sorted({max(m, 16), 16}):
            for block_n, warps, stages in (
                (64, 4, 4),
                (64, 4, 7),
                (128, 4, 4),
                (128, 4, 6),
                (128, 8, 4),
                (128, 8, 6),
            ):
                yield Choice("gemm", block_m, block_n, block_k, 1, warps, stages)
        if problem.kind == "int8" and problem.group == 0 and problem.k % 256 == 0:
            for block_n, warps in ((64, 4), (128, 4), (128, 8)):
                yield Choice("gemm", max(m, 16), block_n, 256, 1, warps, 4)
        return
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
        if block_m > max(m, 64):
            continue
        for columns, stages in ((block_k, 3), (block_k, 4), (min(block_k, 64), 4)):
            yield Choice("gemm", block_m, block_n, columns, 1, warps, stages, _folds(problem))


# --- where choices are kept -----------------------------------------------------------------------------------------------

_tuned: dict[
    str, dict[str, Choice]
] = {}  # GPU -> key -> choice, measured in this process or read from disk
_chosen: dict[tuple[str, Problem], Choice] = {}


def tuned_dir() -> Path:
    """Where measured choices of this user are kept."""
    return cache_dir() / "tuned"


def slug(name: str) -> str:
    """A GPU's name as a file name."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


_MOST = 1 << 16  # of any size in a choice


def _choice(value: Any) -> Choice:
    """Raises `ValueError` or `TypeError` for what is no choice."""
    choice = Choice(**value)
    sizes = {**asdict(choice)}
    if sizes.pop("method") not in METHODS:
        raise ValueError(f"method {str(choice.method)[:40]!r}")
    if type(sizes.pop("fold")) is not bool:
        raise ValueError(f"fold {str(choice.fold)[:40]}")
    for name, size in sizes.items():
        is_size = type(size) is int and 0 < size <= _MOST
        if not is_size or (name not in ("split_k", "stages") and size & (size - 1)):
            raise ValueError(f"{name} {str(size)[:40]}")
    return choice


def _read(path: Path, *, of_user: bool) -> dict[str, Choice]:
    """The choices in a file; none, and a warning, where it is damaged, or, in the user's cache,
    not to be trusted."""
    try:
        content = json.loads(
            read_private(private_folder(path.parent) / path.name) if of_user else path.read_bytes()
        )
        choices = {str(key): _choice(value) for key, value in content["choices"].items()}
        _compare_versions(path, content.get("triton"))
        return choices
    except FileNotFoundError:
        return {}
    except (Unsafe, OSError) as error:
        told = str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{path} is not a file of tuned choices ({type(error).__name__}: {error})"
    tell(f"{told[:300]}; it is ignored, scripts/benchmark_kernels.py --tune writes a new one")
    return {}


def _compare_versions(path: Path, measured: object) -> None:
    """Say so where choices were measured with another minor version of Triton: they are right with
    any, but another compiler may have another fastest one."""
    here = _triton_version()
    if here and isinstance(measured, str) and measured.split(".")[:2] != here.split(".")[:2]:
        tell(
            f"{path.name}: tiles were measured with Triton {measured[:40]}, and {here} is "
            "installed; 'llmq bench --tune' measures again"
        )


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def tuned(chip: Chip) -> dict[str, Choice]:
    """Every measured choice for a GPU: the package's, overridden by the user's."""
    if chip.name not in _tuned:
        file = f"{slug(chip.name)}.json"
        _tuned[chip.name] = (
            {
                **_read(Path(__file__).parent / "tuned" / file, of_user=False),
                **_read(tuned_dir() / file, of_user=True),
            }
            if chip.name
            else {}
        )
    return _tuned[chip.name]


def choose(problem: Problem, chip: Chip) -> Choice:
    """The choice for a problem."""
    known = _chosen.get((chip.name or chip.arch, problem))
    if known is None:
        measured = tuned(chip).get(problem.key)
        if measured is None or not fits(problem, measured, chip):
            measured = _nearest(problem, chip)
        known = measured or default_choice(problem, chip)
        _chosen[(chip.name or chip.arch, problem)] = known
    return known


_KEY = re.compile(r"(float|int8)/w(\d+)/g(\d+)/(\w+)/(\d+)x(\d+)/m(\d+)")
_FAR = 5.0  # doublings of N, K and (twice) M, beyond which a measurement says nothing


def _problem(key: str) -> Problem | None:
    """A problem from its key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    kind, bits, group, dtype, *sizes = match.groups()
    return Problem(kind, int(bits), int(group), dtype, *map(int, sizes))


def _distance(one: Problem, other: Problem) -> float:
    """Doublings between two problems of one kind; infinite between kinds."""
    if (one.kind, one.bits, one.group) != (other.kind, other.bits, other.group):
        return math.inf
    if min(one.n, one.k, one.m, other.n, other.k, other.m) < 1:
        return math.inf
    doublings = abs(math.log2(one.n / other.n)) + abs(math.log2(one.k / other.k))
    doublings += 2 * abs(math.log2(one.m / other.m))
    return doublings + (0.01 if one.dtype != other.dtype else 0.0)  # both types have 16 bits


def _nearest(problem: Problem, chip: Chip) -> Choice | None:
    """What was measured fastest for the nearest problem, for this one."""
    near: tuple[float, Problem, Choice] | None = None
    for key, choice in tuned(chip).items():
        other = _problem(key)
        distance = math.inf if other is None else _distance(problem, other)
        if other is not None and distance <= _FAR and (near is None or distance < near[0]):
            near = (distance, other, choice)
    if near is None:
        return None
    _, other, choice = near
    if choice.method == "gemm":
        choice = replace(choice, split_k=_moved_split(choice, other, problem))
    return choice if fits(problem, choice, chip) else None


def _moved_split(choice: Choice, measured: Problem, problem: Problem) -> int:
    """As many programs for this problem as were fastest for the measured one, if they can be had by
    splitting K and each keeps four tiles."""
    if problem.m > SPLIT_MAX_ROWS:
        return 1

    def tiles(one: Problem) -> int:
        return -(-one.n // choice.block_n) * -(-one.m // choice.block_m)

    wanted = choice.split_k * tiles(measured) / tiles(problem)
    split = 1 << max(round(math.log2(wanted)), 0)
    return max(min(split, 8, problem.k // choice.block_k // 4), 1)


def forget() -> None:
    """Read the files again at the next lookup."""
    _tuned.clear()
    _chosen.clear()


def save(chip: Chip, path: Path, details: dict[str, Any]) -> None:
    """Write every measured choice of a GPU, atomically, with Triton's version. details: other
    versions and conditions of the measurement."""
    content = {
        "gpu": chip.name,
        "triton": _triton_version(),
        **details,
        "choices": {key: asdict(choice) for key, choice in sorted(tuned(chip).items())},
    }
    try:
        folder = private_folder(path.parent, create=True)
    except Unsafe as error:
        if path.parent == tuned_dir():
            tell(f"{error}; what was measured is not kept there")
            return
        folder = path.parent  # a folder of the caller's, which is never read from
    write_private(folder / path.name, (json.dumps(content, indent=1) + "\n").encode())


def keep(problem: Problem, chip: Chip, seconds: Mapping[Choice, float]) -> Choice:
    """Remember the fastest of the measured choices for this process and for `save`."""
    best = min(seconds, key=seconds.__getitem__)
    tuned(chip)[problem.key] = best
    _chosen.clear()  # others may have it as their nearest
    return best


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
