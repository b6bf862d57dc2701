"""What the commands that quantize and the one that plans share: the checked job of the options, and
how fast this machine is."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from llmq.commands import common

if TYPE_CHECKING:
    from llmq.ptq.job import Job


def prepare_job(args: argparse.Namespace, *, check_scales: bool = True) -> Job:
    """The checked job of the options. check_scales: see `llmq.ptq.run.prepare`. Raises `LlmqError`
    also when the planned memory is above `--max-ram` or `--max-gpu-memory`."""
    from llmq.errors import LlmqError
    from llmq.models.source import Source
    from llmq.ptq.budget import peak_bytes
    from llmq.ptq.job import prepare

    source = Source.open(args.model, args.revision)
    recipe = common.read_recipe(args, common.max_positions(source.config))
    job = prepare(
        source,
        recipe,
        calibration=args.calibration,
        format=args.format,
        strict=args.strict,
        check_scales=check_scales,
    )
    if args.max_gpu_memory is not None and args.device == "cpu":
        raise LlmqError(
            f"--max-gpu-memory {args.max_gpu_memory}: the run is on the CPU; add --device cuda or "
            "use --max-ram"
        )
    # Whatever is computed with lies on the device, so the plan is the same for both; beside a GPU
    # the RAM holds a stored block and a batch of activations at most.
    for option, limit in (("--max-ram", args.max_ram), ("--max-gpu-memory", args.max_gpu_memory)):
        if limit is not None and peak_bytes(job) > limit * 1e9:
            raise LlmqError(
                f"{option} {limit}: the run is planned to need {peak_bytes(job) / 1e9:.2f} GB "
                "above the libraries; raise it, or use --method rtn, which needs no calibration"
            )
    return job


def measured_rate(device: str = "cpu", precision: str = "fp32") -> float:
    """Matmul rate of a device in FLOP/s, halved: a run also does work that is not matmul. On a CPU
    always that of float32: the time there goes to what is around the products too."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    size, dtype = (1024, torch.float32) if device == "cpu" else (8192, dtypes[precision])
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best / 2)
