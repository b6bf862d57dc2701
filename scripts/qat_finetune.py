"""Fine-tune a model through its quantizer: from a PTQ start to a packed checkpoint.

    python scripts/qat_finetune.py tiny out --scheme w2 --steps 50

Reads top to bottom as an example of the Python API; `llmq qat` is the command with all options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llmq
from llmq.commands.qat import budget_line
from llmq.commands.rendering import progress
from llmq.qat.job import prepare_job
from llmq.qat.run import fine_tune
from llmq.qat.settings import QATSettings, Scheme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", default="bundled")
    parser.add_argument("--scheme", default="w2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    args = parser.parse_args()

    # What to train: the grid of the weights, the length of the run. Learning rates follow from the
    # grid of each layer.
    settings = QATSettings(
        Scheme.parse(args.scheme),
        max_steps=args.steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
    )
    job = prepare_job(args.model, settings, train=args.train)
    print(budget_line(job))

    # PTQ start, training, freezing; the same call continues an interrupted run.
    with progress("qat") as bar:
        report = fine_tune(
            job,
            args.out,
            show=lambda title, done, total, remark: bar(done, total, f"{title} {remark}"),
        )
    for name, score in report["held_out"].items():
        print(f"held-out perplexity, {name}: {score['perplexity']:.3f}")
    print(f"shipped: {report['shipped']}")

    # A checkpoint like any other.
    model = llmq.load(args.out)
    print(
        f"{type(model).__name__} with {sum(buffer.nbytes for buffer in model.buffers()) / 1e6:.1f} "
        "MB of packed weights"
    )


if __name__ == "__main__":
    main()
