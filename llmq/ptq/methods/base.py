"""What a method is: what it needs, how it solves layers, what that takes, and whether it goes on
with the block as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.block_calls import CallOf
from llmq.ptq.solver import SolverResult
from llmq.ptq.stats import LayerStats
from llmq.recipe import Recipe
from llmq.storage.hidden_states import ActivationFile

Shape = tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """text: calibration text. hessian: layers are solved under the second moments of their inputs.
    both_streams: they are corrected for what the layers before them lost. tuning: a block is worked
    on as a whole after its layers are solved, and `tune` is called."""

    text: bool = False
    hessian: bool = False
    both_streams: bool = False
    tuning: bool = False


@dataclass(frozen=True)
class Windows:
    """Calibration text by its size."""

    n_sequences: int
    length: int

    @property
    def n_tokens(self) -> int:
        return self.n_sequences * self.length


@dataclass(frozen=True)
class SolvedBlock:
    """A block whose layers are solved, for methods that go on with it.

    module: float32, with the quantized values in it. weights: full-precision `[N, K]` by layer,
    names relative to the block. start: what the layer solver made of them. inputs: of the block in
    the quantized model. targets: its outputs in the full-precision model, for the same sequences.
    call_of: its other arguments for the sequences that are named. special: where tokens are special
    ones, bool `[n_sequences, T]`. dtype: of the passes. seed: another one for each block."""

    module: nn.Module
    weights: dict[str, Tensor]
    start: dict[str, QuantizedTensor]
    inputs: ActivationFile
    targets: ActivationFile
    call_of: CallOf
    special: Tensor | None
    dtype: torch.dtype
    seed: int


@dataclass(frozen=True)
class ClassErrors:
    """Errors over the positions of one class: of the start, and of what tuning made of it."""

    n_positions: int
    start: float
    tuned: float


@dataclass(frozen=True)
class BlockTuning:
    """tensors: by layer. start_error, error: distance from the targets on up to four steps'
    sequences before and after, mean over tokens of the squared distance over the target's squared
    length; the start is kept when tuning does not lower it (then they are equal). n_skipped: steps
    without a finite loss or gradient. by_class: the same by class of positions, before and after
    tuning, whichever was kept. worse: the classes for whose sake the start was kept."""

    tensors: dict[str, QuantizedTensor]
    start_error: float
    error: float
    n_skipped: int
    by_class: dict[str, ClassErrors] = field(default_factory=dict)
    worse: list[str] = field(default_factory=list)

    @property
    def kept_start(self) -> bool:
        return self.error == self.start_error


class Method(Protocol):
    """`Rounding` has the answers of a method that does nothing but round."""

    def check(self, recipe: Recipe) -> None:
        """Raises `LlmqError` for keys of the recipe that do not go with the method."""

    def needs(self, recipe: Recipe) -> Needs: ...

    def solve(
        self, weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
    ) -> SolverResult:
        """Quantize a float32 weight `[N, K]`; layers that share an input come stacked. stats: of
        its inputs, where text is read."""

    def solve_many(
        self,
        weights: Sequence[Tensor],
        stats: Sequence[LayerStats | None],
        spec: QuantSpec,
        recipe: Recipe,
    ) -> list[SolverResult]:
        """The same for several weights of one shape, such as experts, each with its own
        statistics."""

    def tune(self, block: SolvedBlock, recipe: Recipe) -> BlockTuning:
        """Better weights for all layers of a block."""

    def solve_bytes(self, shape: Shape) -> int:
        """Bytes that a solve of a layer `(N, K)` holds."""

    def together_bytes(self, shape: Shape, n_layers: int) -> int:
        """Bytes that `solve_many` holds for so many layers `(N, K)`, their statistics aside."""

    def tuning_bytes(self, layers: list[Shape], windows: Windows) -> int:
        """Bytes that `tune` holds beside the block."""

    def solve_flops(self, shape: Shape) -> float:
        """Floating-point operations of a solve; what only moves memory is counted eightfold."""

    def tuning_flops(self, layers: list[Shape], windows: Windows, recipe: Recipe) -> float:
        """Floating-point operations of `tune` for all blocks, which have these layers."""


def check_no_init(recipe: Recipe) -> None:
    """For methods that start from nothing else."""
    if recipe.init != "gptq":
        raise LlmqError(
            f"init {recipe.init} is what method blockwise starts from, and the method is "
            f"{recipe.method}; give --method blockwise, or --init gptq to leave it out"
        )


class Rounding(Method):
    """Rounds each weight on its own; the base of methods that need more."""

    def check(self, recipe: Recipe) -> None:
        check_no_init(recipe)
        if recipe.order == "act":
            raise LlmqError(
                f"method {recipe.method} has no order of columns: leave out --act-order, or use "
                "--method gptq"
            )

    def needs(self, recipe: Recipe) -> Needs:
        return Needs()

    def solve_many(
        self,
        weights: Sequence[Tensor],
        stats: Sequence[LayerStats | None],
        spec: QuantSpec,
        recipe: Recipe,
    ) -> list[SolverResult]:
        """One by one."""
        pairs = zip(weights, stats, strict=True)
        return [self.solve(weight, own, spec, recipe) for weight, own in pairs]

    def tune(self, block: SolvedBlock, recipe: Recipe) -> BlockTuning:
        raise NotImplementedError(f"{type(self).__name__} has no part that works on whole blocks")

    def solve_bytes(self, shape: Shape) -> int:
        """One Hessian, where activation ranges are measured; W, W^T, errors and codes of two
        stacked layers."""
        n, k = shape
        return 4 * k * k + 2 * 13 * n * k

    def together_bytes(self, shape: Shape, n_layers: int) -> int:
        return self.solve_bytes(shape)

    def tuning_bytes(self, layers: list[Shape], windows: Windows) -> int:
        return 0

    def solve_flops(self, shape: Shape) -> float:
        return 0.0

    def tuning_flops(self, layers: list[Shape], windows: Windows, recipe: Recipe) -> float:
        return 0.0
