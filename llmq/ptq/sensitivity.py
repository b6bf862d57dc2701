"""What every candidate spec of a layer costs the model: an estimate of the Kullback-Leibler
divergence, in nats per token, that quantizing this layer alone would cause.

With g_t the gradient of the log-likelihood by a layer's outputs at token t and E what quantization
adds to its weight, it is the mean over tokens of the sum over outputs c of (g_tc (E x_t)_c)^2 / 2:
the second-order term of the divergence, with the Fisher matrix estimated from one drawn token per
position and what tokens and outputs have in common left out. E is the error of the method itself,
on the inputs at hand and without its sweeps: GPTQ gains more in some layers than in others. Figures
of what predicts better are in the README of `llmq/ptq`.

Weights are at hand here, so this is also where each candidate gets the scale dtype that holds its
scales: what is chosen needs no look at the weights any more."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.models.arch import linear_weight
from llmq.ptq.blocks import Blocks
from llmq.ptq.gradients import Backward, BlockGradients
from llmq.ptq.methods import method_of
from llmq.ptq.scales import fitting_spec
from llmq.ptq.stats import LayerStats
from llmq.ptq.threads import total as sum_of
from llmq.recipe import Recipe
from llmq.storage.hidden_states import ActivationFile

MAX_SEQUENCES, MAX_LENGTH = 32, 256  # of the calibration windows, their first tokens
BATCH = 4  # windows at a time

Candidates = Mapping[str, Sequence[QuantSpec]]
"""The specs that a layer may get, by its name in the model."""


@dataclass(frozen=True)
class Cost:
    """Of a candidate. nats: per token. scale_dtype: what it takes to hold the layer's scales."""

    nats: float
    scale_dtype: str = "float16"


def measure(
    blocks: Blocks,
    tokens: Tensor,
    candidates: Candidates,
    recipe: Recipe,
    work_dir: Path,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Cost]]:
    """The cost of each candidate by name of layer. tokens: int64 `[n, T]`, of which some windows
    are taken. work_dir: where files may lie meanwhile. on_block: told how many passes through a
    block are done, of how many."""
    tokens = tokens[:MAX_SEQUENCES, :MAX_LENGTH]
    layers = _by_block(blocks, candidates)
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="sensitivity-", dir=work_dir) as folder:
        backward = Backward(blocks, tokens, Path(folder), recipe.seed)
        done, total = 0, 2 * len(blocks)
        for _ in backward.forward():
            done += 1
            on_block(done, total)
        for block in backward.backward(layers):
            name = blocks.name(block.index)
            for group in block.groups:
                own = {layer: candidates[f"{name}.{layer}"] for layer in group}
                found = _costs(block, own, recipe)
                costs |= {f"{name}.{layer}": values for layer, values in found.items()}
            done += 1
            on_block(done, total)
    return costs


def _by_block(blocks: Blocks, candidates: Candidates) -> dict[str, list[str]]:
    """Names of layers in their block, by its name."""
    layers: dict[str, list[str]] = {}
    for index in range(len(blocks)):
        prefix = blocks.name(index) + "."
        inside = [name for name in candidates if name.startswith(prefix)]
        layers[blocks.name(index)] = [name.removeprefix(prefix) for name in inside]
    return layers


@torch.no_grad()
def _costs(block: BlockGradients, candidates: Candidates, recipe: Recipe) -> dict[str, list[Cost]]:
    """Of layers that read the same inputs, which are solved together where they have a spec in
    common."""
    group = list(candidates)
    inputs = block.inputs[group[0]]
    weights = {name: linear_weight(block.module.get_submodule(name)) for name in group}
    stats = _statistics(inputs, weights[group[0]].device)
    fitting = {name: _fitting(weights[name], candidates[name]) for name in group}
    costs: dict[str, dict[QuantSpec, Cost]] = {name: {} for name in group}
    for spec in dict.fromkeys(spec for specs in fitting.values() for spec in specs):
        names = [name for name in group if spec in fitting[name]]
        weight = torch.cat([weights[name] for name in names])
        error = errors_of(weight, stats, spec, recipe)
        for name, own in zip(names, error.split([len(weights[n]) for n in names]), strict=True):
            cost = _cost(own, inputs, block.gradients[name])
            if not math.isfinite(cost):
                raise LlmqError(
                    f"block {block.index}, {name}: NaN or infinity among its inputs or gradients, "
                    "so what bits are worth cannot be told; give it a spec with --rule"
                )
            costs[name][spec] = Cost(cost, spec.scale_dtype)
    return {name: [costs[name][spec] for spec in fitting[name]] for name in group}


def _fitting(weight: Tensor, specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    return [fitting_spec(weight, spec) for spec in specs]


def errors_of(weight: Tensor, stats: LayerStats, spec: QuantSpec, recipe: Recipe) -> Tensor:
    """What the method adds to a float32 weight `[N, K]`, without sweeps and corrections."""
    quick = replace(recipe, sweeps=0, alpha=0.0)
    result = method_of(quick).solve(weight, stats, spec, quick)
    return result.tensor.dequantize().sub_(weight)


def _statistics(inputs: ActivationFile, device: torch.device) -> LayerStats:
    n_chunks = -(-inputs.n_sequences // BATCH)
    stats = LayerStats(inputs.width, device, n_chunks=n_chunks)
    for x in inputs.batches(BATCH):
        stats.add(x.to(device))
    return stats.finish()


def _cost(error: Tensor, inputs: ActivationFile, gradients: ActivationFile) -> float:
    """Mean over tokens of the sum of (g * E x)^2 / 2. error: E `[N, K]`."""
    total, n_tokens = 0.0, 0
    for x, g in _rows(inputs, gradients, error.device):
        total += sum_of((x @ error.T).mul_(g).square_()) / 2
        n_tokens += len(x)
    return total / n_tokens


def _rows(
    inputs: ActivationFile, gradients: ActivationFile, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs `[n, K]` and gradients `[n, N]` of tokens."""
    for x, g in zip(inputs.batches(BATCH), gradients.batches(BATCH), strict=True):
        yield x.to(device).flatten(0, 1), g.to(device).flatten(0, 1)
