"""What the commands that quantize and the one that plans share: the recipe and the checked job of
the options, and how fast this machine is."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from llmq.commands import rendering
from llmq.commands.machine import timed_device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmq.grid.spec import QuantSpec
    from llmq.models.source import Source
    from llmq.ptq.choice import Budget
    from llmq.ptq.job import Job
    from llmq.ptq.mixed import Costs
    from llmq.ptq.mixed_run import MixedJob
    from llmq.recipe import Recipe, Rule
    from llmq.text.documents import TokenSet

# Options that are named as the field of the recipe that they set.
_FIELDS = (
    "method",
    "init",
    "damping",
    "inputs",
    "token_weights",
    "calibration",
    "samples",
    "sequence_length",
    "seed",
    "iterations",
    "learning_rate",
    "scale_steps",
    "autocast",
    "all_experts",
)


def read_recipe(args: argparse.Namespace, config: PretrainedConfig) -> Recipe:
    """The recipe of the options, for the model of a config, which decides how much text is read
    where nobody says it."""
    from dataclasses import replace

    from llmq.ptq.sizing import windows_for
    from llmq.recipe import OUTSIDE, Recipe, Rule, outside_spec

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
    for name in OUTSIDE:
        options[name] = outside_spec(getattr(args, name), f"--{name}")
    recipe = recipe.changed(**_given(options), activations=_activations(args, recipe))
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


def prepare_job(
    args: argparse.Namespace, *, is_plan: bool = False, for_budget: bool = False
) -> Job:
    """The checked job of the options. is_plan: nothing will be run, so a config will do for a
    model, scales are not looked for in the weights, and what is more than `--max-ram` is no error.
    for_budget: see `prepare`. Raises `LlmqError` otherwise when the planned memory is above
    `--max-ram`, and in any case when it is above `--max-gpu-memory`."""
    from llmq.errors import LlmqError
    from llmq.models.config_only import open_to_plan
    from llmq.models.source import Source
    from llmq.ptq.job import prepare
    from llmq.ptq.methods import needs_text
    from llmq.ptq.sizing import default_text
    from llmq.text.documents import SELF

    opened = open_to_plan if is_plan else Source.open
    source = opened(args.model, args.revision)
    recipe = read_recipe(args, source.config)
    with ExitStack() as stack:
        told: dict[str, Any] = {}
        is_written = (recipe.calibration or default_text(source)) == SELF
        if is_written and needs_text(recipe) and not is_plan:
            told = {"on_text": stack.enter_context(rendering.progress("text of the model's own"))}
        job = prepare(
            source,
            recipe,
            calibration=_tokens_to_plan(source, recipe),
            format=args.format,
            strict=args.strict,
            check_scales=not is_plan,
            for_budget=for_budget,
            device=args.device,
            held_out=not args.no_held_out,
            allow_requantize=args.allow_requantize,
            **told,
        )
    if args.max_gpu_memory is not None and args.device == "cpu":
        raise LlmqError(
            f"--max-gpu-memory {args.max_gpu_memory}: the run is on the CPU; add --device cuda or "
            "use --max-ram"
        )
    # Whatever is computed with lies on the device, so the plan is the same for both; beside a GPU
    # the RAM holds a stored block and a batch of activations at most.
    _check_memory(job, "--max-gpu-memory", args.max_gpu_memory)
    if not is_plan:
        _check_memory(job, "--max-ram", args.max_ram)
    return job


def budget_of(args: argparse.Namespace) -> Budget | None:
    """What `--bpw` or `--max-bytes` allow. Raises `LlmqError` for options that say it twice."""
    from llmq.errors import LlmqError
    from llmq.ptq.choice import Budget

    if args.bpw is None and args.max_bytes is None:
        return None
    given = {"--bpw": args.bpw, "--max-bytes": args.max_bytes, "--bits": args.bits}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise LlmqError(f"{' and '.join(names)}: each says how many bits there are; give one")
    return Budget(args.bpw, args.max_bytes)


def mixed_job(args: argparse.Namespace, job: Job, budget: Budget, costs: Costs) -> MixedJob:
    """The jobs of a budget, with the options of the one that was asked for."""
    from llmq.ptq.mixed_run import choose

    return choose(job, costs, budget, format=args.format, strict=args.strict)


def _tokens_to_plan(source: Source, recipe: Recipe) -> TokenSet | None:
    """Beside a config alone there may be no tokenizer, and the size of the calibration text is
    enough. None where the text is read."""
    from llmq.models.arch import check_length
    from llmq.models.config_only import ConfigOnly
    from llmq.ptq.sizing import default_text
    from llmq.text.documents import TokenSet

    if not isinstance(source, ConfigOnly):
        return None
    length = recipe.sequence_length
    check_length(source.config, length, f"--sequence-length {length}")
    return TokenSet.unread(recipe.calibration or default_text(source), recipe.samples, length)


def max_ram(args: argparse.Namespace) -> int | None:
    """Bytes of `--max-ram`."""
    return None if args.max_ram is None else int(args.max_ram * 1e9)


def _check_memory(job: Job, option: str, limit: float | None) -> None:
    """Raise `LlmqError` for a job that needs more than an option allows, in GB, and name a method
    that does not."""
    from llmq.errors import LlmqError
    from llmq.ptq.alternatives import lighter_methods
    from llmq.ptq.budget import peak_bytes

    if limit is None or (peak := peak_bytes(job)) <= limit * 1e9:
        return
    remedy = "raise it"
    for name, n_bytes in lighter_methods(job, limit * 1e9).items():
        remedy = f"raise it, or use --method {name}, which takes {n_bytes / 1e9:.2f} GB"
        break
    raise LlmqError(
        f"{option} {limit}: the run is planned to need {peak / 1e9:.2f} GB above the libraries; "
        f"{remedy}"
    )


def planned_rate(args: argparse.Namespace, precision: str = "fp32") -> dict[str, Any]:
    """What a plan's time goes by. device: where a product was timed, or "--tflops".
    flops_per_second: half of its rate."""
    if args.tflops is not None:
        return {"flops_per_second": args.tflops * 1e12 / 2, "device": "--tflops"}
    device = timed_device(args.device)
    return {"flops_per_second": measured_rate(device, precision), "device": device}


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
