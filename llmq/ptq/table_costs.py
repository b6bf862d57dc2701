"""What candidate specs of embeddings and head cost the model, in nats per token, beside what
`sensitivity` says of layers.

Embeddings: what rounding them changes of what enters block 0, with the gradients there, as of a
layer's outputs. Rows count as often as the text has their tokens. Head: the Kullback-Leibler
divergence itself, for nothing follows it. One tensor that is both costs both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from llmq.grid.spec import QuantSpec
from llmq.models.outside import EMBEDDINGS, HEAD, Table
from llmq.models.readers import weight_reader
from llmq.ptq.batches import BATCH
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.costs import Cost
from llmq.ptq.gradients import Backward
from llmq.ptq.head import logits_of, positions_at_once
from llmq.ptq.outside import OutsideReader, as_stored, fitting_table_spec, quantize_table
from llmq.ptq.threads import total as sum_of

HEAD_TOKENS = 1024  # that a head is run on: twice for each candidate


class TableCosts:
    """candidates: of each table, with the scale dtypes that hold its scales. nats: what they cost,
    by name of table and in that order; two passes add to it."""

    def __init__(self, backward: Backward, candidates: Mapping[Table, Sequence[QuantSpec]]) -> None:
        self.backward, self.blocks = backward, backward.blocks
        self.weight_of = weight_reader(self.blocks.model, self.blocks.reader)
        self.candidates = {
            table: [fitting_table_spec(self.weight_of(table.name), spec) for spec in specs]
            for table, specs in candidates.items()
        }
        self.nats = {table.name: [0.0] * len(specs) for table, specs in candidates.items()}

    @property
    def costs(self) -> dict[str, list[Cost]]:
        """By name of table, in the order of its candidates."""
        found = {}
        for table, specs in self.candidates.items():
            pairs = zip(self.nats[table.name], specs, strict=True)
            found[table.name] = [Cost(nats, spec.scale_dtype) for nats, spec in pairs]
        return found

    @torch.no_grad()
    def add_heads(self) -> None:
        """After the forward pass."""
        self._add(EMBEDDINGS, self._of_head)

    @torch.no_grad()
    def add_embeddings(self) -> None:
        """After the backward pass."""
        self._add(HEAD, self._of_embeddings)

    def _add(self, left_out: str, cost_of: Callable[[Blocks], float]) -> None:
        """left_out: the role of tables that a pass says nothing of."""
        for table, specs in self.candidates.items():
            for number, spec in enumerate(specs if table.role != left_out else ()):
                qtensor = quantize_table(self.weight_of(table.name), spec)
                reader = OutsideReader(self.blocks.reader, {table.name: qtensor}.copy)
                self.nats[table.name][number] += cost_of(as_stored(self.blocks, reader))

    def _of_head(self, stored: Blocks) -> float:
        """The divergence by a head that is stored so."""
        n_windows = max(1, HEAD_TOKENS // self.backward.tokens.shape[1])
        hidden = self.backward.inputs_of(len(self.blocks)).batches(1)
        lost, n_tokens = 0.0, 0
        with ExitStack() as stack:
            for each in (self.blocks, stored):
                stack.enter_context(each.with_weights_outside(with_head=True))
            for tokens, states in zip(self.backward.tokens[:n_windows], hidden, strict=False):
                lost += self._divergence(stored, tokens, states[0].to(self.blocks.device))
                n_tokens += len(tokens)
        return lost / n_tokens

    def _divergence(self, stored: Blocks, tokens: Tensor, hidden: Tensor) -> float:
        """Summed over the positions of a window, some at a time. hidden: `[T, D]`."""
        vocab_size = self.blocks.model.config.get_text_config().vocab_size
        step, lost = positions_at_once(vocab_size), 0.0
        n_returned = self.backward.recorder.n_returned
        for some, states in zip(tokens.split(step), hidden.split(step), strict=True):
            base, quant = (
                torch.log_softmax(logits_of(each, some, states, n_returned).float(), dim=-1)
                for each in (self.blocks, stored)
            )
            lost += sum_of(base.exp().mul_(base - quant))
        return lost

    def _of_embeddings(self, stored: Blocks) -> float:
        """Mean over tokens of the sum of (g * change)^2 / 2, by embeddings that are stored so."""
        recorder = BlockRecorder(stored.model, stored.modules)
        exact = self.backward.inputs_of(0).batches(BATCH)
        gradients = self.backward.gradients_of(0).batches(BATCH)
        rows, lost = self.backward.measured.split(BATCH), 0.0
        with stored.with_weights_outside():
            for tokens, x, g in zip(rows, exact, gradients, strict=False):
                change = recorder.run(tokens)[0] - x.to(tokens.device)
                lost += sum_of(change.mul_(g.to(tokens.device)).square_()) / 2
        return lost / self.backward.measured.numel()
