"""Which engine computes what llmq computes, for every kind of result, as a table in Markdown.

    python scripts/engine_matrix.py MODEL WORK_DIR --engine vllm=VLLM_PYTHON:vllm [--engine ...]

MODEL is quantized by plain rounding into one folder for each row and format below WORK_DIR, and
`scripts/check_engines.py` runs each folder through every engine. An engine is given as
TITLE=PYTHON:KEY, the interpreter of the environment it is installed in and its key in
`check_engines.py`. What was run before is kept in WORK_DIR/results.json and not run again, so that
an interrupted run continues and another engine can be added later.

Cells: `equal`; `differs by X`, the largest difference of a log-probability; or `refused`, with the
engine's words below the table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECK = Path(__file__).with_name("check_engines.py")
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
        self.path.write_text(json.dumps(self.known, indent=1))
        return value


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line of an output that has one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def run(command: list[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {SECONDS} s"
    return done.returncode, done.stdout, done.stderr


def make(model: str, work_dir: Path, row: str, format: str) -> dict[str, Any]:
    """Quantize into one folder, or say why a format does not hold the row."""
    name = f"{row.replace(' ', '-').replace(',', '')}-{format}"
    folder = work_dir / (f"{name}.gguf" if format == "gguf" else name)
    if format == "gguf":
        source = make_base(model, work_dir, row)
        command = ["export", str(source), str(folder), "--format", "gguf", "--json"]
    else:
        method = [] if "--method" in ROWS[row] else ["--method", "rtn"]
        command = ["quantize", model, str(folder), *ROWS[row], *method, "--format", format]
        command.append("--json")
    code, output, errors = run([sys.executable, "-m", "llmq", *command])
    result = last_object(output)
    if code or result is None:
        return {"reason": (errors.strip().splitlines() or ["no output"])[-1]}
    code, _, errors = run([sys.executable, str(CHECK), str(folder), "--write"])
    if code:
        return {"reason": (errors.strip().splitlines() or ["no reference"])[-1]}
    return {"folder": str(folder), "format": result["format"]}


def make_base(model: str, work_dir: Path, row: str) -> Path:
    """The folder that an export starts from."""
    folder = work_dir / f"{row.replace(' ', '-').replace(',', '')}-auto"
    if not folder.exists():
        make(model, work_dir, row, "auto")
    return folder


def check(engine: Engine, folder: str, dtype: str) -> dict[str, Any]:
    command = [engine.python, str(CHECK), folder, "--engine", engine.key, "--dtype", dtype]
    _, output, errors = run(command)
    found = last_object(output)
    if found is not None:
        return found
    lines = errors.strip().splitlines() or ["no output"]
    return {"result": "refused", "reason": lines[-1][:300]}


def cell(result: dict[str, Any]) -> str:
    if result["result"] == "differs":
        return f"differs by {result['worst']:.2g}"
    return str(result["result"])


def table(results: Results, engines: list[Engine], dtype: str) -> str:
    """Markdown, with the reasons of refusals below."""
    titles = [engine.title for engine in engines]
    lines = [f"| row | format | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    reasons: dict[str, list[str]] = {}
    for key, made in results.known.items():
        row, _, format = key.partition(" / ")
        if "folder" not in made:
            if format != "auto":
                continue
            lines.append(f"| {row} | {made['reason']} |")
            continue
        cells = []
        for engine in engines:
            result = made.get(f"{engine.title} {dtype}")
            cells.append("" if result is None else cell(result))
            if result is not None and result["result"] == "refused":
                reasons.setdefault(f"{engine.title}: {result['reason']}", []).append(key)
        lines.append(f"| {row} | {made['format']} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {reason} ({'; '.join(keys)})" for reason, keys in reasons.items()]
    return "\n".join(lines)


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
    for row in args.rows or ROWS:
        for format in args.formats or FORMATS:
            key = f"{row} / {format}"
            made = results.known.get(key) or results.keep(
                key, make(args.model, args.work_dir, row, format)
            )
            for engine in args.engines:
                name = f"{engine.title} {args.dtype}"
                if "folder" in made and name not in made:
                    made[name] = check(engine, made["folder"], args.dtype)
                    results.keep(key, made)
                    print(f"{key}: {engine.title}: {cell(made[name])}", file=sys.stderr, flush=True)
    print(table(results, args.engines, args.dtype))


if __name__ == "__main__":
    main()
