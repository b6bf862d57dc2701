"""Progress on stderr, and the tables and lines of a command's text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Show(Protocol):
    """Show progress: done of total, and a remark."""

    def __call__(self, done: int, total: int, remark: str = "") -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Show]:
    """A progress bar on a terminal, plain lines elsewhere. What the first call reports as done
    counts as done before."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:

        def print_line(done: int, total: int, remark: str = "") -> None:
            print(f"{title} {done}/{total} {remark}".rstrip(), file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, remark="")

        def move(done: int, total: int, remark: str = "") -> None:
            bar.update(task, completed=done, total=total, remark=remark)

        yield move


def render(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A plain text table, numbers to the right."""
    table = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    numeric = [
        all(row[i][:1].isdigit() or row[i][:1] in "-+" for row in table[1:])
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def render_pairs(pairs: dict[str, object]) -> str:
    """Names and values, one per line."""
    width = max(map(len, pairs))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs.items())


def render_conditions(summary: dict[str, Any]) -> str:
    """What a figure was measured on and with, for its text."""
    skipped = skipped_rows(summary.get("text", {}))
    head = "" if summary["head_bits"] is None else f", head at {summary['head_bits']} bits"
    return (
        f"{summary['tokens']} tokens of {summary['data']}{skipped}, "
        f"protocol {summary['protocol']} at {summary['sequence_length']}, BOS {summary['bos']}, "
        f"{summary['dtype']}, compute {summary['compute']}{head}"
    )


def skipped_rows(text: dict[str, Any]) -> str:
    """How many rows of a text were left out and why, for its name in a line; empty for none."""
    reasons = [f"{count} {reason}" for reason, count in text.get("skipped_rows", {}).items()]
    return f" ({', '.join(reasons)} of {text['rows']} rows left out)" if reasons else ""


def text_line(text: dict[str, Any]) -> str:
    """What was read of a text: rows, columns, and whether chats went through a template."""
    parts = [f"{text['source']}: {text['rows']} rows{skipped_rows(text)}"]
    if text.get("dataset"):
        parts.append(text["dataset"])
    if text.get("revision"):
        parts.append(f"commit {text['revision'][:12]}")
    if text.get("split"):
        parts.append(f"split {text['split']}")
    if columns := text.get("columns"):
        parts.append(f"column {', '.join(' + '.join(names) for names in columns)}")
    if written := text.get("written"):
        parts.append(f"written by the model itself with seed {written['seed']}")
    if (template := text.get("chat_template")) is not None:
        parts.append("chat template of the model" if template else "no chat template")
    if text.get("files_left_out"):
        parts.append(f"{text['files_left_out']} files of other splits left out")
    return ", ".join(parts)


def companion_lines(report: dict[str, Any]) -> dict[str, str]:
    """What of the source is not in the output, for the text of a report."""
    lines = {}
    if left := report["left_behind"]:
        names = [name for name in left if not name.startswith(".")] or list(left)
        more = ", ..." if len(left) > len(names[:3]) else ""
        lines["left behind"] = (
            f"{len(left)} files of the source ({', '.join(names[:3])}{more}); report.json has the "
            "reasons"
        )
    if dropped := report["dropped_auto_map"]:
        lines["auto_map"] = (
            f"{len(dropped)} entries dropped, whose code is not in the source: "
            f"{', '.join(dropped[:3])}"
        )
    return lines


def render_interval(bounds: Sequence[float] | None, digits: str) -> str:
    """A 95% interval, or why there is none. digits: the format of its bounds."""
    return (
        "one window, no interval"
        if bounds is None
        else f"95% interval {bounds[0]:{digits}} to {bounds[1]:{digits}}"
    )
