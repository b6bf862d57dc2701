"""A small model in a folder of any format, whatever that holds."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import make_model
from torch import nn

import llmq
from llmq.activations.nodes import fake_quantize_per_token
from llmq.formats.base import Format
from llmq.formats.registry import format_named
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.module import quantized_modules

_SPECS = tuple(map(QuantSpec.parse, ("w4g32-asym", "w4g32", "w8", "ternary-tensor")))
_SHAPES = ((64, 64), (32, 64), (128, 64), (64, 128))  # of the layers of `make_model`


def spec_for(fmt: Format) -> QuantSpec:
    """The first of some specs that a format holds."""
    return next(spec for spec in _SPECS if not any(fmt.refusal(spec, shape) for shape in _SHAPES))


def quantized_folder(
    folder: Path, name: str, *, dtype: torch.dtype = torch.bfloat16, **options: object
) -> Path:
    """Save a small model, rounded to nearest, in the format of a name. options: of
    `make_model`."""
    fmt = format_named(name)
    recipe = llmq.Recipe.uniform(
        str(spec_for(fmt)), method="rtn", activations=fmt.activations or ActSpec()
    )
    model = make_model(dtype=dtype, **options)
    llmq.quantize(model, recipe)
    return llmq.save(model, folder, format=name)


@torch.no_grad()
def dequantized(model: nn.Module) -> nn.Module:
    """The model with a plain linear layer of the same values in place of each quantized one, which
    rounds its input where that one does."""
    for name, module in quantized_modules(model).items():
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        plain.to(module.weight.dtype).requires_grad_(False)
        plain.weight.copy_(module.weight)
        if module.bias is not None:
            plain.bias.copy_(module.bias)
        if module.activations.kind == "int8-token":
            plain.register_forward_pre_hook(_round_tokens)
        model.set_submodule(name, plain)
    return model


def _round_tokens(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    return fake_quantize_per_token(args[0])
