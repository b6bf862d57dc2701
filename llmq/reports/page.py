"""`report.html`: one page about a result that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.reports import facts, svg, templates
from llmq.storage.boundary import reading

PAGE = "report.html"
REPORT = "report.json"


@dataclass(frozen=True)
class Sample:
    """What both models write after a prompt, greedily."""

    prompt: str
    before: str
    after: str


def render(
    report: Mapping[str, Any],
    *,
    comparison: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] = (),
    log: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as HTML. report: `report.json`. comparison: what `llmq compare --json` gives. log:
    the rows of a training log."""
    losses = facts.losses(report, comparison)
    return templates.render(
        "report.html",
        report=report,
        tiles=_tiles(report, losses),
        losses=losses,
        changes=_picture(losses, "change", "change of perplexity in percent"),
        divergences=_picture(losses, "kl", "KL divergence in nats"),
        training=_training(report),
        panels=facts.panels(log, report),
        errors=facts.error_map(report.get("layers", ())),
        parts=facts.parts(report),
        remarks=facts.remarks(report),
        settings=facts.settings(report),
        samples=samples,
        engines=report.get("engines", ()),
    )


def write_beside(folder: Path) -> Path:
    """The page of a folder whose report was just written. Returns where it is."""
    page = folder / PAGE
    write(page, json.loads((folder / REPORT).read_text("utf-8")), log=log_of(folder))
    return page


def write(page: Path, report: Mapping[str, Any], **more: Any) -> None:
    """A page into a file. more: see `render`."""
    page.write_text(render(report, **more), "utf-8")


def report_of(folder: Path) -> dict[str, Any]:
    """What a folder says of itself. Raises `LlmqError` for one without a report, which another tool
    wrote, or `llmq.save`, and for one that no page can be made of."""
    path = folder / REPORT
    if not path.is_file():
        raise LlmqError(
            f"{folder}: there is no {REPORT} in it, which llmq quantize and llmq qat write; a page "
            "needs one"
        )
    with reading(path, "no page can be made of it", "quantize again, or get the folder again"):
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        render(found, log=log_of(folder))  # it may have been edited
    return found


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of the log of a folder's training; none where there was none."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _tiles(report: Mapping[str, Any], losses: Sequence[facts.Loss]) -> list[tuple[str, str, str]]:
    """What stands at the top: a name, a value, and a remark."""
    found = []
    if "stored_bytes" in report:
        before, after = report["source_bytes"], report["stored_bytes"]
        found.append(
            ("weight files", templates.megabytes(after), f"{after / before:.0%} of before")
        )
    if "bits_per_quantized_weight" in report:
        bits = f"{report['bits_per_quantized_weight']:.2f}"
        whole = f"{report['bits_per_weight']:.2f} per weight of the model"
        found.append(("bits per quantized weight", bits, whole))
    if losses:
        worst = max(losses, key=lambda each: each.change.value)
        found.append(("perplexity", f"{worst.change.value:+.2f}%", _range(worst.change)))
        found.append(("KL divergence", f"{worst.kl.value:.3g}", "nats per token, same text"))
    return found


def _range(row: svg.Interval) -> str:
    text = row.label.partition(":")[0]
    if row.interval is None:
        return text
    low, high = row.interval
    return f"{low:+.2f} to {high:+.2f}% (95%), {text}"


def _picture(losses: Sequence[facts.Loss], name: str, caption: str) -> str:
    rows = [row for loss in losses if (row := getattr(loss, name)).is_finite]
    return svg.intervals(rows, 0.0, caption) if rows else ""


def _training(report: Mapping[str, Any]) -> list[tuple[str, float, Sequence[float] | None]]:
    """Held-out perplexity of what training began with, its start and its end."""
    held_out = report.get("held_out")
    if not isinstance(held_out, Mapping):
        return []
    return [
        (name.replace("_", " "), figures["perplexity"], figures["ci95"])
        for name, figures in held_out.items()
    ]
