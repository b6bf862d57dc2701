"""What a page tells, taken from `report.json` (see `llmq.ptq.report` and `llmq.qat.ship`), from a
comparison (`llmq.evaluation.divergence`) and from a training log."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.messages import grouped_notes
from llmq.reports import svg

_IN_BLOCK = re.compile(r"^.*?\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"\.\d+(?=\.)")
SHADES = 9  # of the map of errors
# Of a training log: caption -> keys and what they are called.
PANELS = {
    "cross entropy on the training text, in nats": {"ce": "cross entropy"},
    "KL divergence from full precision on the training text, in nats": {"kl": "KL divergence"},
    "shares of all codes": {
        "flip_rate": "changed since the row before",
        "zero_fraction": "zero",
        "clip_fraction": "outside their grid",
    },
}
_KINDS = {"calibration": "held-out text", "other": "another text"}


@dataclass(frozen=True)
class Loss:
    """What is lost on one text. change: of perplexity, in percent."""

    text: str
    base: float
    quant: float
    change: svg.Interval
    kl: svg.Interval
    windows: str


@dataclass(frozen=True)
class Cell:
    """A kind of layer in a block. shade: 0 (least error) to 8; None where there is no such
    layer."""

    shade: int | None
    title: str


@dataclass(frozen=True)
class ErrorMap:
    """Errors of layers: a row for each kind of layer, a column for each block."""

    blocks: list[str]
    rows: list[tuple[str, list[Cell]]]
    least: float
    largest: float


def losses(report: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> list[Loss]:
    """Of held-out text as the run measured it, and of a comparison behind it."""
    found = []
    held_out = report.get("held_out")
    for figures in held_out if isinstance(held_out, list) else ():
        if "not_measured" not in figures:
            kind = _KINDS.get(figures["kind"], figures["kind"])
            found.append(_loss(f"{kind}: {figures['source']}", figures, figures["windows"]))
    if comparison is not None:
        text = comparison.get("text", {}).get("source", comparison["data"])
        shape = [comparison["windows"], comparison["sequence_length"]]
        found.append(_loss(f"compared on {text}", comparison, shape))
    return found


def _loss(text: str, figures: Mapping[str, Any], shape: Sequence[int]) -> Loss:
    return Loss(
        text,
        figures["base_perplexity"],
        figures["quant_perplexity"],
        _percent(_interval(text, figures, "perplexity_ratio")),
        _interval(text, figures, "kl_mean"),
        f"{shape[0]} x {shape[1]}",
    )


def _interval(text: str, figures: Mapping[str, Any], key: str) -> svg.Interval:
    ends = figures.get(f"{key}_ci95")
    return svg.Interval(text, figures[key], None if ends is None else (ends[0], ends[1]))


def _percent(ratio: svg.Interval) -> svg.Interval:
    ends = ratio.interval
    return svg.Interval(
        ratio.label,
        100 * (ratio.value - 1),
        None if ends is None else (100 * (ends[0] - 1), 100 * (ends[1] - 1)),
    )


def error_map(layers: Iterable[Mapping[str, Any]]) -> ErrorMap | None:
    """The errors of layers on a logarithmic scale, those of experts averaged; None where none was
    measured. Layers without text have errors of their weights."""
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for layer in layers:
        place = _IN_BLOCK.match(layer["name"])
        if place is not None and _error(layer) is not None:
            kind = _NUMBER.sub(".*", place[2])
            found.setdefault(kind, {}).setdefault(int(place[1]), []).append(layer)
    blocks = sorted({block for of_kind in found.values() for block in of_kind})
    means = {
        (kind, block): _mean(map(_error, members))
        for kind, of_kind in found.items()
        for block, members in of_kind.items()
    }
    above = [value for value in means.values() if 0 < value < math.inf]
    if not above:
        return None
    least, largest = min(above), max(above)
    rows = []
    for kind, of_kind in found.items():
        cells = [
            _cell(of_kind[block], means[kind, block], (least, largest))
            if block in of_kind
            else Cell(None, "")
            for block in blocks
        ]
        rows.append((kind, cells))
    return ErrorMap([str(block) for block in blocks], rows, least, largest)


def _error(layer: Mapping[str, Any]) -> float | None:
    error: float | None = layer.get("error")
    return layer.get("weight_error") if error is None else error


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _cell(layers: Sequence[Mapping[str, Any]], error: float, ends: tuple[float, float]) -> Cell:
    low, high = map(math.log, ends)
    inside = min(max(error, ends[0]), ends[1]) if math.isfinite(error) else ends[1]
    share = (math.log(inside) - low) / ((high - low) or 1.0)
    title = f"{layers[0]['name']}, {layers[0]['spec']}: {error:.2e}"
    if len(layers) > 1:
        title = f"{len(layers)} like {title} on average"
    elif (rounding := layers[0].get("rtn_error")) is not None:
        title += f", plain rounding {rounding:.2e}"
    return Cell(round(share * (SHADES - 1)), title)


def parts(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Bytes of the weight files by what they are for, the largest first."""
    sizes: dict[str, int] = {}
    for layer in report.get("layers", ()):
        place = _IN_BLOCK.match(layer["name"])
        if "n_bytes" in layer:
            kind = _NUMBER.sub(".*", place[2]) if place else layer["name"]
            sizes[kind] = sizes.get(kind, 0) + layer["n_bytes"]
    for table in report.get("outside", ()):
        sizes[table["name"]] = table["n_bytes"]
    rest = report.get("stored_bytes", 0) - sum(sizes.values())
    if rest > 0:
        sizes["as in the source: embeddings, norms, what is kept"] = rest
    return sorted(sizes.items(), key=lambda each: -each[1])


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What is otherwise than somebody might expect, each in a sentence."""
    found = []
    counts = {
        "n_worse_than_rounding": "layers have a larger error than plain rounding",
        "n_kept_rounding": "layers are rounded plainly, which came nearer to the target",
        "n_extra_damping": "layers needed more damping than asked for",
        "n_dead_columns": "columns never saw an input",
        "n_dropped_rows": "rows of calibration data were not finite and were left out",
    }
    for key, meaning in counts.items():
        if report.get(key):
            found.append(f"{report[key]} {meaning}.")
    lists = {
        "fallbacks": "fell back to plain rounding",
        "kept_layers": "stay in full precision",
        "layers_with_large_error": "have a large error",
        "copied_source_tensors": "are tensors that the model has no place for, copied as they are",
    }
    for key, meaning in lists.items():
        if names := report.get(key):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{len(names)} {meaning}: {', '.join(names[:3])}{more}.")
    found += [f"{line}." for line in grouped_notes(report.get("notes") or {})]
    if report.get("shipped") == "start":
        found.append("Training did not beat its start, so the start is what is stored.")
    return found


def settings(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What decided the result, flat, without what says nothing."""
    found: list[tuple[str, str]] = []
    _flatten(report.get("recipe") or report.get("settings") or {}, "", found)
    found += [(name, str(value)) for name, value in report.get("versions", {}).items()]
    return found


def _flatten(data: Mapping[str, Any], prefix: str, found: list[tuple[str, str]]) -> None:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key == "rules":
            found += [(f"rule {pattern}", _spec(spec)) for pattern, spec in value]
        elif isinstance(value, Mapping) and "code" in value:
            found.append((name, _spec(value)))
        elif isinstance(value, Mapping):
            _flatten(value, f"{name}.", found)
        elif value is not None:
            found.append((name, str(value)))


def _spec(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "kept"
    return ", ".join(f"{key} {value}" for key, value in spec.items())


def panels(log: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pictures of a training log with their captions: cross entropy and divergence on axes of
    their own, held-out losses beside what full precision and the start have there, and what the
    codes do."""
    found = []
    scored = _of(log, "held_out_perplexity")
    held_out = [(step, math.log(value)) for step, value in scored if value > 0]
    if held_out:
        line = svg.Line("while it trains", held_out, dots=True)
        found.append(("cross entropy on held-out text, in nats", [line], _references(report)))
    for caption, names in PANELS.items():
        every = {label: _of(log, key) for key, label in names.items()}
        drawn = [svg.Line(label, points) for label, points in every.items() if points]
        if drawn:
            found.append((caption, drawn, {}))
    return [(caption, svg.lines(drawn, marks, caption)) for caption, drawn, marks in found]


def _references(report: Mapping[str, Any]) -> dict[str, float]:
    """Cross entropy on held-out text before training."""
    held_out = report.get("held_out")
    return {
        name.replace("_", " "): math.log(figures["perplexity"])
        for name, figures in (held_out.items() if isinstance(held_out, Mapping) else ())
        if name != "trained"
    }


def _of(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in log if key in row and math.isfinite(row[key])]
