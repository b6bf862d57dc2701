"""What fine-tuning through the quantizer gives over PTQ, as a table: perplexity and size of every
rung of the ladder on one model and text.

    python scripts/qat_table.py tiny --steps 100 python scripts/qat_table.py MODEL --train FOLDER
    --eval eval.txt --sequence-length 256 --steps 300 --out table.json

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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
from llmq.text.windows import cut_windows

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
    coarse = scheme.weights.bits < 4
    return (
        replace(
            scheme,
            weights=replace(
                scheme.weights, group_size=64, symmetric=scheme.weights.code == "ternary"
            ),
        )
        if coarse
        else scheme
    )


def control(args: argparse.Namespace, folder: Path) -> PreTrainedModel:
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
    return llmq.load(folder, dtype="float32")


def ptq(args: argparse.Namespace, scheme: Scheme, method: str, folder: Path) -> PreTrainedModel:
    """The model quantized by a PTQ method with the scheme's weights."""
    recipe = Recipe.uniform(
        scheme.weights,
        method=method,
        samples=128,
        sequence_length=args.sequence_length,
        seed=args.seed,
    )
    quantize_folder(prepare(args.model, recipe, calibration=args.calibration or args.train), folder)
    return llmq.load(folder, dtype="float32")


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
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
    args = parser.parse_args()

    model_dir = resolve(args.model)
    text = cut_windows(
        load_documents(args.eval, "eval"),
        load_tokenizer(model_dir),
        load_config(model_dir),
        args.sequence_length,
    )
    text = replace(text, tokens=text.tokens[: args.max_windows])
    rows: list[dict[str, Any]] = []

    def note(
        weights: str, method: str, model: PreTrainedModel, folder: Path, started: float, **more: Any
    ) -> float:
        score = evaluate(model, text)
        rows.append(
            {
                "weights": weights,
                "method": method,
                "bytes": weight_bytes(folder),
                "seconds": round(time.perf_counter() - started, 1),
                **score.to_json(),
                **more,
            }
        )
        row = rows[-1]
        against = f"{100 * (score.value / teacher_value - 1):+.2f}%" if teacher_value else ""
        low, high = score.ci95
        remark = "(the start: training lost)" if more.get("shipped") == "start" else ""
        print(
            f"{weights:12} {method:16} {score.value:8.3f} [{low:.2f}, {high:.2f}] {against:>8} "
            f"{row['bytes'] / 1e6:6.1f} MB {row['seconds']:7.1f} s {remark}",
            flush=True,
        )
        if args.out:
            args.out.write_text(
                json.dumps(
                    {
                        "steps": args.steps,
                        "tokens": args.steps * args.batch_size * args.sequence_length,
                        "rows": rows,
                    },
                    indent=1,
                )
            )
        return score.value

    teacher_value = 0.0
    with tempfile.TemporaryDirectory(prefix="llmq-") as work:
        folder = Path(work)
        plain = note(
            "full",
            "as it is",
            llmq.load(args.model, dtype="float32"),
            model_dir,
            time.perf_counter(),
        )
        started = time.perf_counter()
        tuned = note(
            "full", "fine-tuned", control(args, folder / "control"), folder / "control", started
        )
        teacher, teacher_value = (
            (str(folder / "control"), tuned) if tuned < plain else (args.model, plain)
        )
        for name in args.schemes:
            scheme = scheme_of(name)
            # 8 bits are there to compare with: what PTQ loses at them is next to nothing, and
            # training would have nothing to win.
            is_reference = scheme.weights.bits == 8
            for method in () if scheme.kv_bits else args.ptq[:2] if is_reference else args.ptq:
                started = time.perf_counter()
                note(
                    str(scheme.weights),
                    method,
                    ptq(args, scheme, method, folder / f"{name}-{method}"),
                    folder / f"{name}-{method}",
                    started,
                )
            if is_reference:
                continue
            started = time.perf_counter()
            report = fine_tune(
                prepare_job(
                    args.model, settings_of(args, scheme), train=args.train, teacher=teacher
                ),
                folder / f"{name}-qat",
            )
            note(
                name if scheme.kv_bits else str(scheme.weights),
                "QAT",
                llmq.load(folder / f"{name}-qat", dtype="float32"),
                folder / f"{name}-qat",
                started,
                shipped=report["shipped"],
            )


if __name__ == "__main__":
    main()
