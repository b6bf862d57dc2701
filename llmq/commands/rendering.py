"""Progress on stderr, and the tables and lines of a command's text."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from llmq.messages import grouped_notes, one_line


class Show(Protocol):
    """Show progress: done of total, and a remark."""

    def __call__(self, done: int, total: int, remark: str = "") -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Show]:
    """A bar on a terminal, plain lines elsewhere, on stderr: how many of how many, and the time
    left. What the first call reports as done counts as done before."""
    from rich.console import Console

    from llmq.commands.pace import Pace

    pace, console = Pace(time.monotonic()), Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        from llmq.commands.bar import drawn

        with drawn(title, pace, console) as bar:
            yield bar.move
        return

    def print_line(done: int, total: int, remark: str = "") -> None:
        now = time.monotonic()
        pace.report(done, total, now)
        line = f"{title} {done}/{total}  {pace.says(now)}  {remark}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    yield print_line


class Bars:
    """Several `progress` after each other: a terminal has place for one. To be closed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._title = ""
        self._show: Show | None = None

    def show(self, title: str, done: int, total: int, remark: str = "") -> None:
        """Move the bar of that title; another title ends it."""
        if self._show is None or title != self._title:
            self._stack.close()
            self._title, self._show = title, self._stack.enter_context(progress(title))
        self._show(done, total, remark)

    def close(self) -> None:
        self._stack.close()


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, None for a file or a pipe, whose lines are not
    broken."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, width: int | None, indent: str) -> str:
    """`text` in lines of at most `width` characters, all but the first indented."""
    if width is None:
        return text
    lines = textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def note_lines(notes: Mapping[str, str]) -> list[str]:
    """Notes of layers, by name, as `grouped_notes` has them."""
    return [f"note: {line}" for line in grouped_notes(notes)]


def idle_experts(modules: list[dict[str, Any]]) -> list[str]:
    """Names of the experts that no calibration token reached."""
    return [f"{module['name']}.{number}" for module in modules for number in module["idle"]]


def expert_lines(modules: list[dict[str, Any]]) -> dict[str, str]:
    """How calibration text reached the experts. modules: as `llmq.ptq.experts.Coverage` has
    them."""
    if not modules:
        return {}
    least = min(module["min_rows"] for module in modules)
    usual = sorted(module["median_rows"] for module in modules)[len(modules) // 2]
    n_experts = sum(module["n_experts"] for module in modules)
    n_few = sum(len(module["blended"]) + len(module["borrowed"]) for module in modules)
    lines = {
        "experts": f"{n_experts} in {len(modules)} layers, each calibrated on {least} to "
        f"{usual:.0f} tokens (least and median)"
    }
    if n_few:
        lines["few tokens"] = (
            f"{n_few} experts had fewer than half as many as channels and were measured on the "
            "tokens of others, too"
        )
    if idle := idle_experts(modules):
        more = ", ..." if len(idle) > 3 else ""
        lines["idle experts"] = f"{len(idle)} got no token: {', '.join(idle[:3])}{more}"
    return lines


def print_notes(notes: Mapping[str, str]) -> None:
    """On stderr, in lines of the terminal's width."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    for line in note_lines(notes):
        print(wrapped(one_line(line), width, "  "), file=sys.stderr)


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
    """Names and values, each on a line of its own, or on a terminal on as many as it takes."""
    width, columns = max(map(len, pairs)), terminal_width()
    return "\n".join(
        wrapped(f"{name.ljust(width)}  {value}", columns, " " * (width + 2))
        for name, value in pairs.items()
    )


def render_conditions(summary: dict[str, Any]) -> str:
    """What a figure was measured on and with, for its text."""
    skipped = skipped_rows(summary.get("text", {}))
    head = "" if summary["head_bits"] is None else f", head at {summary['head_bits']} bits"
    how = f" with stride {summary['stride']}" if "stride" in summary else ""
    how += ", detokenised" if summary.get("detokenised") else ""
    n = summary.get("documents")
    documents = "" if n is None else f" in {n} document{'' if n == 1 else 's'}"
    return (
        f"{summary['tokens']} tokens of {summary['data']}{documents}{skipped}, "
        f"protocol {summary['protocol']} at {summary['sequence_length']}{how}, "
        f"BOS {summary['bos']}, "
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


def picture_lines(text: dict[str, Any]) -> dict[str, str]:
    """How many pictures stand before the text of calibration windows, for the text of a report."""
    found = text.get("pictures")
    if not found:
        return {}
    mean = found["tokens_of_rows"] / found["windows"]
    line = (
        f"{found['pictures']}: {found['windows']} windows begin with one of {found['rows']} rows "
        f"of {mean:.0f} tokens, pictures included"
    )
    if found["rows"] < found["windows"]:
        line += ", and go on with other text where a row comes again"
    if reasons := [f"{count} {reason}" for reason, count in found["left_out"].items()]:
        line += (
            f"; rows left out: {', '.join(reasons)} (the longest has {found['longest_row']} tokens)"
        )
    return {"pictures": line}


def transform_lines(report: dict[str, Any]) -> dict[str, object]:
    """Where scale moved before layers were solved."""
    lines = {}
    for name in dict.fromkeys(moved["transform"] for moved in report["transforms"]):
        own = [moved for moved in report["transforms"] if moved["transform"] == name]
        n_reached = sum(len(pair["takers"]) for moved in own for pair in moved["pairs"])
        left = [layer for moved in own for layer in moved["left"]]
        lines[name] = f"scale moved into {n_reached} layers"
        if left:
            lines[name] += f"; into {len(left)} it could not, the first being {left[0]}"
    return {**lines}


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


def render_interval(bounds: Sequence[float] | None, digits: str, drawn: str = "window") -> str:
    """A 95% interval, or why there is none. digits: the format of its bounds. drawn: what is drawn
    for it."""
    return (
        f"one {drawn}, no interval"
        if bounds is None
        else f"95% interval {bounds[0]:{digits}} to {bounds[1]:{digits}}"
    )


def outside_lines(tables: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Embeddings and head that are quantized, as a report has them."""
    return {
        table["role"]: f"{table['spec']}, {table['n_bytes'] / 1e6:.1f} MB, error "
        f"{table['weight_error']:.1e} of the weights"
        for table in tables
    }


def mixed_lines(mixed: dict[str, Any] | None) -> dict[str, object]:
    """Which bits were chosen for a budget, and what one width for all loses in their place."""
    if mixed is None:
        return {}
    lines: dict[str, object] = {"mixed bits": _choice_line(mixed["mixed"])}
    if mixed["uniform"] is None:
        lines["one width"] = "none takes about as much, so there is nothing to compare with"
        return lines
    lines["one width"] = _choice_line(mixed["uniform"])
    if "held_out_kl" in mixed["uniform"]:
        lines["kept"] = f"{mixed['kept']}, which loses less on held-out text"
    return lines


def _choice_line(choice: dict[str, Any]) -> str:
    parts = [f"{n} x {spec}" for spec, n in choice["layers_by_spec"].items()]
    parts += [f"{role} {spec}" for role, spec in choice["outside"].items()]
    line = f"{choice['bits_per_quantized_weight']:.2f} bits: {', '.join(parts)}; KL about "
    line += f"{choice['estimated_kl']:.2e}"
    measured = [f"{kl:.2e}" for kl in choice.get("held_out_kl", ()) if kl is not None]
    return f"{line}, measured {' and '.join(measured)}" if measured else line
