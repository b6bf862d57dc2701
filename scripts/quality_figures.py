"""The figures of `quality_table.py`: gaps with intervals that are paired window by window, with
full precision and between tools, and the table.

The gap of a result is the logarithm of its perplexity over full precision's, averaged over texts,
which count alike, and over seeds. Intervals are of windows drawn with replacement within each text,
the same ones for all results; they say nothing of other seeds, whose range is told beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from llmq.evaluation.bootstrap import N_RESAMPLES

GPTQ_PEERS = ("llm-compressor", "gptqmodel")
TUNING_PEERS = ("autoround",)


def window_gaps(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """By text: the gap of every window, averaged over the results of several seeds; float64
    `[n]`."""
    gaps: dict[str, list[Tensor]] = {}
    for result in results:
        for name, figures in result["figures"].items():
            windows = figures["windows"]
            found = [torch.tensor(windows[key]).double() for key in ("quant_nll", "base_nll")]
            gaps.setdefault(name, []).append(found[0] - found[1])
    return {name: torch.stack(each).mean(dim=0) for name, each in gaps.items()}


def resampled(gaps: Mapping[str, Tensor]) -> Tensor:
    """Means over texts of means over windows drawn with replacement, `[N_RESAMPLES]`. Equal numbers
    of windows give equal draws, so that those of two results can be subtracted or divided."""
    means = []
    for values in gaps.values():
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(values), (N_RESAMPLES, len(values)), generator=generator)
        means.append(values[chosen].mean(dim=1))
    return torch.stack(means).mean(dim=0)


def interval(draws: Tensor) -> tuple[float, float]:
    """The middle 95% of draws."""
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


@dataclass(frozen=True)
class Row:
    """All seeds of a tool at a spec. name: what the table calls it. tool: its name without
    options."""

    spec: str
    tool: str
    name: str
    results: list[dict[str, Any]]

    @property
    def gaps(self) -> dict[str, Tensor]:
        return window_gaps(self.results)

    @property
    def gap(self) -> float:
        return mean(float(values.mean()) for values in self.gaps.values())

    @property
    def draws(self) -> Tensor:
        return resampled(self.gaps)

    @property
    def has_spread(self) -> bool:
        """Whether there is an interval at all: one window says nothing of others."""
        return all(len(values) > 1 for values in self.gaps.values())

    def over_seeds(self) -> tuple[float, float] | None:
        """Smallest and largest gap of single seeds, where there are several."""
        found = [Row(self.spec, self.tool, self.name, [each]).gap for each in self.results]
        return (min(found), max(found)) if len(found) > 1 else None

    def figure(self, text: str, name: str) -> float:
        """A figure of a text, averaged over seeds."""
        return mean(result["figures"][text][name] for result in self.results)

    def kl(self, position: str | None = None) -> float | None:
        """Mean KL in nats over texts and seeds, of one class of positions or of all; None where no
        text has such a position."""
        found = []
        for result in self.results:
            for figures in result["figures"].values():
                if position is None:
                    found.append(figures["kl_mean"])
                elif position in figures["kl_by_position"]:
                    found.append(figures["kl_by_position"][position]["mean"])
        return mean(found) if found else None

    def took(self, name: str) -> float | None:
        """Mean over seeds of what a run took; None for folders that were there."""
        found = [result["took"][name] for result in self.results if name in result["took"]]
        return mean(found) if found else None


def best(rows: list[Row], tools: tuple[str, ...]) -> Row | None:
    """The row with the smallest gap among some tools."""
    return min((row for row in rows if row.tool in tools), key=lambda row: row.gap, default=None)


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(value: float, draws: Tensor, has_spread: bool, digits: int = 4) -> str:
    if not has_spread:
        return number(value, digits)
    low, high = interval(draws)
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """What the table says of a row, by the titles of columns."""
    of_texts = {f"perplexity, {text}": number(exp_of_mean(row, text), 3) for text in row.gaps}
    gap = with_interval(row.gap, row.draws, row.has_spread)
    seeds = row.over_seeds()
    if seeds is not None:
        gap += f", seeds {seeds[0]:.4f} to {seeds[1]:.4f}"
    found = {**of_texts, "gap (95%)": gap}
    of_peers = {
        "of the best GPTQ peer's": best(rows, GPTQ_PEERS),
        "of the best tuning peer's": best(rows, TUNING_PEERS),
    }
    for title, peer in of_peers.items():
        if peer is not None:
            ratio = row.draws / peer.draws
            said = with_interval(row.gap / peer.gap, ratio, row.has_spread, 2)
            found[title] = "1" if peer is row else said
    peer = best(rows, (*GPTQ_PEERS, *TUNING_PEERS))
    if peer is not None:
        less = with_interval(row.gap - peer.gap, row.draws - peer.draws, row.has_spread)
        found["less the best peer's"] = "0" if peer is row else less
    return {
        **found,
        "KL": number(row.kl()),
        "KL, first position": number(row.kl("first")),
        "wall s": number(row.took("wall_seconds"), 0),
        "processor s": number(row.took("processor_seconds"), 0),
        "peak MB": number(row.took("peak_megabytes"), 0),
        "weights MB": number(mean(result["bytes"] for result in row.results) / 1e6, 1),
    }


def exp_of_mean(row: Row, text: str) -> float:
    """Perplexity on a text; of several seeds the geometric mean."""
    base = row.results[0]["figures"][text]["base_perplexity"]
    return base * exp(float(row.gaps[text].mean()))


def table(spec: str, rows: list[Row]) -> str:
    """Markdown of the rows of one spec."""
    found = {row.name: cells(row, rows) for row in rows}
    titles = list(dict.fromkeys(title for each in found.values() for title in each))
    lines = [f"| {spec} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, each in found.items():
        lines.append(f"| {name} | {' | '.join(each.get(title, '') for title in titles)} |")
    return "\n".join(lines)


def remarks(rows: list[Row]) -> list[str]:
    """Layers that ended worse than rounding would have left them."""
    found = []
    for row in rows:
        of_rows = [result["layers"] for result in row.results if result.get("layers")]
        worse = [each for each in of_rows if each["worse_than_rounding"]]
        if worse:
            most = max(worse, key=lambda each: each["worse_than_rounding"])
            largest = max(each["largest"] for each in worse)
            found.append(
                f"{row.name} at {row.spec}: {most['worse_than_rounding']} of {most['n']} layers "
                f"have a larger error than rounding (up to {largest:.2f} times)"
            )
    return found
