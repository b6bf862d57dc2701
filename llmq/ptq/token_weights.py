"""What each token counts when a layer is solved.

A Hessian of plain squares takes an error of the layer's output at one token for as bad as at any
other. To the model they differ by orders of magnitude: the second-order term of the divergence
weighs the error at token t with the gradient g_t of the log-likelihood by the layer's outputs (see
`gradients`). Its squared length, averaged over outputs, leaves GPTQ's Hessian one matrix for all
rows of a layer (GuidedQuant, Kim et al., 2025, with one group of outputs). One drawn token a
position tells it with noise, and what a text holds by chance would count: so its square root is
taken and a tenth of the mean added. What was tried stands in the README of `llmq/ptq`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmq.errors import LlmqError
from llmq.ptq.batches import BATCH
from llmq.ptq.blocks import Blocks
from llmq.ptq.gradients import Backward
from llmq.ptq.leaves import Leaves
from llmq.ptq.ranks import ONE, Ranks
from llmq.storage import files, seals

POWER, FLOOR = 0.5, 0.1
# What enters all blocks lies on disk until the way back has passed it: of so many sequences at a
# time that it stays within this.
KEPT_BYTES = 8 << 30


@dataclass(frozen=True)
class TokenWeights:
    """folder: where the squared lengths of gradients lie, a file for each block and part of the
    sequences of this process. ranks: the processes that share them."""

    folder: Path
    ranks: Ranks = ONE

    def of(self, index: int, layers: Sequence[str]) -> Tensor:
        """For layers of a block, named as in it, which read the same: float32 `[n, T]` of this
        process, 1 on average over those of all."""
        parts = []
        for path in sorted(self.folder.glob(f"block-{index:05d}-*.safetensors")):
            with safe_open(path, "pt") as file:
                parts.append(sum(file.get_tensor(layer) for layer in layers))
        everyones = self.ranks.gathered(torch.cat(parts))
        found = weights_of(torch.cat(everyones)).split([len(own) for own in everyones])
        return found[self.ranks.rank]

    def measure(
        self,
        blocks: Blocks,
        tokens: Tensor,
        leaves: Leaves,
        layers: Mapping[int, list[str]],
        seed: int,
        on_pass: Callable[[int, int], None] = lambda done, total: None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write the files that are not there as they were sealed. tokens: int64 `[n, T]`, those of
        this process, and how they are cut in leaves. layers: that will be asked for, by block.
        seed: of the tokens that are drawn. on_pass: told how many passes through a block are done,
        of how many. dtype: that they are computed in. Raises `LlmqError` for NaN or infinity."""
        self.folder.mkdir(exist_ok=True)
        width = blocks.model.config.get_text_config().hidden_size
        at_once = sequences_at_once(tokens.shape[1], width, len(blocks))
        parts = parts_of(replace(leaves, batch_size=BATCH).sizes, at_once)
        seed += leaves.sequences.start
        done, total = 0, 2 * len(blocks) * len(parts)

        def step() -> None:
            nonlocal done
            done += 1
            on_pass(done, total)

        for number, sizes in enumerate(parts):
            own, tokens = tokens.split([sum(sizes), len(tokens) - sum(sizes)])
            own_seed, seed = seed, seed + len(own)  # each sequence has a seed of its own
            paths = {index: self._path(index, number) for index in layers}
            if all(map(seals.is_sound, paths.values())):
                done += 2 * len(blocks)
                continue
            found = self._pass(blocks, own, sizes, layers, own_seed, dtype, step)
            for index, squares in found:
                if squares:
                    files.write_tensors(paths[index], squares)
                    seals.seal(paths[index])

    def _pass(
        self,
        blocks: Blocks,
        tokens: Tensor,
        sizes: list[int],
        layers: Mapping[int, list[str]],
        seed: int,
        dtype: torch.dtype,
        on_block: Callable[[], None],
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Of some sequences: the blocks from the last to the first, with the squared lengths of the
        gradients of their layers."""
        with tempfile.TemporaryDirectory(prefix="gradients-", dir=self.folder) as folder:
            backward = Backward(blocks, tokens, Path(folder), seed, dtype, sizes=sizes)
            for _ in backward.forward():
                on_block()
            names = {blocks.name(index): own for index, own in layers.items()}
            found = backward.squared_lengths(names)
            for index, squares in zip(reversed(range(len(blocks))), found, strict=True):
                for layer, own in squares.items():
                    _check(own, f"{blocks.name(index)}.{layer}")
                yield index, squares
                on_block()

    def _path(self, index: int, part: int) -> Path:
        return self.folder / f"block-{index:05d}-{part:05d}.safetensors"


def parts_of(sizes: Sequence[int], at_once: int) -> list[list[int]]:
    """Batches of these sizes in parts of at most so many sequences, or one batch."""
    parts: list[list[int]] = []
    for size in sizes:
        if not parts or sum(parts[-1]) + size > at_once:
            parts.append([])
        parts[-1].append(size)
    return parts


def sequences_at_once(length: int, width: int, n_blocks: int) -> int:
    """How many sequences of `length` tokens go forward and back together: full batches, so that
    what is kept of them is within `KEPT_BYTES`, or one batch."""
    most = KEPT_BYTES // kept_bytes(length, width, n_blocks)
    return max(BATCH, most // BATCH * BATCH)


def kept_bytes(n_tokens: int, width: int, n_blocks: int) -> int:
    """Bytes on disk during a pass: what enters all blocks and leaves the last, and the gradients
    behind two of them, float32."""
    return 4 * n_tokens * width * (n_blocks + 3)


def weights_of(squares: Tensor) -> Tensor:
    """What tokens count, 1 on average, by the squared lengths of their gradients."""
    roots = squares.double().pow(POWER)
    mean = roots.mean()
    if not mean:  # a layer that nothing depends on
        return torch.ones_like(squares)
    return ((roots / mean + FLOOR) / (1 + FLOOR)).float()


def _check(squares: Tensor, name: str) -> None:
    if not bool(torch.isfinite(squares).all()):
        raise LlmqError(
            f"{name}: NaN or infinity among the gradients by its outputs, so what tokens count "
            "for it cannot be told; give --token-weights equal"
        )
