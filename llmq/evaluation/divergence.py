"""How far a quantized model is from its base: both run over the same windows, side by side, and no
logits are stored.

Perplexities of two models on the same text move together, so their ratio is known ten times better
than either; the interval here is paired. The Kullback-Leibler divergence sees what perplexity
averages away: its 99th percentile and maximum are the tokens where the quantized model would say
something else. And it is told by class of position, since a mean does not see when the one token
breaks that all others attend to (see `position_classes`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.evaluation.bootstrap import mean_interval, perplexity_of, reported_interval
from llmq.evaluation.perplexity import MOST_LOGITS, not_finite, windows_per_batch
from llmq.evaluation.position_classes import (
    class_means,
    class_perplexities,
    classify,
    is_special,
    special_ids,
    watching_lengths,
)
from llmq.text.documents import check_vocabulary
from llmq.text.windows import Windows

TOKENS_PER_BATCH = 2048


def token_statistics(
    base_logits: Tensor, quant_logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Per-token statistics in float32 for logits `[T, V]` and targets `[T]`."""
    base = torch.log_softmax(base_logits.float(), dim=-1)
    quant = torch.log_softmax(quant_logits.float(), dim=-1)
    base_target = base.gather(1, targets[:, None])[:, 0]
    quant_target = quant.gather(1, targets[:, None])[:, 0]
    return {
        "base_nll": -base_target,
        "quant_nll": -quant_target,
        "probability_change": quant_target.exp() - base_target.exp(),
        "agree": (base.argmax(-1) == quant.argmax(-1)).float(),
        # Rounding can leave a divergence of zero at -1e-8; the true one is never negative.
        "kl": torch.linalg.vecdot(base.exp(), base - quant).clamp_min(0),
    }


def window_statistics(
    base_logits: Tensor, quant_logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """`token_statistics`, some tokens at a time: it holds several copies of their logits."""
    size = max(1, MOST_LOGITS // 4 // base_logits.shape[-1])
    parts = [
        token_statistics(*each)
        for each in zip(
            base_logits.split(size), quant_logits.split(size), targets.split(size), strict=True
        )
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compare(
    base: PreTrainedModel,
    quant: PreTrainedModel,
    windows: Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    *,
    special: Collection[int] | None = None,
) -> dict[str, Any]:
    """Perplexity ratio with a paired 95% interval, KL(base || quant) in nats, top-1 agreement and
    RMS change of the target's probability; KL and perplexity also by class of position. Takes and
    raises what `compare_tokens` does."""
    return summarize(*compare_tokens(base, quant, windows, on_batch, special=special))


@torch.no_grad()
def compare_tokens(
    base: PreTrainedModel,
    quant: PreTrainedModel,
    windows: Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    *,
    special: Collection[int] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`token_statistics` of all windows, float64 `[n, T - 1]` each, and the class of the position
    that each token was predicted at, int64 of the same shape.

    special: ids of special tokens, None for those that the base's config names. Raises `LlmqError`
    when the models have different vocabularies or their logits are not finite, and for windows of
    another protocol than `gptq`.
    """
    if windows.targets is not None:
        raise LlmqError(
            f"windows of protocol {windows.protocol}: two models are compared by gptq only, where "
            "every token of a window but the first is scored; cut them by it"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (base, quant)]
    if sizes[0] != sizes[1]:
        raise LlmqError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; compare a "
            "quantized model with the model it was made from"
        )
    check_vocabulary(windows.tokens, sizes[0], "evaluation text")
    rows: dict[str, list[Tensor]] = {}
    lengths: list[Tensor] = []
    done = 0
    length = windows.tokens.shape[1]
    for batch in windows.tokens.split(windows_per_batch(length, sizes[0], TOKENS_PER_BATCH)):
        with watching_lengths(base, lengths):
            base_logits = base(input_ids=batch.to(base.device), use_cache=False).logits
        quant_logits = quant(input_ids=batch.to(quant.device), use_cache=False).logits
        for base_row, quant_row, ids in zip(base_logits, quant_logits, batch, strict=True):
            found = window_statistics(base_row[:-1].cpu(), quant_row[:-1].cpu(), ids[1:])
            for name, values in found.items():
                rows.setdefault(name, []).append(values)
        done += len(batch)
        on_batch(done, len(windows.tokens))
    table = {name: torch.stack(values).double() for name, values in rows.items()}
    if not all(bool(torch.isfinite(values).all()) for values in table.values()):
        name, model = (
            ("quantized", quant)
            if bool(torch.isfinite(table["base_nll"]).all())
            else ("base", base)
        )
        raise LlmqError(f"the {name} model's logits are {not_finite(model.dtype)}")
    ids = special_ids(base.config) if special is None else special
    ratios = torch.cat(lengths) if lengths else None
    classes = classify(is_special(windows.tokens, ids), ratios, 1.0)
    return table, classes[:, :-1]


def summarize(table: dict[str, Tensor], classes: Tensor) -> dict[str, Any]:
    """The figures of `compare` from what `compare_tokens` finds."""
    log_ratio = (table["quant_nll"] - table["base_nll"]).mean(dim=1)
    kl = table["kl"]
    return {
        "base_perplexity": perplexity_of(float(table["base_nll"].mean())),
        "quant_perplexity": perplexity_of(float(table["quant_nll"].mean())),
        "perplexity_ratio": perplexity_of(float(log_ratio.mean())),
        "perplexity_ratio_ci95": reported_interval(
            map(perplexity_of, mean_interval(log_ratio)), len(log_ratio)
        ),
        "kl_mean": float(kl.mean()),
        "kl_mean_ci95": reported_interval(mean_interval(kl.mean(dim=1)), len(kl)),
        # kthvalue, not quantile: torch.quantile refuses more than 16M values.
        "kl_p99": float(kl.flatten().kthvalue(max(1, math.ceil(0.99 * kl.numel()))).values),
        "kl_max": float(kl.max()),
        "kl_by_position": {name: each.to_json() for name, each in class_means(kl, classes).items()},
        "perplexity_by_position": class_perplexities(
            table["base_nll"], table["quant_nll"], classes
        ),
        "top1_agreement": float(table["agree"].mean()),
        "rms_probability_change": float(table["probability_change"].square().mean().sqrt()),
    }
