"""The scales of all blocks, trained together after the last block is done.

Codes stay as they are, and each scale moves until what the quantized model says of the next token
is closest to what the full-precision model says (the second phase of EfficientQAT, Chen et al.,
2024, with the divergence from the model in place of the text's own tokens). No block is solved with
what those behind it lose in view; this is the only step that sees them all.

The pass runs block by block: the packed blocks lie in memory, and one at a time has weights. The
inputs of blocks are kept on the way up and each block runs once more on the way down, so a step
takes a third more than training would that keeps everything. A result is kept only if it is better
than its start on sequences that were not trained on, on average and in no class of positions worse
by more than the standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from llmq.evaluation.position_classes import (
    class_means,
    classify,
    clearly_worse,
    is_special,
    relative_lengths,
)
from llmq.grid import rounding
from llmq.grid.fakequant import straight_through
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import weight_as_stored
from llmq.ptq.batches import BATCH, Batches
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.head import logits_of, positions_at_once
from llmq.ptq.methods.base import ClassErrors
from llmq.ptq.methods.blockwise import BETAS, sequences_per_step
from llmq.ptq.pair import Pair
from llmq.ptq.precision import computing_in
from llmq.ptq.results import StoredBlock
from llmq.storage.hidden_states import ActivationFile

CHECKED_SHARE = 8  # one of so many sequences decides whether the result is kept


@dataclass(frozen=True)
class ScaleOptions:
    """steps: of the optimizer. learning_rate: by how much a step moves a scale, as a share of it;
    falls to zero along a half cosine. dtype: that blocks and heads are run in meanwhile, on float32
    masters; what decides whether the result is kept is measured in float32. seed: of the order of
    the sequences. special: ids of special tokens."""

    steps: int
    learning_rate: float = 0.002
    dtype: torch.dtype = torch.float32
    seed: int = 0
    special: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ScaleTuning:
    """blocks: as they are afterwards, empty where the start was kept. kl_start, kl: divergence from
    the full-precision model on `n_checked` sequences before and after, in nats per token, whichever
    was kept. n_skipped: steps without a finite loss or gradient. by_class: the divergence by class
    of positions. worse: classes for whose sake the start was kept."""

    blocks: list[StoredBlock]
    n_steps: int
    n_skipped: int
    n_checked: int
    kl_start: float
    kl: float
    by_class: dict[str, ClassErrors]
    worse: list[str]

    @property
    def is_kept(self) -> bool:
        return bool(self.blocks)

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.n_steps,
            "steps_skipped": self.n_skipped,
            "checked_sequences": self.n_checked,
            "kl_start": self.kl_start,
            "kl": self.kl,
            "by_class": {name: asdict(each) for name, each in self.by_class.items()},
            "worse_in": self.worse,
            "kept": self.is_kept,
        }


@torch.no_grad()
def tune_scales(
    pair: Pair,
    tokens: Tensor,
    options: ScaleOptions,
    folder: Path,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> ScaleTuning:
    """Train the scales of all quantized layers on calibration sequences int64 `[n, T]`. folder: for
    files meanwhile, which its owner removes. on_step: told how many steps are done, of how
    many."""
    tuner = _Tuner(pair, tokens, options, folder)
    return tuner.tune(on_step)


class _BlockScales:
    """The scales of one block in training: float32 masters, as the logarithm of their distance from
    the start."""

    def __init__(self, stored: StoredBlock) -> None:
        self.start = stored
        self.shifts = {
            name: torch.zeros_like(tensor.scale, dtype=torch.float32).requires_grad_()
            for name, tensor in stored.quantized.items()
        }

    def weight(self, name: str, device: str) -> Tensor:
        """What the layer will be once it is stored, float32 `[N, K]`, with a gradient to its
        scales."""
        tensor = self.start.quantized[name].to(device)
        shift = self.shifts[name]
        master = tensor.scale.float() * shift.to(device).exp()
        scale = straight_through(master, rounding.round_scale(master.detach(), tensor.spec))
        return rounding.dequantize(tensor.codes(), scale, tensor.zero, tensor.spec, tensor.g_idx)

    @torch.no_grad()
    def stored(self) -> StoredBlock:
        """The block with its scales as they are now, in the dtype that they are stored in."""
        quantized = {name: self._moved(name) for name in self.start.quantized}
        return StoredBlock(quantized, self.start.kept)

    def _moved(self, name: str) -> QuantizedTensor:
        tensor = self.start.quantized[name]
        moved = tensor.scale.float() * self.shifts[name].exp()
        scale = rounding.round_scale(moved, tensor.spec).to(tensor.scale.dtype)
        return replace(tensor, scale=scale.contiguous())


class _Tuner:
    """The two models on the calibration sequences."""

    def __init__(self, pair: Pair, tokens: Tensor, options: ScaleOptions, folder: Path) -> None:
        self.pair, self.options, self.folder = pair, options, folder
        self.device = pair.exact.device
        self.tokens = tokens.to(self.device)
        n_sequences, self.length = tokens.shape
        self.batch = sequences_per_step(n_sequences, self.length)
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(n_sequences, generator=self.generator)
        n_checked = max(1, n_sequences // CHECKED_SHARE)
        self.checked = order[:n_checked].tolist()
        # One sequence has to do for both.
        self.trained = order[n_checked:] if n_sequences > 1 else order
        self.width: int = pair.exact.model.config.get_text_config().hidden_size
        self.lengths = torch.zeros(tokens.shape)
        self.recorder = BlockRecorder(pair.stored.model, pair.stored.modules)
        self.calls = self._record()
        self.exact = self._exact_outputs()
        self.blocks = [
            _BlockScales(pair.finished.read_block(index)) for index in range(len(pair.stored))
        ]

    def tune(self, on_step: Callable[[int, int], None]) -> ScaleTuning:
        with ExitStack() as stack:
            for each in dict.fromkeys((self.pair.exact, self.pair.stored)):
                stack.enter_context(each.with_weights_outside(with_head=True))
            before = self._divergences()
            n_skipped = self._train(on_step)
            after = self._divergences()
        special = is_special(self.tokens[self.checked], self.options.special).cpu()
        classes = classify(special, self.lengths[self.checked], 1.0)
        old, new = class_means(before, classes), class_means(after, classes)
        worse = clearly_worse(before, after, classes)
        is_better = bool(after.mean() < before.mean()) and not worse
        return ScaleTuning(
            [block.stored() for block in self.blocks] if is_better else [],
            self.options.steps,
            n_skipped,
            len(self.checked),
            float(before.mean()),
            float(after.mean()),
            {name: ClassErrors(old[name].n, old[name].mean, new[name].mean) for name in old},
            worse,
        )

    def _file(self, name: str) -> ActivationFile:
        return ActivationFile(self.folder / f"{name}.bin", self.length, self.width)

    def _record(self) -> BlockCalls:
        """What blocks are called with, and what enters block 0 of either model."""
        exact, stored = self.pair.exact, self.pair.stored
        batches = Batches(self.tokens, BATCH, self.device)
        with ExitStack() as stack:
            keep = stack.enter_context(self._file("stored-0").appender(durable=False))
            stack.enter_context(stored.with_weights_outside())
            calls = BlockCalls.record(self.recorder, batches, self.folder, keep)
        if exact is stored:
            return calls
        recorder = BlockRecorder(exact.model, exact.modules)
        with ExitStack() as stack:
            keep = stack.enter_context(self._file("exact-0").appender(durable=False))
            stack.enter_context(exact.with_weights_outside())
            for batch in batches:
                keep(recorder.run(**batch)[0])
        return calls

    def _exact_outputs(self) -> ActivationFile:
        """What leaves the last block of the full-precision model."""
        blocks = self.pair.exact
        for index in range(len(blocks)):
            module = blocks.load(index)
            lengths = []
            with self._file(f"exact-{(index + 1) % 2}").appender(durable=False) as append:
                is_shared = index == 0 and blocks is self.pair.stored
                inputs = self._file("stored-0" if is_shared else f"exact-{index % 2}")
                for call, hidden in self.calls.batches(index, inputs, BATCH, self.device):
                    output = call.run(module, hidden)
                    lengths.append(relative_lengths(output).cpu())
                    append(output)
            self.lengths = torch.maximum(self.lengths, torch.cat(lengths))
        return self._file(f"exact-{len(blocks) % 2}")

    def _divergences(self) -> Tensor:
        """Of the checked sequences, float32 `[n, T]` in nats."""
        found = []
        for start in range(0, len(self.checked), BATCH):
            sequences = self.checked[start : start + BATCH]
            hidden = self._up(sequences)[-1]
            exact = self.exact.sequences(sequences).to(self.device)
            for number, index in enumerate(sequences):
                parts = self._compare(self.tokens[index], hidden[number], exact[number])
                found.append(torch.cat([divergence for divergence, _ in parts]))
        return torch.stack(found).cpu()

    @torch.enable_grad()
    def _train(self, on_step: Callable[[int, int], None]) -> int:
        """All steps. Returns how many were skipped because NaN or infinity reached loss or
        gradients."""
        shifts = [shift for block in self.blocks for shift in block.shifts.values()]
        optimizer = torch.optim.Adam(
            shifts, lr=self.options.learning_rate, betas=BETAS, eps=1e-12, fused=True
        )
        n_skipped, steps = 0, self.options.steps
        for step, sequences in enumerate(self._order()):
            for group in optimizer.param_groups:
                rate = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = self.options.learning_rate * rate
            with computing_in(self.options.dtype, self.device):
                self._back(sequences)
            total = torch.nn.utils.get_total_norm(
                [shift.grad for shift in shifts if shift.grad is not None]
            )
            if bool(torch.isfinite(total)):
                optimizer.step()
            else:
                n_skipped += 1
            optimizer.zero_grad(set_to_none=True)
            on_step(step + 1, steps)
        return n_skipped

    def _order(self) -> Iterator[list[int]]:
        """The sequences of each step: epoch after epoch, each in its own order."""
        waiting: list[int] = []
        for _ in range(self.options.steps):
            while len(waiting) < self.batch:
                order = torch.randperm(len(self.trained), generator=self.generator)
                waiting += self.trained[order].tolist()
            yield waiting[: self.batch]
            waiting = waiting[self.batch :]

    @torch.no_grad()
    def _up(self, sequences: Sequence[int]) -> list[Tensor]:
        """The inputs of all blocks `[n, T, D]` in the quantized model, and what leaves the last."""
        states = [self._file("stored-0").sequences(sequences).to(self.device)]
        for index, block in enumerate(self.blocks):
            module = self.pair.stored.rebuild(index, block.stored())
            call = self.calls.of(index)(sequences)
            states.append(call.run(module, states[-1].clone()))
        return states

    def _back(self, sequences: Sequence[int]) -> None:
        """Add the gradients of the mean divergence of these sequences to those of all scales."""
        states = self._up(sequences)
        exact = self.exact.sequences(sequences).to(self.device)
        last = states.pop()
        rows = [
            torch.cat([part for _, part in self._compare(self.tokens[index], own, other, True)])
            for index, own, other in zip(sequences, last, exact, strict=True)
        ]
        gradient = torch.stack(rows) / (len(sequences) * self.length)
        for index in reversed(range(len(self.blocks))):
            gradient = self._through(index, states.pop(), gradient, sequences)

    def _through(
        self, index: int, inputs: Tensor, gradient: Tensor, sequences: Sequence[int]
    ) -> Tensor:
        """The gradient by the inputs of a block, of that by its outputs; its scales get theirs."""
        block, stored = self.blocks[index], self.pair.stored
        prefix = stored.name(index) + "."
        weights = {
            f"{name.removeprefix(prefix)}.weight": weight_as_stored(
                stored.model.get_submodule(name), block.weight(name, self.device)
            )
            for name in block.shifts
        }
        kept = {name.removeprefix(prefix): tensor for name, tensor in block.start.kept.items()}
        values = {name: weight.detach() for name, weight in weights.items()}
        module = stored.materialize(index, kept | values).requires_grad_(False)
        start, call = inputs.requires_grad_(), self.calls.of(index)(sequences)
        output = functional_call(module, weights, (start.clone(), *call.args), call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        found, *of_scales = torch.autograd.grad(
            *(output, [start, *block.shifts.values()], gradient.to(output.dtype)), allow_unused=True
        )
        for shift, own in zip(block.shifts.values(), of_scales, strict=True):
            if own is not None:  # an expert that no token was sent to
                shift.grad = own
        assert found is not None
        return found

    def _compare(
        self, tokens: Tensor, own: Tensor, exact: Tensor, with_gradient: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """By the models' own norms and heads, some positions of a sequence at a time: the
        divergence of each `[t]`, and the gradient of their sum by the hidden states `[t, D]` of the
        quantized model, empty unless it is wanted."""
        vocab_size = self.pair.exact.model.config.get_text_config().vocab_size
        step = positions_at_once(vocab_size)
        parts = []
        for some, states, base in zip(
            tokens.split(step), own.split(step), exact.split(step), strict=True
        ):
            with torch.no_grad():
                aim = self._logits(self.pair.exact, some, base)
            states = states.detach().clone().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = self._logits(self.pair.stored, some, states)
            divergence, of_logits = divergence_and_gradient(aim, logits.detach())
            gradient = states.detach()[:0]
            if with_gradient:
                (gradient,) = torch.autograd.grad(logits, states, of_logits.to(logits.dtype))
            parts.append((divergence, gradient))
        return parts

    def _logits(self, blocks: Blocks, tokens: Tensor, hidden: Tensor) -> Tensor:
        """`[t, V]`, see `logits_of`."""
        return logits_of(blocks, tokens, hidden, self.recorder.n_returned)


def divergence_and_gradient(aim: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each position from logits `aim` to `logits`, both `[t, V]`, float32 `[t]`,
    and the gradient of their sum by `logits`, float32 `[t, V]`: the difference of the likelihoods.
    Written out for vocabularies of a quarter million, where each pass over them counts; torch's
    softmax takes a quarter of the time of its exponential function."""
    aim, logits = aim.float(), logits.float()
    share = torch.softmax(aim, dim=-1)
    apart = torch.log_softmax(aim, dim=-1).sub_(torch.log_softmax(logits, dim=-1))
    return apart.mul_(share).sum(-1), torch.softmax(logits, dim=-1).sub_(share)
