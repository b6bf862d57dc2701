"""Block-wise tuning: move the weights and scales of a whole block until its output is right.

GPTQ answers for each layer alone. Here all layers of a block are trained together, by gradient
descent through the quantizer, against what the block computes in the full-precision model: inputs
from the quantized model, targets from the full-precision one (Block-AP in EfficientQAT, Chen et
al., 2024; SignRound, Cheng et al., 2023). The error is the squared distance of each token over its
squared length.

Scales start where the layer solver left them, weights where they were: off the grid. A result is
kept only if it is better than the start, on average and in no class of positions worse. What was
tried stands in the README of `llmq/ptq`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmq.errors import LlmqError
from llmq.evaluation.position_classes import ClassMean, class_means, classify, worse_classes
from llmq.grid import rounding
from llmq.grid.fakequant import fake_quantize_ste
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import weight_as_stored
from llmq.ptq.methods.base import (
    BlockTuning,
    ClassErrors,
    Needs,
    Rounding,
    Shape,
    SolvedBlock,
    Windows,
)
from llmq.ptq.methods.gptq import METHOD as GPTQ
from llmq.ptq.methods.rtn import rtn
from llmq.ptq.solver import SolverResult
from llmq.ptq.stats import LayerStats
from llmq.ptq.threads import one_thread
from llmq.recipe import Recipe

TOKENS_PER_STEP = 2048
CHECKED_STEPS = 4  # whose sequences decide whether the result is better than the start
BETAS = (0.9, 0.95)
SCALE_RANGE = 4.0  # a scale may leave its start by this factor


@dataclass(frozen=True)
class BlockwiseOptions:
    """iterations: optimizer steps per block. learning_rate: of the weights, in steps of their own
    grid; scales move so that the outermost code moves as far, and zero points, if they are tuned,
    as far as a weight. All fall to zero along a half cosine. autocast: run the block in bfloat16
    while it trains, on float32 masters. seed: of the order of the sequences."""

    iterations: int = 45
    learning_rate: float = 0.02
    tune_zero_points: bool = False
    autocast: bool = False
    seed: int = 0


def sequences_per_step(n_sequences: int, length: int) -> int:
    """How many sequences a step takes."""
    return max(1, min(TOKENS_PER_STEP // length, n_sequences))


def tune_block(block: SolvedBlock, options: BlockwiseOptions) -> BlockTuning:
    """Tune the quantized layers of a block, which stays as it is except that its parameters no
    longer require gradients."""
    start = block.start
    tuner = _Tuner(block, options)
    before = tuner.errors({layer: tensor.dequantize() for layer, tensor in start.items()})
    masters = {layer: _Master(block.weights[layer], start[layer], options) for layer in start}
    n_skipped = tuner.train(masters)
    tuned = {layer: master.freeze() for layer, master in masters.items()}
    after = tuner.errors({layer: tensor.dequantize() for layer, tensor in tuned.items()})
    by_class = {
        name: ClassErrors(old.n, old.mean, after.by_class[name].mean)
        for name, old in before.by_class.items()
    }
    worse = worse_classes(before.by_class, after.by_class)
    if after.mean < before.mean and not worse:
        return BlockTuning(tuned, before.mean, after.mean, n_skipped, by_class)
    return BlockTuning(dict(start), before.mean, before.mean, n_skipped, by_class, worse)


class _Master:
    """One layer in training: float32 weight, scale and zero point off the grid, and what they are
    once stored."""

    def __init__(self, weight: Tensor, start: QuantizedTensor, options: BlockwiseOptions) -> None:
        self.spec = start.spec
        self.weight = weight.detach().clone().requires_grad_()
        self.scale = start.scale.float().clone().requires_grad_()
        self.zero = None if start.zero is None else start.zero.float().clone()
        smallest = torch.finfo(start.scale.dtype).smallest_normal
        initial = self.scale.detach().clone()
        # A scale below the smallest normal number of its dtype would lose its digits, and at last
        # become zero.
        self.lowest, self.highest = (
            torch.minimum(initial, (initial / SCALE_RANGE).clamp_min(smallest)),
            initial * SCALE_RANGE,
        )
        step, outermost = float(initial.mean()), self.spec.levels.levels / 2
        rate = options.learning_rate
        self.groups = [
            {"params": [self.weight], "lr": rate * step},
            {"params": [self.scale], "lr": rate * step / outermost},
        ]
        if self.zero is not None and options.tune_zero_points:
            self.groups.append({"params": [self.zero.requires_grad_()], "lr": rate})

    def value(self) -> Tensor:
        return fake_quantize_ste(self.weight, self.scale, self.zero, self.spec)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """After each step."""
        torch.maximum(torch.minimum(self.scale, self.highest), self.lowest, out=self.scale)

    @torch.no_grad()
    def freeze(self) -> QuantizedTensor:
        """The values of the last `value()`, packed."""
        zero = None if self.zero is None else rounding.round_zero(self.zero, self.spec)
        return QuantizedTensor.round(
            self.weight, rounding.round_scale(self.scale, self.spec), zero, self.spec
        )


def _backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Whether loss and gradients, which are computed here, are finite: a step without would be in
    every weight."""
    loss.backward()
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return bool(
        torch.isfinite(loss.detach() + nn.utils.get_total_norm(gradients))
    )  # one wait for the device


@dataclass(frozen=True)
class _Errors:
    """Over all checked positions, and by class."""

    mean: float
    by_class: dict[str, ClassMean]


class _Tuner:
    """The block, its data and the order in which they are used."""

    def __init__(self, block: SolvedBlock, options: BlockwiseOptions) -> None:
        self.block, self.call_of = block.module, block.call_of
        self.inputs, self.targets = block.inputs, block.targets
        self.options = options
        self.block.requires_grad_(False)
        self.device = next(self.block.parameters()).device
        self.n_sequences, length = self.inputs.n_sequences, self.inputs.length
        self.batch = sequences_per_step(self.n_sequences, length)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.checked = self._finite_steps(CHECKED_STEPS)
        self.special = (
            torch.zeros(self.n_sequences, length, dtype=torch.bool)
            if block.special is None
            else block.special.cpu()
        )

    def _finite_steps(self, most: int) -> list[Tensor]:
        """The sequences of up to so many full steps without NaN or infinity, which would say
        nothing about the weights."""
        steps = torch.randperm(self.n_sequences, generator=self.generator).split(self.batch)
        full = (step for step in steps if len(step) == self.batch)
        finite = (
            step
            for step in full
            if all(
                bool(torch.isfinite(file.sequences(step.tolist()).sum()))
                for file in (self.inputs, self.targets)
            )
        )
        return list(islice(finite, most))

    def _distances(self, values: Mapping[str, Tensor], sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token `[n, T]`: the squared distance from the target over the target's squared
        length, and that squared length."""
        hidden, target = (
            file.sequences(sequences.tolist()).to(self.device)
            for file in (self.inputs, self.targets)
        )
        named = {
            f"{layer}.weight": weight_as_stored(self.block.get_submodule(layer), value)
            for layer, value in values.items()
        }
        call = self.call_of(sequences.tolist())
        output = functional_call(self.block, named, (hidden, *call.args), call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        squares = target.square().sum(-1).clamp_min(1e-30)
        return (output.float() - target).square().sum(-1) / squares, squares

    @torch.no_grad()
    def errors(self, values: Mapping[str, Tensor]) -> _Errors:
        """The mean distances of the checked sequences, in float32."""
        if not self.checked:
            return _Errors(0.0, {})
        pairs = [self._distances(values, sequences) for sequences in self.checked]
        distances = torch.cat([distance for distance, _ in pairs]).cpu()
        lengths = torch.cat([squares for _, squares in pairs]).cpu().sqrt()
        special = self.special[torch.cat(self.checked)]
        with one_thread():
            classes = classify(special, lengths, float(lengths.median()))
            return _Errors(float(distances.double().mean()), class_means(distances, classes))

    @torch.enable_grad()
    def train(self, masters: Mapping[str, _Master]) -> int:
        """All steps. Returns how many were skipped because NaN or infinity reached loss or
        gradients."""
        optimizer = torch.optim.Adam(
            [group for master in masters.values() for group in master.groups],
            betas=BETAS,
            eps=1e-12,
            fused=True,
        )
        first_rates = [group["lr"] for group in optimizer.param_groups]
        n_skipped = 0
        for step, sequences in enumerate(self._order(self.options.iterations)):
            for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / self.options.iterations))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
                distances, _ = self._distances(
                    {layer: master.value() for layer, master in masters.items()}, sequences
                )
                loss = distances.mean()
            if _backward(loss, optimizer):
                optimizer.step()
                for master in masters.values():
                    master.keep_in_range()
            else:
                n_skipped += 1
            optimizer.zero_grad(set_to_none=True)
        return n_skipped

    def _order(self, n_steps: int) -> list[Tensor]:
        """The sequences of each step: epoch after epoch, each in its own order."""
        n_epochs = -(-n_steps * self.batch // self.n_sequences)
        epochs = [
            torch.randperm(self.n_sequences, generator=self.generator) for _ in range(n_epochs)
        ]
        return list(torch.cat(epochs).split(self.batch)[:n_steps]) if epochs else []


class Blockwise(Rounding):
    """Layers as the recipe's `init` has them, then blocks as a whole."""

    def check(self, recipe: Recipe) -> None:
        if recipe.order == "act":
            raise LlmqError(
                "block-wise tuning needs groups of consecutive columns, and true act-order stores "
                "other ones: leave out --act-order (the default order sorts columns too), or use "
                "--method gptq"
            )

    def needs(self, recipe: Recipe) -> Needs:
        is_corrected = recipe.inputs == "both" and recipe.init != "rtn"
        return Needs(text=True, hessian=True, both_streams=is_corrected, tuning=True)

    def solve(
        self, weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
    ) -> SolverResult:
        assert stats is not None
        if recipe.init == "rtn":
            return rtn(weight, spec, stats.hessian.diagonal() if recipe.search else None)
        return GPTQ.solve(weight, stats, spec, recipe)

    def solve_many(
        self,
        weights: Sequence[Tensor],
        stats: Sequence[LayerStats | None],
        spec: QuantSpec,
        recipe: Recipe,
    ) -> list[SolverResult]:
        if recipe.init == "rtn":
            return super().solve_many(weights, stats, spec, recipe)
        return GPTQ.solve_many(weights, stats, spec, recipe)

    def tune(self, block: SolvedBlock, recipe: Recipe) -> BlockTuning:
        options = BlockwiseOptions(
            recipe.iterations,
            recipe.learning_rate,
            recipe.tune_zero_points,
            block.dtype == torch.bfloat16,
            block.seed,
        )
        return tune_block(block, options)

    def solve_bytes(self, shape: Shape) -> int:
        return GPTQ.solve_bytes(shape)

    def together_bytes(self, shape: Shape, n_layers: int) -> int:
        return GPTQ.together_bytes(shape, n_layers)

    def tuning_bytes(self, layers: list[Shape], windows: Windows) -> int:
        """The full-precision weights and Hessians, and of each weight a master, its gradient, two
        moments, its value and the value's gradient; and the activations of a step, about twelve of
        the widest kind."""
        n_tokens = sequences_per_step(windows.n_sequences, windows.length) * windows.length
        widest = max(max(shape) for shape in layers)
        weights = sum(n * k for n, k in layers)
        hessians = sum(k * k for _, k in layers)
        return 7 * 4 * weights + 4 * hessians + 12 * 4 * n_tokens * widest

    def solve_flops(self, shape: Shape) -> float:
        return GPTQ.solve_flops(shape)

    def tuning_flops(self, layers: list[Shape], windows: Windows, recipe: Recipe) -> float:
        """Three matmuls per weight and token of every step, doubled: attention, the quantizer and
        the optimizer take about as long on small blocks."""
        n_tokens = sequences_per_step(windows.n_sequences, windows.length) * windows.length
        return 2.0 * 3 * 2 * recipe.iterations * n_tokens * sum(n * k for n, k in layers)


METHOD = Blockwise()
