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

Nothing here imports Triton."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmq_kernels.core.cache import Unsafe, cache_dir, private_folder, read_private, write_private
from llmq_kernels.core.errors import tell
from llmq_kernels.triton.choices import (
    METHODS,
    SPLIT_MAX_ROWS,
    Chip,
    Choice,
    Problem,
    default_choice,
    fits,
)

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
    for name in ("fold", "early"):
        if type(sizes.pop(name)) is not bool:
            raise ValueError(f"{name} {str(getattr(choice, name))[:40]}")
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
