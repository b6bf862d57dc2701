"""`llmq plan MODEL --qat`: what `llmq qat` would take."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmq.commands import jobs, rendering
from llmq.commands.machine import LIBRARY_BYTES, memory_bytes, timed_device
from llmq.commands.options import real, whole
from llmq.commands.pace import rough_duration
from llmq.commands.parser import Parser
from llmq.commands.plan_ranks import n_processes

if TYPE_CHECKING:
    from llmq.models.source import Source
    from llmq.qat.budget import Memory, Size
    from llmq.qat.settings import QATSettings
    from llmq.recipe import LayerPlan

# Options that only mean something with --qat, and those of `llmq plan` that do so with it.
OWN = frozenset(
    {
        "scheme",
        "max_tokens",
        "batch_size",
        "lora_rank",
        "optimizer",
        "precision",
        "gradient_checkpointing",
    }
)
SHARED = frozenset(
    {
        *("model", "qat", "sequence_length", "device", "revision", "max_ram", "json"),
        *("processes", "gpus", "nodes", "gpu_memory", "tflops"),
    }
)
# What is tried, in this order, where a run does not fit.
SMALLER: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--batch-size 1": {"batch_size": 1},
    "--batch-size 1 --gradient-checkpointing": {"batch_size": 1, "gradient_checkpointing": True},
    "--lora-rank 16 --gradient-checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    "--lora-rank 16 --batch-size 1 --gradient-checkpointing": {
        "lora_rank": 16,
        "batch_size": 1,
        "gradient_checkpointing": True,
    },
}


def add_arguments(parser: Parser) -> None:
    """The options of `llmq qat` that decide memory and time."""
    parser.add_argument(
        "--qat", action="store_true", help="plan fine-tuning by 'llmq qat' instead: memory and time"
    )
    parser.more.add_argument("--scheme", default="w4", help="with --qat (default: w4)")
    parser.more.add_argument(
        "--max-tokens", type=real(1), metavar="N", help="with --qat: training tokens"
    )
    parser.more.add_argument(
        "--batch-size", type=whole(1), default=8, help="with --qat (default: 8)"
    )
    parser.more.add_argument(
        "--lora-rank", type=whole(1), metavar="R", help="with --qat (default: all weights)"
    )
    parser.more.add_argument(
        "--optimizer", default="adamw_torch", metavar="NAME", help="with --qat"
    )
    parser.more.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="with --qat, as llmq qat has it"
    )
    parser.more.add_argument("--gradient-checkpointing", action="store_true", help="with --qat")


def check(args: argparse.Namespace) -> None:
    """Raise `LlmqError` for an option that the kind of plan does not go by: it would be ignored."""
    from llmq.errors import LlmqError

    given = {name for name, value in vars(args).items() if value != args.parser.get_default(name)}
    given -= {"command"}
    wrong = given - OWN - SHARED if args.qat else given & OWN
    for name in sorted(wrong):
        option = f"--{name.replace('_', '-')}"
        raise LlmqError(
            f"{option}: plans with --qat go by the scheme, such as --scheme w4a8; leave it out"
            if args.qat
            else f"{option}: is an option of fine-tuning; give --qat, or leave it out"
        )
    if args.qat and args.gpu_memory is not None and args.max_ram is not None:
        raise LlmqError(
            "--gpu-memory and --max-ram: training lies on one device, and both say how much memory "
            "that has; give one"
        )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.models.config_only import ConfigOnly, open_to_plan
    from llmq.qat.budget import training_flops

    source = open_to_plan(args.model, args.revision)
    settings, n = _settings(args, source), n_processes(args)
    plans, size = _layers(source, settings)
    memory = _memory(source, settings, plans, size, n)
    limit, where = _limit(args)
    estimate = jobs.planned_rate(args, str(settings.precision))
    per_million = training_flops(size.n_multiplied, 1e6) / estimate["flops_per_second"] / n
    result = {
        "model": str(source.folder),
        "has_weights": not isinstance(source, ConfigOnly),
        "scheme": args.scheme,
        "parameters": size.n_parameters,
        "quantized_layers": sum(plan.spec is not None for plan in plans),
        "processes": n,
        "shard": settings.shard,
        "precision": settings.precision,
        "windows_per_step": [n * settings.batch_size, settings.sequence_length],
        "memory": memory.to_json(),
        "planned_peak_bytes": memory.n_bytes,
        "limit_bytes": limit,
        "limit_of": where,
        "fits": None if limit is None else memory.n_bytes <= limit,
        "fitting_options": _fitting(source, settings, plans, size, n, limit),
        "planned_seconds_per_million_tokens": round(per_million, 1),
        "max_tokens": args.max_tokens,
        "planned_seconds": args.max_tokens and round(per_million * args.max_tokens / 1e6, 1),
        "estimate": estimate,
    }
    return result, _text(result)


def _settings(args: argparse.Namespace, source: Source) -> QATSettings:
    from llmq.models.arch import usual_length
    from llmq.qat.settings import QATSettings, Scheme

    length = args.sequence_length or usual_length(source.config)
    is_for_gpus = not (args.gpus is None and args.gpu_memory is None and args.tflops is None)
    settings = QATSettings(
        Scheme.parse(args.scheme),
        sequence_length=length,
        batch_size=args.batch_size,
        lora_rank=args.lora_rank,
        optimizer=args.optimizer,
        precision=args.precision or ("bf16" if is_for_gpus else None),
        gradient_checkpointing=args.gradient_checkpointing,
        shard=n_processes(args) > 1 and args.lora_rank is None,
    )
    return settings.on(timed_device(args.device))


def _layers(source: Source, settings: QATSettings) -> tuple[list[LayerPlan], Size]:
    """What becomes of each layer, and how large the model is."""
    from llmq.models.arch import quantizable_layers
    from llmq.models.source import meta_model
    from llmq.qat.budget import Size
    from llmq.recipe import Recipe

    model = meta_model(source.config)
    plans = Recipe.uniform(settings.scheme.weights).plan(quantizable_layers(model))
    return plans, Size.of(model, plans)


def _memory(
    source: Source, settings: QATSettings, plans: list[LayerPlan], size: Size, n: int
) -> Memory:
    import torch

    from llmq.qat.budget import Memory

    is_half = settings.precision == "bf16" and source.config.dtype == torch.bfloat16
    config = source.config.get_text_config()
    return Memory.of(config, plans, settings, size, 2 if is_half else 4, n)


def _limit(args: argparse.Namespace) -> tuple[int | None, str | None]:
    """Bytes that training may take beside the libraries, and who says so."""
    if args.gpu_memory is not None:
        return int(args.gpu_memory), "--gpu-memory"
    if args.max_ram is not None:
        return int(args.max_ram * 1e9), "--max-ram"
    there = memory_bytes() if args.device == "cpu" else None
    return (None, None) if there is None else (there - LIBRARY_BYTES, "this machine")


def _fitting(
    source: Source,
    settings: QATSettings,
    plans: list[LayerPlan],
    size: Size,
    n: int,
    limit: int | None,
) -> dict[str, int]:
    """Options with which it fits, with their peak memory in bytes, where it does not."""
    if limit is None or _memory(source, settings, plans, size, n).n_bytes <= limit:
        return {}
    found = {}
    for option, values in SMALLER.items():
        shard = settings.shard and "lora_rank" not in values
        other = _memory(source, replace(settings, **values, shard=shard), plans, size, n)
        if other.n_bytes <= limit:
            found[option] = other.n_bytes
    return found


def _text(result: dict[str, Any]) -> str:
    memory = result["memory"]
    rows = [(name, f"{n_bytes / 1e9:.2f}") for name, n_bytes in memory.items()]
    table = rendering.render(rows, ("memory of a process", "GB"))
    batch, length = result["windows_per_step"]
    pairs: dict[str, object] = {
        "model": f"{result['parameters'] / 1e6:.1f}M parameters, {result['quantized_layers']} "
        f"layers at {result['scheme']}",
        "batch": f"{batch} windows of {length} tokens",
        **_process_pairs(result),
        **_memory_pairs(result),
        "time": f"about {rough_duration(result['planned_seconds_per_million_tokens'])} per million "
        "tokens",
        "estimated from": "8.5 operations per parameter and token at "
        f"{result['estimate']['flops_per_second'] / 1e9:.0f} GFLOP/s",
    }
    if not result["has_weights"]:
        pairs["weights"] = "none in this folder: sizes are those that its config describes"
    if result["planned_seconds"]:
        pairs["time"] = (
            f"about {rough_duration(result['planned_seconds'])} for "
            f"{result['max_tokens']:.0f} tokens"
        )
    return f"{table}\n\n{rendering.render_pairs(pairs)}"


def _process_pairs(result: dict[str, Any]) -> dict[str, object]:
    if (n := result["processes"]) == 1:
        return {}
    what = "--shard: a share of masters, gradients and moments" if result["shard"] else "all of it"
    return {f"each of {n} processes": what}


def _memory_pairs(result: dict[str, Any]) -> dict[str, object]:
    peak = f"about {result['planned_peak_bytes'] / 1e9:.2f} GB above the libraries"
    if result["fits"] is None:
        return {"peak memory": peak}
    fits = f"into the {result['limit_bytes'] / 1e9:.1f} GB of {result['limit_of']}"
    if result["fits"]:
        return {"peak memory": peak, "fits": fits}
    memory = result["memory"]
    fixed = sum(memory[name] for name in ("masters", "gradients", "optimizer", "teacher"))
    instead = f"no option changes that: weights and optimizer take {fixed / 1e9:.2f} GB"
    if fitting := result["fitting_options"]:
        option, n_bytes = next(iter(fitting.items()))
        instead = f"{option}, which takes {n_bytes / 1e9:.2f} GB"
    return {"peak memory": peak, "fits": f"not {fits}", "instead": instead}
