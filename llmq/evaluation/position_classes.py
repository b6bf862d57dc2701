"""Positions that a mean over tokens does not see: the first of a window, special tokens, and tokens
whose hidden states are many times longer than others.

Many models park attention on such a position (Xiao et al., 2023: attention sinks; Sun et al., 2024:
massive activations). It is one of 256, so a mean hardly moves when it breaks, and every later token
attends to it. Whoever decides between two sets of weights therefore compares them class by class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.evaluation.bootstrap import perplexity_of
from llmq.models.arch import find_blocks

CLASSES = ("first", "special", "outlier", "other")
# Of the median length of hidden states. Lengths of usual tokens lie within a factor of 3 of each
# other; where there are massive activations they are 50 to 200 times as long.
OUTLIER_LENGTH = 10.0


@dataclass(frozen=True)
class ClassMean:
    """Mean of some figure over the positions of a class, and how many there are."""

    n: int
    mean: float

    def to_json(self) -> dict[str, Any]:
        return {"n_positions": self.n, "mean": self.mean}


def special_ids(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> frozenset[int]:
    """Ids of special tokens: the tokenizer's, and those that the config names."""
    text_config = config.get_text_config()
    ids: set[int] = set() if tokenizer is None else set(tokenizer.all_special_ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text_config, name, None)
        ids.update(
            each
            for each in (value if isinstance(value, list | tuple) else [value])
            if isinstance(each, int)
        )
    return frozenset(ids)


def is_special(tokens: Tensor, ids: Collection[int]) -> Tensor:
    """Where int64 tokens `[...]` are special ones, bool of the same shape."""
    return torch.isin(tokens, torch.tensor(sorted(ids), dtype=tokens.dtype, device=tokens.device))


def classify(special: Tensor, lengths: Tensor | None = None, median: float = 0.0) -> Tensor:
    """The class of each position, int64 `[B, T]`, as an index into `CLASSES`. Each has one: the
    first of these that holds.

    special: bool `[B, T]`. lengths: of hidden states, `[B, T]`, whose usual one is `median`;
    without them no position is an outlier."""
    classes = torch.full(special.shape, CLASSES.index("other"), device=special.device)
    if lengths is not None:
        classes[lengths > OUTLIER_LENGTH * median] = CLASSES.index("outlier")
    classes[special] = CLASSES.index("special")
    classes[:, 0] = CLASSES.index("first")
    return classes


def relative_lengths(hidden: Tensor) -> Tensor:
    """Lengths of hidden states `[..., B, T, D]` over their median, float32 `[B, T]`; of several at
    a position (Gemma 3n) the largest."""
    lengths = hidden.float().norm(dim=-1)
    lengths = lengths.reshape(-1, *lengths.shape[-2:]).amax(dim=0)
    return lengths / lengths.median().clamp_min(1e-30)


@contextmanager
def watching_lengths(model: PreTrainedModel, found: list[Tensor]) -> Iterator[None]:
    """While a full-precision model runs: `found` gets, for each batch, the `relative_lengths` of
    the hidden states that leave a block, the largest of all blocks; nothing for a model whose
    blocks are not found."""
    try:
        _, blocks = find_blocks(model)
    except LlmqError:
        yield
        return

    def watch(index: int, output: Any) -> None:
        ratio = relative_lengths(output[0] if isinstance(output, tuple) else output).cpu()
        if index == 0:
            found.append(ratio)
        else:
            found[-1] = torch.maximum(found[-1], ratio)

    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: watch(index, output))
        for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def class_means(values: Tensor, classes: Tensor) -> dict[str, ClassMean]:
    """Mean of float values by class, for those that have positions. Both of one shape."""
    means = {}
    for index, name in enumerate(CLASSES):
        chosen = values[classes == index].double()
        if len(chosen):
            means[name] = ClassMean(len(chosen), float(chosen.mean()))
    return means


def class_perplexities(
    base_nll: Tensor, quant_nll: Tensor, classes: Tensor
) -> dict[str, dict[str, Any]]:
    """Perplexity of two models by class, from negative log-likelihoods in nats. All of one
    shape."""
    base, quant = class_means(base_nll, classes), class_means(quant_nll, classes)
    return {
        name: {
            "n_positions": mean.n,
            "base": perplexity_of(mean.mean),
            "quant": perplexity_of(quant[name].mean),
        }
        for name, mean in base.items()
    }


def worse_classes(before: Mapping[str, ClassMean], after: Mapping[str, ClassMean]) -> list[str]:
    """Classes with a higher mean after than before, of the same positions."""
    return [name for name in before if not after[name].mean <= before[name].mean]


def clearly_worse(before: Tensor, after: Tensor, classes: Tensor) -> list[str]:
    """Classes whose mean is higher after than before by more than the standard error of the paired
    difference: for losses on a sample of text, which scatter even between equal models. All of one
    shape."""
    found = []
    for index, name in enumerate(CLASSES):
        difference = (after - before)[classes == index].double()
        if len(difference) < 2:
            continue
        error = float(difference.std()) / len(difference) ** 0.5
        if float(difference.mean()) > error:
            found.append(name)
    return found


@dataclass(frozen=True)
class HeldOutLosses:
    """Negative log-likelihoods of held-out windows under several models by name, float `[n, T -
    1]`, and the class of the position that each was predicted at, int64 of the same shape."""

    losses: Mapping[str, Tensor]
    classes: Tensor

    def by_class(self) -> dict[str, dict[str, Any]]:
        """Mean losses in nats by model and class."""
        return {
            model: {
                name: mean.to_json() for name, mean in class_means(losses, self.classes).items()
            }
            for model, losses in self.losses.items()
        }

    def worse(self, before: str, after: str) -> list[str]:
        """Classes that one model is clearly worse in than another."""
        return clearly_worse(self.losses[before], self.losses[after], self.classes)
