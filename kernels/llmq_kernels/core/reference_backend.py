"""The backend `reference`: the specification for a whole product. It takes everything, changes no
layout, and is what every other backend is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.core import reference
from llmq_kernels.core.backend import Backend, State, no_obstacle
from llmq_kernels.core.capability import EVERYTHING
from llmq_kernels.core.weight import PackedWeight


def fake_quantized(x: Tensor, weight: PackedWeight) -> Tensor:
    """x as a product with this weight sees it: itself, or rounded as its `activations` say."""
    match weight.activations:
        case "int8-token":
            return reference.fake_quantize_tokens(x)
        case "int8-static":
            assert weight.input_range is not None
            return reference.fake_quantize_static(x, weight.input_range)
        case "int8-group":
            whole = weight.scale.shape[1] == 1
            columns = weight.shape[1] if whole else weight.group_size
            group = reference.activation_group(weight.code.bits, columns)
            return reference.fake_quantize_groups(x, group)
        case "int8-token-asym":
            return reference.fake_quantize_token_ranges(x)
    return x


def linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` in x's dtype, by the specification."""
    seen = fake_quantized(x, weight)
    return reference.matmul(seen, weight.dequantize()).to(x.dtype)


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """Nothing: it reads the canonical words."""
    return {}


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words, which stayed."""
    return weight.packed


BACKEND = Backend("reference", (EVERYTHING,), no_obstacle, prepare, linear, restore)
