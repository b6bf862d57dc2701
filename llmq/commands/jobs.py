"""What the commands that quantize and the one that plans share: the recipe and the checked job of
the options, and how fast this machine is."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmq.grid.spec import QuantSpec
    from llmq.ptq.job import Job
    from llmq.recipe import Recipe, Rule

# Options that are named as the field of the recipe that they set.
_FIELDS = (
    "method",
    "init",
    "damping",
    "inputs",
    "samples",
    "sequence_length",
    "seed",
    "iterations",
    "learning_rate",
    "autocast",
)


def max_positions(config: Any) -> int:
    """Tokens that a model has positions for; models without a limit get 2048."""
    from llmq.models.arch import position_limit

    return position_limit(config) or 2048


def read_recipe(args: argparse.Namespace, config: PretrainedConfig) -> Recipe:
    """The recipe of the options, for the model of a config, which decides how much text is read
    where nobody says it."""
    from dataclasses import replace

    from llmq.ptq.sizing import windows_for
    from llmq.recipe import Recipe, Rule

    windows = windows_for(config, quick=args.quick)
    sizes: dict[str, Any] = {"samples": windows.n_sequences, "sequence_length": windows.length}
    recipe = Recipe(**sizes, rules=(Rule("*", _spec(args)),))
    if args.recipe:
        recipe = _recipe_of_file(args, recipe)
    if args.quick:  # is an option, and so overrides the file
        recipe = replace(recipe, **sizes)
    options = {name: getattr(args, name) for name in _FIELDS}
    options["order"] = "act" if args.act_order else None
    options["search"] = False if args.no_search else None
    recipe = replace(recipe, **_given(options), activations=_activations(args, recipe))
    return replace(recipe, rules=(*(Rule.parse(text) for text in args.rule), *recipe.rules))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def _spec(args: argparse.Namespace) -> QuantSpec:
    from llmq.grid.spec import PER_ROW, QuantSpec

    bits = args.bits or "4"
    group_size = PER_ROW if bits == "8" else 128
    if args.group_size is not None:
        group_size = args.group_size
    return QuantSpec(_code(bits), group_size, not args.asymmetric)


def _code(bits: str) -> str:
    return bits if bits == "ternary" else f"int{bits}"


def _activations(args: argparse.Namespace, recipe: Recipe) -> Any:
    from dataclasses import replace

    options = {"kind": args.activations, "kv_bits": args.kv_bits}
    return replace(recipe.activations, **_given(options))


def _recipe_of_file(args: argparse.Namespace, defaults: Recipe) -> Recipe:
    """The recipe of a file: what it leaves out from the defaults, and in the specs of its rules
    what the options give; layers that it keeps stay kept."""
    from dataclasses import replace

    from llmq.errors import LlmqError
    from llmq.recipe import Recipe
    from llmq.recipes.files import read_recipe_file

    data = read_recipe_file(args.recipe).for_quantize()
    try:
        sizes = {"samples": defaults.samples, "sequence_length": defaults.sequence_length}
        recipe = Recipe.from_json({**sizes, **data})
        if "rules" not in data:
            return replace(recipe, rules=defaults.rules)
        return replace(recipe, rules=tuple(_with_options(rule, args) for rule in recipe.rules))
    except LlmqError as error:
        raise LlmqError(f"--recipe {args.recipe}, with the options beside it: {error}") from None


def _with_options(rule: Rule, args: argparse.Namespace) -> Rule:
    from dataclasses import replace

    if rule.spec is None:
        return rule
    given = {
        "code": _code(args.bits) if args.bits else None,
        "group_size": args.group_size,
        "symmetric": False if args.asymmetric else None,
    }
    return replace(rule, spec=replace(rule.spec, **_given(given)))


def prepare_job(args: argparse.Namespace, *, check_scales: bool = True) -> Job:
    """The checked job of the options. check_scales: see `llmq.ptq.run.prepare`. Raises `LlmqError`
    also when the planned memory is above `--max-ram` or `--max-gpu-memory`."""
    from llmq.errors import LlmqError
    from llmq.models.source import Source
    from llmq.ptq.budget import peak_bytes
    from llmq.ptq.job import prepare

    source = Source.open(args.model, args.revision)
    recipe = read_recipe(args, source.config)
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
