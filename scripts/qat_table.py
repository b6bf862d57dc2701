"""What fine-tuning through the quantizer gives over PTQ, as a table: perplexity and size of every
rung of the ladder on one model and text.

    python scripts/qat_table.py tiny --steps 100
    python scripts/qat_table.py MODEL --train FOLDER --eval eval.txt --sequence-length 256 \\
        --steps 300 --out table.json

The first rows are full precision, and full precision fine-tuned on the same tokens: the control
without which a gain of QAT could not be told from a gain of more training. The better of the two is
the teacher, and percentages are against it. Evaluation in float32 with the dequantized weights,
protocol `gptq`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llmq
from llmq.evaluation.perplexity import evaluate
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.qat.job import prepare_job
from llmq.qat.losses import LossWeights
from llmq.qat.run import fine_tune, train
from llmq.qat.settings import QATSettings, Scheme
from llmq.recipe import Recipe
from llmq.text.documents import load_documents
from llmq.text.windows import Windows, cut_windows

SCHEMES = ("w8", "w4", "w3", "w2", "ternary", "w4a8kv8")
PTQ_METHODS = ("rtn", "gptq", "blockwise")


def settings_of(args: argparse.Namespace, scheme: Scheme) -> QATSettings:
    return QATSettings(
        scheme,
        init=args.init,
        max_steps=args.steps,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=args.seed,
        precision=args.precision,
    )


def scheme_of(name: str) -> Scheme:
    """The schemes of the table have groups of 64 at 3 bits and fewer, with zero points at 3 and
    2."""
    scheme = Scheme.parse(name)
    if scheme.weights.bits >= 4:
        return scheme
    is_symmetric = scheme.weights.code == "ternary"
    return replace(scheme, weights=replace(scheme.weights, group_size=64, symmetric=is_symmetric))


def control(args: argparse.Namespace, folder: Path) -> None:
    """The full-precision model, fine-tuned on the same tokens with cross entropy; written to
    `folder`."""
    plain = replace(
        settings_of(args, Scheme.parse("w8")),
        loss=LossWeights(kl=0, ce=1),
        lr_weights=args.control_rate,
    )
    job = prepare_job(args.model, plain, train=args.train)
    model = llmq.load(args.model, dtype="float32")
    assert job.windows is not None
    (folder / "work").mkdir(parents=True)
    train(model, job, job.windows, folder / "work")
    shutil.rmtree(folder / "work")
    model.to(load_config(job.model_dir).dtype).save_pretrained(folder)
    load_tokenizer(job.model_dir).save_pretrained(folder)


def ptq(args: argparse.Namespace, scheme: Scheme, method: str, folder: Path) -> None:
    """The model quantized by a PTQ method with the scheme's weights, written to `folder`."""
    recipe = Recipe.uniform(
        scheme.weights,
        method=method,
        samples=128,
        sequence_length=args.sequence_length,
        seed=args.seed,
    )
    quantize_folder(prepare(args.model, recipe, calibration=args.calibration or args.train), folder)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass
class Table:
    """Rows as they are measured: printed at once, and written to `--out`.
    teacher_value: the perplexity that percentages are against, once it is known."""

    text: Windows
    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    teacher_value: float | None = None

    def add(self, weights: str, method: str, folder: Path, started: float, **more: Any) -> float:
        """Measure the model in a folder, which was begun to be made at `started`, in seconds of
        `time.perf_counter`. Returns its perplexity."""
        score = evaluate(llmq.load(folder, dtype="float32"), self.text)
        seconds = round(time.perf_counter() - started, 1)
        row = {
            "weights": weights,
            "method": method,
            "bytes": weight_bytes(folder),
            "seconds": seconds,
            **score.to_json(),
            **more,
        }
        self.rows.append(row)
        against = ""
        if self.teacher_value is not None:
            against = f"{100 * (score.value / self.teacher_value - 1):+.2f}%"
        low, high = score.ci95
        remark = "(the start: training lost)" if more.get("shipped") == "start" else ""
        print(
            f"{weights:12} {method:16} {score.value:8.3f} [{low:.2f}, {high:.2f}] {against:>8} "
            f"{row['bytes'] / 1e6:6.1f} MB {seconds:7.1f} s {remark}",
            flush=True,
        )
        self._write()
        return score.value

    def _write(self) -> None:
        if self.args.out is None:
            return
        n_tokens = self.args.steps * self.args.batch_size * self.args.sequence_length
        table = {"steps": self.args.steps, "tokens": n_tokens, "rows": self.rows}
        self.args.out.write_text(json.dumps(table, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", default="bundled")
    parser.add_argument("--eval", default="bundled")
    parser.add_argument(
        "--calibration",
        help=(
            "text that the PTQ rows are calibrated on (default: the training text, on which "
            "QAT's own start is calibrated too)"
        ),
    )
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", choices=PTQ_METHODS, default="gptq")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--control-rate", type=float, default=5e-5, help="peak learning rate of the control"
    )
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--ptq", nargs="*", choices=PTQ_METHODS, default=PTQ_METHODS)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    return parser.parse_args()


def windows_of(args: argparse.Namespace, model_dir: Path) -> Windows:
    """What all rows are measured on."""
    config, tokenizer = load_config(model_dir), load_tokenizer(model_dir)
    documents = load_documents(args.eval, "eval")
    text = cut_windows(documents, tokenizer, config, args.sequence_length)
    return replace(text, tokens=text.tokens[: args.max_windows])


def add_teacher(table: Table, model_dir: Path, folder: Path) -> str:
    """The rows in full precision. Returns the better model's folder."""
    plain = table.add("full", "as it is", model_dir, time.perf_counter())
    started = time.perf_counter()
    control(table.args, folder)
    tuned = table.add("full", "fine-tuned", folder, started)
    table.teacher_value = min(plain, tuned)
    return str(folder) if tuned < plain else str(table.args.model)


def add_ptq(table: Table, name: str, work: Path) -> None:
    """The rows of one scheme without training."""
    scheme, methods = scheme_of(name), tuple(table.args.ptq)
    if scheme.kv_bits:
        return
    for method in methods[:2] if scheme.weights.bits == 8 else methods:
        started, folder = time.perf_counter(), work / f"{name}-{method}"
        ptq(table.args, scheme, method, folder)
        table.add(str(scheme.weights), method, folder, started)


def add_qat(table: Table, name: str, teacher: str, work: Path) -> None:
    """The row of one scheme with training."""
    args, scheme, folder = table.args, scheme_of(name), work / f"{name}-qat"
    started = time.perf_counter()
    settings = settings_of(args, scheme)
    report = fine_tune(prepare_job(args.model, settings, train=args.train, teacher=teacher), folder)
    weights = name if scheme.kv_bits else str(scheme.weights)
    table.add(weights, "QAT", folder, started, shipped=report["shipped"])


def main() -> None:
    args = parse_arguments()
    model_dir = resolve(args.model)
    table = Table(windows_of(args, model_dir), args)
    with tempfile.TemporaryDirectory(prefix="llmq-") as work:
        teacher = add_teacher(table, model_dir, Path(work) / "control")
        for name in args.schemes:
            add_ptq(table, name, Path(work))
            # 8 bits are there to compare with: what PTQ loses at them is next to nothing, and
            # training would have nothing to win.
            if scheme_of(name).weights.bits != 8:
                add_qat(table, name, teacher, Path(work))


if __name__ == "__main__":
    main()
