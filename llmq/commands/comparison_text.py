"""The text of `llmq compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmq.commands import rendering

MOST_ROWS = 8  # of changed answers that are named; the JSON has all


def render(summary: dict[str, Any]) -> str:
    """The figures of a comparison, one on each line."""
    ratio = rendering.render_interval(summary["perplexity_ratio_ci95"], ".5f")
    kl = rendering.render_interval(summary["kl_mean_ci95"], ".3e")
    perplexity = f"{summary['base_perplexity']:.4f} -> {summary['quant_perplexity']:.4f}"
    sizes = f"{summary['base_bytes'] / 1e6:.1f} MB -> {summary['quant_bytes'] / 1e6:.1f} MB"
    return rendering.render_pairs(
        {
            "perplexity": perplexity,
            "ratio": f"{summary['perplexity_ratio']:.5f} ({ratio})",
            "by position": _perplexities(summary["perplexity_by_position"]),
            "KL, mean": f"{summary['kl_mean']:.3e} nats ({kl})",
            "KL, p99 and max": f"{summary['kl_p99']:.3e} and {summary['kl_max']:.3e} nats",
            "KL by position": _means(summary["kl_by_position"]),
            "top-1 agreement": f"{summary['top1_agreement']:.2%}",
            "target's probability": f"RMS change {summary['rms_probability_change']:.2%}",
            **(_choice_lines(summary["choices"]) if "choices" in summary else {}),
            "weight files": f"{sizes} ({summary['quant_bytes'] / summary['base_bytes']:.0%})",
            "measured on": rendering.render_conditions(summary),
            **({"page": summary["page"]} if summary["page"] else {}),
            **({"no page": summary["page_skipped"]} if summary["page_skipped"] else {}),
        }
    )


def _means(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A figure by class of position, as `position_classes.class_means` has it."""
    return ", ".join(f"{name} {each['mean']:.3e}" for name, each in found.items())


def _perplexities(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Perplexity by class of position, as `position_classes.class_perplexities` has it."""
    pairs = (f"{name} {each['base']:.4g} -> {each['quant']:.4g}" for name, each in found.items())
    return ", ".join(pairs)


def _choice_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """How answers to multiple choice changed, as `flips.compare_answers` has it."""
    accuracy = f"{found['base_accuracy']:.2%} -> {found['quant_accuracy']:.2%}"
    flips = [
        f"{len(found[kind])} {kind.replace('_', ' ')}{_rows(found[kind])}"
        for kind in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")
    ]
    return {
        "accuracy": f"{accuracy} of {found['questions']} questions of {found['file']}, by "
        f"{found['score']}, BOS {found['bos']}",
        "changed answers": f"{', '.join(flips)}; McNemar's exact test p = {found['mcnemar_p']:.3g}",
    }


def _rows(flips: Sequence[Mapping[str, Any]]) -> str:
    """The questions of flips, for the end of a phrase."""
    shown = ", ".join(str(flip["row"]) for flip in flips[:MOST_ROWS])
    more = ", ..." if len(flips) > MOST_ROWS else ""
    return f" (rows {shown}{more})" if flips else ""
