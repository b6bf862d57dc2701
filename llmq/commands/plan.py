"""`llmq plan MODEL`: what `quantize` would do, without doing it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from llmq.commands import common

if TYPE_CHECKING:
    from llmq.ptq.run import Job

HELP = "Show what would be quantized and what not, the size, peak memory and time. Nothing is run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=common.MODEL_HELP)
    common.add_quantization_arguments(parser)


def prepare_job(args: argparse.Namespace) -> Job:
    """The checked job of the options, shared with `quantize`. Raises `LlmqError` also when the planned memory is above `--max-ram` or `--max-gpu-memory`."""
    from llmq.errors import LlmqError
    from llmq.models.load import load_config, resolve
    from llmq.ptq.budget import peak_bytes
    from llmq.ptq.run import prepare

    model_dir = resolve(args.model, args.revision)
    recipe = common.read_recipe(args, common.max_positions(load_config(model_dir)))
    job = prepare(str(model_dir), recipe, calibration=args.calibration, format=args.format, strict=args.strict)
    if args.max_gpu_memory is not None and args.device == "cpu":
        raise LlmqError(f"--max-gpu-memory {args.max_gpu_memory}: the run is on the CPU; add --device cuda or use --max-ram")
    # Whatever is computed with lies on the device, so the plan is the same for both; beside a GPU the RAM holds a stored block and a batch of activations at most.
    for option, limit in (("--max-ram", args.max_ram), ("--max-gpu-memory", args.max_gpu_memory)):
        if limit is not None and peak_bytes(job) > limit * 1e9:
            raise LlmqError(f"{option} {limit}: the run is planned to need {peak_bytes(job) / 1e9:.2f} GB above the libraries; raise it, or use --method rtn, which needs no calibration")
    return job


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.ptq.budget import flops, peak_bytes, stored_bytes

    job = prepare_job(args)
    source = sum(path.stat().st_size for path in set(job.shards.names.values()))
    rate = measured_rate()
    result = {
        "model": str(job.model_dir),
        "model_type": job.model.config.model_type,
        "method": job.recipe.method,
        "format": job.fmt.name,
        "layers": [{"name": plan.layer.name, "shape": list(plan.layer.shape), "spec": None if plan.spec is None else str(plan.spec), "note": plan.note} for plan in job.plans],
        "source_bytes": source,
        "planned_bytes": stored_bytes(job),
        "planned_peak_bytes": peak_bytes(job),
        "planned_seconds": round(flops(job) / rate, 1),
        "recipe": job.recipe.to_json(),
    }
    return result, _text(result)


def measured_rate() -> float:
    """float32 matmul rate of this machine in FLOP/s, halved: a run also does work that is not matmul."""
    import torch

    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return float(2 * 1024**3 / best / 2)


def _text(result: dict[str, Any]) -> str:
    groups: dict[tuple[str, str, str, str], int] = {}
    for layer in result["layers"]:
        kind = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        key = (kind, "x".join(map(str, layer["shape"])), layer["spec"] or "keep", layer["note"])
        groups[key] = groups.get(key, 0) + 1
    table = common.render([(*key[:3], count, key[3]) for key, count in groups.items()], ("layers", "N x K", "spec", "count", "note"))
    pairs = common.render_pairs(
        {
            "method, format": f"{result['method']}, {result['format']}",
            "weight files": f"{result['source_bytes'] / 1e6:.1f} MB -> about {result['planned_bytes'] / 1e6:.1f} MB",
            "peak memory": f"about {result['planned_peak_bytes'] / 1e9:.2f} GB above the libraries",
            "time": f"about {result['planned_seconds']:.0f} s on this machine's CPU",
        }
    )
    return f"{table}\n\n{pairs}"
