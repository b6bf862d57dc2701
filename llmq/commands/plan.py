"""`llmq plan MODEL`: what `quantize` would do, without doing it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmq.commands import jobs, options, plan_mixed, plan_qat, plan_ranks, rendering
from llmq.commands.machine import LIBRARY_BYTES, memory_bytes
from llmq.commands.options import real
from llmq.commands.pace import rough_duration
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.ptq.job import Job

HELP = (
    "Show what would be quantized and what not, the size, peak memory and time. Nothing is run. "
    "A folder with a config and no weights will do."
)

MENTIONED = 0.1  # share of the output that is worth a word when it is not quantized

# What quantizes a part that is kept otherwise.
_OPTIONS = {
    "embeddings": "--embeddings",
    "head": "--head",
    "embeddings and head": "--embeddings",
}

EXAMPLES = (
    "llmq plan tiny",
    "llmq plan tiny --bits 3 --group-size 64 --method blockwise",
    "llmq plan Qwen/Qwen3-0.6B --recipe w4-gptq",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    options.add_quantization_arguments(parser)
    parser.more.add_argument(
        "--tflops",
        type=real(0.001),
        metavar="N",
        help="of a large product on the machine meant, instead of timing one on this",
    )
    plan_ranks.add_arguments(parser)
    plan_qat.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.models.config_only import ConfigOnly
    from llmq.ptq.budget import (
        expected_coverage,
        peak_bytes,
        stored_bytes,
        work_bytes,
    )
    from llmq.ptq.parts import parts

    plan_qat.check(args)
    if args.qat:
        return plan_qat.run(args)
    budget = jobs.budget_of(args)
    job = jobs.prepare_job(args, is_plan=True, for_budget=budget is not None)
    estimate = jobs.planned_rate(args)
    rate = estimate["flops_per_second"]
    planned = plan_mixed.planned(args, job, budget, rate)
    job = planned.job
    found = parts(job)
    stored = stored_bytes(job)
    result = {
        "model": str(job.source.folder),
        "model_type": job.model.config.model_type,
        "has_weights": not isinstance(job.source, ConfigOnly),
        "source_precision": job.source.precision,
        "method": job.recipe.method,
        "format": job.fmt.name,
        "layers": [
            {
                "name": plan.layer.name,
                "shape": list(plan.layer.shape),
                "spec": None if plan.spec is None else str(plan.spec),
                "note": plan.note,
            }
            for plan in job.plans
        ],
        "notes": job.notes,
        "parts": [part.to_json() for part in found],
        "unquantized_bytes": int(sum(part.planned_bytes for part in found if part.spec is None)),
        "calibration": None
        if job.tokens is None
        else {
            "source": job.tokens.source,
            "windows": list(job.tokens.tokens.shape),
            "pictures": job.tokens.read.get("pictures"),
        },
        "experts": expected_coverage(job),
        "source_bytes": job.source.weight_bytes,
        "planned_bytes": stored,
        "planned_work_bytes": work_bytes(job),
        "planned_disk_bytes": planned.disk_bytes,
        "planned_peak_bytes": peak_bytes(job),
        "memory": _memory(args, job),
        "planned_seconds": round(planned.flops / rate, 1),
        "estimate": {"flops": planned.flops, **estimate},
        "quick": _quick(job, rate),
        "recipe": job.recipe.to_json(),
    }
    if (shared := plan_ranks.planned(args, job, rate)) is not None:
        result["processes"] = shared
    if planned.about is not None:
        result["mixed"] = planned.about | {"n_results": planned.n_results}
    return result, _text(result)


def _quick(job: Job, rate: float) -> dict[str, Any] | None:
    """What `--quick` would take, where that is less."""
    from llmq.ptq.alternatives import quick_job
    from llmq.ptq.budget import disk_bytes, flops

    quick = quick_job(job)
    if quick is None or quick.tokens is None:
        return None
    return {
        "windows": list(quick.tokens.tokens.shape),
        "planned_seconds": round(flops(quick) / rate, 1),
        "planned_disk_bytes": disk_bytes(quick),
    }


def _memory(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Whether the run fits, and the methods that would. limit_bytes: of --max-ram, else what this
    machine has beside the libraries; None where nobody says."""
    from llmq.ptq.alternatives import lighter_methods
    from llmq.ptq.budget import peak_bytes

    if args.max_ram is not None:
        limit, where = args.max_ram * 1e9, "--max-ram"
    elif (there := memory_bytes()) is not None:
        limit, where = there - LIBRARY_BYTES, "this machine"
    else:
        return {"limit_bytes": None, "of": None, "fits": None, "fitting_methods": {}}
    fits = peak_bytes(job) <= limit
    return {
        "limit_bytes": int(limit),
        "of": where,
        "fits": fits,
        "fitting_methods": {} if fits else lighter_methods(job, limit),
    }


def _text(result: dict[str, Any]) -> str:
    columns = rendering.terminal_width()
    notes = [
        rendering.wrapped(line, columns, "  ") for line in rendering.note_lines(result["notes"])
    ]
    parts = [_layer_table(result), _part_table(result), rendering.render_pairs(_pairs(result))]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _layer_table(result: dict[str, Any]) -> str:
    groups: dict[tuple[str, str, str], int] = {}
    for layer in result["layers"]:
        kind = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        key = (kind, "x".join(map(str, layer["shape"])), layer["spec"] or "keep")
        groups[key] = groups.get(key, 0) + 1
    return rendering.render(
        [(*key, count) for key, count in groups.items()],
        ("layers", "N x K", "spec", "count"),
    )


def _part_table(result: dict[str, Any]) -> str:
    total = max(1, result["planned_bytes"])
    rows = [
        (
            part["name"],
            part["spec"] or "as stored",
            f"{part['source_bytes'] / 1e6:.1f}",
            f"{part['planned_bytes'] / 1e6:.1f}",
            f"{part['planned_bytes'] / total:.0%}",
        )
        for part in result["parts"]
    ]
    return rendering.render(rows, ("part", "spec", "MB now", "MB then", "share"))


def _pairs(result: dict[str, Any]) -> dict[str, object]:
    method = f"{result['method']}, {result['format']}"
    pairs: dict[str, object] = {"method, format": method}
    if not result["has_weights"]:
        pairs["weights"] = "none in this folder: sizes are those that its config describes"
    if calibration := result["calibration"]:
        n, length = calibration["windows"]
        pairs["calibration"] = f"{n} windows of {length} tokens of {calibration['source']}"
        pairs |= rendering.picture_lines(calibration)
    if experts := result["experts"]:
        pairs["experts"] = _expert_line(experts)
    mixed = result.get("mixed")
    pairs |= plan_mixed.pairs(mixed)
    remark = plan_mixed.results_remark(1 if mixed is None else mixed["n_results"])
    pairs |= _size_pairs(result)
    pairs |= _memory_pairs(result)
    disk, work = result["planned_disk_bytes"], result["planned_work_bytes"]
    pairs["disk"] = (
        f"about {disk / 1e9:.2f} GB while it runs, {work / 1e9:.2f} GB of it to resume from{remark}"
    )
    estimate = result["estimate"]
    places = {"cpu": "this machine's CPU", "--tflops": "such a machine"}
    where = places.get(estimate["device"], estimate["device"])
    pairs["time"] = f"about {rough_duration(result['planned_seconds'])} on {where}{remark}"
    product = "of --tflops" if estimate["device"] == "--tflops" else "of a product just now"
    pairs["estimated from"] = (
        f"{estimate['flops']:.1e} operations at {estimate['flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"half the rate {product}"
    )
    pairs |= plan_ranks.pairs(result.get("processes"))
    if quick := result["quick"]:
        n, length = quick["windows"]
        pairs["with --quick"] = (
            f"{n} windows of {length} tokens, about {rough_duration(quick['planned_seconds'])}, "
            f"{quick['planned_disk_bytes'] / 1e9:.2f} GB of disk"
        )
    return pairs


def _expert_line(experts: dict[str, Any]) -> str:
    chosen = experts["n_chosen"]
    line = f"{experts['n_experts']} in each of {experts['n_layers']} layers"
    line += f", {chosen} for each token" if chosen else ""
    if experts["expected_rows"] is None:
        return line
    return (
        f"{line}: about {experts['expected_rows']} calibration tokens each, and those with fewer "
        f"than {experts['enough_rows']} are measured on the tokens of others, too"
    )


def _size_pairs(result: dict[str, Any]) -> dict[str, object]:
    """Sizes, and what is not quantized where that is much of them."""
    planned, left = result["planned_bytes"], result["unquantized_bytes"]
    size = f"{result['source_bytes'] / 1e6:.1f} MB -> about {planned / 1e6:.1f} MB"
    kept = [part for part in result["parts"] if part["spec"] is None]
    if left < MENTIONED * planned or not kept:
        return {"weight files": size}
    bits = 8 * kept[0]["planned_bytes"] / kept[0]["weights"]
    share = f"{left / 1e6:.1f} MB ({left / planned:.0%}) stay at {bits:.0f} bits"
    line = f"{share}, most of it {kept[0]['name']}"
    if option := _OPTIONS.get(kept[0]["name"]):
        saved = kept[0]["planned_bytes"] - kept[0]["weights"]
        line += f"; {option} w8 makes it {(planned - saved) / 1e6:.1f} MB in all"
    return {"weight files": size, "not quantized": line}


def _memory_pairs(result: dict[str, Any]) -> dict[str, object]:
    memory = result["memory"]
    peak = f"about {result['planned_peak_bytes'] / 1e9:.2f} GB above the libraries"
    if memory["fits"] is None:
        return {"peak memory": peak}
    fits = f"into the {memory['limit_bytes'] / 1e9:.1f} GB of {memory['of']}"
    if not memory["fits"]:
        remedy = ", nor does any other method"
        if fitting := memory["fitting_methods"]:
            name, n_bytes = next(iter(fitting.items()))
            remedy = f"; --method {name} takes {n_bytes / 1e9:.2f} GB"
        fits = f"not {fits}{remedy}"
    return {"peak memory": peak, "fits": fits}
