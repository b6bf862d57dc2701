"""Which engine computes what llmq computes, for every kind of result, as a table in Markdown.

    python scripts/engine_matrix.py MODEL WORK_DIR --engine vllm=VLLM_PYTHON:vllm [--engine ...]

MODEL is quantized by plain rounding into one folder for each row and format below WORK_DIR, and
`scripts/check_engines.py` runs all folders through every engine. An engine is given as
TITLE=PYTHON:KEY, the interpreter of the environment it is installed in and its key in
`check_engines.py`; it is started once, and again after a folder that it died of. What was run
before is kept in WORK_DIR/results.json and not run again, so that an interrupted run continues and
another engine can be added later.

Cells: `equal` or `differs`, with the largest difference of a log-probability; or `refused`, with
the engine's words below the table. Formats that cannot hold a row have no line."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

CHECK = Path(__file__).resolve().with_name("check_engines.py")
SECONDS = 900  # for one engine and one folder
# Row -> the options of `llmq quantize`. Plain rounding: what an engine reads does not depend on
# how codes were found.
ROWS: dict[str, list[str]] = {
    "w4g128": ["--bits", "4"],
    "w4g64-asym": ["--bits", "4", "--group-size", "64", "--asymmetric"],
    "w3g64-asym": ["--bits", "3", "--group-size", "64", "--asymmetric"],
    "w2g64": ["--bits", "2", "--group-size", "64"],
    "w8": ["--bits", "8", "--group-size", "-1"],
    "W8A8": ["--bits", "8", "--group-size", "-1", "--activations", "int8-token"],
    "W4A8": ["--bits", "4", "--activations", "int8-token"],
    "ternary": ["--bits", "ternary", "--group-size", "64"],
    "ternary, A8": ["--bits", "ternary", "--group-size", "0", "--activations", "int8-token"],
    "mixed rules": ["--bits", "4", "--rule", "*.down_proj=w8", "--rule", "*.layers.0.*=keep"],
    "act-order": ["--bits", "4", "--act-order", "--method", "gptq", "--samples", "8"],
}
FORMATS = ("auto", "gptq", "gptq_v2", "awq", "gguf")


@dataclass(frozen=True)
class Engine:
    """title: of its column. python: its interpreter. key: what `check_engines.py` calls it."""

    title: str
    python: str
    key: str

    @classmethod
    def parse(cls, text: str) -> Engine:
        """Read TITLE=PYTHON:KEY."""
        title, _, rest = text.partition("=")
        python, _, key = rest.rpartition(":")
        if not (title and python and key):
            raise argparse.ArgumentTypeError(f"{text!r}: expected TITLE=PYTHON:KEY")
        return cls(title, python, key)


class Results:
    """What is known by now: key -> a JSON object, written after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, value: Any) -> Any:
        self.known[key] = value
        self.write()
        return value

    def write(self) -> None:
        self.path.write_text(json.dumps(self.known, indent=1))


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line of an output that has one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def run_llmq(*command: str) -> dict[str, Any]:
    """What a command of llmq prints, or `reason`."""
    full = [sys.executable, "-m", "llmq", *command, "--json"]
    done = subprocess.run(full, capture_output=True, text=True)
    found = last_object(done.stdout)
    if done.returncode or found is None:
        return {"reason": last_line(done.stderr)}
    return found


def last_line(errors: str) -> str:
    return (errors.strip().splitlines() or ["no output"])[-1][:300]


def make(model: str, work_dir: Path, row: str, format: str) -> dict[str, Any]:
    """Quantize into one folder, or say why a format does not hold the row."""
    name = f"{row.replace(' ', '-').replace(',', '')}-{format}"
    folder = work_dir / (f"{name}.gguf" if format == "gguf" else name)
    if format == "gguf":
        source = folder.with_name(name.replace("-gguf", "-auto"))
        if not source.exists():
            return {"reason": "there is no folder that it could be made of"}
        result = run_llmq("export", str(source), str(folder), "--format", "gguf")
    else:
        method = [] if "--method" in ROWS[row] else ["--method", "rtn"]
        options = [*ROWS[row], *method, "--format", format]
        result = run_llmq("quantize", model, str(folder), *options)
    if "reason" in result:
        return {"reason": result["reason"]}
    return {"folder": str(folder.resolve()), "format": result["format"]}


def reference(folder: str) -> Path:
    """What llmq computes with a folder, beside it."""
    return Path(f"{folder}.reference.json")


def answers(python: str, folders: list[str], options: list[str]) -> Iterator[dict[str, Any]]:
    """What `check_engines.py` prints of each folder, one after another as it comes."""
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    waiting = list(folders)
    while waiting:
        command = [python, str(CHECK), *waiting, *options]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            for line in _lines(process):
                if line.startswith("{"):
                    yield {**json.loads(line), "folder": waiting.pop(0)}
            process.wait()
            errors.seek(0)
            told = last_line(errors.read())
        if waiting:
            reason = f"the process ended ({process.returncode}): {told}"
            yield {"folder": waiting.pop(0), "result": "refused", "reason": reason}


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines that a process prints; it is ended when none comes for `SECONDS`."""
    assert process.stdout is not None
    while True:
        timer = Timer(SECONDS, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def shorten(text: str) -> str:
    return text if len(text) <= 190 else f"{text[:187].rstrip()}..."


class Notes:
    """Numbered reasons of refusals. Those that differ in numbers and paths alone are one."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}  # without numbers and paths -> the first such reason

    def number(self, engine: str, reason: str, folder: str) -> int:
        text = f"{engine}: {reason.replace(folder, 'FOLDER')}"
        key = re.sub(r"\d+", "", text)[:80]
        self.texts.setdefault(key, text)
        return list(self.texts).index(key) + 1

    def lines(self) -> list[str]:
        """Items of a list, in lines of a hundred columns."""
        items = (f"- ({n}) {text}" for n, text in enumerate(self.texts.values(), 1))
        return [textwrap.fill(shorten(item), 100, subsequent_indent="  ") for item in items]


def cell(result: dict[str, Any]) -> str:
    """What stands in the table of a result that is no refusal: in brackets the largest difference
    of a log-probability."""
    return f"{result['result']} ({result['worst']:.2g})"


def table(results: Results, engines: list[Engine], dtype: str) -> str:
    """Markdown, with the reasons of refusals below."""
    titles = [engine.title for engine in engines]
    lines = [f"| row | format | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    notes = Notes()
    for row, format in ((row, format) for row in ROWS for format in FORMATS):
        made = results.known.get(f"{row} / {format}")
        if made is None or "folder" not in made:
            continue
        cells = []
        for engine in engines:
            result = made.get(f"{engine.title} {dtype}")
            if result is None:
                cells.append("")
            elif result["result"] == "refused":
                number = notes.number(engine.title, result["reason"], made["folder"])
                cells.append(f"refused ({number})")
            else:
                cells.append(cell(result))
        lines.append(f"| {row} | {made['format']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes.lines()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--engine", type=Engine.parse, action="append", default=[], dest="engines")
    parser.add_argument("--row", choices=ROWS, action="append", dest="rows")
    parser.add_argument("--format", choices=FORMATS, action="append", dest="formats")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    results = Results(args.work_dir / "results.json")
    keys = [(row, format) for format in args.formats or FORMATS for row in args.rows or ROWS]
    for row, format in keys:
        if (key := f"{row} / {format}") not in results.known:
            made = results.keep(key, make(args.model, args.work_dir, row, format))
            print(f"{key}: {made}", file=sys.stderr, flush=True)
    asked = [results.known[f"{row} / {format}"] for row, format in keys]
    by_folder = {made["folder"]: made for made in asked if "folder" in made}
    missing = [folder for folder in by_folder if not reference(folder).exists()]
    for written in answers(sys.executable, missing, ["--write"]):
        print(written, file=sys.stderr, flush=True)
    for engine in args.engines:
        name = f"{engine.title} {args.dtype}"
        waiting = [folder for folder, made in by_folder.items() if name not in made]
        for found in answers(
            engine.python, waiting, ["--engine", engine.key, "--dtype", args.dtype]
        ):
            by_folder[found["folder"]][name] = found
            results.write()
            told = found["reason"] if found["result"] == "refused" else cell(found)
            print(f"{Path(found['folder']).name}: {engine.title}: {told}", file=sys.stderr)
    print(table(results, args.engines, args.dtype))


if __name__ == "__main__":
    main()
