"""What the parts of a run are computed in.

What the quantized model computes is always float32. Three parts are not its results and may be
faster where the model is stored in bfloat16 and the processor multiplies that natively:

    stream     what the full-precision model computes beside it, where only means of it are used;
    training   the forward and backward passes of block-wise tuning and of that of all scales, on
               float32 masters; what decides whether a result is kept is measured in float32;
    gradients  the passes of the full-precision model that tell what tokens count.

The report names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig

from llmq.ptq.methods import method_of
from llmq.recipe import Recipe


@dataclass(frozen=True)
class Precision:
    """stream: dtype of the full-precision stream. training: of the passes of training. gradients:
    of those that tell what tokens count. See the module's text."""

    stream: torch.dtype = torch.float32
    training: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: Recipe, device: str) -> Precision:
        """What a model with this config is best computed in on a device; `recipe.autocast` decides
        about training where it is given."""
        is_native = (
            config.dtype or config.get_text_config().dtype
        ) == torch.bfloat16 and multiplies_bfloat16(device)
        needs = method_of(recipe).needs(recipe)
        needs_means_only = needs.both_streams and not needs.tuning
        trains_in_bfloat16 = (needs.tuning or recipe.scale_steps > 0) and (
            is_native if recipe.autocast is None else recipe.autocast
        )
        return cls(
            torch.bfloat16 if is_native and needs_means_only else torch.float32,
            torch.bfloat16 if trains_in_bfloat16 else torch.float32,
            torch.bfloat16 if is_native and recipe.token_weights != "equal" else torch.float32,
        )


def computing_in(dtype: torch.dtype, device: torch.device | str) -> torch.autocast:
    """Products in bfloat16 where that is the dtype, on float32 masters."""
    is_half = dtype == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half)


def usual_precision(device: str) -> Literal["bf16", "fp32"]:
    """What to train in where nobody says it: bfloat16 if a device has instructions for it, else
    float32, which is many times faster there."""
    return "bf16" if multiplies_bfloat16(device) else "fp32"


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16 numbers; without them they are
    slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
