"""`llmq plan MODEL`: what `quantize` would do, without doing it."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import jobs, options, rendering
from llmq.commands.parser import Parser

HELP = "Show what would be quantized and what not, the size, peak memory and time. Nothing is run."

EXAMPLES = (
    "llmq plan tiny",
    "llmq plan tiny --bits 3 --group-size 64 --method blockwise",
    "llmq plan Qwen/Qwen3-0.6B --recipe w4-gptq",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    options.add_quantization_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.ptq.budget import flops, peak_bytes, stored_bytes, work_bytes

    job = jobs.prepare_job(args, check_scales=False)  # which would read all weights
    source = job.source.weight_bytes
    rate = jobs.measured_rate()
    result = {
        "model": str(job.source.folder),
        "model_type": job.model.config.model_type,
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
        "source_bytes": source,
        "planned_bytes": stored_bytes(job),
        "planned_work_bytes": work_bytes(job),
        "planned_peak_bytes": peak_bytes(job),
        "planned_seconds": round(flops(job) / rate, 1),
        "recipe": job.recipe.to_json(),
    }
    return result, _text(result)


def _text(result: dict[str, Any]) -> str:
    groups: dict[tuple[str, str, str, str], int] = {}
    for layer in result["layers"]:
        kind = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        key = (kind, "x".join(map(str, layer["shape"])), layer["spec"] or "keep", layer["note"])
        groups[key] = groups.get(key, 0) + 1
    table = rendering.render(
        [(*key[:3], count, key[3]) for key, count in groups.items()],
        ("layers", "N x K", "spec", "count", "note"),
    )
    disk = result["planned_bytes"] + result["planned_work_bytes"]
    pairs = rendering.render_pairs(
        {
            "method, format": f"{result['method']}, {result['format']}",
            "weight files": f"{result['source_bytes'] / 1e6:.1f} MB -> about "
            f"{result['planned_bytes'] / 1e6:.1f} MB",
            "peak memory": f"about {result['planned_peak_bytes'] / 1e9:.2f} GB above the libraries",
            "disk": f"about {disk / 1e9:.2f} GB while it runs",
            "time": f"about {result['planned_seconds']:.0f} s on this machine's CPU",
        }
    )
    return f"{table}\n\n{pairs}"
