"""What quantization cost on text that was not calibrated on: held-out windows run through the
source and through what was stored, block by block, and the model's own head compares the two.

Peak memory is one block, or the head, and the hidden states of some windows twice. It is computed
from the stored blocks alone, so that a run which goes on measures the same."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.evaluation.divergence import summarize, token_statistics
from llmq.evaluation.position_classes import classify, is_special, relative_lengths
from llmq.messages import brief
from llmq.ptq.batches import BATCH, Batches
from llmq.ptq.block_calls import BlockCalls, CallOf
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.head import logits_of, positions_at_once
from llmq.ptq.pair import Pair
from llmq.text.documents import check_vocabulary, token_hash
from llmq.text.held_out import HeldOutText


def measure(
    pair: Pair,
    texts: Sequence[HeldOutText],
    work_dir: Path,
    *,
    special: Collection[int] = (),
) -> list[dict[str, Any]]:
    """What `llmq compare` says of each text, in float32: of weights alone, without what is done to
    activations. texts: windows of one length. special: ids of special tokens. A measurement that
    fails costs no result: its reason stands in its place."""
    figures: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="held-out-", dir=work_dir) as folder:
            figures = _figures(pair, texts, Path(folder), special)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of a model's own code, too
        figures = [{"not_measured": brief(error)} for _ in texts]
    return [{**_about(text), **found} for text, found in zip(texts, figures, strict=True)]


def _about(text: HeldOutText) -> dict[str, Any]:
    return {
        "kind": text.kind,
        "source": text.source,
        "windows": list(text.tokens.shape),
        "tokens_sha256": token_hash(text.tokens),
    }


def _figures(
    pair: Pair, texts: Sequence[HeldOutText], folder: Path, special: Collection[int]
) -> list[dict[str, Any]]:
    """All windows together, so that every block is read once; the figures by text."""
    vocab_size = pair.exact.model.config.get_text_config().vocab_size
    for text in texts:
        check_vocabulary(text.tokens, vocab_size, text.source)
    tokens = torch.cat([text.tokens for text in texts])
    if not len(tokens):
        return [_TOO_LITTLE for _ in texts]
    held_out = _HeldOut(pair, tokens, folder)
    table = held_out.statistics()
    classes = classify(is_special(tokens, special), held_out.lengths, 1.0)[:, :-1]
    figures, start = [], 0
    for text in texts:
        end = start + len(text.tokens)
        rows = {name: values[start:end] for name, values in table.items()}
        is_there = end > start
        figures.append(summarize(rows, classes[start:end]) if is_there else _TOO_LITTLE)
        start = end
    return figures


_TOO_LITTLE = {"not_measured": "too little text is left beside what is calibrated on"}


class _HeldOut:
    """Windows int64 `[n, T]` on their way. lengths: of their hidden states in the source, over the
    median of each block, the largest of all blocks."""

    def __init__(self, pair: Pair, tokens: Tensor, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.tokens = tokens.to(pair.exact.device)
        self.n_returned = 0
        self.lengths = torch.zeros(tokens.shape)

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Those of `llmq.evaluation.divergence`, float64 `[n, T - 1]`."""
        blocks, stored = self.pair.exact, self.pair.stored
        recorder = BlockRecorder(blocks.model, blocks.modules)
        hidden: list[Tensor] = []
        with blocks.with_weights_outside():
            batches = Batches(self.tokens, BATCH, blocks.device)
            calls = BlockCalls.record(recorder, batches, self.folder, hidden.append)
        exact = torch.cat(hidden)
        self.n_returned = recorder.n_returned
        quantized = exact.clone() if stored is blocks else self._inputs(stored)
        for index in range(len(blocks)):
            call_of = calls.of(index)
            _advance(blocks.load(index), exact, call_of)
            self.lengths = torch.maximum(self.lengths, relative_lengths(exact).cpu())
            _advance(
                blocks.rebuild(index, self.pair.finished.read_block(index)), quantized, call_of
            )
            calls.forget(index)
        with ExitStack() as stack:
            for each in dict.fromkeys((blocks, stored)):
                stack.enter_context(each.with_weights_outside(with_head=True))
            rows = [self._window(*each) for each in zip(self.tokens, exact, quantized, strict=True)]
        table = {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}
        if not all(bool(torch.isfinite(values).all()) for values in table.values()):
            raise LlmqError("NaN or infinite logits")
        return table

    def _inputs(self, blocks: Blocks) -> Tensor:
        """What enters block 0."""
        recorder = BlockRecorder(blocks.model, blocks.modules)
        with blocks.with_weights_outside():
            return torch.cat([recorder.run(batch)[0] for batch in self.tokens.split(BATCH)])

    def _window(self, tokens: Tensor, exact: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        """By the model's own norm and head, some tokens at a time."""
        vocab_size = self.pair.exact.model.config.get_text_config().vocab_size
        step, n_targets = positions_at_once(vocab_size), len(tokens) - 1
        parts = []
        for start in range(0, n_targets, step):
            end = min(start + step, n_targets)
            base = logits_of(self.pair.exact, tokens[start:end], exact[start:end], self.n_returned)
            quant = logits_of(
                self.pair.stored, tokens[start:end], quantized[start:end], self.n_returned
            )
            parts.append(token_statistics(base, quant, tokens[start + 1 : end + 1]))
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _advance(block: nn.Module, states: Tensor, call_of: CallOf) -> None:
    """Run a block over hidden states `[n, T, D]`, in place."""
    for start in range(0, len(states), BATCH):
        part = states[start : start + BATCH]
        part.copy_(call_of(range(start, start + len(part))).run(block, part))
