"""What quantization cost, of a report: the figures that were measured, with their intervals, and
how. Nothing is said of what was not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmq.cards.facts import GGUF, quantizes_activations
from llmq.cards.markdown import code, plain, table

FULL, START, TRAINED = "full_precision", "start", "trained"
_OF_PTQ = (
    "Windows of text that was not calibrated on, {windows}, each token after the first of a window "
    "scored, in float32{weights_alone}."
)
_OF_QAT = (
    "Windows of the training text that were not trained on (protocol `{protocol}`, beginning-of-"
    "text token: {bos}), each token after the first of a window scored, in {dtype}."
)
_INTERVALS = (
    "Intervals are 95%, by bootstrap over windows, both models on the same tokens. KL divergence "
    "is from the model before to the one after."
)


def losses(report: Mapping[str, Any], name: str) -> str:
    """Markdown: a table and its protocol, or that nothing was measured. name: of the result."""
    exported = report.get("exported") or {}
    if exported.get("n_requantized"):
        return _not_measured("the export rounded weights anew", name)
    found = report.get("held_out")
    if isinstance(found, Mapping):
        if exported and report["format"] == GGUF and quantizes_activations(report):
            return _not_measured("a GGUF file has no activations of few bits", name)
        text = _of_qat(report) if found else ""
    else:
        text = _of_ptq(report, found or [])
    if not text:
        return _not_measured("", name)
    kept = " The export since then kept every value, bit for bit." if exported else ""
    return f"{text}{kept}"


def _not_measured(reason: str, name: str) -> str:
    why = f": {reason}" if reason else ""
    return f"Not measured{why}. {code(f'llmq compare BASE {shlex.quote(name)}')} does it."


def _of_ptq(report: Mapping[str, Any], found: list[dict[str, Any]]) -> str:
    measured = [text for text in found if "not_measured" not in text]
    if not measured:
        return ""
    header = ["text", "tokens", "perplexity", "ratio", "KL divergence, nats", "same first choice"]
    rows = [
        [
            plain(text["source"]),
            "{} x {}".format(*text["windows"]),
            f"{text['base_perplexity']:.3f} -> {text['quant_perplexity']:.3f}",
            _with_interval(text["perplexity_ratio"], text["perplexity_ratio_ci95"], "{:.4f}"),
            _with_interval(text["kl_mean"], text["kl_mean_ci95"], "{:.5f}"),
            f"{text['top1_agreement']:.1%}",
        ]
        for text in measured
    ]
    alone = ", of the weights alone" if quantizes_activations(report) else ""
    windows = " and ".join(dict.fromkeys(f"{text['windows'][0]} each" for text in measured))
    protocol = _OF_PTQ.format(windows=windows, weights_alone=alone)
    return f"{table(header, rows)}\n\n{protocol} {_INTERVALS}"


def _of_qat(report: Mapping[str, Any]) -> str:
    found, shipped = report["held_out"], report["shipped"]
    full, own = found[FULL], found[shipped]
    ratio = own.get("perplexity_ratio")
    told = "-" if ratio is None else _with_interval(ratio, own["perplexity_ratio_ci95"], "{:.4f}")
    row = [
        plain(report["train"]["source"]),
        f"{own['windows']} x {own['sequence_length']}",
        f"{full['perplexity']:.3f} -> {own['perplexity']:.3f}",
        told,
    ]
    protocol = _OF_QAT.format(**{key: own[key] for key in ("protocol", "bos", "dtype")})
    figures = table(["text", "tokens", "perplexity", "ratio"], [row])
    return f"{figures}\n\n{protocol} {_INTERVALS.partition(' KL')[0]}"


def _with_interval(value: float, interval: list[float] | None, form: str) -> str:
    """A figure with its 95% interval; one window has none."""
    if interval is None:
        return form.format(value)
    low, high = (form.format(bound) for bound in interval)
    return f"{form.format(value)} ({low} to {high})"
