"""What every candidate spec of a layer costs the model: an estimate of the Kullback-Leibler
divergence, in nats per token, that quantizing this layer alone would cause.

With g_t the gradient of the log-likelihood by a layer's outputs at token t and E what quantization
adds to its weight, it is the mean over tokens of the sum over outputs c of (g_tc (E x_t)_c)^2 / 2:
the second-order term of the divergence, with the Fisher matrix estimated from one drawn token per
position and what tokens and outputs have in common left out. E is the error of the method itself,
without its sweeps: GPTQ gains more in some layers than in others. It is solved on other windows
than those that it is measured on, since what it seems to gain on its own is least true of wide
layers. The first position of a window does not count: where attention rests on it, an error there
moves all others alike, which the layers behind make up for. Figures of what predicts better are in
the README of `llmq/ptq`.

Weights are at hand here, so this is also where each candidate gets the scale dtype that holds its
scales: what is chosen needs no look at the weights any more."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.models.arch import linear_weight
from llmq.models.outside import Table
from llmq.ptq.batches import BATCH
from llmq.ptq.blocks import Blocks
from llmq.ptq.costs import Cost
from llmq.ptq.expert_costs import costs_of_others, layers_to_measure, pool_of
from llmq.ptq.gradients import Backward, BlockGradients
from llmq.ptq.leaves import leaves_of
from llmq.ptq.methods import method_of
from llmq.ptq.scales import fitting_spec
from llmq.ptq.stats import LayerStats
from llmq.ptq.table_costs import TableCosts
from llmq.ptq.threads import total as sum_of
from llmq.recipe import Recipe
from llmq.storage.hidden_states import ActivationFile

MAX_SEQUENCES, MAX_LENGTH = 128, 256  # of the calibration windows, their first tokens
MAX_MEASURED = 32  # of these; layers are solved on the others

Candidates = Mapping[str, Sequence[QuantSpec]]
"""The specs that a layer may get, by its name in the model."""


def measure(
    blocks: Blocks,
    tokens: Tensor,
    candidates: Candidates,
    recipe: Recipe,
    work_dir: Path,
    on_block: Callable[[int, int], None] = lambda done, total: None,
    *,
    tables: Mapping[Table, Sequence[QuantSpec]] | None = None,
) -> dict[str, list[Cost]]:
    """The cost of each candidate by name of layer. tokens: int64 `[n, T]`, of which some windows
    are taken. work_dir: where files may lie meanwhile. on_block: told how many passes through a
    block are done, of how many. tables: candidates of embeddings and head."""
    tokens = _some(tokens)
    layers = _by_block(blocks, candidates)
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="sensitivity-", dir=work_dir) as folder:
        n_others = len(tokens) - _n_measured(len(tokens))
        backward = Backward(blocks, tokens, Path(folder), recipe.seed, n_others=n_others)
        done, total = 0, 2 * len(blocks)
        for _ in backward.forward():
            done += 1
            on_block(done, total)
        of_tables = TableCosts(backward, tables or {})
        of_tables.add_heads()
        measured = {
            name: layers_to_measure(own, rows)
            for (name, own), rows in zip(layers.items(), backward.rows, strict=True)
        }
        for block in backward.backward(measured):
            name = blocks.name(block.index)
            own = {layer: candidates[f"{name}.{layer}"] for layer in layers[name]}
            found = _BlockCosts(block, own, recipe, backward.measured.numel()).found()
            costs |= {f"{name}.{layer}": values for layer, values in found.items()}
            done += 1
            on_block(done, total)
        of_tables.add_embeddings()
    return costs | of_tables.costs


def n_tokens(tokens: Tensor) -> tuple[int, int]:
    """How many of the calibration windows `[n, T]` go through the model, and how many errors are
    measured on."""
    tokens = _some(tokens)
    return tokens.numel(), tokens[: _n_measured(len(tokens))].numel()


def _some(tokens: Tensor) -> Tensor:
    return tokens[:MAX_SEQUENCES, :MAX_LENGTH]


def _n_measured(n_sequences: int) -> int:
    """Whole batches of windows, half of all or at most 32; all where there are too few to be shared
    out."""
    if n_sequences < 2 * BATCH:
        return n_sequences
    return min(MAX_MEASURED, n_sequences // 2 // BATCH * BATCH)


def _by_block(blocks: Blocks, candidates: Candidates) -> dict[str, list[str]]:
    """Names of layers in their block, by its name."""
    layers: dict[str, list[str]] = {}
    for index in range(len(blocks)):
        prefix = blocks.name(index) + "."
        inside = [name for name in candidates if name.startswith(prefix)]
        layers[blocks.name(index)] = [name.removeprefix(prefix) for name in inside]
    return layers


@dataclass
class _BlockCosts:
    """candidates: of all layers of the block. n_tokens: that are measured. pools: statistics that
    layers of experts have in common."""

    block: BlockGradients
    candidates: Candidates
    recipe: Recipe
    n_tokens: int
    pools: dict[str, LayerStats] = field(default_factory=dict)

    @torch.no_grad()
    def found(self) -> dict[str, list[Cost]]:
        """By name in the block."""
        costs: dict[str, list[Cost]] = {}
        for group in self.block.groups:
            costs |= self._of_group(group)
        block = self.block
        return costs | costs_of_others(block.module, block.rows, self.candidates, costs)

    def _of_group(self, group: list[str]) -> dict[str, list[Cost]]:
        """Of layers that read the same inputs, which are solved together where they have a spec in
        common."""
        block, stats = self.block, self._statistics(group[0])
        weights = {name: linear_weight(block.module.get_submodule(name)) for name in group}
        fitting = {name: _fitting(weights[name], self.candidates[name]) for name in group}
        costs: dict[str, dict[QuantSpec, Cost]] = {name: {} for name in group}
        for spec in dict.fromkeys(spec for specs in fitting.values() for spec in specs):
            names = [name for name in group if spec in fitting[name]]
            weight = torch.cat([weights[name] for name in names])
            error = errors_of(weight, stats, spec, self.recipe)
            for name, own in zip(names, error.split([len(weights[n]) for n in names]), strict=True):
                lost = _lost(own, block.inputs[group[0]], block.gradients[name])
                if not math.isfinite(lost):
                    raise LlmqError(
                        f"block {block.index}, {name}: NaN or infinity among its inputs or "
                        "gradients, so what bits are worth cannot be told; give it a spec with "
                        "--rule"
                    )
                costs[name][spec] = Cost(lost / self.n_tokens, spec.scale_dtype)
        return {name: [costs[name][spec] for spec in fitting[name]] for name in group}

    def _statistics(self, layer: str) -> LayerStats:
        """Of what a layer, the first of its group, reads."""
        rows, inputs = self.block.rows, self._solved_on()
        device = linear_weight(self.block.module.get_submodule(layer)).device
        pool = pool_of(layer, rows)
        if pool == layer:
            return _statistics([inputs[layer]], device)
        if pool not in self.pools:
            own = [file for name, file in inputs.items() if pool_of(name, rows) == pool]
            self.pools[pool] = _statistics(own, device)
        return self.pools[pool]

    def _solved_on(self) -> dict[str, ActivationFile]:
        """Inputs by the first layer of a group: on the windows without gradients, if there are any
        that get to the layer."""
        own, others = self.block.inputs, self.block.others
        return {name: others[name] if others[name].n_sequences else own[name] for name in own}


def _fitting(weight: Tensor, specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    return [fitting_spec(weight, spec) for spec in specs]


def errors_of(weight: Tensor, stats: LayerStats, spec: QuantSpec, recipe: Recipe) -> Tensor:
    """What the method adds to a float32 weight `[N, K]`, without sweeps and corrections."""
    quick = replace(recipe, sweeps=0, alpha=0.0)
    result = method_of(quick).solve(weight, stats, spec, quick)
    return result.tensor.dequantize().sub_(weight)


def _statistics(inputs: Sequence[ActivationFile], device: torch.device) -> LayerStats:
    n_chunks = sum(-(-file.n_sequences // _batch(file)) for file in inputs)
    stats = LayerStats(inputs[0].width, device, chunks=leaves_of(n_chunks))
    for file in inputs:
        for x in file.batches(_batch(file)):
            stats.add(x.to(device))
    return stats.finish()


def _batch(file: ActivationFile) -> int:
    """Windows at a time, or as many rows."""
    return BATCH if file.length > 1 else BATCH * MAX_LENGTH


def _lost(error: Tensor, inputs: ActivationFile, gradients: ActivationFile) -> float:
    """The sum over tokens and outputs of (g * E x)^2 / 2, first positions aside where there are
    positions. error: E `[N, K]`."""
    first = 1 if inputs.length > 1 else 0
    batches = inputs.batches(_batch(inputs)), gradients.batches(_batch(gradients))
    total = 0.0
    for x, g in zip(*batches, strict=True):
        made = x[:, first:].to(error.device).flatten(0, 1) @ error.T
        total += sum_of(made.mul_(g[:, first:].to(error.device).flatten(0, 1)).square_()) / 2
    return total
