"""What fine-tuning through the quantizer gives over PTQ: every rung of the ladder on a model and
texts, and the claims that people make of QAT, each with its interval.

    python scripts/qat_table.py tiny WORK_DIR --steps 100
    python scripts/qat_table.py MODEL WORK_DIR --train FILE --text NAME=FILE:60 --steps 120 \\
        --scheme w2 ternary w4a8kv8 --init blockwise --trained-tokens 2e12
    python scripts/qat_table.py --page WORK_DIR WORK_DIR ...

The first rows are full precision, and full precision fine-tuned on the same tokens: the control
without which a gain of QAT could not be told from a gain of more training. QAT is taught by the
source, or by the control with `--teacher control`. With `--train generated` there is no control:
the text is the model's own. Evaluation in float32, quantized activations included. Results go to
WORK_DIR/results.jsonl, a line each, and are not computed again while everything that decides them
is the same; a run that was interrupted goes on, without a time.
--page prints the claims of several folders side by side."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from qat_rows import (
    ABOUT,
    CONTROL,
    RESULTS,
    Run,
    against,
    page,
    percent,
    samples,
    table,
    written,
)
from quality_runs import Text, figures_of, hash_of_json, hash_of_model
from quality_table import machine

import llmq
from llmq.cards.versions import versions
from llmq.commands.options import method_name
from llmq.grid.spec import PER_TENSOR, ActSpec, QuantSpec
from llmq.models.identity import model_name, source_name
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.job import prepare
from llmq.ptq.precision import usual_precision
from llmq.ptq.run import quantize_folder
from llmq.qat.job import QATJob, prepare_job
from llmq.qat.losses import LossWeights
from llmq.qat.run import fine_tune, train
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings, Scheme
from llmq.recipe import Recipe

SCHEMES = ("w8a8", "w4", "w3", "w2", "ternary", "w4a8kv8")
BITNET = "bitnet"  # ternary, one scale a matrix, the mean magnitude; INT8 activations
PTQ_METHODS = ("rtn", "gptq", "blockwise")
GENERATED = "generated"
SAMPLE_TOKENS, TEMPERATURE = 48, 0.7


def scheme_of(name: str) -> Scheme:
    """The schemes of the table have groups of 64 at 4 bits and fewer, with zero points at 3 and
    2."""
    if name == BITNET:
        return Scheme(QuantSpec("ternary", PER_TENSOR), "int8-token")
    scheme = Scheme.parse(name)
    if scheme.weights.bits > 4:
        return scheme
    is_symmetric = scheme.weights.code in ("ternary", "int4")
    return replace(scheme, weights=replace(scheme.weights, group_size=64, symmetric=is_symmetric))


class Ladder:
    """One model, with everything that is the same for all runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = resolve(args.model)
        self.work_dir: Path = args.work_dir
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.texts = {
            text.name: text.windows(self.folder, args.window_length) for text in args.texts
        }
        self.model_hash = hash_of_model(self.folder)
        (self.work_dir / ABOUT).write_text(json.dumps(self._about(), indent=1))

    def runs(self) -> Iterator[Run]:
        if self.args.train != GENERATED:
            yield Run(CONTROL)
        for scheme in self.args.schemes:
            for method in ("rtn",) if scheme == BITNET else self.args.ptq:
                yield Run("ptq", scheme, method)
            yield Run("qat", scheme, "rtn" if scheme == BITNET else self.args.init)

    def result(self, run: Run) -> dict[str, Any]:
        """One result, from the file or new."""
        key = self._key(run)
        path = self.work_dir / RESULTS
        lines = path.read_text().splitlines() if path.exists() else []
        for line in map(json.loads, lines):
            if line["key"] == key:
                return line
        folder = self._folder(run)
        was_begun = any(self.work_dir.glob(f"*{folder.name}*"))
        started, before = time.monotonic(), time.process_time()
        about = self._make(run, folder)
        took = {
            "from_start": not was_begun,
            "wall_seconds": round(time.monotonic() - started, 1),
            "processor_seconds": round(time.process_time() - before, 1),
        }
        conditions = {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        n_bytes = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
        measured = {"bytes": n_bytes, "figures": self._measured(folder)}
        if self.args.prompt:
            measured["sample"] = self.sample(folder)
        result = {"key": key, "run": asdict(run), **conditions, "took": took, **about, **measured}
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if not self.args.keep and run.kind != CONTROL:  # which may be a teacher
            shutil.rmtree(folder)
        return result

    def sample(self, folder: Path) -> str:
        """What a model writes behind the prompt."""
        return llmq.generate(
            str(folder), self.args.prompt, SAMPLE_TOKENS, temperature=TEMPERATURE, seed=0
        )

    def _key(self, run: Run) -> dict[str, Any]:
        """Everything that decides a result but the code."""
        args = self.args
        trained = {
            "steps": args.steps,
            "batch": [args.batch_size, args.sequence_length],
            "train": source_name(args.train),
            "precision": args.precision,
            "teacher": args.teacher,
            "control_rate": args.control_rate,
            **({} if args.device == "cpu" else {"device": args.device}),
        }
        return {
            "model_sha256": self.model_hash,
            "texts": {name: text.identity()["tokens_sha256"] for name, text in self.texts.items()},
            "run": str(run),
            "calibration": source_name(args.calibration or args.train),
            "seed": args.seed,
            "versions": versions(),
            "prompt": args.prompt,
            **({} if run.kind == "ptq" else trained),
        }

    def _make(self, run: Run, folder: Path) -> dict[str, Any]:
        """Write the model of a run. Returns what its report says that figures do not."""
        if run.kind == CONTROL:
            self._tune(folder)
            return {}
        scheme = scheme_of(run.scheme)
        if run.kind == "ptq":
            self._quantize(scheme, run.method, folder)
            return {}
        report = fine_tune(self._job(self._settings(scheme, run.method)), folder, overwrite=True)
        kept = ("shipped", "held_out", "verdict", "first_loss", "last_loss", "seconds")
        return {name: report[name] for name in kept}

    def _folder(self, run: Run) -> Path:
        return self.work_dir / f"{run}-{hash_of_json(self._key(run))[:8]}"

    def _settings(self, scheme: Scheme, init: str) -> QATSettings:
        args = self.args
        is_bitnet = scheme == scheme_of(BITNET)
        return QATSettings(
            scheme,
            quantizer="absmean" if is_bitnet else "lsq",
            phases=Phases(gradual=0.1 if is_bitnet else 0.0),
            init=init,
            max_steps=args.steps,
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            seed=args.seed,
            precision=args.precision,
        )

    def _job(self, settings: QATSettings) -> QATJob:
        teacher = str(self._folder(Run(CONTROL))) if self.args.teacher == CONTROL else None
        return self._prepared(settings, teacher)

    def _prepared(self, settings: QATSettings, teacher: str | None = None) -> QATJob:
        args = self.args
        return prepare_job(
            args.model, settings, train=args.train, teacher=teacher, device=args.device
        )

    def _tune(self, folder: Path) -> None:
        """The full-precision model, fine-tuned on the same tokens with cross entropy."""
        plain = replace(
            self._settings(Scheme.parse("w8"), "rtn"),
            loss=LossWeights(kl=0, ce=1),
            lr_weights=self.args.control_rate,
        )
        job = self._prepared(plain)
        model = llmq.load(self.args.model, dtype="float32")
        assert job.windows is not None
        work = folder.with_name(f"{folder.name}-work")
        work.mkdir(exist_ok=True)
        train(model, job, job.windows, work)
        shutil.rmtree(work)
        model.to("cpu", load_config(job.model_dir).dtype).save_pretrained(folder)
        load_tokenizer(job.model_dir).save_pretrained(folder)

    def _quantize(self, scheme: Scheme, method: str, folder: Path) -> None:
        recipe = Recipe.uniform(
            scheme.weights,
            method=method,
            samples=128,
            sequence_length=self.args.sequence_length,
            seed=self.args.seed,
            activations=ActSpec(scheme.activations, scheme.kv_bits),
        )
        calibration = self.args.calibration or self.args.train
        job = prepare(self.args.model, recipe, calibration=calibration)
        quantize_folder(job, folder, overwrite=True, device=self.args.device)

    def _measured(self, folder: Path) -> dict[str, Any]:
        base, quant = (
            llmq.load(each, dtype="float32").to(self.args.device)
            for each in (self.args.model, folder)
        )
        return {name: figures_of(base, quant, text) for name, text in self.texts.items()}

    def _about(self) -> dict[str, Any]:
        args = self.args
        stored = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return {
            "model": model_name(self.folder),
            "bytes": stored,
            "tokens": args.steps * args.batch_size * args.sequence_length,
            "trained_tokens": args.trained_tokens,
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("work_dir", type=Path, nargs="?", metavar="WORK_DIR")
    parser.add_argument("--page", type=Path, nargs="+", metavar="WORK_DIR")
    parser.add_argument("--train", default="bundled", help="as llmq qat takes it")
    parser.add_argument("--text", type=Text.parse, action="append", dest="texts")
    parser.add_argument(
        "--calibration",
        help="text of the PTQ rows (default: the training text, on which QAT's own start is "
        "calibrated too)",
    )
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=method_name, default="gptq")
    parser.add_argument("--teacher", choices=("source", CONTROL), default="source")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="as llmq qat has it")
    parser.add_argument(
        "--control-rate", type=float, default=5e-5, help="peak learning rate of the control"
    )
    parser.add_argument(
        "--scheme",
        nargs="+",
        default=SCHEMES,
        dest="schemes",
        help="as llmq qat takes them, or bitnet",
    )
    parser.add_argument("--ptq", nargs="*", type=method_name, default=PTQ_METHODS)
    parser.add_argument("--trained-tokens", type=float, help="of the model's own training")
    parser.add_argument("--prompt", help="for samples of what the models write")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="make these rows, such as control")
    parser.add_argument("--keep", action="store_true", help="the folders that were written")
    args = parser.parse_args()
    if args.page is None and args.work_dir is None:
        parser.error("expected MODEL WORK_DIR, or --page WORK_DIR ...")
    if args.train == GENERATED and (args.teacher == CONTROL or (args.ptq and not args.calibration)):
        parser.error(
            "--train generated has no control to be the teacher and no text for PTQ: give "
            "--teacher source, and --calibration FILE or --ptq without methods"
        )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or usual_precision(args.device)
    args.texts = args.texts or [Text("bundled", "bundled", 200)]
    return args


def main() -> None:
    args = parse_arguments()
    if args.page:
        print(page(args.page))
        return
    ladder = Ladder(args)
    results = {}
    for run in ladder.runs():
        if args.only and str(run) not in args.only:
            continue
        result = results[str(run)] = ladder.result(run)
        print(f"{run}: {percent(against(result, None))}", file=sys.stderr, flush=True)
    print(table(results, list(ladder.texts)))
    if args.prompt:
        print(samples({"full precision": ladder.sample(ladder.folder), **written(results)}))
    print(f"\n{page([args.work_dir])}")


if __name__ == "__main__":
    main()
