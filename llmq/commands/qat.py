"""`llmq qat MODEL OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import common, jobs
from llmq.commands.values import real, source, whole

if TYPE_CHECKING:
    from llmq.qat.job import QATJob
    from llmq.qat.settings import QATSettings

HELP = "Fine-tune a model through its quantizer, from a PTQ start to a packed checkpoint. For many GPUs: accelerate launch -m llmq qat ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=common.MODEL_HELP)
    parser.add_argument("out", help="the folder to write")
    parser.add_argument(
        "--scheme",
        default="w4",
        help="w8, w4, w3, w2 or ternary, with a8 and kv8 or kv4 behind where wanted: w4a8kv8 (default: w4)",
    )
    parser.add_argument(
        "--group-size",
        type=whole(-1),
        metavar="G",
        help="columns per scale; -1: one scale per row, 0: one per tensor (default: 128; w2: 64)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="a learned zero point per group (w2 has one, except with --quantizer seq)",
    )
    parser.add_argument(
        "--activations",
        choices=("int8-token", "int8-static"),
        default=None,
        help="which kind of INT8 activations a scheme with a8 has (default: int8-token)",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=SPEC",
        help="another treatment for some layers, such as '*.layers.0.*=w8' or '*.down_proj=keep'",
    )
    quantizers = "learned scales, the same stretched over the range (ParetoQ; 2 bits and ternary), scales from the range (LLM-QAT), or absmean ternary (BitNet) (default: lsq)"
    parser.add_argument(
        "--quantizer", choices=("lsq", "seq", "ste", "absmean"), default="lsq", help=quantizers
    )
    parser.add_argument(
        "--init",
        choices=("rtn", "gptq", "blockwise"),
        default="gptq",
        help="the PTQ method of the start (default: gptq)",
    )
    parser.add_argument(
        "--kv-before-rope",
        action="store_true",
        help="quantize keys before the rotary embedding, as LLM-QAT does",
    )
    parser.add_argument(
        "--train",
        type=source,
        default="bundled",
        metavar="SOURCE",
        help="text file, .jsonl, .parquet, folder, Hub data set (name:config:split), 'bundled' (default), or 'generated' by the teacher",
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="full-precision teacher with the same vocabulary (default: the model itself)",
    )
    parser.add_argument(
        "--max-tokens", type=real(1), metavar="N", help="training tokens (default: the text once)"
    )
    parser.add_argument(
        "--max-steps", type=whole(1), metavar="N", help="optimizer steps, instead of --max-tokens"
    )
    parser.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=8,
        help="sequences per process and batch (default: 8)",
    )
    parser.add_argument(
        "--accumulation", type=whole(1), default=1, help="batches per optimizer step (default: 1)"
    )
    parser.add_argument(
        "--lr-weights",
        type=real(),
        help="peak learning rate of the weights (default: 0.001 to 0.004 of a step of each layer's own grid)",
    )
    parser.add_argument(
        "--lr-scales",
        type=real(),
        help="peak learning rate of scales and zero points (default: as far as the weights move)",
    )
    parser.add_argument(
        "--kl", type=real(), default=1.0, help="weight of KL divergence to the teacher (default: 1)"
    )
    parser.add_argument(
        "--ce",
        type=real(),
        help="weight of cross entropy with the text (default: 0.1; 1 with --kl 0; 0 with --train generated)",
    )
    parser.add_argument(
        "--max-grad-norm",
        type=real(),
        default=1.0,
        help="longer gradients are cut to this length; 0: none (default: 1)",
    )
    parser.add_argument(
        "--held-out",
        type=whole(0),
        default=32,
        metavar="N",
        help="windows of the text that are not trained on, at most a tenth (default: 32)",
    )
    phases = "share of the run"
    parser.add_argument(
        "--warmup",
        type=real(),
        default=0.03,
        help=f"{phases} over which learning rates rise (default: 0.03)",
    )
    parser.add_argument(
        "--gradual",
        type=real(),
        default=0.0,
        help=f"{phases} over which quantization is blended in (default: 0; try 0.1 for ternary)",
    )
    parser.add_argument(
        "--activations-from",
        type=real(),
        help=f"{phases} after which activations are quantized (default: 0; 0.1 with static ranges, which are only observed at first)",
    )
    parser.add_argument(
        "--freeze-ranges",
        type=real(),
        default=0.85,
        help=f"{phases} after which static activation ranges stop (default: 0.85)",
    )
    parser.add_argument(
        "--freeze-scales",
        type=real(),
        default=0.85,
        help=f"{phases} after which scales stop (default: 0.85)",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="arithmetic; master weights are float32 always (default: bf16)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations twice instead of keeping them",
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="(default: 0)")
    parser.add_argument(
        "--log-every",
        type=whole(0),
        default=0,
        metavar="STEPS",
        help="(default: 100 times in the run)",
    )
    parser.add_argument(
        "--save-every",
        type=whole(0),
        default=0,
        metavar="STEPS",
        help="checkpoints to resume from (default: 5 times in the run)",
    )
    parser.add_argument(
        "--eval-every",
        type=whole(0),
        default=0,
        metavar="STEPS",
        help="held-out perplexity (default: 5 times in the run)",
    )
    parser.add_argument(
        "--report-to", default="none", help="none, tensorboard or wandb, through the Trainer"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="write loss and telemetry as a picture (needs matplotlib)"
    )
    parser.add_argument(
        "--device", default=None, help="cpu or cuda (default: cuda where there is one)"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse layers that would differ from what was asked, and stored tensors that would be left out",
    )
    parser.add_argument("--revision", help="revision of a Hub model")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that llmq wrote earlier"
    )


def read_settings(args: argparse.Namespace, max_length: int) -> QATSettings:
    """The settings of the options. max_length: tokens the model has positions for."""
    from dataclasses import replace

    from llmq.errors import LlmqError
    from llmq.qat.job import GENERATED
    from llmq.qat.losses import LossWeights
    from llmq.qat.schedule import Phases
    from llmq.qat.settings import QATSettings, Scheme

    scheme = Scheme.parse(args.scheme)
    grid = scheme.weights
    grid = replace(
        grid,
        group_size=grid.group_size if args.group_size is None else args.group_size,
        symmetric=grid.symmetric and not args.asymmetric,
    )
    if args.quantizer == "seq" and grid.code == "int2":
        if args.asymmetric:
            raise LlmqError(
                "--asymmetric: the levels of --quantizer seq lie at half-integers around zero and "
                "have no zero point; leave it out, or use --quantizer lsq"
            )
        grid = replace(grid, code="int2h", symmetric=True)
    if args.activations and scheme.activations == "none":
        raise LlmqError(
            f"--activations {args.activations}: the scheme {args.scheme} does not quantize "
            f"activations; write {args.scheme}a8"
        )
    scheme = replace(scheme, weights=grid, activations=args.activations or scheme.activations)
    activations_from = (
        args.activations_from
        if args.activations_from is not None
        else 0.1
        if scheme.activations == "int8-static"
        else 0.0
    )
    ce = (
        args.ce
        if args.ce is not None
        else 0.0
        if args.train == GENERATED
        else 0.1
        if args.kl
        else 1.0
    )
    length = args.sequence_length or min(2048, max_length)
    if length > max_length:
        raise LlmqError(
            f"--sequence-length {length}: the model has positions for {max_length} tokens only"
        )
    return QATSettings(
        scheme, quantizer=args.quantizer, init=args.init, kv_before_rope=args.kv_before_rope, max_tokens=None if args.max_tokens is None else int(args.max_tokens), max_steps=args.max_steps,
        sequence_length=length, batch_size=args.batch_size, accumulation=args.accumulation, lr_weights=args.lr_weights, lr_scales=args.lr_scales, precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing, loss=LossWeights(args.kl, ce), seed=args.seed, log_every=args.log_every, save_every=args.save_every, eval_every=args.eval_every,
        max_grad_norm=args.max_grad_norm, n_held_out=args.held_out,
        phases=Phases(warmup=args.warmup, gradual=args.gradual, activations=activations_from, freeze_scales=args.freeze_scales, freeze_ranges=args.freeze_ranges),
    )  # fmt: skip


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The result as JSON-able data and as text; None in all but the main process, which has
    them."""
    import torch

    from llmq.benchmark.plot import check_plot
    from llmq.messages import one_line
    from llmq.models.source import Source
    from llmq.qat.job import prepare_job
    from llmq.qat.run import check_output, fine_tune
    from llmq.recipe import Rule
    from llmq.storage.boundary import running

    check_output(Path(args.out), args.overwrite)
    if args.plot:
        check_plot(args.plot)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    common.check_device(device)
    source = Source.open(args.model, args.revision)
    settings = read_settings(args, common.max_positions(source.config))
    job = prepare_job(
        source,
        settings,
        train=args.train,
        teacher=args.teacher,
        rules=tuple(Rule.parse(text) for text in args.rule),
        device=device,
        strict=args.strict,
    )
    if job.processes.is_main_process:
        for name, note in job.notes.items():
            print(one_line(f"note: {name}: {note}"), file=sys.stderr)
        print(budget_line(job), file=sys.stderr, flush=True)
    with common.progress("qat") as bar:

        def show(title: str, done: int, total: int, remark: str) -> None:
            if job.processes.is_main_process:
                bar(done, total, f"{title} {remark}".strip())

        report = running(args.model)(fine_tune)(
            job, Path(args.out), overwrite=args.overwrite, report_to=args.report_to, show=show
        )
    if args.plot and report:
        from llmq.qat.plot import plot_log

        plot_log(Path(args.out) / "log.jsonl", Path(args.plot))
    return ({"out": args.out, **report}, _summary(args.out, report)) if report else None


def budget_line(job: QATJob) -> str:
    """What the training will take, before it starts."""
    budget = job.budget()
    device = job.processes.device.type
    hours = (
        budget["flops"]
        / (jobs.measured_rate(device, job.settings.precision) * job.processes.num_processes)
        / 3600
    )
    memory = f"about {budget['bytes'] / 1e9:.2f} GB per process for weights and optimizer and {budget['activation_bytes'] / 1e9:.2f} GB for the activations of a batch"
    return f"budget: {budget['tokens']:,} tokens in {budget['steps']:,} steps, {memory}, about {hours:.2f} h on {'this CPU' if device == 'cpu' else device}"


def _summary(out: str, report: dict[str, Any]) -> str:
    held_out = {name: score["perplexity"] for name, score in report["held_out"].items()}
    shipped = "the trained model"
    if report["shipped"] != "trained":
        worse = report["trained_worse_in"]
        reason = (
            f"made it worse at some positions ({', '.join(worse)})" if worse else "did not beat it"
        )
        shipped = f"the PTQ start, because training {reason} on held-out text"
    pairs: dict[str, object] = {"written": f"{out}: {shipped}"}
    pairs |= {
        f"held-out perplexity, {name.replace('_', ' ')}": f"{value:.3f}"
        for name, value in held_out.items()
    }
    if report["verdict"]:
        pairs["compared"] = report["verdict"]
    if report["last_loss"] is not None:
        pairs["loss"] = f"{report['first_loss']:.4f} -> {report['last_loss']:.4f}"
    pairs |= common.companion_lines(report)
    pairs["seconds"] = f"{report['seconds']:.0f}"
    return common.render_pairs(pairs)
