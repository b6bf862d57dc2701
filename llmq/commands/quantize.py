"""`llmq quantize MODEL OUT`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from llmq.commands import jobs, options, pushing, rendering
from llmq.commands.engine_lines import engine_lines
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.ptq.choice import Budget
    from llmq.ptq.job import Job
    from llmq.ptq.mixed_run import MixedJob
    from llmq.ptq.results import BlockReport

HELP = (
    "Quantize a model into a folder. An interrupted run continues when the same command is given "
    "again."
)

EXAMPLES = (
    "llmq quantize tiny tiny-w4                        # 4 bits, groups of 128",
    "llmq quantize tiny tiny-w3 --bits 3 --group-size 64 --asymmetric",
    "llmq quantize tiny tiny-mix --rule '*.down_proj=w8' --rule '*.layers.0.*=keep'",
    "llmq quantize tiny tiny-3.25 --bpw 3.25           # bits where they count",
    "llmq quantize tiny tiny-w8a8 --recipe w8a8        # see llmq/recipes/README.md",
    "llmq quantize Qwen/Qwen3-0.6B qwen3-w4 --calibration my-text.jsonl",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.add_argument("out", help="the folder to write")
    options.add_quantization_arguments(parser)
    parser.section("run and output")
    options.add_overwrite_argument(parser)
    pushing.add_push_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The result as JSON-able data and as text; None where another process gives it."""
    from llmq.errors import LlmqError, VerificationError
    from llmq.ptq.mixed_run import quantize_mixed
    from llmq.ptq.ranks import started
    from llmq.ptq.run import quantize_folder
    from llmq.storage.workspace import check_output

    ranks = started()
    if ranks.is_first:
        check_output(Path(args.out), args.overwrite)
    pushing.check_push(args)
    options.check_device(args.device)
    budget = jobs.budget_of(args)
    if budget is not None and ranks.are_many:
        raise LlmqError(
            f"--bpw and --max-bytes: not on {ranks.size} processes; start one, without torchrun"
        )
    job = jobs.prepare_job(args, for_budget=budget is not None)
    if not ranks.is_first:
        quantize_folder(
            job, Path(args.out), device=args.device, max_ram=jobs.max_ram(args), ranks=ranks
        )
        return None
    mixed = None if budget is None else _mixed(args, job, budget)
    rendering.print_notes((job if mixed is None else mixed.chosen).notes)
    with contextlib.closing(rendering.Bars()) as bars:
        done = total = 0

        def on_start(finished: int, n_blocks: int) -> None:
            nonlocal done, total
            done, total = finished, n_blocks
            bars.show("blocks", done, total, f"resuming after block {done - 1}" if done else "")

        def on_block(report: BlockReport) -> None:
            nonlocal done
            done += 1
            bars.show("blocks", done, total, _remark(report))

        def on_step(what: str, step: int, n_steps: int) -> None:
            bars.show(what, step, n_steps)

        how: dict[str, Any] = {
            "device": args.device,
            "overwrite": args.overwrite,
            "max_ram": jobs.max_ram(args),
            "on_start": on_start,
            "on_block": on_block,
            "on_step": on_step,
        }
        if mixed is None:
            report = quantize_folder(job, Path(args.out), ranks=ranks, **how)
        else:
            report = quantize_mixed(mixed, Path(args.out), **how)
    if args.strict and report["fallbacks"]:
        raise VerificationError(
            f"--strict: {args.out} was written, but {len(report['fallbacks'])} layers fell back to "
            f"plain rounding, the first being {report['fallbacks'][0]}"
        )
    if args.strict and (idle := rendering.idle_experts(report["experts"])):
        raise VerificationError(
            f"--strict: {args.out} was written, but no calibration token reached {len(idle)} "
            f"experts, the first being {idle[0]}; use more or other calibration text"
        )
    pushed, lines = pushing.push_result(args)
    return {"out": args.out, **report, **pushed}, _summary(args.out, report, lines)


def _mixed(args: argparse.Namespace, job: Job, budget: Budget) -> MixedJob:
    """What the layers of a job get within a budget."""
    from llmq.ptq.mixed_run import measured_costs

    with rendering.progress("what bits are worth") as show:
        costs = measured_costs(job, budget, args.device, show)
    return jobs.mixed_job(args, job, budget, costs)


def _remark(report: BlockReport) -> str:
    """Errors of a block: the mean of its layers first, which is what fits beside a bar, then that
    of every kind."""
    kinds: dict[str, list[float]] = {}
    for layer in report.layers:
        if layer.error is not None:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer.error)
    parts = [f"{name} {mean(errors):.1e}" for name, errors in kinds.items()]
    if kinds:
        every = itertools.chain.from_iterable(kinds.values())
        parts.insert(0, f"error {mean(every):.1e}:")
    if report.tuned_error is not None:
        parts.insert(0, f"block {report.start_error:.1e} -> {report.tuned_error:.1e}")
    return "  ".join(parts)


def _summary(out: str, report: dict[str, Any], lines: dict[str, object]) -> str:
    """lines: about what was pushed."""
    n_kept = len(report["kept_layers"])
    pairs: dict[str, object] = {
        "written": f"{out} ({report['format']} format), verified block by block",
        "layers": f"{report['n_quantized_layers']} quantized, {n_kept} kept in full precision",
        **rendering.outside_lines(report["outside"]),
        "weight files": f"{report['source_bytes'] / 1e6:.1f} MB -> "
        f"{report['stored_bytes'] / 1e6:.1f} MB, "
        f"{report['bits_per_quantized_weight']:.2f} bits per quantized weight, "
        f"{report['bits_per_weight']:.2f} per weight of the model",
        "seconds": f"{report['seconds']:.1f}",
    }
    if report["calibration"] and (text := report["calibration"]["text"]):
        pairs["calibrated on"] = rendering.text_line(text)
        pairs |= rendering.picture_lines(text)
    pairs |= rendering.companion_lines(report)
    pairs |= rendering.transform_lines(report)
    pairs |= _errors(report)
    pairs |= rendering.expert_lines(report["experts"])
    pairs |= _held_out(report)
    pairs |= rendering.mixed_lines(report.get("mixed"))
    pairs |= _tuning(report)
    pairs |= _scale_tuning(report["scale_tuning"])
    pairs |= _deviations(report)
    pairs |= lines
    return f"{rendering.render_pairs(pairs)}\n{engine_lines(report['engines'])}"


def _errors(report: dict[str, Any]) -> dict[str, object]:
    """The layers' own errors beside those of rounding."""
    measured = [layer for layer in report["layers"] if layer["error"] is not None]
    if not measured:
        return {}
    ours = sum(layer["error"] for layer in measured) / len(measured)
    rounded = sum(layer["rtn_error"] for layer in measured) / len(measured)
    text = f"{ours:.2e} of the layers' output on average; plain rounding: {rounded:.2e}"
    return {"output error": text}


def _held_out(report: dict[str, Any]) -> dict[str, object]:
    """What was lost on text that was not calibrated on."""
    lines = {}
    for text in report["held_out"]:
        name = "KL, held-out text" if text["kind"] == "calibration" else "KL, another text"
        if reason := text.get("not_measured"):
            lines[name] = f"not measured on {text['source']}: {reason}"
            continue
        n_windows, length = text["windows"]
        lines[name] = (
            f"{text['kl_mean']:.2e}, perplexity {text['base_perplexity']:.2f} -> "
            f"{text['quant_perplexity']:.2f}, on {n_windows} x {length} tokens of {text['source']}"
        )
    return {**lines}


def _tuning(report: dict[str, Any]) -> dict[str, object]:
    """What became of the blocks as a whole."""
    tuned = report["tuned_blocks"]
    if not tuned:
        return {}
    n_lower = sum(block["tuned_error"] < block["start_error"] for block in tuned)
    before = sum(block["start_error"] for block in tuned) / len(tuned)
    after = sum(block["tuned_error"] for block in tuned) / len(tuned)
    pairs: dict[str, object] = {
        "block error": f"{before:.2e} -> {after:.2e} of the blocks' output; tuning helped in "
        f"{n_lower} of {len(tuned)} blocks"
    }
    rejected = [block["tuning_worse_in"] for block in tuned if block["tuning_worse_in"]]
    if rejected:
        classes = sorted(set(itertools.chain.from_iterable(rejected)))
        pairs["tuning not kept"] = (
            f"in {len(rejected)} blocks, where positions of some kind became worse: "
            f"{', '.join(classes)}"
        )
    return pairs


def _scale_tuning(found: dict[str, Any] | None) -> dict[str, object]:
    """What became of the scales of all blocks together."""
    if found is None:
        return {}
    kept = "" if found["kept"] else "; not kept"
    if found["worse_in"]:
        kept += f", since positions of some kind became worse: {', '.join(found['worse_in'])}"
    return {
        "scales, all blocks": f"KL {found['kl_start']:.2e} -> {found['kl']:.2e} on "
        f"{found['checked_sequences']} calibration sequences that were not trained on{kept}"
    }


def _deviations(report: dict[str, Any]) -> dict[str, object]:
    """Where something went otherwise than usual, and what to do about it."""
    pairs: dict[str, object] = {}
    if names := report["fallbacks"]:
        pairs["fallbacks"] = (
            f"{len(names)} layers fell back to plain rounding: {', '.join(names[:3])}"
        )
    if large := report["layers_with_large_error"]:
        more = ", ..." if len(large) > 3 else ""
        pairs["large errors"] = (
            f"{len(large)} layers lost more than half of their output: {', '.join(large[:3])}"
            f"{more}; keep them (--rule '{large[0]}=keep') or give them more bits"
        )
    n_kept = report["n_kept_rounding"]
    if n_better := n_kept + report["n_worse_than_rounding"]:
        pairs["plain rounding"] = (
            f"was better in {n_better} layers, and is kept in {n_kept} of them"
        )
    if report["n_dead_columns"] or report["n_dropped_rows"]:
        pairs["calibration"] = (
            f"{report['n_dead_columns']} input channels were always zero, "
            f"{report['n_dropped_rows']} rows with NaN or infinity were left out"
        )
    return pairs
