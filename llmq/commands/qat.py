"""`llmq qat MODEL OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import jobs, options, pushing, qat_options, rendering
from llmq.commands.engine_lines import engine_lines
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.qat.job import QATJob

A_TRIAL, ENOUGH_STEPS, FEW_TOKENS = 20, 300, 1024

HELP = (
    "Fine-tune a model through its quantizer, from a PTQ start to a packed checkpoint. "
    "For many GPUs: accelerate launch -m llmq qat ..."
)

EXAMPLES = (
    "llmq qat tiny tiny-w4 --scheme w4 --max-tokens 1e6",
    "llmq qat tiny tiny-w2 --recipe w2-qat --max-steps 100 --batch-size 4",
    "llmq qat Qwen/Qwen3-0.6B qwen3-w3 --scheme w3 --train my-text.jsonl",
)


def add_arguments(parser: Parser) -> None:
    qat_options.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The result as JSON-able data and as text; None in all but the main process, which has
    them."""
    pushing.check_push(args)
    job = prepare(args)
    if job.processes.is_main_process:
        _tell(job)
    report = train(args, job)
    if not report:
        return None
    if args.plot:
        from llmq.qat.plot import plot_log

        plot_log(Path(args.out) / "log.jsonl", Path(args.plot))
    pushed, lines = pushing.push_result(args)
    return {"out": args.out, **report, **pushed}, _summary(args.out, report, lines)


def prepare(args: argparse.Namespace) -> QATJob:
    """The checked job of the options."""
    import torch

    from llmq.benchmark.plot import check_plot
    from llmq.commands.qat_settings import read_settings
    from llmq.models.source import Source
    from llmq.qat.job import prepare_job
    from llmq.qat.run import check_output

    check_output(Path(args.out), args.overwrite)
    if args.plot:
        check_plot(args.plot)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.check_device(device)
    source = Source.open(args.model, args.revision)
    settings, rules = read_settings(args, source.config)
    return prepare_job(
        source,
        settings,
        train=args.train,
        teacher=args.teacher,
        rules=rules,
        device=device,
        strict=args.strict,
    )


def train(args: argparse.Namespace, job: QATJob) -> dict[str, Any] | None:
    """Run a job and return its report, in the main process."""
    from llmq.qat.run import fine_tune
    from llmq.storage.boundary import running

    with rendering.progress("qat") as bar:

        def show(title: str, done: int, total: int, remark: str) -> None:
            if job.processes.is_main_process:
                bar(done, total, f"{title} {remark}".strip())

        return running(args.model)(fine_tune)(
            job, Path(args.out), overwrite=args.overwrite, report_to=args.report_to, show=show
        )


def _tell(job: QATJob) -> None:
    """Notes and budget, before anything is computed."""
    rendering.print_notes(job.notes)
    print(budget_line(job), file=sys.stderr, flush=True)
    if (told := advice(job)) is not None:
        print(told, file=sys.stderr, flush=True)


def advice(job: QATJob) -> str | None:
    """What to do about few large steps: 320 of 1024 tokens won 65% back, 160 of 2048 won 61%
    (llmq/qat/README.md), and in very few no code changes. Nothing where the batch is spread over
    processes or accumulated."""
    from llmq.qat.pace import reaches_edge

    settings, n_steps = job.settings, int(job.budget()["steps"])
    batch = max(1, FEW_TOKENS // settings.sequence_length)
    is_one = job.processes.num_processes == settings.accumulation == 1
    if not is_one or not A_TRIAL <= n_steps < ENOUGH_STEPS:
        return None
    has_own_rate = settings.quantizer == "lsq" and settings.lr_weights is None
    if has_own_rate and not reaches_edge(settings.scheme.weights, n_steps):
        return (
            f"{n_steps:,} steps are too few for weights to get from one code to another, so scales,"
            " norms and embeddings learn alone: take more of them, with a smaller --batch-size or "
            "more text"
        )
    if settings.batch_size <= batch:
        return None
    more = n_steps * settings.batch_size // batch
    return (
        f"{n_steps:,} steps of {settings.tokens_per_batch:,} tokens: smaller ones learn more from "
        f"as much text, such as --batch-size {batch} --max-steps {more}"
    )


def budget_line(job: QATJob) -> str:
    """What the training will take, before it starts."""
    budget = job.budget()
    device = job.processes.device.type
    precision = str(job.settings.precision)
    rate = jobs.measured_rate(device, precision) * job.processes.num_processes
    return (
        f"budget: {budget['tokens']:,} tokens in {budget['steps']:,} steps, about "
        f"{budget['bytes'] / 1e9:.2f} GB per process for weights and optimizer and "
        f"{budget['activation_bytes'] / 1e9:.2f} GB for the activations of a batch, about "
        f"{budget['flops'] / rate / 3600:.2f} h in {precision} on "
        f"{'this CPU' if device == 'cpu' else device}"
    )


def _shipped(report: dict[str, Any]) -> str:
    if report["shipped"] == "trained":
        return "the trained model"
    reason = "did not beat it"
    if worse := report["trained_worse_in"]:
        reason = f"made it worse at some positions ({', '.join(worse)})"
    return f"the PTQ start, because training {reason} on held-out text"


def _scored(score: dict[str, Any]) -> str:
    """A perplexity, and how many times that of full precision it is."""
    text = f"{score['perplexity']:.3f}"
    if "perplexity_ratio" not in score:
        return text
    interval = score["perplexity_ratio_ci95"]
    told = "" if interval is None else f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}"
    return f"{text}, {score['perplexity_ratio']:.4f} times that of full precision{told}"


def _summary(out: str, report: dict[str, Any], lines: dict[str, object]) -> str:
    """lines: about what was pushed."""
    pairs: dict[str, object] = {
        "written": f"{out} ({report['format']} format): {_shipped(report)}",
    }
    for name, score in report["held_out"].items():
        pairs[f"held-out perplexity, {name.replace('_', ' ')}"] = _scored(score)
    if report["verdict"]:
        pairs["compared"] = report["verdict"]
    if report["last_loss"] is not None:
        pairs["loss"] = f"{report['first_loss']:.4f} -> {report['last_loss']:.4f}"
    pairs |= rendering.transform_lines(report)
    pairs |= rendering.companion_lines(report)
    pairs["seconds"] = f"{report['seconds']:.0f}"
    pairs |= lines
    return f"{rendering.render_pairs(pairs)}\n{engine_lines(report['engines'])}"
