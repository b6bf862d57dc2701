"""One backward pass of the full-precision model, block by block: what enters each linear layer, and
the gradient of the log-likelihood by what leaves it.

Forward, the inputs of every block are kept in a folder. At the top, a token is drawn at every
position from the model's own distribution, which makes the squares of these gradients an estimate
of the Fisher matrix, and so of the second derivatives of the Kullback-Leibler divergence from the
model (labels of the text would give the "empirical" one, which is not that). Then blocks follow
from the last to the first. Peak memory is one block, or the head, and a batch of sequences; on disk
lie the inputs of all blocks, and what belongs to the layers of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.models.experts import unfused_in
from llmq.models.site import sites_in
from llmq.ptq.batches import BATCH, Batches
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import (
    BlockCall,
    BlockRecorder,
    first_line,
    shared_inputs,
)
from llmq.ptq.expert_costs import expert_groups
from llmq.ptq.head import logits_of, positions_at_once
from llmq.ptq.precision import computing_in
from llmq.storage.hidden_states import ActivationFile


@dataclass(frozen=True)
class BlockGradients:
    """A block in full precision with what its layers met. groups: names of layers in the block that
    read the same tensor. inputs: of a group by its first layer, `[m, T, K]`. gradients: of the sum
    of log-likelihoods by the outputs of each layer, `[m, T, N]`. others: inputs on the sequences
    without gradients, `[n - m, T, K]`. All are `[rows, 1, ...]` for experts. rows: how many each
    expert gets on all `n` sequences, int64 `[E]`, by the name of their module."""

    index: int
    module: nn.Module
    groups: list[list[str]]
    inputs: dict[str, ActivationFile]
    gradients: dict[str, ActivationFile]
    others: dict[str, ActivationFile]
    rows: dict[str, Tensor]


class Backward:
    """tokens: int64 `[n, T]`. folder: for the files of the pass, which its owner removes. seed: of
    the tokens that are drawn in the first sequence; the others have those that follow. dtype: that
    products are computed in. n_others: the last sequences go forward only; what comes before them
    makes whole batches. sizes: sequences in a batch, or in each."""

    def __init__(
        self,
        blocks: Blocks,
        tokens: Tensor,
        folder: Path,
        seed: int,
        dtype: torch.dtype = torch.float32,
        n_others: int = 0,
        sizes: int | Sequence[int] = BATCH,
    ) -> None:
        assert not n_others or (len(tokens) - n_others) % BATCH == 0, "whole batches"
        self.blocks, self.folder, self.seed, self.dtype = blocks, folder, seed, dtype
        self.sizes = sizes
        self.tokens = tokens.to(blocks.device)
        self.measured = self.tokens[: len(tokens) - n_others]  # those with gradients
        self.width: int = blocks.model.config.get_text_config().hidden_size
        self.recorder = BlockRecorder(blocks.model, blocks.modules)
        self.calls: BlockCalls | None = None
        # of the experts of each block, as `BlockGradients` has them
        self.rows: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def forward(self) -> Iterator[int]:
        """Keep the inputs of every block; yields the number of each that is done."""
        with ExitStack() as stack:
            keep = stack.enter_context(self.inputs_of(0).appender(durable=False))
            stack.enter_context(self.blocks.with_weights_outside())
            batches = Batches(self.tokens, self.sizes, self.blocks.device)
            self.calls = BlockCalls.record(self.recorder, batches, self.folder, keep)
        for index in range(len(self.blocks)):
            module = self.blocks.load(index)
            with ExitStack() as stack:
                append = stack.enter_context(self.inputs_of(index + 1).appender(durable=False))
                self.rows.append(stack.enter_context(_counting_rows(module)))
                for call, hidden in self._batches(index):
                    with self._computing():
                        append(call.run(module, hidden))
            yield index

    def backward(self, layers: dict[str, list[str]]) -> Iterator[BlockGradients]:
        """The blocks from the last to the first, each until the next is asked for. layers: which of
        them count, in the block, by the name of the block."""
        for index, module in self._downward():
            yield self._block(index, module, layers.get(self.blocks.name(index), []))

    def squared_lengths(self, layers: dict[str, list[str]]) -> Iterator[dict[str, Tensor]]:
        """Of the blocks from the last to the first: by layer, the squared lengths of the gradients
        by its outputs, float32 `[n, T]`. layers: as above, and none of an expert's, which do not
        see every token."""
        for index, module in self._downward():
            names = layers.get(self.blocks.name(index), [])
            found: dict[str, list[Tensor]] = {name: [] for name in names}

            def keep(met: _Met, shape: torch.Size, index: int = index, found: Any = found) -> None:
                for name, parts in found.items():
                    rows = _by_token(met.gradients[name], shape, self._name(index, name))
                    parts.append(rows.float().square().sum(-1).cpu())

            self._back(index, module, names, keep)
            yield {name: torch.cat(parts) for name, parts in found.items()}

    def _downward(self) -> Iterator[tuple[int, nn.Module]]:
        """The blocks from the last to the first; what was kept for one goes with it."""
        self._write_top()
        for index in reversed(range(len(self.blocks))):
            yield index, self.blocks.load(index).requires_grad_(False)
            self.inputs_of(index + 1).path.unlink()

    def inputs_of(self, index: int) -> ActivationFile:
        """Of a block, or what leaves the last one, `[n, T, D]`, until the way back has passed
        it."""
        return self._file(f"inputs-{index:05d}", self.width)

    def gradients_of(self, index: int) -> ActivationFile:
        """By the inputs of the block that came last on the way back, `[n, T, D]`, and until the
        next one is done by those of the block behind it: two files take turns."""
        return self._file(f"gradients-{index % 2}", self.width)

    def _computing(self) -> torch.autocast:
        return computing_in(self.dtype, self.blocks.device)

    def _file(self, name: str, width: int) -> ActivationFile:
        return ActivationFile(self.folder / f"{name}.bin", self.tokens.shape[1], width)

    def _rows_of(self, name: str, width: int, is_ragged: bool) -> ActivationFile:
        """What layers meet, by token, or row by row where each has others."""
        file = self._file(name, width)
        return replace(file, length=1) if is_ragged else file

    def _batches(self, index: int) -> Iterator[tuple[BlockCall, Tensor]]:
        assert self.calls is not None
        return self.calls.batches(index, self.inputs_of(index), self.sizes, self.blocks.device)

    def _write_top(self) -> None:
        """The gradients by what leaves the last block, by the model's own norm and head."""
        last = len(self.blocks)
        with (
            self.gradients_of(last).appender(durable=False) as append,
            self.blocks.with_weights_outside(with_head=True),
            self._computing(),  # in which the head is made a bfloat16 one once
        ):
            hidden = self.inputs_of(last).batches(1)
            for number, (tokens, states) in enumerate(zip(self.measured, hidden, strict=False)):
                generator = torch.Generator().manual_seed(self.seed + number)
                append(self._top(tokens, states[0].to(self.blocks.device), generator)[None])

    def _top(self, tokens: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """`[T, D]` for the hidden states of a sequence, some positions at a time."""
        step = positions_at_once(self.blocks.model.config.get_text_config().vocab_size)
        parts = []
        for some, states in zip(tokens.split(step), hidden.split(step), strict=True):
            states = states.clone().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(self.blocks, some, states, self.recorder.n_returned)
            share = torch.softmax(logits.detach().float(), dim=-1)
            if not bool(torch.isfinite(share.sum())):
                raise LlmqError(
                    "the full-precision model's likelihoods hold NaN or infinity on the "
                    "calibration text, so what bits or tokens are worth cannot be told; give "
                    "layers their specs with --rule, or --token-weights equal"
                )
            drawn = draw(share, generator)
            # of the log-likelihood of what is drawn, by the logits
            gradient = share.neg_().scatter_add_(1, drawn, torch.ones_like(share[:, :1]))
            parts += torch.autograd.grad(logits, states, gradient.to(logits.dtype))
        return torch.cat(parts)

    def _block(self, index: int, module: nn.Module, names: list[str]) -> BlockGradients:
        """Run a block forward and back, and write what its layers meet."""
        sites = {site.name: site for site in sites_in(module) if site.name in names}
        rows = self.rows[index]
        of_experts = expert_groups(names, rows)
        ragged = {name for group in of_experts for name in group}
        dense = [name for name in names if name not in ragged]
        groups = [*self._groups(index, module, dense), *of_experts]
        inputs, others = (
            {
                group[0]: self._rows_of(
                    f"{kind}-{group[0]}", sites[group[0]].shape[1], group[0] in ragged
                )
                for group in groups
            }
            for kind in ("x", "others")
        )
        gradients = {
            name: self._rows_of(f"g-{name}", sites[name].shape[0], name in ragged) for name in names
        }
        with ExitStack() as stack:
            keep_x, keep_g, keep_others = (
                {
                    name: stack.enter_context(file.appender(durable=False))
                    for name, file in files.items()
                }
                for files in (inputs, gradients, others)
            )

            def keep(met: _Met, shape: torch.Size) -> None:
                measured = [(keep_x, met.inputs), (keep_g, met.gradients)]
                for keeping, found in measured if met.gradients else [(keep_others, met.inputs)]:
                    for name, append in keeping.items():
                        if name not in ragged:
                            append(_by_token(found[name], shape, self._name(index, name)))
                        elif name in found:  # some of its tokens are in the batch
                            append(found[name].flatten(0, -2)[:, None])

            self._back(index, module, names, keep)
        return BlockGradients(index, module, groups, inputs, gradients, others, rows)

    def _back(
        self,
        index: int,
        module: nn.Module,
        names: list[str],
        keep: Callable[[_Met, torch.Size], None],
    ) -> None:
        """Run a block forward and back. keep: handed what layers met in each batch, and how many
        sequences and tokens that has."""
        after = self.gradients_of(index + 1).batches(self.sizes)
        with self.gradients_of(index).appender(durable=False) as append:
            for (call, hidden), gradient in zip_longest(self._batches(index), after):
                met = _Met({name: module.get_submodule(name) for name in names})
                with self._computing():
                    if gradient is None:
                        met.run_forward(module, call, hidden)
                    else:
                        append(met.run(module, call, hidden, gradient.to(hidden.device)))
                keep(met, hidden.shape[:2])

    @torch.no_grad()
    def _groups(self, index: int, module: nn.Module, names: list[str]) -> list[list[str]]:
        if not names:
            return []
        call, hidden = next(self._batches(index))
        layers = {name: module.get_submodule(name) for name in names}
        groups = shared_inputs(module, layers, call, hidden)
        if idle := set(names).difference(*groups):
            raise LlmqError(
                f"{self._name(index, min(idle))}: this layer did not run on the calibration text, "
                "so what its bits are worth cannot be told; give it a spec with --rule"
            )
        return groups

    def _name(self, index: int, layer: str) -> str:
        return f"{self.blocks.name(index)}.{layer}"


@contextmanager
def _counting_rows(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """How many rows the experts of a block get, while it runs."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in unfused_in(block).items():
            found[name] = torch.zeros(module.n_experts, dtype=torch.int64)

            def count(module: Any, args: Any, kwargs: Any, own: Tensor = found[name]) -> None:
                index = module.routed(*args, **kwargs).index.clamp(max=module.n_experts)
                counts = torch.bincount(index.flatten().cpu(), minlength=module.n_experts + 1)
                own += counts[: module.n_experts]

            stack.callback(module.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield found


class _Met:
    """What layers meet in one run of their block."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def run(self, module: nn.Module, call: BlockCall, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by the inputs of the block, of that by its outputs."""
        start = hidden.requires_grad_()
        try:
            with torch.enable_grad(), self._watching():
                output = call.run(module, start.clone())  # a leaf may not be changed in place
                (found,) = torch.autograd.grad(output, start, gradient.to(output.dtype))
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError
        ) as error:  # such as a model that changes in place what the way back needs
            raise LlmqError(
                f"{type(module).__name__}: no gradients come back through it ({first_line(error)}),"
                " so what bits or tokens are worth cannot be told; give layers their specs with "
                "--rule, or --token-weights equal"
            ) from error
        return found

    @torch.no_grad()
    def run_forward(self, module: nn.Module, call: BlockCall, hidden: Tensor) -> None:
        """Inputs alone."""
        with self._watching():
            call.run(module, hidden)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: self._note(
                        name, (*args, *kwargs.values())[0], output
                    ),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            yield

    def _note(self, name: str, x: Any, output: Tensor) -> None:
        self.inputs[name] = x.detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient))


def _by_token(rows: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Rows of a layer as `[B, T, ...]`."""
    n, length = shape
    if rows.numel() != n * length * rows.shape[-1]:
        raise LlmqError(
            f"{name}: it has {rows.numel() // rows.shape[-1]} rows for {n * length} tokens, so "
            "what its bits or these tokens are worth cannot be told; give it a spec with --rule, "
            "or --token-weights equal"
        )
    return rows.reshape(n, length, -1)


def draw(share: Tensor, generator: torch.Generator) -> Tensor:
    """One of the columns of each row, int64 `[t, 1]`, with the probabilities `share` `[t, V]` and
    numbers from a CPU generator. Each column waits for an exponential time of its rate, and the
    first is taken: unlike where a running sum passes one number, another order of sums elsewhere
    hardly ever draws another column. (torch.multinomial takes several times as long.)"""
    waiting = torch.rand(share.shape, generator=generator).to(share.device).log_().neg_()
    return share.div(waiting).argmax(-1, keepdim=True)
