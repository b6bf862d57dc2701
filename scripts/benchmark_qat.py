"""What the quantizers cost in training: time of a fine-tuning step through them against a plain
one, with the same loss and no teacher.

    python scripts/benchmark_qat.py tiny
    python scripts/benchmark_qat.py MODEL --device cuda --batch-size 16 --sequence-length 1024

Forward, backward and AdamW on random tokens; the models take turns, step by step, so that whatever
else the machine does hits all of them; medians."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import llmq
from llmq.grid.spec import ActSpec
from llmq.qat.losses import LossWeights
from llmq.qat.student import Student
from llmq.recipe import Recipe

KINDS = {"plain": None, "w4g128": ActSpec(), "w4g128, INT8 activations": ActSpec("int8-token")}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def student_of(model_name: str, activations: ActSpec | None, device: str) -> Student:
    """A model in training that starts from plain rounding, or as it is where nothing is to be
    quantized."""
    model = llmq.load(model_name, dtype="float32")
    if activations is not None:
        llmq.prepare_qat(model, Recipe.uniform("w4g128", method="rtn", activations=activations))
    return Student(model.to(device).train(), None, LossWeights(kl=0, ce=1))


def stepper(student: Student, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """A function that takes one optimizer step and returns its seconds."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    device = tokens.device.type

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = student(tokens)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    print(
        f"{args.batch_size} x {args.sequence_length} tokens, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n| | seconds per step | "
        "times plain |\n|---|---|---|"
    )
    for precision, dtype in PRECISIONS.items():
        steps = {}
        for name, activations in KINDS.items():
            student = student_of(args.model, activations, args.device)
            vocabulary = student.model.config.get_text_config().vocab_size
            tokens = torch.randint(
                vocabulary,
                (args.batch_size, args.sequence_length),
                generator=torch.Generator().manual_seed(0),
            ).to(args.device)
            steps[name] = stepper(student, tokens, dtype)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(args.repeats + 1):
            for name, step in steps.items():
                seconds = step()
                if repeat:  # the first one warms up
                    times[name].append(seconds)
        plain = statistics.median(times["plain"])
        for name, values in times.items():
            print(
                f"| {precision}, {name} | {statistics.median(values):.3f} | "
                f"{statistics.median(values) / plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
