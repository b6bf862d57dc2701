"""Finding the fastest tiles: every candidate is checked against the exact product before it is
timed, in child processes.

An illegal access or a hanging kernel spoils the CUDA context of its process: everything after it
fails, too, and would be taken for "refused by the compiler". So candidates run in children that say
one line per candidate. One that dies costs the candidate it was at; the rest goes to a fresh one.

1. Checking: as many children as there are cores. Each compiles its share of the kernels (Triton
   keeps them on disk) and compares their outputs with a float32 product of the dequantized weight.
   What is wrong, or refused by the compiler, is never timed.
2. Timing: one child, alone on the GPU, which finds all kernels compiled. Three repeats for each
   candidate, then the fastest again with more, until the best is not just the luckiest."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmq.benchmark import kernels, timing
from llmq_kernels import PreparedWeight
from llmq_kernels.core.reference import fake_quantize_tokens
from llmq_kernels.triton import backend, tuning
from llmq_kernels.triton.choices import Chip, Choice, Problem, bucket, candidates, chip_of

ROOTS = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "kernels")]
FINALISTS = 4  # measured again at least
# Fused kernels differ little from tokens to tokens: these first, where most was left to gain.
FIRST_ROWS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Job:
    """What is to be tuned. kind: see `kernels.Kind`."""

    kind: str
    n: int
    k: int
    m: int
    choices: tuple[Choice, ...]

    def problem(self) -> Problem:
        """What its result is kept under."""
        kind = kernels.Kind(self.kind)
        spec = kind.spec
        n_groups = spec.n_groups(self.k) if spec.group_size else 1
        return Problem(
            "float" if kind.activations == "none" else "int8",
            spec.bits,
            spec.columns_per_group(self.k) if n_groups > 1 else 0,
            "bfloat16",
            self.n,
            self.k,
            bucket(self.m),
        )


@dataclass
class Report:
    """seconds: of each candidate that was timed, by problem. refused: candidates that were wrong or
    did not run, with the reason. not_reached: candidates that the time did not reach."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    not_reached: int = 0


def tune(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kinds: Sequence[kernels.Kind],
    device: torch.device,
    max_seconds: float,
) -> Report:
    """Measure the candidates of every problem and remember the fastest; problems that the time does
    not reach keep what they have."""
    started, chip = time.monotonic(), chip_of(device)
    jobs = _jobs(shapes, rows, kinds, chip)
    report = Report()
    good = _checked(jobs, device, started + 0.6 * max_seconds, report)
    left = [
        dataclasses.replace(job, choices=tuple(choice for choice in job.choices if choice in ok))
        for job, ok in zip(jobs, good, strict=True)
    ]
    seconds = _timed(left, device, started + max_seconds, report)
    for job, measured in zip(jobs, seconds, strict=True):
        if measured:
            tuning.keep(job.problem(), chip, measured)
            key = job.problem().key
            report.seconds[key] = {str(choice): value for choice, value in measured.items()}
    report.not_reached = sum(
        len(job.choices) - len(measured) for job, measured in zip(jobs, seconds, strict=True)
    ) - len(report.refused)
    return report


def _jobs(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kinds: Sequence[kernels.Kind],
    chip: Chip,
) -> list[Job]:
    """One per problem, what matters most first."""
    jobs: dict[str, Job] = {}
    first = [m for m in rows if m in FIRST_ROWS]
    for part in (first, [m for m in rows if m not in FIRST_ROWS]):
        for kind in kinds:
            for n, k in shapes:
                for m in part:
                    job = Job(kind.text, n, k, m, ())
                    jobs.setdefault(
                        job.problem().key, dataclasses.replace(job, choices=_all(job, chip))
                    )
    return list(jobs.values())


def _all(job: Job, chip: Chip) -> tuple[Choice, ...]:
    """What is used now, so that tuning never makes a product slower, and the candidates."""
    problem = job.problem()
    return tuple(dict.fromkeys((tuning.choose(problem, chip), *candidates(problem, chip))))


# --- the parent -----------------------------------------------------------------------------------


def _checked(
    jobs: Sequence[Job], device: torch.device, deadline: float, report: Report
) -> list[set[Choice]]:
    """The candidates of each job that gave the right product."""
    n_workers = max(min((os.cpu_count() or 2) - 2, 14), 1) if device.type == "cuda" else 1
    shares: list[list[tuple[int, Choice]]] = [[] for _ in range(n_workers)]
    worker_of: dict[tuple[str, Choice], int] = {}
    for index, job in enumerate(jobs):
        for choice in job.choices:
            # The same kernel for all shapes, so one worker compiles it for all.
            kernel = dataclasses.replace(choice, split_k=min(choice.split_k, 2))
            worker = worker_of.setdefault((job.kind, kernel), len(worker_of) % n_workers)
            shares[worker].append((index, choice))
    good: list[set[Choice]] = [set() for _ in jobs]

    def work(share: list[tuple[int, Choice]]) -> None:
        for index, choice, answer in _answers("check", jobs, share, device, deadline):
            if answer == "right":
                good[index].add(choice)
            else:
                report.refused[f"{jobs[index].problem().key} {choice}"] = answer

    threads = [threading.Thread(target=work, args=(share,)) for share in shares if share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return good


def _timed(
    jobs: Sequence[Job], device: torch.device, deadline: float, report: Report
) -> list[dict[Choice, float]]:
    """Seconds of each job's candidates."""
    seconds: list[dict[Choice, float]] = [{} for _ in jobs]
    work = [(index, choice) for index, job in enumerate(jobs) for choice in job.choices]
    for index, choice, answer in _answers("time", jobs, work, device, deadline):
        try:
            seconds[index][choice] = float(answer)
        except ValueError:
            report.refused[f"{jobs[index].problem().key} {choice}"] = answer
    return seconds


def _answers(
    step: str,
    jobs: Sequence[Job],
    work: Sequence[tuple[int, Choice]],
    device: torch.device,
    deadline: float,
) -> Iterator[tuple[int, Choice, str]]:
    """A child's answers; where it dies, that of its candidate is how, and another goes on."""
    left = list(work)
    while left and time.monotonic() < deadline:
        done: set[tuple[int, Choice]] = set()
        started: tuple[int, Choice] | None = None
        process = _child(step, jobs, left, device)
        timer = threading.Timer(max(deadline - time.monotonic(), 0), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            index, place, answer = json.loads(line)
            item = (index, Choice(**place))
            if answer is None:
                started = item
                continue
            done.add(item)
            yield *item, answer
        timer.cancel()
        code = process.wait()
        if time.monotonic() >= deadline:
            return
        if code and started is not None and started not in done:
            done.add(started)
            yield *started, f"its process ended with {code}"
        elif code and not done:
            raise RuntimeError(f"a child for the step '{step}' of tuning ended with {code}")
        left = [item for item in left if item not in done]
        if not code:
            return


def _child(
    step: str, jobs: Sequence[Job], work: Sequence[tuple[int, Choice]], device: torch.device
) -> subprocess.Popen[str]:
    path = os.pathsep.join([*ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "llmq.benchmark.tuner", step, str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    tasks = [
        {
            **dataclasses.asdict(dataclasses.replace(jobs[index], choices=())),
            "index": index,
            "choices": [dataclasses.asdict(choice) for where, choice in work if where == index],
        }
        for index in dict.fromkeys(index for index, _ in work)
    ]
    try:
        json.dump(tasks, process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died before it read: its exit code tells
    return process


# --- the child ------------------------------------------------------------------------------------


def _say(index: int, choice: Choice, answer: str | None) -> None:
    print(json.dumps([index, dataclasses.asdict(choice), answer]), flush=True)


def _is_alive(device: torch.device) -> bool:
    """Whether the CUDA context still works."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _try(index: int, choice: Choice, measure: Any, device: torch.device) -> str:
    """The answer for one candidate. Ends the process where the context is lost."""
    _say(index, choice, None)
    try:
        answer = str(measure(choice))
    except Exception as error:  # compilers raise many things; each is the reason for this candidate
        answer = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    _say(index, choice, answer)
    if not _is_alive(device):
        sys.stdout.flush()
        os._exit(3)
    return answer


@torch.no_grad()
def _check(job: Job, device: torch.device, index: int) -> None:
    """Say of each candidate whether its product is right."""
    kind = kernels.Kind(job.kind)
    weight = kernels.random_weight(kind, job.n, job.k, device)
    prepared = PreparedWeight(weight, torch.bfloat16, device)
    x = torch.randn(job.m, job.k, device=device, dtype=torch.bfloat16)
    seen = x.float() if kind.activations == "none" else fake_quantize_tokens(x)
    expected = seen @ weight.dequantize().T
    # The output and, at most, the weight are rounded to bfloat16; sums are kept in float32.
    most = 2 * 2.0**-8 + job.k * 2.0**-22

    def verdict(choice: Choice) -> str:
        out = backend.run(x, prepared.weight, prepared.state, None, choice)
        error = float((out.float() - expected).norm() / expected.norm())
        return "right" if error < most else f"a relative error of {error:.3g}, above {most:.3g}"

    for choice in job.choices:
        _try(index, choice, verdict, device)


@torch.no_grad()
def _time(job: Job, copies: list[PreparedWeight], device: torch.device, index: int) -> None:
    """Say the seconds of each candidate, and of the fastest ones once more, until the fastest of
    all is one of these."""
    x = torch.randn(job.m, job.k, device=device, dtype=torch.bfloat16)

    def seconds(choice: Choice, repeats: int) -> float:
        calls = [partial(backend.run, x, each.weight, each.state, None, choice) for each in copies]
        return timing.seconds(calls, device, repeats)

    answers = {
        choice: _try(index, choice, partial(seconds, repeats=3), device) for choice in job.choices
    }
    measured = {choice: float(answer) for choice, answer in answers.items() if _is_number(answer)}
    again: set[Choice] = set()
    while len(again) < len(measured):
        rest = [choice for choice in measured if choice not in again]
        best = min(rest, key=measured.__getitem__)
        if len(again) >= FINALISTS and measured[best] >= min(measured[each] for each in again):
            return
        again.add(best)
        answer = _try(index, best, partial(seconds, repeats=25), device)
        measured[best] = float(answer) if _is_number(answer) else math.inf


def _is_number(answer: str) -> bool:
    try:
        float(answer)
    except ValueError:
        return False
    return True


def main() -> None:
    step, device = sys.argv[1], torch.device(sys.argv[2])
    made: tuple[tuple[str, int, int], list[PreparedWeight]] | None = None
    for task in json.load(sys.stdin):
        index = task.pop("index")
        choices = tuple(Choice(**choice) for choice in task.pop("choices"))
        job = Job(**{**task, "choices": choices})
        if step == "check":
            _check(job, device, index)
            continue
        shape = (job.kind, job.n, job.k)
        if made is None or made[0] != shape:
            made = None  # the last shape's copies go before the next ones come
            kind = kernels.Kind(job.kind)
            made = (shape, kernels.prepared_copies(kind, job.n, job.k, device))
        _time(job, made[1], device, index)


if __name__ == "__main__":
    main()
