"""What each tool and method costs a model, on the same calibration tokens and evaluation windows:
the project's own check of quality.

    python scripts/quality_table.py tiny WORK_DIR
    bash scripts/install_peers.sh PEERS
    python scripts/quality_table.py MODEL WORK_DIR --calibration FILE --text NAME=FILE:60 \\
        --tool rtn --tool gptq --tool 'blockwise:{"iterations": 200}' \\
        --tool llm-compressor --tool gptqmodel --tool autoround:default --tool autoround:best \\
        --peers PEERS --spec w4g64 w3g64-asym --seeds 3

--tool is a method of llmq, or a peer in an environment of its own: NAME, or NAME:{JSON} with
options (fields of llmq's recipe, or what `quantize_with.py` names), or the name of one of its
recipes (autoround:light, :default, :best). --evaluate NAME=FOLDER measures a folder that somebody
wrote already, in the table of the only --spec.

Each run is a process of its own, whose wall time, processor time and peak memory are taken, start
and imports included. Then llmq loads what was written, whoever wrote it, and compares it in float32
with the source, window by window. Head and embeddings stay in full precision, unless options of
llmq say otherwise.

Results go to WORK_DIR/results.jsonl, a line each, and are not computed again while everything that
decides them is the same: model, tool and options, spec, seed, tokens of calibration and evaluation,
threads, versions of the tool, torch and transformers, and for llmq's methods the code that they run
(comments and docstrings aside). --known FILE takes lines of earlier runs, such as those in
scripts/results. NAME@LABEL keeps results of llmq under a label instead: `gptq@old
gptq` is how two states of the code stand in one table, and how a change that cannot matter costs no
new run. A run that fails is a line with its error; the others go on, and the script ends with 1."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality_figures import Row, remarks, table
from quality_runs import (
    LLMQ_PACKAGES,
    MEASURE,
    PEER_PACKAGES,
    QUANTIZE,
    RunError,
    Text,
    Tool,
    emptied,
    hash_of_code,
    hash_of_json,
    hash_of_model,
    measure,
    run_measured,
    versions,
)

from llmq.errors import LlmqError
from llmq.models.identity import model_name, source_name
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.calibration import windows
from llmq.ptq.methods import METHODS
from llmq.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


class Benchmark:
    """One model, with everything that is the same for all runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = resolve(args.model)
        self.work_dir: Path = args.work_dir
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.results_path = self.work_dir / "results.jsonl"
        self.texts = {
            text.name: text.windows(self.folder, args.window_length) for text in args.texts
        }
        self.model_hash = hash_of_model(self.folder)
        self._versions_of: dict[str, dict[str, str | None]] = {}
        self._tokens_of: dict[int, tuple[Path, str]] = {}

    def runs(self) -> Iterator[tuple[Tool, str, int]]:
        """Seeds inside, so that an interrupted benchmark has whole rows."""
        for spec in self.args.specs:
            for tool in self.args.tools:
                for seed in range(self.args.seeds if tool.needs_seeds else 1):
                    yield tool, spec, seed

    def result(self, tool: Tool, spec: str, seed: int) -> dict[str, Any]:
        """One result, from the file or new. Raises `RunError`, which is in the file then."""
        try:
            key = self._key(tool, spec, seed)
        except RunError as error:
            self._write({"key": {"tool": str(tool), "spec": spec}, "error": str(error)})
            raise
        known = [line for line in self._lines() if line["key"] == key and "error" not in line]
        if known:
            return known[-1]
        run_dir = self.work_dir / f"{tool.name}-{spec}-{seed}-{hash_of_json(key)[:8]}"
        about = {"key": key, "model": model_name(self.folder), **self._conditions()}
        try:
            result = {**about, **self._run(tool, spec, seed, run_dir)}
        except RunError as error:
            self._write({**about, "error": str(error)})
            raise
        self._write(result)
        return result

    @cached_property
    def _code_hash(self) -> str:
        return hash_of_code(ROOT)

    def _key(self, tool: Tool, spec: str, seed: int) -> dict[str, Any]:
        """Everything that decides a result."""
        key = {
            "measure": MEASURE,
            "model_sha256": self.model_hash,
            "texts": {name: text.identity()["tokens_sha256"] for name, text in self.texts.items()},
            "tool": tool.name,
            "spec": spec,
        }
        if tool.folder:
            return {**key, "folder_sha256": hash_of_model(Path(tool.folder))}
        if not tool.is_peer:
            key["code"] = tool.label or self._code_hash
        return {
            **key,
            "options": tool.options,
            "seed": seed,
            "calibration_sha256": self._tokens(seed)[1],
            "threads": self.args.threads,
            "versions": self._versions(tool),
        }

    def _run(self, tool: Tool, spec: str, seed: int, run_dir: Path) -> dict[str, Any]:
        """In a folder of its own, which stays after a failure."""
        if tool.folder:
            return {"took": {}, **measure(self.folder, Path(tool.folder), self.texts)}
        emptied(run_dir)
        command = [
            *[self._python(tool), str(QUANTIZE), tool.name if tool.is_peer else "llmq"],
            *[str(self.folder), str(run_dir / "written"), "--spec", spec, "--seed", str(seed)],
            *["--tokens", str(self._tokens(seed)[0]), "--options", self._options(tool)],
        ]
        took = run_measured(command, run_dir / "log", self.args.threads)
        result = {"took": took, **measure(self.folder, run_dir / "written", self.texts)}
        if not self.args.keep:
            shutil.rmtree(run_dir)
        return result

    def _options(self, tool: Tool) -> str:
        return json.dumps(tool.options if tool.is_peer else {"method": tool.name, **tool.options})

    def _python(self, tool: Tool) -> str:
        if not tool.is_peer:
            return sys.executable
        given = dict(each.split("=", 1) for each in self.args.pythons)
        if tool.name in given:
            return given[tool.name]
        found = self.args.peers and self.args.peers / tool.name / "bin" / "python"
        if found and found.exists():
            return str(found)
        raise RunError(
            f"{tool.name}: no interpreter; make its environment by 'bash scripts/install_peers.sh "
            f"DIR {tool.name}' and give --peers DIR, or --python {tool.name}=PATH"
        )

    def _versions(self, tool: Tool) -> dict[str, str | None]:
        name = tool.name if tool.is_peer else "llmq"
        if name not in self._versions_of:
            packages = PEER_PACKAGES[name] if tool.is_peer else LLMQ_PACKAGES
            self._versions_of[name] = versions(self._python(tool), packages)
        return self._versions_of[name]

    def _tokens(self, seed: int) -> tuple[Path, str]:
        """The file of a seed's calibration tokens, and its hash."""
        if seed not in self._tokens_of:
            shape = {"samples": self.args.samples, "sequence_length": self.args.sequence_length}
            recipe = Recipe.uniform("w4", seed=seed, **shape)
            tokenizer, config = load_tokenizer(self.folder), load_config(self.folder)
            cut = windows(tokenizer, config, recipe, self.args.calibration, held_out=False)
            path = self.work_dir / f"tokens-{cut.sha256[:12]}.json"
            path.write_text(json.dumps(cut.tokens.tolist()))
            self._tokens_of[seed] = path, cut.sha256
        return self._tokens_of[seed]

    def _conditions(self) -> dict[str, Any]:
        return {
            "calibration": source_name(self.args.calibration),
            "sequences": [self.args.samples, self.args.sequence_length],
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _lines(self) -> list[dict[str, Any]]:
        paths = [path for path in (*self.args.known, self.results_path) if path.exists()]
        texts = [path.read_text() for path in paths]
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def _write(self, line: dict[str, Any]) -> None:
        with self.results_path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def machine() -> str:
    """The processor and how many there are."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def heading(benchmark: Benchmark, result: dict[str, Any]) -> str:
    """The conditions of a table, a sentence of each kind."""
    args = benchmark.args
    texts = []
    for name, text in benchmark.texts.items():
        full = result["figures"][name]["base_perplexity"]
        n_windows, length = text.tokens.shape
        texts.append(f"{name}, {n_windows} windows of {length} (full precision {full:.3f})")
    has_bos = any(text.bos == "every-window" for text in benchmark.texts.values())
    special = "each begun with BOS" if has_bos else "without special tokens"
    seeds = "one seed" if args.seeds == 1 else f"{args.seeds} seeds"
    return (
        f"{result['model']}, calibrated on {args.samples} x {args.sequence_length} tokens of "
        f"{source_name(args.calibration)}, {seeds}; measured on {'; '.join(texts)}, in float32 "
        f"{special}. {result['machine']}, {args.threads} threads a run."
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("work_dir", type=Path, metavar="WORK_DIR")
    parser.add_argument("--calibration", default="bundled", help="as llmq quantize takes it")
    parser.add_argument("--text", type=Text.parse, action="append", dest="texts")
    parser.add_argument("--tool", type=Tool.parse, action="append", dest="tools", default=[])
    parser.add_argument("--evaluate", type=Tool.written, action="append", default=[])
    parser.add_argument("--spec", nargs="+", default=["w3g64-asym"], dest="specs")
    parser.add_argument("--peers", type=Path, help="where install_peers.sh made environments")
    parser.add_argument(
        "--python", action="append", default=[], dest="pythons", metavar="PEER=PATH"
    )
    parser.add_argument(
        "--known", type=Path, nargs="+", default=[], help="results.jsonl of others, taken as ours"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run")
    parser.add_argument("--keep", action="store_true", help="the folders that were written")
    args = parser.parse_args(argv)
    if args.evaluate and len(args.specs) != 1:
        parser.error("--evaluate takes one --spec: that of the table in which the folders stand")
    args.texts = args.texts or [Text("bundled", "bundled", 16)]
    if not (args.tools or args.evaluate):
        args.tools = [Tool(name) for name in METHODS]
    args.tools += args.evaluate
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        benchmark = Benchmark(args)
    except LlmqError as error:
        sys.exit(f"quality_table.py: {error}")
    torch.set_num_threads(args.threads)
    found: dict[tuple[str, Tool], list[dict[str, Any]]] = {}
    failures = []
    for tool, spec, seed in benchmark.runs():
        try:
            result = benchmark.result(tool, spec, seed)
        except RunError as error:
            failures.append(f"{tool} at {spec}, seed {seed}: {error}")
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
            continue
        found.setdefault((spec, tool), []).append(result)
        gap = Row(spec, tool.name, str(tool), [result]).gap
        print(f"{spec} {tool} seed {seed}: gap {gap:.4f}", file=sys.stderr, flush=True)

    rows = [Row(spec, tool.name, str(tool), results) for (spec, tool), results in found.items()]
    if rows:
        print(heading(benchmark, rows[0].results[0]))
    for spec in dict.fromkeys(row.spec for row in rows):
        print(f"\n{table(spec, [row for row in rows if row.spec == spec])}")
    for remark in remarks(rows):
        print(f"\n{remark}")
    if failures:
        sys.exit(
            "\n".join([f"{len(failures)} runs failed, the others are in the table:", *failures])
        )


if __name__ == "__main__":
    main()
