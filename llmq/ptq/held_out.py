"""What quantization cost on text that was not calibrated on: held-out windows run through the
source and through what was stored, block by block, and the model's own head compares the two.

Peak memory is one block, or the head, and the hidden states of some windows twice. It is computed
from the stored blocks alone, so that a run which goes on measures the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.evaluation.divergence import summarize, token_statistics
from llmq.messages import brief
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.results import FinishedBlocks
from llmq.text.documents import check_vocabulary, token_hash
from llmq.text.held_out import HeldOutText

HEAD_TOKENS = 64  # at a time: their logits take 67 MB in a vocabulary of 262,144


def measure(
    blocks: Blocks, finished: FinishedBlocks, texts: Sequence[HeldOutText], work_dir: Path
) -> list[dict[str, Any]]:
    """What `llmq compare` says of each text, in float32: of weights alone, without what is done to
    activations. A measurement that fails costs no result: its reason stands in its place."""
    measured = []
    for text in texts:
        about = {
            "kind": text.kind,
            "source": text.source,
            "windows": list(text.tokens.shape),
            "tokens_sha256": token_hash(text.tokens),
        }
        if not len(text.tokens):
            reason = "too little text is left beside what is calibrated on"
            measured.append({**about, "not_measured": reason})
            continue
        try:
            vocab_size = blocks.model.config.get_text_config().vocab_size
            check_vocabulary(text.tokens, vocab_size, text.source)
            with tempfile.TemporaryDirectory(prefix="held-out-", dir=work_dir) as folder:
                figures = _HeldOut(blocks, finished, text.tokens, Path(folder)).compare()
        except (MemoryError, OSError):
            raise
        except Exception as error:  # of a model's own code, too
            measured.append({**about, "not_measured": brief(error)})
        else:
            measured.append({**about, **figures})
    return measured


class _HeldOut:
    """Windows int64 `[n, T]` on their way, a window at a time."""

    def __init__(
        self, blocks: Blocks, finished: FinishedBlocks, tokens: Tensor, folder: Path
    ) -> None:
        self.blocks, self.finished, self.folder = blocks, finished, folder
        self.tokens = tokens.to(blocks.device)
        self.recorder = BlockRecorder(blocks.model, blocks.modules)

    @torch.no_grad()
    def compare(self) -> dict[str, Any]:
        """The summary of `llmq.evaluation.divergence`."""
        hidden: list[Tensor] = []
        with self.blocks.with_weights_outside():
            batches = self.tokens.split(1)
            calls = BlockCalls.record(self.recorder, batches, self.folder, hidden.append)
        exact = torch.cat(hidden)
        quantized = exact.clone()
        for index in range(len(self.blocks)):
            call_of = calls.of(index)
            stored = self.finished.read_block(index)
            for states, block in (
                (exact, self.blocks.load(index)),
                (quantized, self.blocks.rebuild(index, stored)),
            ):
                for i in range(len(states)):
                    states[i : i + 1] = call_of([i]).run(block, states[i : i + 1])
                del block
            calls.forget(index)
        return self._compared(exact, quantized)

    def _compared(self, exact: Tensor, quantized: Tensor) -> dict[str, Any]:
        """By the model's own norm and head, `HEAD_TOKENS` tokens at a time."""
        rows: dict[str, list[Tensor]] = {}
        with self.blocks.with_weights_outside(with_head=True):
            for tokens, *states in zip(self.tokens, exact, quantized, strict=True):
                parts: dict[str, list[Tensor]] = {}
                for start in range(0, len(tokens) - 1, HEAD_TOKENS):
                    end = min(start + HEAD_TOKENS, len(tokens) - 1)
                    base, quant = (
                        self._logits(tokens[start:end], state[start:end]) for state in states
                    )
                    found = token_statistics(base, quant, tokens[start + 1 : end + 1])
                    for name, values in found.items():
                        parts.setdefault(name, []).append(values.cpu())
                for name, pieces in parts.items():
                    rows.setdefault(name, []).append(torch.cat(pieces))
        table = {name: torch.stack(values).double() for name, values in rows.items()}
        if not all(bool(torch.isfinite(values).all()) for values in table.values()):
            raise LlmqError("NaN or infinite logits")
        return summarize(table)

    def _logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """`[n, V]` of `n` hidden states behind the last block: all after it is by position."""
        with _passing_on(self.blocks.modules, hidden[None], self.recorder.n_returned):
            logits: Tensor = self.blocks.model(input_ids=tokens[None], use_cache=False).logits
        return logits[0]


@contextmanager
def _passing_on(modules: nn.ModuleList, hidden: Tensor, n_returned: int) -> Iterator[None]:
    """The model with blocks that give these hidden states. n_returned: see `BlockRecorder`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *[None] * (n_returned - 1)) if n_returned else hidden

    patched = list(modules)
    for block in patched:
        block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in patched:
            del block.forward
