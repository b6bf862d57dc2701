"""What a fine-tuning run goes by: the settings of a recipe file's section `qat`, then the options,
then the defaults."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from llmq.errors import LlmqError
from llmq.fields import check_keys
from llmq.grid.spec import QuantSpec
from llmq.models.arch import check_length, usual_length
from llmq.qat.job import GENERATED
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings, Scheme
from llmq.recipe import Rule, rules_of
from llmq.recipes.files import QAT, read_recipe_file

# Options that are named as the setting that they give.
_FIELDS = (
    "quantizer",
    "init",
    "kv_before_rope",
    "max_tokens",
    "max_steps",
    "sequence_length",
    "batch_size",
    "accumulation",
    "lr_weights",
    "lr_scales",
    "lora_rank",
    "optimizer",
    "precision",
    "gradient_checkpointing",
    "shard",
    "max_grad_norm",
    "seed",
    "log_every",
    "save_every",
    "eval_every",
    "n_held_out",
)


def read_settings(
    args: argparse.Namespace, config: PretrainedConfig
) -> tuple[QATSettings, tuple[Rule, ...]]:
    """The settings, and the rules for layers that are treated otherwise. config: of the
    model, which has positions for so many tokens."""
    rules = tuple(Rule.parse(text) for text in args.rule)
    if not args.recipe:
        return _settings(args, {}, config), rules
    section = read_recipe_file(args.recipe).for_qat()
    try:
        own = {key: value for key, value in section.items() if key != "rules"}
        _check_section(own)
        rules = (*rules, *rules_of(section.get("rules", [])))
    except LlmqError as error:
        raise LlmqError(f"--recipe {args.recipe}: {error}") from None
    try:
        return _settings(args, own, config), rules
    except LlmqError as error:
        raise LlmqError(f"--recipe {args.recipe}, with the options beside it: {error}") from None


def _check_section(section: dict[str, Any]) -> None:
    """Raise `LlmqError` for keys that do not exist and values of other types, by their path."""
    check_keys(section, QATSettings, QAT)
    if "loss" in section:
        check_keys(section["loss"], LossWeights, f"{QAT}.loss")
    if "phases" in section:
        check_keys(section["phases"], Phases, f"{QAT}.phases")


def _settings(
    args: argparse.Namespace, section: dict[str, Any], config: PretrainedConfig
) -> QATSettings:
    given = {name: getattr(args, name) for name in _FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if "max_tokens" in given:
        given["max_tokens"] = int(given["max_tokens"])
    values = {"sequence_length": usual_length(config), **section}
    if "max_tokens" in given or "max_steps" in given:  # the length of the run is one setting
        values |= {"max_tokens": None, "max_steps": None}
    values |= given
    length = values["sequence_length"]
    check_length(config, length, f"--sequence-length {length}")
    scheme = _scheme(args, section.get("scheme", "w4"), values.get("quantizer", "lsq"))
    values["scheme"] = scheme
    values["loss"] = _loss(args, section.get("loss", {}))
    values["phases"] = _phases(section.get("phases", {}), scheme)
    return QATSettings(**values)


def _scheme(args: argparse.Namespace, stored: Any, quantizer: str) -> Scheme:
    scheme = _scheme_of(stored) if args.scheme is None else Scheme.parse(args.scheme)
    grid = scheme.weights
    if args.group_size is not None:
        grid = replace(grid, group_size=args.group_size)
    if args.asymmetric:
        grid = replace(grid, symmetric=False)
    if quantizer == "seq" and grid.code == "int2":
        if args.asymmetric:
            raise LlmqError(
                "--asymmetric: the levels of --quantizer seq lie at half-integers around zero and "
                "have no zero point; leave it out, or use --quantizer lsq"
            )
        grid = replace(grid, code="int2h", symmetric=True)
    if args.activations and scheme.activations == "none":
        raise LlmqError(
            f"--activations {args.activations}: the scheme {args.scheme or stored} does not "
            f"quantize activations; write {args.scheme or 'w4'}a8"
        )
    return replace(scheme, weights=grid, activations=args.activations or scheme.activations)


def _scheme_of(stored: Any) -> Scheme:
    """The scheme of a recipe file: its short form, or an object whose weights may have a short form
    of their own."""
    if isinstance(stored, str):
        return Scheme.parse(stored)
    check_keys(stored, Scheme, f"{QAT}.scheme")
    if "weights" not in stored:
        raise LlmqError(f"{QAT}.scheme: weights are missing, such as 'weights: w4g128'")
    weights = stored["weights"]
    spec = QuantSpec.parse(weights) if isinstance(weights, str) else QuantSpec.from_json(weights)
    return Scheme(**{**stored, "weights": spec})


def _loss(args: argparse.Namespace, stored: dict[str, Any]) -> LossWeights:
    kl = stored.get("kl", 1.0) if args.kl is None else args.kl
    ce = stored.get("ce") if args.ce is None else args.ce
    if ce is None and args.train == GENERATED:
        ce = 0.0
    if ce is None:
        ce = 0.1 if kl else 1.0
    return LossWeights(kl, ce)


def _phases(stored: dict[str, Any], scheme: Scheme) -> Phases:
    """Static ranges are only observed at first."""
    is_static = scheme.activations == "int8-static"
    return Phases(**{"activations": 0.1 if is_static else 0.0, **stored})
