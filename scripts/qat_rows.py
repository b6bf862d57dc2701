"""What the rows of `qat_table.py` say: the table of one model, and the claims that people make of
QAT, for several models side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from quality_figures import Row, interval, number, resampled, window_gaps

CONTROL = "control"
RESULTS, ABOUT = "results.jsonl", "about.json"


@dataclass(frozen=True)
class Run:
    """kind: "control", "ptq" or "qat". scheme: as `llmq qat` takes it. method: of PTQ, or of the
    start of training."""

    kind: str
    scheme: str = ""
    method: str = ""

    def __str__(self) -> str:
        return "-".join(each for each in (self.kind, self.scheme, self.method) if each)


def against(result: dict[str, Any], other: dict[str, Any] | None) -> tuple[float, float, float]:
    """By how much perplexity is above full precision's, or above another result's on the same
    windows, with its 95% interval; mean over texts of the logarithm, as a share."""
    gaps = window_gaps([result])
    if other is not None:
        less = window_gaps([other])
        gaps = {name: values - less[name] for name, values in gaps.items()}
    middle = float(torch.stack([values.mean() for values in gaps.values()]).mean())
    low, high = interval(resampled(gaps))
    return exp(middle) - 1, exp(low) - 1, exp(high) - 1


def percent(values: tuple[float, float, float]) -> str:
    return "{:+.2%} ({:+.2%} to {:+.2%})".format(*values)


def recovered(gptq: dict[str, Any], qat: dict[str, Any]) -> float:
    """The share of what GPTQ adds to the logarithm of perplexity that training took away."""
    before, after = (Row("", "", "", [each]).gap for each in (gptq, qat))
    return 1 - after / before


def table(results: dict[str, dict[str, Any]], texts: list[str]) -> str:
    """Markdown of all rows. results: by the name of the run."""
    control, any_result = results.get(CONTROL), next(iter(results.values()))
    full = [f"{any_result['figures'][name]['base_perplexity']:.3f}" for name in texts]
    titles = [
        *(*texts, "against full precision (95%)", "against the control (95%)"),
        *("KL", "KL, first position", "MB"),
    ]
    lines = [
        f"| | {' | '.join(titles)} | processor s |",
        "|---" * (len(titles) + 2) + "|",
        f"| full precision | {' | '.join(full)} | | | | | | |",
    ]
    for name, result in results.items():
        figures = result["figures"]
        is_control = control is None or name == CONTROL
        lost = "" if is_control else percent(against(result, control))
        cells = [
            *(f"{figures[text]['quant_perplexity']:.3f}" for text in texts),
            percent(against(result, None)),
            lost,
            " ".join(f"{figures[text]['kl_mean']:.3f}" for text in texts),
            number(Row("", "", "", [result]).kl("first"), 3),
            f"{result['bytes'] / 1e6:.1f}",
            f"{result['took']['processor_seconds']:.0f}",
        ]
        start = " (the start)" if result.get("shipped") == "start" else ""
        lines.append(f"| {name}{start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: result["sample"] for name, result in results.items()}


def samples(texts: dict[str, str]) -> str:
    """Markdown of what models wrote, each on a line of its own."""
    return "\n".join(f"\n**{name}**: {' '.join(text.split())}" for name, text in texts.items())


def claims(results: dict[str, dict[str, Any]], about: dict[str, Any]) -> dict[str, str]:
    """What can be said of the claims from the runs that there are: by claim, the figure."""
    found: dict[str, str] = {}

    def say(claim: str, name: str, other: str | None) -> None:
        if name in results and (other is None or other in results):
            values = against(results[name], None if other is None else results[other])
            found[claim] = percent(values)

    say("PTQ at INT8, weights and activations, against full precision", "ptq-w8a8-rtn", None)
    for scheme, title in (("w8a8", "INT8"), ("w4", "INT4 weights"), ("w4a8kv8", "W4A8KV8")):
        for name in (each for each in results if each.startswith(f"qat-{scheme}-")):
            say(f"QAT at {title}, against fine-tuning on the same tokens", name, CONTROL)
            say(f"QAT at {title}, against full precision as it was", name, None)
    for name in (each for each in results if each.startswith("qat-w4-")):
        say("QAT at 4 bits against PTQ at INT8 with activations", name, "ptq-w8a8-rtn")
    for scheme in ("w4", "w3", "w2", "ternary"):
        for name in (each for each in results if each.startswith(f"qat-{scheme}-")):
            if gptq := results.get(f"ptq-{scheme}-gptq"):
                share = recovered(gptq, results[name])
                found[f"of what GPTQ adds at {scheme}, QAT takes away"] = f"{share:.0%}"
    for name in ("ptq-w8a8-rtn", "ptq-w4-rtn"):
        if name in results:
            share = results[name]["bytes"] / about["bytes"]
            found[f"weight files at {name.split('-')[1]}"] = f"{share:.0%} of the source's"
    if about["trained_tokens"]:
        share = about["tokens"] / about["trained_tokens"]
        found["tokens of QAT"] = f"{about['tokens']:,}, {share:.2g} of the model's training"
    # Beside a GPU the processor's seconds say nothing of the work.
    on_processor = {name: each for name, each in results.items() if not _on_gpu(each)}
    whole = [name for name, each in on_processor.items() if each["took"]["from_start"]]
    for name in whole if CONTROL in whole else []:
        if not name.startswith("qat-"):
            continue
        ratio = processor_seconds(results[name]) / processor_seconds(results[CONTROL])
        scheme = name.split("-")[1]
        found[f"time of QAT at {scheme}, of plain fine-tuning's"] = f"{ratio:.2f}"
    return found


def _on_gpu(result: dict[str, Any]) -> bool:
    return "device" in result.get("key", {})


def processor_seconds(result: dict[str, Any]) -> float:
    return float(result["took"]["processor_seconds"])


def page(folders: list[Path]) -> str:
    """The claims of several folders, a column each."""
    columns: dict[str, dict[str, str]] = {}
    for folder in folders:
        about = json.loads((folder / ABOUT).read_text())
        lines = map(json.loads, (folder / RESULTS).read_text().splitlines())
        results = {str(Run(**line["run"])): line for line in lines}
        columns[about["model"]] = claims(results, about)
    titles = list(dict.fromkeys(claim for found in columns.values() for claim in found))
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title in titles:
        cells = [found.get(title, "") for found in columns.values()]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)
